from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain.training import loggers
from llmtrain.training.loggers import LoggerConfig, WandbConfig, WandbLogger
from llmtrain.training.run_directory import RunDirectory

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


def read_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: a LevelDB log of 32 KiB blocks after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    place, record = 7, b""
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:  # a header does not cross blocks
            place += room
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind == 0:
            break
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            yield message
            record = b""


def offline_files(path: Path) -> list[Path]:
    return sorted(path.glob("wandb/offline-run-*/run-*.wandb"))


def history(file: Path) -> list[dict[str, Any]]:
    """The logged lines of a .wandb file, wandb's own keys left out."""
    lines = []
    for record in read_records(file):
        if record.WhichOneof("record_type") == "history":
            items = {
                (".".join(item.nested_key) or item.key): json.loads(item.value_json)
                for item in record.history.item
            }
            lines.append({key: value for key, value in items.items() if not key.startswith("_")})
    return lines


def test_offline_wandb_has_the_same_lines_and_a_resumed_run_the_same_id(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    lines = [line(step, **{"train/loss/code": 0.1 * step, "eval/bits_per_byte": 1 / 3}) for step in (1, 2, 3)]
    config = {"seq_len": 64, "hub": {"hf_token": "canary"}}
    for part in (lines[:2], lines[2:]):
        logger = WandbLogger(directory, OFFLINE, "a name", config)
        for one in part:
            logger.log(one)
        logger.close()
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


def test_offline_wandb_has_the_ledger_of_a_run_by_its_steps(ranks, tiny, tmp_path):
    run = tmp_path / "run"
    ranks.run([*tiny, "logger.wandb.mode=offline", "max_steps=4", "data.packing=best_fit"], 1, tmp_path)
    (file,) = offline_files(run)
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert history(file) == lines
    logged = [one.history for one in read_records(file) if one.WhichOneof("record_type") == "history"]
    assert [one.step.num for one in logged] == [line["step"] for line in lines] == [1, 2, 3, 4]
    for key in ("data/tokens", "data/padding", "data/share", "data/epochs", "train/loss"):
        for name in ("code", "prose"):
            assert f"{key}/{name}" in history(file)[-1]
    assert all(line["data/epochs/code"] > 0 for line in lines), "also before the first pass is laid out"
    last = lines[-1]
    counted = sum(last[f"data/{key}/{name}"] for key in ("tokens", "padding") for name in ("code", "prose"))
    assert counted == last["train/tokens"]


OUTAGE = """
import json, logging, sys, time
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from llmtrain.training.loggers import WandbConfig, WandbLogger
from llmtrain.training.run_directory import RunDirectory
began = time.perf_counter()
logger = WandbLogger(RunDirectory(sys.argv[1]), WandbConfig(mode="online", project="p"), "n", {"a": 1})
slowest = 0.0
for step in range(1, 51):
    before = time.perf_counter()
    logger.log({"step": step, "train/loss": 1 / step})
    slowest = max(slowest, time.perf_counter() - before)
logged = time.perf_counter() - began
before = time.perf_counter()
logger.close()
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
    assert seconds["slowest"] < 0.5, "a step waited for wandb"
    assert seconds["close"] < loggers.FINISH_SECONDS + 1
    assert whole < loggers.FINISH_SECONDS + 20  # the rest is starting Python on a busy machine
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
    assert seconds["close"] < loggers.CONNECT_SECONDS
    assert re.search(r"^WARNING wandb records offline .*No API key", stderr, re.MULTILINE), stderr
    (file,) = offline_files(tmp_path / "run")
    assert len(history(file)) == 50


def test_a_wandb_that_cannot_be_imported_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger = WandbLogger(RunDirectory(tmp_path), OFFLINE, "n", {})
    logger.log(line(1))
    logger.close()
    logger.log(line(2))
    assert [record.getMessage()[:40] for record in caplog.records] == [
        "wandb is off, metrics.jsonl has every li"
    ]


def test_a_wandb_that_does_not_finish_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Stuck:
        def log(self, line: dict[str, Any], step: int) -> None:
            pass

        def finish(self) -> None:
            time.sleep(3)

    monkeypatch.setattr(loggers, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(WandbLogger, "_start", lambda self: Stuck())
    logger = WandbLogger(RunDirectory(tmp_path), OFFLINE, "n", {})
    logger.log(line(1))
    began = time.perf_counter()
    logger.close()
    assert time.perf_counter() - began < 1
    assert "did not finish" in caplog.text


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


def test_loggers_import_neither_wandb_nor_rich_nor_plotly() -> None:
    code = "import sys, llmtrain.training.loggers, llmtrain.training.report; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"wandb", "rich", "plotly"} & set(modules)
