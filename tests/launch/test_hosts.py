"""launch/hostfile.sh on two hosts with real sshd and pdsh: a job on both is one job."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from tests.launch.conftest import LAUNCH, TRAIN, wait_for
from tests.launch.endings import clean_environment, lost_steps
from tests.launch.hosts import Hosts, killed, missing
from tests.soak.lives import curve

BOTH = ["a slots=1", "b slots=1  # a comment"]
IPV6 = ["fd77::1 slots=1", "root@[fd77::2] slots=1"]
CANARY = "canary-6f1d0b"
pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    if reason := missing():
        pytest.skip(reason)
    made = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        made.open()
        yield made
    finally:
        made.close()


@pytest.fixture
def start(hosts, tmp_path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start hostfile.sh on host a; whatever is left ends with the test, on both hosts."""
    started: list[subprocess.Popen[str]] = []
    environment = clean_environment("wrapper", tmp_path) | {"LLMTRAIN_SKIP_SETUP": "1"}

    def run(*words: str, lines: list[str] = BOTH, **variables: str) -> subprocess.Popen[str]:
        started.append(hosts.start(lines, words, environment | variables))
        return started[-1]

    yield run
    hosts.mend()
    for process in started:
        killed(process)
    for name in "ab":
        for process in hosts.processes(name, "llmtrain"):
            process.kill()


def everybody_reads(word: str) -> bool:
    """Whether the word is in a command line of any process."""
    lines = []
    for process in psutil.process_iter():
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return any(word in line for line in lines)


@pytest.mark.parametrize("lines", [BOTH, pytest.param(IPV6, marks=pytest.mark.slow)], ids=["names", "IPv6"])
def test_two_hosts_train_what_one_does(hosts, start, ranks, tiny, tmp_path, lines):
    """Every word arrives as it was written; the environment too, and in no list of processes."""
    plain = [*tiny, "deepspeed=zero2", "max_steps=6", f"output_dir={tmp_path}/one host"]
    ranks.run(plain, 2, tmp_path)
    prose = next(word.partition("=")[2] for word in tiny if word.startswith("+data.sources.prose.path"))
    words = [
        *(word for word in tiny if not word.startswith("+data.sources.prose")),
        *(f'+data.sources.prose={{path: "{prose}", weight: 0.3}}', "deepspeed=zero2", "max_steps=6"),
        *(f"output_dir={tmp_path}/two hosts", "name='${seq_len} \"quoted\" it\\'s $HOME `id` \\ ;&'"),
    ]
    job = start(*words, lines=lines, SECRET=CANARY, LLMTRAIN_EXPORT="SECRET")
    seen, folders = set(), set()
    while job.poll() is None:
        assert not everybody_reads(CANARY)
        for process in hosts.processes("b", "llmtrain"):
            with suppress(psutil.Error):
                seen.add((process.environ().get("SECRET"), process.environ().get("RANK")))
                folders.update(word for word in process.cmdline() if word.startswith("/tmp/llmtrain-"))
        time.sleep(0.5)
    output = job.communicate()[0]
    assert job.returncode == 0, output
    assert (CANARY, "1") in seen
    assert curve(tmp_path / "two hosts") == curve(tmp_path / "one host")
    config = yaml.safe_load((tmp_path / "two hosts" / "config.yaml").read_text())
    assert config["name"] == '64 "quoted" it\'s $HOME `id` \\ ;&'
    assert folders and not any(Path(folder).exists() for folder in folders)


def test_what_is_wrong_is_a_line_a_host_and_nothing_starts(hosts, start, tmp_path):
    changed = tmp_path / "conf"
    subprocess.run(["cp", "-r", LAUNCH.parent / "conf", changed], check=True)
    with (changed / "config.yaml").open("a") as file:
        file.write("# another version\n")
    gpus = hosts.folder / "b-bin" / "nvidia-smi"
    gpus.write_text('#!/bin/sh\necho "GPU 0: NVIDIA H200 (UUID: GPU-1)"\n')
    gpus.chmod(0o755)
    hosts.instead("b", LAUNCH.parent / "conf", changed)
    try:
        job = start("name=x", lines=["a slots=1", "b slots=3", "gone slots=1"])
        output = job.communicate(timeout=120)[0].splitlines()
    finally:
        gpus.unlink()
        hosts.end("b")
        hosts.listen("b")
    assert job.returncode == 78
    assert [line.split(":")[1] for line in output] == [" gone", " a", " b"], output
    assert "cannot be reached by `ssh gone` without a password: ssh: connect to host 10.77.0.9" in output[0]
    assert output[1].endswith("slots=1, but nvidia-smi lists 0 GPU(s)")
    assert "other code than here in conf/config.yaml; slots=3, but nvidia-smi lists 1 GPU(s)" in output[2]


def test_a_mistake_in_the_config_is_told_before_anything_starts(start):
    job = start("max_stepss=3")
    output = job.communicate(timeout=120)[0]
    assert job.returncode == 78
    assert output.startswith("error: max_stepss=3: no such key")
    assert output.count("\n") == 1


REWINDS = """
import json, os, sys
from pathlib import Path

folder, rank = Path(os.environ["STAND_IN"]), os.environ["RANK"]
if not (folder / f"began-{rank}").exists():
    (folder / f"began-{rank}").touch()
    sys.exit(89)
(folder / "DONE").touch()
told = {"run": str(folder), "grace_seconds": 1, "done": True}
Path(os.environ["LLMTRAIN_SUPERVISOR"]).write_text(json.dumps(told))
"""


def test_a_run_that_rewinds_is_started_again_on_both_hosts(start, stand_in):
    """Which takes no more than a `llmtrain.train` that ends with 89 and then is done, on each host.

    The hosts are written as IPv6 addresses.
    """
    (stand_in / "llmtrain" / "train.py").write_text(REWINDS)
    job = start(lines=IPV6, PYTHONPATH=str(stand_in), STAND_IN=str(stand_in), LLMTRAIN_EXPORT="STAND_IN")
    output = job.communicate(timeout=240)[0]
    assert job.returncode == 0, output
    assert "2 hosts, 2 ranks, rank 0 on fd77::1 at [fd77::1]:" in output
    assert output.count("the run goes back before a spike: starting it again") == 2
    assert {path.name for path in stand_in.glob("began-*")} == {"began-0", "began-1"}


LONG = ["deepspeed=zero2", "max_steps=100000", "checkpoint.every=100000"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGUSR1, 85),
        (signal.SIGINT, 130),
        (signal.SIGKILL, -9),
    ],
)
def test_a_signal_to_the_head_stops_both_hosts(hosts, start, tiny, tmp_path, number, code):
    """Also SIGKILL, which nobody hears of but through ssh; no step is lost."""
    job = start(*tiny, *LONG)
    wait_for(tmp_path / "run" / "metrics.jsonl", seconds=240)
    job.send_signal(number)
    if number == signal.SIGKILL:
        job.wait(timeout=60)  # its output is open as long as pdsh lives
    else:
        job.communicate(timeout=240)
    assert job.returncode == code
    assert hosts.nobody_left(60), hosts.left()
    assert lost_steps(tmp_path / "run") == 0


@pytest.mark.slow
def test_a_lost_connection_stops_both_hosts(hosts, start, tiny, tmp_path):
    """One host's ssh dies: its node saves and leaves, and so the others do."""
    job = start(*tiny, *LONG)
    wait_for(tmp_path / "run" / "metrics.jsonl", seconds=240)
    (ssh,) = [
        each for each in hosts.processes("a", "node.py") if each.name() == "ssh" and "b" in each.cmdline()
    ]
    ssh.kill()
    output = job.communicate(timeout=240)[0]
    assert job.returncode == 85, output
    assert hosts.nobody_left(60), hosts.left()
    assert lost_steps(tmp_path / "run") == 0


@pytest.mark.slow
def test_a_second_ctrl_c_kills_the_ranks_of_both_hosts(hosts, start, stand_in):
    (stand_in / "llmtrain" / "train.py").write_text(TRAIN)
    names = {"PYTHONPATH": str(stand_in), "STAND_IN": str(stand_in), "MODE": "stubborn"}
    job = start(**names, LLMTRAIN_EXPORT="STAND_IN MODE")
    wait_for(stand_in / "started-0", stand_in / "started-1", seconds=240)
    job.send_signal(signal.SIGINT)
    wait_for(stand_in / "signals-0", stand_in / "signals-1", seconds=60)
    job.send_signal(signal.SIGINT)
    output = job.communicate(timeout=240)[0]
    assert job.returncode == 137, output
    assert hosts.nobody_left(60), hosts.left()


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_both_hosts(hosts, start, tiny, tmp_path):
    job = start(*tiny, *LONG)
    wait_for(tmp_path / "run" / "metrics.jsonl", seconds=240)
    (rank,) = [process for process in hosts.processes("b", "llmtrain.train") if is_rank(process)]
    rank.kill()
    output = job.communicate(timeout=240)[0]
    assert job.returncode in (1, 137), output
    assert hosts.nobody_left(60), hosts.left()


def is_rank(process: psutil.Process) -> bool:
    return process.cmdline()[2:4] == ["-m", "llmtrain.train"]


@pytest.mark.slow
def test_a_cut_cable_ends_both_hosts_and_the_run_goes_on_bit_equal(hosts, start, ranks, tiny, tmp_path):
    words = [*tiny, "deepspeed=zero2", "max_steps=600", "checkpoint.every=20", "hang_timeout=20"]
    ranks.run([*words, f"output_dir={tmp_path}/whole"], 2, tmp_path, {"OMP_NUM_THREADS": "1"})
    job = start(*words)
    wait_for(tmp_path / "run" / "checkpoints" / "step_00000040", seconds=240)
    hosts.cut()
    output = job.communicate(timeout=180)[0]
    assert job.returncode == 86, output
    assert hosts.nobody_left(60), hosts.left()
    hosts.mend()
    job = start(*words)
    output = job.communicate(timeout=400)[0]
    assert job.returncode == 0, output
    whole, cut = curve(tmp_path / "whole"), curve(tmp_path / "run")
    assert whole.keys() == cut.keys()
    assert all(set(cut[step]) == set(whole[step]) for step in whole)
