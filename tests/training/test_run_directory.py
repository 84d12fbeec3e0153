from __future__ import annotations

import errno
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.config import Config, ExitCode, UserError
from llmtrain.config.secrets import LEFT_OUT, redact
from llmtrain.training import run_directory
from llmtrain.training.run_directory import RunDirectory

HOLD = """
import sys, time
from llmtrain.training.run_directory import RunDirectory
run = RunDirectory(sys.argv[1])
run.lock()
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "runs" / "first")
    directory.path.mkdir(parents=True)
    return directory


# Lines


@given(st.floats(), st.floats())
def test_a_line_keeps_every_bit_and_what_is_not_finite_is_null(
    tmp_path_factory: pytest.TempPathFactory, one: float, other: float
) -> None:
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    run.append_metrics({"step": 1, "a": one, "nested": {"b": [other]}})
    (line,) = run.read_metrics()
    for wrote, read in ((one, line["a"]), (other, line["nested"]["b"][0])):
        assert read == wrote if math.isfinite(wrote) else read is None


def test_scalars_of_numpy_and_torch_become_numbers(run: RunDirectory) -> None:
    import numpy as np

    run.append_metrics(
        {"step": np.int64(3), "a": torch.tensor(0.5), "b": np.float32("nan"), "c": np.float64(1e-17)}
    )
    assert run.read_metrics() == [{"step": 3, "a": 0.5, "b": None, "c": 1e-17}]


def test_lines_of_several_writers_never_mix(run: RunDirectory) -> None:
    """A line is one write at the end of the file, however long it is and whoever writes beside."""
    text = "x" * 50_000

    def write(writer: int) -> None:
        for _ in range(20):
            run.append_event("save", writer=writer, text=text)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = run.read_events()
    assert sorted(event["writer"] for event in events) == sorted([0, 1, 2, 3] * 20)


def test_an_event_says_when_and_what(run: RunDirectory) -> None:
    run.append_event("save", step=7, path="checkpoints/step_00000007")
    (event,) = run.read_events()
    assert list(event) == ["time", "event", "step", "path"]
    assert event["event"] == "save" and event["time"].endswith("+00:00")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b""),
        (b'{"step": 1}\n', b'{"step": 1}\n'),
        (b'{"step": 1}\n{"st', b'{"step": 1}\n'),
        (b'{"step": 1', b""),
        (b'{"step": 1}\n' + b"y" * 200_000, b'{"step": 1}\n'),
        (b"y" * 65_536, b""),
    ],
)
def test_an_unterminated_last_line_is_cut_and_the_next_line_is_whole(
    run: RunDirectory, before: bytes, after: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    run.metrics.write_bytes(before)
    run.cut_unterminated()
    assert run.metrics.read_bytes() == after
    assert bool(caplog.records) == (before != after)
    if caplog.records:
        assert f"{len(before) - len(after)} bytes" in caplog.text
    run.append_metrics({"step": 2})
    assert run.read_metrics()[-1] == {"step": 2}


def test_cutting_without_files_does_nothing(run: RunDirectory) -> None:
    run.cut_unterminated()
    assert not run.metrics.exists()


def test_a_broken_line_is_named_and_an_unfinished_one_is_told(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    run.metrics.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a JSON object"):
        run.read_metrics()
    run.metrics.write_text('{"step": 1}\n{"step"')
    assert run.read_metrics() == [{"step": 1}]
    assert "not finished" in caplog.text


def test_the_newest_lines_are_whole_and_a_broken_one_has_its_number(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.newest_metrics() == []
    for step in range(1, 101):
        run.append_metrics({"step": step})
    lengths = [len(line) + 1 for line in run.metrics.read_text().splitlines()]
    for size in (1, 13, 14, 15, 26, 27, 28, 41, 10_000):
        monkeypatch.setattr(run_directory, "NEWEST_BYTES", size)
        whole = sum(sum(lengths[-count:]) <= size for count in range(1, 101))
        assert [line["step"] for line in run.newest_metrics()] == [*range(101 - whole, 101)], size
    run.metrics.write_text("".join('{"step": 1}\n' for _ in range(50)) + "nonsense\n")
    monkeypatch.setattr(run_directory, "NEWEST_BYTES", 40)
    with pytest.raises(UserError, match=r"metrics\.jsonl:51: not a JSON object"):
        run.newest_metrics()


# The lock


def hold(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def test_a_second_job_is_refused_in_one_line_and_a_killed_one_leaves_no_lock(run: RunDirectory) -> None:
    other = hold(run.path)
    try:
        with pytest.raises(UserError) as error:
            run.lock()
        assert error.value.exit_code == ExitCode.LOCKED == 73
        (line,) = str(error.value).splitlines()
        assert f"process {other.pid} on {socket.gethostname()}" in line and str(run.path) in line
        owner = json.loads((run.path / ".lock").read_text())
        assert set(owner) == {"host", "pid", "boot_id", "started"}
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    run.lock()
    assert json.loads((run.path / ".lock").read_text())["pid"] == os.getpid()
    again = RunDirectory(run.path)
    with pytest.raises(UserError, match=str(os.getpid())):
        again.lock()
    run.unlock()
    again.lock()
    again.unlock()


LOOK = """
import sys
from llmtrain.training.run_directory import RunDirectory
run = RunDirectory(sys.argv[1])
print(run.is_locked(), flush=True)
while True:
    run.is_locked()
"""


def test_those_who_look_whether_a_run_is_at_work_stop_none_from_starting(run: RunDirectory) -> None:
    run.lock()
    run.unlock()
    assert not run.is_locked()
    lookers = [
        subprocess.Popen([sys.executable, "-c", LOOK, str(run.path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for looker in lookers:
            assert looker.stdout is not None and looker.stdout.readline() == "False\n"
        for _ in range(100):
            run.lock()
            assert RunDirectory(run.path).is_locked()
            run.unlock()
    finally:
        for looker in lookers:
            looker.kill()
            looker.wait()


def test_a_shared_lock_that_stays_is_refused(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run starts beside one whose lock looks like that, and none waits for ever."""
    import fcntl

    monkeypatch.setattr("llmtrain.training.run_lock.LONGEST_LOOK", 0.2)
    with (run.path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        with pytest.raises(UserError, match="at work in this run directory"):
            run.lock()
    run.lock()


TOUCH = """
import os, sys, time
print("up", flush=True)
while True:
    os.utime(sys.argv[1])
    time.sleep(0.05)
"""


def test_a_lock_of_another_machine_holds_where_their_file_system_keeps_locks_apart(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is all that is seen of it: it holds as long as its owner touches it."""
    monkeypatch.setattr("llmtrain.training.run_lock.TOUCH_SECONDS", 5.0)
    owner = {"host": "elsewhere", "pid": 7, "boot_id": "another", "started": "then"}
    lock = run.path / ".lock"
    lock.write_text(json.dumps(owner))
    other = subprocess.Popen([sys.executable, "-c", TOUCH, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "up\n"
        with pytest.raises(UserError, match="process 7 on elsewhere") as error:
            run.lock()
        assert error.value.exit_code == ExitCode.LOCKED
        assert json.loads(lock.read_text()) == owner
    finally:
        other.kill()
        other.wait()
    monkeypatch.setattr("llmtrain.training.run_lock.TOUCH_SECONDS", 0.3)
    run.lock()
    assert json.loads(lock.read_text())["pid"] == os.getpid()
    touched = lock.stat().st_mtime_ns
    deadline = time.monotonic() + 60
    while lock.stat().st_mtime_ns == touched:
        assert time.monotonic() < deadline, "nobody else could see that we live"
        time.sleep(0.05)
    run.unlock()
    assert lock.read_text() == "", "an orderly end leaves nothing to wait for"


def test_an_owner_whose_touch_is_refused_touches_again(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another machine would take the directory of a living run over after a hiccup of the disk."""
    monkeypatch.setattr("llmtrain.training.run_lock.TOUCH_SECONDS", 0.01)
    touches: list[int] = []

    def refuse_first(handle: int) -> None:
        touches.append(handle)
        if len(touches) == 1:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "utime", refuse_first)
    run.lock()
    deadline = time.monotonic() + 10
    while len(touches) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    run.unlock()
    assert len(touches) >= 2


def test_a_child_process_does_not_inherit_the_lock(run: RunDirectory) -> None:
    run.lock()
    sleep = "import time; print('up', flush=True); time.sleep(30)"
    child = subprocess.Popen([sys.executable, "-c", sleep], close_fds=False, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
        run.unlock()
        run.lock()
    finally:
        child.kill()
        child.wait()
        run.unlock()


def test_an_older_run_is_set_aside_whole(run: RunDirectory) -> None:
    run.lock()
    assert run.set_aside() is None, "a lock alone is no older run"
    for expected in ("first.1", "first.2"):
        run.append_metrics({"step": 1, "where": expected})
        place = run.set_aside()
        assert place == run.path.with_name(expected)
        assert RunDirectory(place).read_metrics() == [{"step": 1, "where": expected}]
        assert [entry.name for entry in run.path.iterdir()] == [".lock"]
        with pytest.raises(UserError):
            RunDirectory(run.path).lock()
        RunDirectory(place).lock()  # the old place is nobody's
    run.unlock()


def test_a_lock_taken_while_the_directory_is_set_aside_is_taken_on_the_new_one(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between open and flock the file may be renamed away: its lock would be another directory's."""
    import fcntl

    real, aside = fcntl.flock, run.path.with_name("aside")

    def late(handle: int, how: int) -> None:
        if not aside.exists():
            run.path.rename(aside)
            run.path.mkdir()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    run.lock()
    monkeypatch.undo()
    with pytest.raises(UserError):
        RunDirectory(run.path).lock()
    RunDirectory(aside).lock()


# Config, JSON, DONE


class Inner(Config):
    api_key: str
    text_key: str
    max_new_tokens: int
    url: str


class Outer(Config):
    name: str
    path: Path
    inner: Inner
    headers: dict[str, str]


def test_the_config_is_written_without_secrets_and_with_everything_else(run: RunDirectory) -> None:
    secrets = ["canary-one", "canary-two", "hf_canarycanarycanarycanary", "canary-three"]
    config = Outer(
        name=f"run with {secrets[2]} in it",
        path=Path("a/b"),
        inner=Inner(
            api_key=secrets[0], text_key="content", max_new_tokens=7, url=f"s3://me:{secrets[3]}@host/x"
        ),
        headers={"auth_token": secrets[1], "tokenizer": "bytes"},
    )
    run.write_config(config)
    text = run.config.read_text()
    assert not [secret for secret in secrets if secret in text]
    assert yaml.safe_load(text) == run.read_config()
    assert run.read_config() == {
        "name": f"run with {LEFT_OUT} in it",
        "path": "a/b",
        "inner": {
            "api_key": LEFT_OUT,
            "text_key": "content",
            "max_new_tokens": 7,
            "url": f"s3://{LEFT_OUT}@host/x",
        },
        "headers": {"auth_token": LEFT_OUT, "tokenizer": "bytes"},
    }


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://x.net/a?se=2030&sig=CANARY%3D&sp=r", f"https://x.net/a?se=2030&sig={LEFT_OUT}&sp=r"),
        ("s3://b/a?X-Amz-Date=7&X-Amz-Signature=CANARY", f"s3://b/a?X-Amz-Date=7&X-Amz-Signature={LEFT_OUT}"),
        ("s3://b/a?X-Amz-Security-Token=CANARY/+=#x", f"s3://b/a?X-Amz-Security-Token={LEFT_OUT}#x"),
        ("s3://b/a?X-Amz-Credential=CANARY", f"s3://b/a?X-Amz-Credential={LEFT_OUT}"),
        ("https://x.net/a?token=CANARY", f"https://x.net/a?token={LEFT_OUT}"),
        ("x.net/a?n=1&access_token=CANARY or b", f"x.net/a?n=1&access_token={LEFT_OUT} or b"),
        ("https://x.net/a?api_key=CANARY&key=CANARY", f"https://x.net/a?api_key={LEFT_OUT}&key={LEFT_OUT}"),
        ("https://me:CANARY@x.net/a?b=me@home", f"https://{LEFT_OUT}@x.net/a?b=me@home"),
        ("https://me:CAN@A?R#Y@x.net/a", f"https://{LEFT_OUT}@x.net/a"),
        ("redis://:CANARY@x.net", f"redis://{LEFT_OUT}@x.net"),
        ("zip://a.json::s3://me:CANARY@b/c", f"zip://a.json::s3://{LEFT_OUT}@b/c"),
    ],
)
def test_secrets_in_urls(url: str, expected: str) -> None:
    assert redact({"path": [url]}) == {"path": [expected]}


@pytest.mark.parametrize(
    "url",
    [
        "https://x.net:80/a?b=me@home&design=7&tokens=3&monkey=1&text_key=title",
        "data.max_tokens=3, sig=nothing",
        "s3://me@bucket/a:b",
    ],
)
def test_urls_without_secrets_stay(url: str) -> None:
    assert redact(url) == url


@pytest.mark.parametrize(
    "name", ["key", "password", "hf_token", "WANDB_API_KEY", "client_secret", "aws_credentials"]
)
def test_names_of_secrets(name: str) -> None:
    assert redact({name: "x"}) == {name: LEFT_OUT}


@pytest.mark.parametrize(
    "name", ["text_key", "tokens", "tokenizer", "max_new_tokens", "monkey", "keep", "keys"]
)
def test_names_that_only_look_like_secrets(name: str) -> None:
    assert redact({name: "x", "n": 3, "none": None}) == {name: "x", "n": 3, "none": None}


def test_json_is_replaced_whole_or_not_at_all(run: RunDirectory) -> None:
    run.write_json("eval/heldout.json", {"loss": float("inf"), "path": Path("x")})
    assert run.read_json("eval/heldout.json") == {"loss": None, "path": "x"}
    unserialisable: Any = {"loss": object()}
    with pytest.raises(TypeError):
        run.write_json("eval/heldout.json", unserialisable)
    assert run.read_json("eval/heldout.json") == {"loss": None, "path": "x"}
    assert [entry.name for entry in run.eval.iterdir()] == ["heldout.json"]
    assert run.read_json("eval/other.json") is None
    (run.path / "data.json").write_text("{")
    with pytest.raises(UserError, match=r"data\.json: not readable"):
        run.read_json("data.json")


def test_done_is_there_only_between_mark_and_clear(run: RunDirectory) -> None:
    run.clear_done()
    assert not run.done.exists()
    run.mark_done()
    assert run.done.exists()
    run.clear_done()
    assert not run.done.exists()


def test_a_config_that_cannot_be_read_is_a_users_error(run: RunDirectory) -> None:
    with pytest.raises(UserError, match="the directory of a run"):
        run.read_config()
    run.config.write_text("a: [")
    with pytest.raises(UserError, match="YAML"):
        run.read_config()
    run.config.write_text("- a\n")
    with pytest.raises(UserError, match="keys and values"):
        run.read_config()
