from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config import UserError
from llmtrain.training import loggers
from llmtrain.training.loggers import ExtraRecord, LoggerConfig, Loggers
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.wandb_record import CONNECT_SECONDS, WandbConfig, WandbRecord
from tests.ranks import PATCH
from tests.training.faults import STEP
from tests.training.wandb_files import history, offline_files, read_records, step_numbers

OFFLINE = WandbConfig(mode="offline", project="llmtrain-tests")


def line(step: int, **more: Any) -> dict[str, Any]:
    fixed = {
        "train/loss": 5.0 / step,
        "train/lr": 1e-3,
        "perf/tokens_per_second": 12345.6,
        "perf/step_seconds": 2.0,
    }
    return {"step": step, **fixed, **more}


# wandb


def test_offline_wandb_has_the_same_lines_and_a_resumed_run_the_same_id(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    lines = [line(step, **{"train/loss/code": 0.1 * step, "eval/bits_per_byte": 1 / 3}) for step in (1, 2, 3)]
    config = {"seq_len": 64, "hub": {"hf_token": "canary"}}
    for part in (lines[:2], lines[2:]):
        logger = Loggers(records=[WandbRecord(directory, OFFLINE, "a name", config)])
        for one in part:
            logger.log(one)
        logger.close(0)
        time.sleep(1.1)  # wandb names its folders by the second
    first, second = offline_files(directory.path)
    assert history(first) + history(second) == lines
    runs = [
        next(r.run for r in read_records(file) if r.WhichOneof("record_type") == "run")
        for file in (first, second)
    ]
    assert {run.run_id for run in runs} == {(directory.path / "wandb" / "id").read_text().strip()}
    assert {(run.project, run.display_name) for run in runs} == {("llmtrain-tests", "a name")}
    stored = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert stored["seq_len"] == 64
    assert not [
        file for file in directory.path.rglob("*") if file.is_file() and b"canary" in file.read_bytes()
    ]


def tables(file: Path) -> dict[str, list[list[Any]]]:
    """The rows of the tables that the summary of a .wandb file names last."""
    found = {}
    for record in read_records(file):
        for item in record.summary.update if record.WhichOneof("record_type") == "summary" else ():
            if item.key in ("samples", "mixture"):
                place = file.parent / "files" / json.loads(item.value_json)["path"]
                found[item.key] = json.loads(place.read_text())["data"]
    return found


def endings(file: Path) -> list[str | int]:
    """What a .wandb file says of how its process ended."""
    return [
        record.exit.exit_code if kind == "exit" else kind
        for record in read_records(file)
        if (kind := record.WhichOneof("record_type")) in ("exit", "preempting")
    ]


def scalars(run: Path, purged: bool) -> list[dict[str, Any]]:
    """What TensorBoard reads, as lines in its order; `purged`: without what a later start took back."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    found = EventAccumulator(str(run / "tensorboard"), {"tensors": 0}, purge_orphaned_data=purged).Reload()
    lines: dict[tuple[int, int], dict[str, Any]] = {}
    for key in found.Tags()["tensors"]:
        if found.summary_metadata[key].plugin_data.plugin_name == "scalars":
            for event in found.Tensors(key):
                again = 0
                while key in lines.setdefault((event.step, again), {"step": event.step}):
                    again += 1
                lines[event.step, again][key] = tensor_util.make_ndarray(event.tensor_proto).item()
    return [lines[place] for place in sorted(lines)]


def test_wandb_and_tensorboard_have_every_line_of_a_run_that_was_stopped_killed_and_resumed(
    ranks, tiny, tmp_path
):
    run = tmp_path / "run"
    common = [
        *tiny, "logger=tensorboard", "logger.wandb.mode=offline", "checkpoint.every=3",
        "callbacks.sample.every=3", "data.packing=best_fit", "max_steps=10",
    ]  # fmt: skip
    for fault, step, code in (("be_stopped", "3", 85), ("die_recorded", "6", -9)):
        faulty = {PATCH: f"tests.training.faults:{fault}", STEP: step}
        job = ranks.start(common, 1, tmp_path, faulty)
        assert job.wait() == [code], job.output()
    ranks.run(common, 1, tmp_path)
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in lines] == [*range(1, 8), *range(7, 11)]

    files = offline_files(run)
    assert len(files) == 3
    assert [one for file in files for one in history(file)] == lines
    assert [number for file in files for number in step_numbers(file)] == list(range(11))
    records = [record for file in files for record in read_records(file)]
    assert len({r.run.run_id for r in records if r.WhichOneof("record_type") == "run"}) == 1
    metrics = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
    assert {m.step_metric for m in metrics if m.glob_name == "*"} == {"train/tokens"}
    assert [endings(file) for file in files] == [["preempting", 85], [], [0]]
    shown = tables(files[-1])
    assert {step for step, _, _ in shown["samples"]} == {3, 6, 9, 10}
    for step, prompt, continuation in shown["samples"]:
        written = (run / "samples" / f"step_{step:08d}.txt").read_text()
        assert continuation and f"{prompt}{continuation}" in written
    ledger = json.loads((run / "data.json").read_text())["sources"]
    assert {row[0]: row[2:4] for row in shown["mixture"]} == {
        name: [source["share"], source["trained"]] for name, source in ledger.items()
    }

    known = [{key: value for key, value in one.items() if value is not None} for one in lines]
    assert sorted(scalars(run, purged=False), key=str) == sorted(known, key=str)
    assert scalars(run, purged=True) == known[:6] + known[7:]


OUTAGE = """
import json, logging, sys, time
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from llmtrain.training.loggers import Loggers
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.wandb_record import WandbConfig, WandbRecord
began = time.perf_counter()
config = WandbConfig(mode="online", project="p")
logger = Loggers(records=[WandbRecord(RunDirectory(sys.argv[1]), config, "n", {"a": 1})])
slowest = 0.0
for step in range(1, 51):
    before = time.perf_counter()
    logger.log({"step": step, "train/loss": 1 / step})
    slowest = max(slowest, time.perf_counter() - before)
logged = time.perf_counter() - began
before = time.perf_counter()
logger.close(0)
print(json.dumps({"slowest": slowest, "logged": logged, "close": time.perf_counter() - before}))
"""


def run_outage(path: Path, argument: str = "", **environment: str) -> tuple[dict[str, float], str, float]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    began = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", OUTAGE, str(path), argument],
        capture_output=True, text=True, check=True, timeout=90, stdin=subprocess.DEVNULL,
        env={**kept, "HOME": str(path.parent), **environment},
    )  # fmt: skip
    return json.loads(result.stdout.splitlines()[-1]), result.stderr, time.perf_counter() - began


def test_an_outage_costs_no_step_and_few_seconds_at_the_end(tmp_path: Path) -> None:
    key, url = "0123456789" * 4, "http://127.0.0.1:9"
    seconds, stderr, whole = run_outage(tmp_path / "run", "+x=canary", WANDB_API_KEY=key, WANDB_BASE_URL=url)
    assert seconds["slowest"] < 5, "a step waited for wandb"
    assert seconds["close"] < loggers.FINISH_SECONDS + loggers.LEAVE_SECONDS + 5
    assert whole < seconds["logged"] + loggers.FINISH_SECONDS + 60  # Python starts, on a busy machine
    warnings = [text for text in stderr.splitlines() if text.startswith("WARNING")]
    assert len(warnings) == 1 and "wandb" in warnings[0], stderr
    assert "Traceback" not in stderr
    if "records offline" in warnings[0]:  # else this machine took longer to find out than a run may wait
        (file,) = offline_files(tmp_path / "run")
        assert history(file) == [{"step": step, "train/loss": 1 / step} for step in range(1, 51)]
    written = [file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert not [data for data in written if b"canary" in data or key.encode() in data]


def test_online_without_a_key_falls_back_at_once_and_asks_nobody(tmp_path: Path) -> None:
    seconds, stderr, _ = run_outage(tmp_path / "run")
    assert seconds["close"] < CONNECT_SECONDS
    assert re.search(r"^WARNING wandb records offline .*No API key", stderr, re.MULTILINE), stderr
    (file,) = offline_files(tmp_path / "run")
    assert len(history(file)) == 50


def test_a_wandb_that_cannot_be_imported_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger = Loggers(records=[WandbRecord(RunDirectory(tmp_path), OFFLINE, "n", {})])
    logger.log(line(1))
    logger.close(0)
    logger.log(line(2))
    assert [record.getMessage()[:40] for record in caplog.records] == [
        "wandb is off, metrics.jsonl has every li"
    ]


def test_a_wandb_that_does_not_finish_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loggers, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(WandbRecord, "start", lambda self: None)
    monkeypatch.setattr(WandbRecord, "log", lambda self, line: None)
    over = threading.Event()
    monkeypatch.setattr(WandbRecord, "finish", lambda self, exit_code: over.wait(120))
    logger = Loggers(records=[WandbRecord(RunDirectory(tmp_path), OFFLINE, "n", {})])
    logger.log(line(1))
    began = time.perf_counter()
    logger.close(0)
    assert time.perf_counter() - began < 60
    over.set()
    assert "did not finish" in caplog.text


class Fragile:
    """A record that fails, or waits, in one of its calls."""

    def __init__(self, name: str, trouble: Mapping[str, Callable[[], object]]) -> None:
        self.name, self._trouble = name, trouble
        self.calls: list[Any] = []

    def start(self) -> None:
        self._called("start")

    def log(self, line: Mapping[str, Any]) -> None:
        self._called("log", line["step"])

    def finish(self, exit_code: int) -> None:
        self._called("finish", exit_code)

    def leave(self) -> None:
        self._called("leave")

    def _called(self, name: str, *what: Any) -> None:
        self.calls.append((name, *what))
        self._trouble.get(name, lambda: None)()


def refuse() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("call", "calls"),
    [
        ("start", [("start",), ("leave",)]),
        ("log", [("start",), ("log", 1), ("finish", 87), ("leave",)]),
        ("finish", [("start",), ("log", 1), ("log", 2), ("finish", 87), ("leave",)]),
    ],
)
def test_a_record_that_fails_is_ended_and_is_one_warning(
    call: str, calls: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    record = Fragile("it", {call: refuse, "leave": refuse})
    found = Loggers(records=[record])
    for step in (1, 2):
        found.log(line(step))
    found.close(87)
    assert record.calls == calls
    assert [one.getMessage() for one in caplog.records if one.levelname == "WARNING"] == [
        "it is off, metrics.jsonl has every line: OSError: [Errno 28] No space left on device"
    ]


def test_a_record_that_wants_to_exit_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    """Threads leave in silence with SystemExit."""
    record = Fragile("it", {"log": sys.exit})
    found = Loggers(records=[record])
    found.log(line(1))
    found.close(0)
    assert record.calls == [("start",), ("log", 1), ("finish", 0), ("leave",)]
    assert [one.getMessage()[:9] for one in caplog.records] == ["it is off"]


def test_records_finish_beside_each_other(caplog: pytest.LogCaptureFixture) -> None:
    together = threading.Barrier(3)
    Loggers(records=[Fragile(str(number), {"finish": together.wait}) for number in range(3)]).close(0)
    assert not together.broken and not caplog.records


def test_records_that_do_not_finish_share_one_deadline(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loggers, "FINISH_SECONDS", 2)
    over = threading.Event()
    records = [Fragile(str(number), {"finish": over.wait}) for number in range(6)]
    began = time.monotonic()
    Loggers(records=records).close(0)
    assert time.monotonic() - began < 8, "in turn they take 12 s"
    assert [one.getMessage()[:18] for one in caplog.records] == [f"{n} did not finish w" for n in range(6)]
    over.set()


def test_no_step_waits_for_a_logger_of_another_package(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not for what builds it, either; what is late is written when it comes to it."""
    over, written, threads = threading.Event(), [], set()

    class Slow:
        def __init__(self) -> None:
            over.wait(60)
            threads.add(threading.current_thread())

        def log(self, line: Mapping[str, Any]) -> None:
            written.append(line["step"])
            threads.add(threading.current_thread())

        def close(self, exit_code: int) -> None:
            written.append(f"exit code {exit_code}")

    found = Loggers(records=[ExtraRecord("logger.extra.slow", Slow)])
    for step in (1, 2):
        found.log(line(step))
    assert written == []
    over.set()
    found.close(85)
    assert written == [1, 2, "exit code 85"]
    assert len(threads) == 1 and threading.current_thread() not in threads


@pytest.mark.parametrize(
    ("environment", "mode"), [(None, "disabled"), ("offline", "offline"), ("online", "online")]
)
def test_the_yaml_is_whole_and_wandb_is_off_unless_asked_for(
    environment: str | None, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omegaconf import OmegaConf

    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    values = OmegaConf.load(Path(__file__).parents[2] / "conf" / "logger" / "default.yaml")
    config = LoggerConfig.model_validate(OmegaConf.to_container(values, resolve=True))
    assert (config.progress, config.wandb.mode) == ("auto", mode)


def test_tensorboard_that_is_not_installed_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoggerConfig(progress="none", wandb=OFFLINE, tensorboard=True, extra={})
    config.check()
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logger.tensorboard=true: .*pip install 'llmtrain\[tensorboard\]'"):
        config.check()


def test_loggers_import_neither_wandb_nor_rich_nor_plotly() -> None:
    code = "import sys, llmtrain.training.loggers, llmtrain.training.report; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"wandb", "rich", "plotly"} & set(modules)
