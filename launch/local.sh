#!/usr/bin/env bash
# Train on this machine: on every visible GPU that the batch divides over, or in one CPU process.
#
#   bash launch/local.sh experiment=quickstart max_steps=50
#
#   CUDA_VISIBLE_DEVICES=0,1  only these GPUs
#   LLMTRAIN_RANKS=2          this many processes (two on a CPU, say)
#   MASTER_PORT=29501         this port, instead of a free one
#   and those of launch/setup.sh
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launch/usage.sh" "$@"
source "$launch/setup.sh"

fail() { printf 'local: %s\n' "$*" >&2; exit 78; }

LLMTRAIN_JOB=$(printf '%q ' bash "$launch/local.sh")
export LLMTRAIN_JOB
source "$launch/questions.sh" "$@"
unset LLMTRAIN_JOB

ranks=${LLMTRAIN_RANKS:-$(python -m llmtrain.ranks "$@")}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || fail "LLMTRAIN_RANKS=$ranks is not a number of processes"

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# --hostfile: a cluster's /job/hostfile would make this a job on many nodes.
# --log_level: the launcher tells its work in INFO lines; what a rank has to say comes from the rank.
job=(deepspeed --hostfile /dev/null --log_level critical --master_port "${MASTER_PORT:-$(free_port)}")
visible=${CUDA_VISIBLE_DEVICES-all}
if [[ ! $(timeout 20 nvidia-smi -L 2>/dev/null || true) =~ GPU\ [0-9]+: ]]; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} # else every process warns that it found no GPU
    job+=(--num_gpus "$ranks" --module)
elif [[ $visible == all ]]; then
    job+=(--num_gpus "$ranks" --module)
elif [[ $visible =~ ^[0-9]+(,[0-9]+)*$ ]]; then
    commas=${visible//[0-9]/}
    ((ranks <= ${#commas} + 1)) || fail "LLMTRAIN_RANKS=$ranks, but CUDA_VISIBLE_DEVICES=$visible"
    # --num_gpus would take the GPUs from 0 on, whatever the variable says.
    unset CUDA_VISIBLE_DEVICES
    job+=(--include "localhost:$(cut -d, -f "1-$ranks" <<<"$visible")" --module)
elif ((ranks == 1)); then
    job=(python -m) # no GPU ('' or -1), or one by its UUID: the launcher knows numbers only
else
    fail "CUDA_VISIBLE_DEVICES=$visible: DeepSpeed's launcher needs GPU numbers for $ranks ranks, such as 0,1"
fi

exec python "$launch/supervise.py" "${job[@]}" llmtrain.train "$@"
