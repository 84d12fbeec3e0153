"""How long a run that was killed takes until its first new step, by part, under the real launcher."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests.ranks import RankServer
from tests.soak.lives import RANKS, Kill, Life


def recovery(
    server: RankServer, directory: Path, arguments: Sequence[str], count: int, rng: random.Random
) -> dict[str, Any]:
    """Relaunch a killed run so many times; medians of seconds by part."""
    run = directory / "recovered"
    words = [*arguments, f"output_dir={run}", "checkpoint.every=3"]
    server.run([*words, "max_steps=3"], RANKS, directory)
    words = [*words, "max_steps=1000"]
    found = [_relaunch(server, directory / f"relaunch{number}", words, run, rng) for number in range(count)]
    return {part: median(times[part] for times in found) for part in found[0]} | {"relaunches": found}


def _relaunch(
    server: RankServer, place: Path, arguments: Sequence[str], run: Path, rng: random.Random
) -> dict[str, float]:
    began = time.monotonic()
    life = Life(server, arguments, run, place, launcher=True)
    assert life.until(life.stepped), life.output()
    total = time.monotonic() - began
    life.kill(Kill("all", "step", launcher=True), rng)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    parts = next(event for event in reversed(events) if event["event"] == "resume")["seconds"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    step = lines[life.lines]["perf/step_seconds"]
    return {**parts, "first step": step, "launcher": total - sum(parts.values()) - step, "total": total}
