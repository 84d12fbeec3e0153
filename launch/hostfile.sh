#!/usr/bin/env bash
# Train on the hosts of a file, one `<host> slots=<ranks>` a line, over ssh and pdsh. Started on any machine that
# reaches all of them without a password; the project, its environment and this directory have the same path there.
#
#   bash launch/hostfile.sh hosts.txt experiment=quickstart name=two-nodes
#
#   MASTER_ADDR=10.0.0.1      where rank 0 listens, instead of the address by which ssh reaches the first host
#   MASTER_PORT=29501         this port, instead of one that is free there
#   LLMTRAIN_EXPORT="A B"     variables to export beside those that launch/hostfile.py names; KEY=VALUE lines in
#                             ./.deepspeed_env and ~/.deepspeed_env are exported, too
#   PDSH_SSH_ARGS_APPEND=...  options for ssh
#   and those of launch/setup.sh
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launch/usage.sh" "$@"
[[ -f ${1-} ]] ||
    { echo "hostfile: ${1:+$1: no such file; }the first word is the file of hosts: bash $0 hosts.txt [overrides]" >&2; exit 78; }
source "$launch/setup.sh"
LLMTRAIN_JOB=$(printf '%q ' bash "$launch/hostfile.sh" "$1")
export LLMTRAIN_JOB
source "$launch/questions.sh" "${@:2}"
unset LLMTRAIN_JOB
exec python "$launch/hostfile.py" "$@"
