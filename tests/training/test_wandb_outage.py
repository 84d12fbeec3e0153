"""A wandb server that dies or falls silent costs no step and, at the end of a run, at most 15 s."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.training import loggers
from tests.training.test_resume import records
from tests.training.wandb_files import offline_files
from tests.training.wandb_server import WandbServer

BUSY = 10
"""Seconds that starting and ending Python may take on a machine with other work."""

RUN = """
import json, logging, sys, time
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from llmtrain.training.loggers import Loggers
from llmtrain.training.wandb_record import WandbConfig, WandbRecord
from llmtrain.training.run_directory import RunDirectory
config = WandbConfig(mode="online", project="p")
directory = RunDirectory(sys.argv[1])
directory.samples.mkdir(parents=True)
directory.samples_of(30).write_text("a sample, whose table the server is asked about")
logger = Loggers(records=[WandbRecord(directory, config, "n", {"a": 1})])
slowest = 0.0
for step in range(1, 41):
    before = time.perf_counter()
    logger.log({"step": step, "train/loss": 1 / step})
    slowest = max(slowest, time.perf_counter() - before)
    time.sleep(float(sys.argv[2]))
print(json.dumps({"slowest": slowest, "ended": time.time()}), flush=True)
logger.close(0)
"""


@pytest.fixture
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.close()


def environment(server: WandbServer, home: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return {**kept, "HOME": str(home), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0123456789" * 4}


def run(server: WandbServer, path: Path, pause: float) -> subprocess.Popen[bytes]:
    with (path / "printed").open("wb") as printed:
        return subprocess.Popen(
            [sys.executable, "-c", RUN, str(path / "run"), str(pause)],
            stdout=printed, stderr=printed, stdin=subprocess.DEVNULL, env=environment(server, path),
        )  # fmt: skip


def ended(process: subprocess.Popen[bytes], path: Path) -> tuple[float, str]:
    """Seconds from the last step to the end of the process, and what it printed."""
    code, now = process.wait(120), time.time()
    printed = (path / "printed").read_text()
    assert code == 0, printed
    (line,) = [text for text in printed.splitlines() if text.startswith("{")]
    assert json.loads(line)["slowest"] < 5, "a step waited for wandb"
    assert "Traceback" not in printed
    return now - json.loads(line)["ended"], printed


def test_lines_arrive_at_a_server_that_lives(server: WandbServer, tmp_path: Path) -> None:
    _, printed = ended(run(server, tmp_path, 0.05), tmp_path)
    assert [line["step"] for line in server.lines] == list(range(1, 41))
    assert "WARNING" not in printed


PARTS = """
import sys, time
from llmtrain.training.loggers import Loggers
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.wandb_record import WandbConfig, WandbRecord
directory = RunDirectory(sys.argv[1])
directory.samples.mkdir(parents=True)
directory.samples_of(2).write_text("--- prompt 1: 'a'\\nabc\\n")
directory.report.write_text("<p>")
source = {"weight": 1, "share": 1.0, "trained": 5, "epochs": 0.5, "loss": 2.0}
directory.write_json("data.json", {"sources": {"code": source}})
for steps in ((1, 2, 3), (2, 3, 4)):
    logger = Loggers(records=[WandbRecord(directory, WandbConfig(mode=sys.argv[2], project="p"), "n", {})])
    for step in steps:
        line = {"step": step, "train/loss": 1 / step, "train/tokens": 64 * step}
        directory.append_metrics(line)
        logger.log(line)
    logger.close(0)
    time.sleep(1.1)  # wandb names its folders by the second
"""


def parts_of_a_run(server: WandbServer, path: Path, mode: str) -> Path:
    """The directory of a run that two processes recorded, as `PARTS` says."""
    done = subprocess.run(
        [sys.executable, "-c", PARTS, str(path / "run"), mode],
        capture_output=True, text=True, timeout=120, env=environment(server, path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return path / "run"


def test_a_resumed_run_is_one_run_with_every_line_tables_and_the_report(
    server: WandbServer, tmp_path: Path
) -> None:
    run = parts_of_a_run(server, tmp_path, "online")
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert [{key: line[key] for key in lines[0]} for line in server.lines] == lines
    assert [line["_step"] for line in server.lines] == [0, 1, 2, 3, 4, 5]
    (name,) = server.runs
    sent = [(one["artifactTypeName"], one["artifactCollectionName"]) for one in server.artifacts]
    tables = {("run_table", f"run-{name}-{table}") for table in ("samples", "mixture")}
    assert set(sent) == tables | {("report", f"report-{name}")}
    assert sent.count(("report", f"report-{name}")) == 2


def sync(server: WandbServer, home: Path, *paths: Path) -> str:
    """What `wandb sync` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *map(str, paths)],
        capture_output=True, text=True, timeout=120, env=environment(server, home), cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("cut", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_wandb_sync_sends_the_parts_of_a_run_in_turn(server: WandbServer, tmp_path: Path, cut: int) -> None:
    """`cut`: bytes that a kill cost the first part."""
    wandb = parts_of_a_run(server, tmp_path, "offline") / "wandb"
    assert not server.lines
    first, second = offline_files(wandb.parent)
    os.truncate(first, first.stat().st_size - cut)
    printed = sync(server, tmp_path, wandb)
    if cut:
        assert "incomplete record" in printed
        assert [line["_step"] for line in server.lines] == [0, 1, 2]
        sync(server, tmp_path, second)
    assert [line["_step"] for line in server.lines] == [0, 1, 2, 3, 4, 5]
    assert [line["step"] for line in server.lines] == [1, 2, 3, 2, 3, 4]
    assert len(server.runs) == 1


@pytest.mark.parametrize("outage", [pytest.param("die", marks=pytest.mark.slow), "fall_silent"])
def test_an_outage_in_the_middle(server: WandbServer, tmp_path: Path, outage: str) -> None:
    process = run(server, tmp_path, 0.25)
    assert server.began.wait(60)
    getattr(server, outage)()
    seconds, _ = ended(process, tmp_path)
    assert len(server.lines) < 40
    assert seconds < loggers.FINISH_SECONDS + BUSY
    assert list(tmp_path.glob("run/wandb/run-*/run-*.wandb")), "what was not sent is kept"


def test_silence_from_the_start(server: WandbServer, tmp_path: Path) -> None:
    server.fall_silent()
    seconds, printed = ended(run(server, tmp_path, 0.0), tmp_path)
    assert seconds < loggers.FINISH_SECONDS + BUSY
    warnings = [line for line in printed.splitlines() if "WARNING" in line]
    assert sum("wandb records offline" in line for line in warnings) == 1
    assert all("wandb records offline" in line or "wandb did not finish" in line for line in warnings)


@pytest.mark.parametrize("outage", ["fall_silent", pytest.param("die", marks=pytest.mark.slow)])
def test_a_run_trains_the_same(server: WandbServer, ranks, tiny, tmp_path: Path, outage: str) -> None:
    """Silent before it began, or dead in its middle."""
    common = [*tiny, "max_steps=30"]
    ranks.run([*common, f"output_dir={tmp_path}/without"], 1, tmp_path)
    if outage == "fall_silent":
        server.fall_silent()
    job = ranks.start([*common, "logger.wandb.mode=online"], 1, tmp_path, environment(server, tmp_path))
    if outage == "die":
        assert server.began.wait(60), job.output()
        server.die()
    assert job.wait() == [0], job.output()
    assert records(tmp_path / "run") == records(tmp_path / "without")
    assert (tmp_path / "run" / "DONE").exists()
