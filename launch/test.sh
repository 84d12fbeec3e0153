#!/usr/bin/env bash
# Set up and run the tests: all of them in a process a core, four at most, or what the arguments tell pytest.
#
#   bash launch/test.sh
#   bash launch/test.sh tests/data -x
#   bash launch/test.sh -m slow        the long ones, which are left out otherwise
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launch/setup.sh"
cd "$launch/.."

# DeepSpeed's shared-memory buffers outlive a killed rank and count as RAM: remove those that nobody maps.
sweep_shared_memory() {
    local buffer
    for buffer in /dev/shm/deepspeed_allreduce_buffer_"$(id -u)"_*; do
        [[ -e $buffer ]] || continue
        grep -qsF "$buffer" /proc/[0-9]*/maps || rm -f "$buffer"
    done
}
trap sweep_shared_memory EXIT

# Most tests run several small ranks at once: one thread each is fastest, and the same everywhere.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
(($#)) || set -- -n logical --maxprocesses 4 --dist loadfile
python -m pytest -ra "$@"
