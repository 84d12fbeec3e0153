"""What a checkpoint costs: `llmtrain bench save`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.benchmarks.data import machine
from llmtrain.benchmarks.measure import FailedError, Result, markdown, medians, number
from llmtrain.benchmarks.save_turns import RESULT
from llmtrain.distributed import free_port, visible_accelerators

RANKS = 2
TURNS = "llmtrain.benchmarks.save_turns"
LIMIT = 1800.0
"""Seconds that the turns of one size may take."""
NAMES = {
    "raw": "write + fsync of the same bytes",
    "verified": "llmtrain",
    "asynchronous": "llmtrain, asynchronous",
    "stock_durable": "DeepSpeed + fsync of its files",
    "stock": "DeepSpeed",
}
FLOOR = "stock_durable"
"""What ratios refer to: as durable as ours."""


def compare_saves(sizes: Sequence[int], stage: int, rounds: int, directory: Path | None) -> dict[str, Any]:
    """Medians of every way and size, by two ranks; files are made below `directory` and removed."""
    report: dict[str, Any] = {"machine": machine(), "stage": stage, "rounds": rounds, "sizes": []}
    for megabytes in sizes:
        with tempfile.TemporaryDirectory(prefix="llmtrain-bench-", dir=directory) as place:
            found = _run_ranks(Path(place), megabytes, stage, rounds)
        ways = {name: medians(turns) | {"rounds": turns} for name, turns in found["ways"].items()}
        floor = ways[FLOOR]["total_s"]
        for way in ways.values():
            way |= {"ratio": way["total_s"] / floor, "stall_ratio": way["stall_s"] / floor}
        report["sizes"].append({"parameters": found["parameters"], "ways": ways})
    return report


def _run_ranks(place: Path, megabytes: int, stage: int, rounds: int) -> Result:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(RANKS)}
    if visible_accelerators() < RANKS:
        shared |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    words = [sys.executable, "-m", TURNS, str(place), str(megabytes), str(stage), str(rounds)]
    processes = []
    for rank in range(RANKS):
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(RANKS)}
        with (place / f"output{rank}.txt").open("wb") as output:
            processes.append(
                subprocess.Popen(
                    words, env=os.environ | shared | mine, stdout=output, stderr=subprocess.STDOUT
                )
            )
    try:
        _await(processes, time.monotonic() + LIMIT)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, process in enumerate(processes):
        if process.returncode:
            said = (place / f"output{rank}.txt").read_text(errors="replace").strip() or "no message"
            raise FailedError(f"{megabytes} MB, rank {rank}: {said.splitlines()[-1]}")
    found: Result = json.loads((place / RESULT).read_text())
    return found


def _await(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> None:
    """Until all have ended, or one has failed."""
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes) or time.monotonic() > deadline:
            return
        time.sleep(0.05)


def saves_table(report: dict[str, Any]) -> str:
    """The comparison as Markdown: medians, and what they are of DeepSpeed's save with fsync."""
    headings = ("parameters", "way", "MB", "standstill, s", "until durable, s", "ratio", "standstill, ratio")
    rows = [
        [
            f"{size['parameters']:,}", NAMES[name], number(way["mb"]), number(way["stall_s"]),
            "-" if name == "stock" else number(way["total_s"]),
            f"{way['ratio']:.2f}", f"{way['stall_ratio']:.2f}",
        ]
        for size in report["sizes"]
        for name, way in size["ways"].items()
    ]  # fmt: skip
    return markdown(headings, rows)
