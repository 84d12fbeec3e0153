#!/usr/bin/env bash
# Make .venv with everything llmtrain needs; over in a moment when that is done already.
#
#   bash launch/setup.sh      set up
#   source launch/setup.sh    set up and enter the environment
#
#   PYTHON=python3.12         the interpreter to build from (3.11 or newer)
#   LLMTRAIN_VENV=DIR         the environment's place, instead of .venv
#   LLMTRAIN_TORCH="..."      what pip installs as torch, options included, instead of this script's choice,
#                             such as "torch>=2.11 --index-url https://download.pytorch.org/whl/cu126"
#   LLMTRAIN_EXTRAS=s3,fast   extras of pyproject.toml to install, instead of dev
#   LLMTRAIN_SKIP_SETUP=1     install nothing, use the Python environment that is active

if [[ ${BASH_SOURCE[0]} != "$0" ]]; then
    [[ -z ${LLMTRAIN_SKIP_SETUP:-} ]] || return 0
    bash "${BASH_SOURCE[0]}" || return
    source "${LLMTRAIN_VENV:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv}/bin/activate"
    return
fi

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${LLMTRAIN_VENV:-$root/.venv}
stamp=$venv/llmtrain-setup
log=$root/.cache/setup.log
extras=${LLMTRAIN_EXTRAS-dev}
torch_floor="torch>=2.11"

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

has_gpu() { [[ $(timeout 20 nvidia-smi -L 2>/dev/null || true) =~ GPU\ [0-9]+: ]]; }

# What the installation depends on: the project's own needs, extras asked for, its place, the interpreter.
fingerprint() {
    local interpreter
    interpreter=$(grep -m1 '^version' "$venv/pyvenv.cfg")
    printf '%s %s %s %s\n' "$(cksum <"$root/pyproject.toml")" "$extras" "$root" "$interpreter"
}

# The stamp's lines: fingerprint, torch's version, the LLMTRAIN_TORCH that asked for it or "auto".
# A CPU torch is done on a machine without a GPU only; a CUDA torch serves both (a shared home has both).
is_done() {
    [[ -x $venv/bin/python && -f $venv/pyvenv.cfg && -f $stamp ]] || return 1
    local made_for torch asked
    { read -r made_for && read -r torch && read -r asked; } <"$stamp" || return 1
    [[ $made_for == "$(fingerprint)" ]] || return 1
    [[ ${LLMTRAIN_TORCH:-$asked} == "$asked" ]] || return 1
    [[ $torch != *+cpu || $asked != auto ]] || ! has_gpu
}

# A Python that can make an environment: Debian has one without ensurepip.
suits() { "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        suits "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or newer with the venv module"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.14; do
        [[ $(command -v "$candidate") != "$venv"/* ]] || continue # never build an environment from itself
        if suits "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer with the venv module found (python3 is $(python3 -V 2>&1 || true));" \
        "install one (Debian, Ubuntu: apt-get install python3-venv) or name it: PYTHON=/path/to/python3.12"
}

make_venv() {
    if "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >>"$log" 2>&1 ||
            fail "$venv has no pip and cannot get one: remove it and start again"
        return
    fi
    local base
    base=$(find_python)
    say "making $venv with $("$base" -V)"
    "$base" -m venv --clear "$venv" >>"$log" 2>&1 || fail "$base -m venv $venv failed; see $log"
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# What pip is at, in its own words without the long list of names.
doing() {
    grep -aE '^ *(Collecting|Downloading|Processing|Obtaining|Preparing|Building|Installing)' "$log" |
        tail -n 1 | sed 's/^ *//; s/packages:.*/packages/' | cut -c 1-90 || true
}

# pip install with signs of life: its own progress on a terminal, else a line every ten seconds.
# --no-compile: Python compiles what is imported, a tenth of it, at the first import.
try_install() {
    set -- --no-compile "$@"
    if [[ -t 1 ]]; then
        pip install --log "$log" "$@"
        return
    fi
    local pid last=$SECONDS
    set -m # a process group of its own, to end it together with the builds that it starts
    pip install "$@" >>"$log" 2>&1 &
    pid=$!
    set +m
    trap 'kill -- "-$pid" 2>/dev/null || true' EXIT
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.5
        if ((SECONDS - last >= 10)); then
            last=$SECONDS
            say "  $SECONDS s: $(doing)"
        fi
    done
    trap - EXIT
    wait "$pid"
}

install() {
    local what=$1
    shift
    say "installing $what"
    try_install "$@" && return
    [[ -t 1 ]] || tail -n 15 "$log" >&2
    fail "pip could not install $what: see the lines above and $log"
}

installed_torch() {
    "$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true
}

# The newest CPU build that pip's own configuration offers (a company's mirror, a folder of wheels).
offered_cpu_torch() {
    pip index versions torch 2>/dev/null | grep -o '[0-9.]*+cpu' | sort -rVu |
        awk -F. '$1 > 2 || ($1 == 2 && $2 >= 11) { print; exit }' || true
}

install_cpu_torch() {
    local version
    version=$(offered_cpu_torch)
    if [[ -n $version ]]; then
        install "PyTorch $version" "torch==$version"
    elif [[ $(uname -s) == Darwin ]]; then
        install "PyTorch" "$torch_floor"
    else
        say "installing PyTorch for the CPU"
        try_install --index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15 "$torch_floor" && return
        say "download.pytorch.org cannot be reached: taking the default PyTorch with its CUDA libraries (3 GB)"
        install "PyTorch" "$torch_floor"
    fi
}

# $1: the LLMTRAIN_TORCH of which the torch is that is there.
install_torch() {
    local have
    have=$(installed_torch)
    if [[ -n ${LLMTRAIN_TORCH:-} ]]; then
        # pip leaves any torch that "torch>=2.11" describes, be it for no GPU or for a newer driver.
        [[ -z $have || $1 == "$LLMTRAIN_TORCH" ]] || pip uninstall -y torch >>"$log" 2>&1
        # shellcheck disable=SC2086  # several words: a requirement and pip's options
        install "$LLMTRAIN_TORCH" $LLMTRAIN_TORCH
    elif has_gpu; then
        # pip takes 2.15.0+cpu for newer than 2.15.0
        [[ $have != *+cpu ]] || pip uninstall -y torch >>"$log" 2>&1
        install "PyTorch with CUDA (3 GB)" "$torch_floor"
    elif [[ -z $have ]]; then
        install_cpu_torch
    fi
}

# A wheel for a newer driver than this machine's imports well and sees no GPU: say so now, not after a slow run.
check_torch() {
    local answer
    answer=$("$venv/bin/python" -c 'import torch; print(torch.__version__, torch.cuda.is_available())' 2>>"$log") ||
        { tail -n 5 "$log" >&2; fail "the installed PyTorch cannot be imported: see the lines above and $log"; }
    say "PyTorch ${answer% *}"
    if [[ $answer == *False ]] && has_gpu; then
        say "WARNING: this PyTorch sees no GPU although nvidia-smi does; the driver may be older than its CUDA. Try" \
            "LLMTRAIN_TORCH=\"$torch_floor --index-url https://download.pytorch.org/whl/cu126\" bash launch/setup.sh"
    fi
}

set_up() {
    local asked
    say "installing llmtrain and what it needs, about a minute on a fast network; details in $log"
    : >"$log"
    make_venv
    asked=$(sed -n 3p "$stamp" 2>/dev/null || true)
    rm -f "$stamp"
    install_torch "$asked"
    [[ -n $(installed_torch) ]] || fail "pip installed no torch: see $log"
    # llmtrain's other needs must not exchange the torch that was just chosen.
    printf 'torch==%s\n' "$(installed_torch)" >"$venv/constraints.txt"
    install "llmtrain and its libraries" -c "$venv/constraints.txt" -e "${root}[$extras]"
    check_torch
    printf '%s\n%s\n%s\n' "$(fingerprint)" "$(installed_torch)" "${LLMTRAIN_TORCH:-auto}" >"$stamp.new"
    mv "$stamp.new" "$stamp"
    say "done in $SECONDS s"
}

[[ -z ${LLMTRAIN_SKIP_SETUP:-} ]] || exit 0
! is_done || exit 0
mkdir -p "$root/.cache"
if command -v flock >/dev/null; then
    exec 9>"$root/.cache/setup.lock"
    flock -n 9 || { say "another setup is running here: waiting for it"; flock 9; }
    ! is_done || exit 0
fi
set_up
