"""Nothing outlives its launcher, and a stop loses no step: real ranks under the real `deepspeed`."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.launch.conftest import LAUNCH
from tests.launch.endings import EVENTS, SMALL, clean_environment, ending


@pytest.mark.parametrize(
    ("number", "target"),
    [
        pytest.param(*event, marks=[] if event == (signal.SIGKILL, "deepspeed") else pytest.mark.slow)
        for event in EVENTS
        if event[1] != "wrapper"
    ],
)
def test_ranks_save_themselves_without_a_wrapper(tmp_path, number, target):
    """`deepspeed` was started by hand; the exit code is what it makes of it."""
    end = ending("deepspeed", number, target, tmp_path)
    assert end.left == 0, end.output
    if (number, target) != (signal.SIGKILL, "rank 1"):
        assert end.lost == 0, end.output


CODES = {
    (signal.SIGINT, "wrapper"): {130},
    (signal.SIGKILL, "wrapper"): {137},
    (signal.SIGKILL, "rank 1"): {1, 137},
}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "target"), EVENTS)
def test_the_wrapper_says_how_it_ended(tmp_path, number, target):
    """85 wherever ranks could save and leave, also where a launcher died above them."""
    end = ending("wrapper", number, target, tmp_path)
    assert end.code in CODES.get((number, target), {85}), end.output
    assert end.left == 0, end.output
    if (number, target) != (signal.SIGKILL, "rank 1"):
        assert end.lost == 0, end.output


def test_a_run_that_is_done_is_a_success(tmp_path):
    """The ranks have told the wrapper of it, again where there was nothing left to do."""
    command = [sys.executable, LAUNCH / "supervise.py", sys.executable, "-m", "llmtrain.train", *SMALL]
    environment = clean_environment("wrapper", tmp_path)
    for _ in range(2):
        done = subprocess.run(
            [*command, "max_steps=2", "name=done"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert "already trained to step 2" in done.stderr


@pytest.mark.slow
def test_a_time_limit_through_the_wrapper(tmp_path):
    limit = ["time_limit=60", "grace_seconds=8"]
    end = ending("wrapper", signal.SIGCONT, "wrapper", tmp_path, [*SMALL, *limit])
    assert (end.code, end.left, end.lost) == (85, 0, 0), end.output
