"""Signals and exit codes through the real launcher, and nothing left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from llmtrain.training.launcher import SUPERVISOR
from tests.launch.conftest import LAUNCH, stand_ins, wait_for

SUPERVISE = LAUNCH / "supervise.py"
DEEPSPEED = (
    sys.executable,
    SUPERVISE,
    "deepspeed",
    "--hostfile=/dev/null",
    "--num_gpus=2",
    "--log_level=critical",
)
# Two ranks without DeepSpeed's three seconds a process: a launcher of one line.
PLAIN = """
RANK=0 python -u -m llmtrain.train & a=$!
RANK=1 python -u -m llmtrain.train & b=$!
wait $a; code=$?; wait $b; exit $code
"""


def module():
    spec = importlib.util.spec_from_file_location("supervise", SUPERVISE)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_exit_codes_as_a_shell_says_them():
    """-n is Popen's death by signal n, 256 - n the same after launch.py's sys.exit(-n)."""
    codes = {0: 0, 1: 1, 78: 78, 85: 85, 130: 130, -9: 137, -15: 143, 247: 137, 241: 143, 254: 130}
    assert {code: module().shell_code(code) for code in codes} == codes


def notes(folder, kind: str) -> list:
    """What both ranks noted."""
    return [json.loads((folder / f"{kind}-{rank}").read_text()) for rank in (0, 1)]


def test_a_signal_reaches_each_rank_once_and_their_code_comes_back(start, stand_in, port):
    job = start(*DEEPSPEED, f"--master_port={port}", "--module", "llmtrain.train", MODE="orderly")
    wait_for(stand_in / "started-0", stand_in / "started-1")
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 85, errors
    assert notes(stand_in, "signals") == [[signal.SIGTERM], [signal.SIGTERM]]
    assert stand_ins(stand_in) == []


@pytest.mark.parametrize(
    ("number", "sent"),
    [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGUSR1"), ("SIGHUP", "SIGTERM")],
)
def test_what_the_ranks_are_told(start, stand_in, number, sent):
    """A lost terminal asks for an orderly stop."""
    job = start(sys.executable, SUPERVISE, "bash", "-c", PLAIN, MODE="orderly")
    wait_for(stand_in / "started-0", stand_in / "started-1")
    job.send_signal(signal.Signals[number])
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 85, errors
    assert notes(stand_in, "signals") == [[signal.Signals[sent]]] * 2
    assert number in errors


@pytest.mark.parametrize(
    ("generation", "number", "code"),
    [(0, signal.SIGKILL, 1), (1, signal.SIGTERM, 143)],
    ids=["node", "runner"],
)
def test_ranks_do_not_outlive_a_launcher_and_its_death_is_no_success(
    start, stand_in, port, generation, number, code
):
    """`deepspeed` answers 0 when its per-node child is killed, and its ranks train on."""
    job = start(*DEEPSPEED, f"--master_port={port}", "--module", "llmtrain.train", MODE="endless")
    wait_for(stand_in / "started-0", stand_in / "started-1")
    rank = psutil.Process(notes(stand_in, "started")[0]["pid"])
    rank.parents()[generation].send_signal(number)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == code, errors
    assert stand_ins(stand_in) == []


def test_a_killed_supervisor_takes_its_ranks_along(start, stand_in):
    job = start(sys.executable, SUPERVISE, "bash", "-c", PLAIN, MODE="orderly")
    wait_for(stand_in / "started-0", stand_in / "started-1")
    job.kill()
    wait_for(stand_in / "signals-0", stand_in / "signals-1")
    deadline = time.monotonic() + 120
    while stand_ins(stand_in):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_there_are_ranks_ends_the_launcher(start, stand_in, port, number):
    """Nothing is lost: the job can be queued again."""
    job = start(*DEEPSPEED, f"--master_port={port}", "--module", "llmtrain.train", MODE="endless")
    while len(stand_ins(stand_in)) < 2:  # the supervisor and the launcher, which is still importing
        assert job.poll() is None
    job.send_signal(number)
    job.communicate(timeout=120)
    assert job.returncode == 85
    assert stand_ins(stand_in) == []


def test_a_signal_before_a_rank_listens_loses_nothing(start, stand_in, port):
    """The rank dies of it, as a rank does that is still importing."""
    job = start(*DEEPSPEED, f"--master_port={port}", "--module", "llmtrain.train", MODE="early")
    wait_for(stand_in / "started-0", stand_in / "started-1")
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=120)
    assert job.returncode == 85
    assert stand_ins(stand_in) == []


def test_one_rank_that_leaves_before_the_first_step_loses_nothing(start, stand_in):
    """Whatever others fail of because it is gone."""
    job = start(sys.executable, SUPERVISE, "bash", "-c", PLAIN.replace("exit $code", "exit 1"), MODE="leave")
    job.communicate(timeout=120)
    assert job.returncode == 85


LAUNCHER = """
import subprocess, sys
others = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
if sys.argv[1] == "failed":
    others[0].kill()
    others[0].wait()
tell = "from llmtrain.training.launcher import tell_nothing_is_lost_yet as tell; tell(3)"
subprocess.run([sys.executable, "-c", tell], check=True)
for other in others:
    other.kill()
"""


@pytest.mark.parametrize(("others", "told"), [("alive", True), ("failed", False)])
def test_a_rank_that_leaves_because_another_one_failed_does_not_say_that_nothing_is_lost(
    tmp_path, others, told
):
    """Its launcher asked it: a job of which a rank dies before the first step would be queued for ever."""
    launcher = tmp_path / "torchrun"
    launcher.write_text(LAUNCHER)
    environment = os.environ | {SUPERVISOR: str(tmp_path / "told"), "PYTHONPATH": str(LAUNCH.parent)}
    subprocess.run([sys.executable, launcher, others], env=environment, check=True)
    assert (tmp_path / "told.preempted").exists() == told


def test_what_a_rank_says_stands_where_its_launcher_says_1(start):
    """As torchrun does, whatever its ranks return."""
    launcher = "python -u -m llmtrain.train seq_lenn=3 || exit 1"
    job = start(sys.executable, SUPERVISE, "bash", "-c", launcher, PYTHONPATH=str(LAUNCH.parent))
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 78, errors


AT_THE_END_OF_ITS_GRACE = """
from functools import partial
from llmtrain.training.launcher import tell_nothing_is_lost_yet
from llmtrain.training.signals import StopRequest

times = iter([0.0, 6.0])
stop = StopRequest(5.0, leaving=partial(tell_nothing_is_lost_yet, 1), clock=lambda: next(times))
stop.step_took(1.0)
stop.saved = {saved}
stop.agree(True)
stop.look_at_clocks()
"""


@pytest.mark.parametrize(("saved", "code"), [(True, 85), (False, 1)])
def test_a_rank_that_has_saved_and_is_ended_after_its_grace_says_so(start, tmp_path, saved, code):
    (tmp_path / "rank.py").write_text(AT_THE_END_OF_ITS_GRACE.format(saved=saved))
    launcher = f"python {tmp_path}/rank.py || exit 1"
    job = start(sys.executable, SUPERVISE, "bash", "-c", launcher, PYTHONPATH=str(LAUNCH.parent))
    _, errors = job.communicate(timeout=120)
    assert "not done after grace_seconds=5" in errors
    assert job.returncode == code, errors


def test_while_it_waits_for_what_a_launcher_left_it_sleeps():
    """Ranks that save then need the processor."""
    supervise = module()
    told, began = supervise.Told(), time.monotonic()
    job = supervise.Job(["bash", "-c", "sleep 60 &"], told, time.time())
    job.process.wait()
    try:
        assert all(job.is_alive() for _ in range(10))
        assert time.monotonic() - began >= 10 * supervise.POLL_SECONDS
    finally:
        job.kill()
        told.close()


def test_torchrun_is_no_rank_of_its_own():
    def is_rank(*command: str) -> bool:
        return module().is_rank(SimpleNamespace(cmdline=lambda: ["python", *command]))

    assert is_rank("-u", "-m", "llmtrain.train") and is_rank("-m", "llmtrain.train", "seed=1")
    assert not is_rank("/bin/torchrun", "-m", "llmtrain.train")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 85)])
def test_a_run_that_is_stopped_as_it_rewinds_is_not_started_again(start, stand_in, number, code):
    job = start(sys.executable, SUPERVISE, "bash", "-c", PLAIN, MODE="orderly", STOPPED="89")
    wait_for(stand_in / "started-0", stand_in / "started-1")
    job.send_signal(number)
    job.communicate(timeout=120)
    assert job.returncode == code


@pytest.mark.parametrize("ends", ["signal", "launcher"])
def test_ranks_in_sessions_of_their_own_are_the_jobs(start, stand_in, ends):
    """So torchrun starts them: they are told, waited for, and outlive it no longer than they need."""
    job = start(
        sys.executable, SUPERVISE, "bash", "-c", PLAIN.replace("python", "setsid python"), MODE="orderly"
    )
    wait_for(stand_in / "started-0", stand_in / "started-1")
    if ends == "signal":
        job.send_signal(signal.SIGTERM)
    else:
        psutil.Process(notes(stand_in, "started")[0]["pid"]).parent().kill()
    job.communicate(timeout=120)
    assert job.returncode == (85 if ends == "signal" else 137)
    assert notes(stand_in, "signals") == [[signal.SIGTERM]] * 2
    assert stand_ins(stand_in) == []


def test_success_needs_the_marker_and_the_word_of_the_ranks(start, stand_in):
    (stand_in / "run").mkdir()
    (stand_in / "run" / "DONE").touch()  # of an earlier start
    job = start(sys.executable, SUPERVISE, "bash", "-c", PLAIN, MODE="return", UNDONE="1")
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 1
    assert errors.splitlines() == ["launch: the launcher ended with 0, but the run did not write DONE"]
    job = start(sys.executable, SUPERVISE, "bash", "-c", PLAIN, MODE="return")
    _, errors = job.communicate(timeout=120)
    assert (job.returncode, errors) == (0, "")


def test_a_check_has_no_run_to_mark_as_done(start, tiny, tmp_path):
    check = (sys.executable, "-m", "llmtrain.check", *tiny, f"output_dir={tmp_path}/run")
    job = start(sys.executable, SUPERVISE, *check, PYTHONPATH=str(LAUNCH.parent), DS_ACCELERATOR="cpu")
    printed, errors = job.communicate(timeout=240)
    assert job.returncode == 0, printed + errors


@pytest.mark.parametrize(
    ("rewinds", "progress", "code", "starts"), [(2, 0, 0, 3), (9, 7, 0, 10), (99, 1, 89, 7)]
)
def test_a_run_that_rewinds_is_started_again(start, stand_in, rewinds, progress, code, starts):
    """While it gets on: `progress` of its first starts write a checkpoint."""
    command = (sys.executable, SUPERVISE, sys.executable, "-m", "llmtrain.train", "resume=never")
    job = start(*command, MODE="rewind", REWINDS=str(rewinds), PROGRESS=str(progress))
    _, errors = job.communicate(timeout=120)
    assert job.returncode == code, errors
    assert len((stand_in / "starts").read_text()) == starts
    assert ("not starting again" in errors) == (code == 89)
    last = json.loads((stand_in / "started-alone").read_text())["argv"]
    assert last == ["resume=never", *["resume=auto"] * (starts > 1)]  # nothing is begun anew


def test_a_second_ctrl_c_kills_ranks_that_do_not_stop(start, stand_in):
    job = start(sys.executable, SUPERVISE, "bash", "-c", PLAIN, MODE="stubborn")
    wait_for(stand_in / "started-0", stand_in / "started-1")
    job.send_signal(signal.SIGINT)
    wait_for(stand_in / "signals-0", stand_in / "signals-1")
    assert job.poll() is None
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=120)
    assert job.returncode == 137
    assert stand_ins(stand_in) == []


def test_ranks_that_do_not_stop_are_killed_after_the_grace_time(start, stand_in):
    job = start(sys.executable, SUPERVISE, "bash", "-c", PLAIN, MODE="stubborn", GRACE="-9")
    wait_for(stand_in / "started-0", stand_in / "started-1")
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=120)
    assert job.returncode == 137
    assert notes(stand_in, "signals") == [[signal.SIGTERM], [signal.SIGTERM]]
    assert stand_ins(stand_in) == []


def test_a_hangup_that_nohup_ignores_stays_ignored(start, stand_in):
    job = start("nohup", sys.executable, SUPERVISE, "bash", "-c", PLAIN, MODE="orderly")
    wait_for(stand_in / "started-0", stand_in / "started-1")
    job.send_signal(signal.SIGHUP)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 85
    assert "SIGHUP" not in errors
    assert "SIGTERM" in errors


def test_a_helper_that_lingers_after_success_does_not_spoil_it(start, stand_in):
    """A logger's helper gets some seconds, then it is ended; the run was a success all the same."""
    job = start(
        sys.executable, SUPERVISE, "bash", "-c", "sleep 300 & python -m llmtrain.train", MODE="return"
    )
    job.communicate(timeout=120)
    assert job.returncode == 0
    assert stand_ins(stand_in) == []
