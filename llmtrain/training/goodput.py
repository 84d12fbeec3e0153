"""What the time of a run was spent on, over all the processes that have worked on it, and how often to save.

productive  steps that were trained for the first time
checkpoint  saving, as far as training stands still for it
evaluation  held-out text, samples
stall       waiting for data; the host's wait, which a GPU may hide that still has a step to compute
restart     from the start of a process to its first step: import, prepare, build, verify, load
lost        steps that an earlier process had trained, and that are trained again after its end
idle        between the end of a process and the start of the next one

The parts add up to the wall-clock time since the start of the first process. Rank 0's time stands for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args

Part = Literal["productive", "checkpoint", "evaluation", "stall", "restart", "lost", "idle"]
PARTS: tuple[Part, ...] = get_args(Part)

START = ("import", "prepare", "build", "verify", "load")
"""Phases of a process before its first step."""

PART_OF: dict[str, Part] = {
    **dict.fromkeys(START, "restart"),
    "data": "stall",
    "eval": "evaluation",
    "save": "checkpoint",
}
"""Of the phases that are no part of a step's computation."""

DEVICE_HOURS_BETWEEN_FAILURES = 50_000.0
"""Assumed before the first failure: 419 unexpected ones in 54 days on 16384 GPUs (Llama 3, table 5)."""


@dataclass(frozen=True)
class Account:
    """What a run had spent by `until`, on the wall clock, and the newest step it had trained by then."""

    seconds: Mapping[str, float]
    trained: int
    until: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Goodput:
    """Seconds by part. One thread spends; others may look."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.start: dict[str, float] = dict.fromkeys(START, 0.0)
        """What the start of this process took, by phase."""
        self.trained = 0
        """The newest step that was trained, by any process."""
        self._before = 0

    def spend(self, phase: str, step: int, seconds: float) -> None:
        """So long this process was in a phase of a step."""
        self.seconds[self.part(phase, step)] += seconds
        if phase in self.start:
            self.start[phase] += seconds

    def part(self, phase: str, step: int) -> Part:
        """What time in a phase of a step counts as."""
        return PART_OF.get(phase) or ("lost" if step <= self._before else "productive")

    def go_on(self, before: Account | None, started: float) -> None:
        """Add what processes before this one spent, which started at `started` on the wall clock."""
        if before is None:
            return
        for part in PARTS:
            self.seconds[part] += before.seconds.get(part, 0.0)
        self.seconds["idle"] += max(0.0, started - before.until)
        self.trained = self._before = before.trained

    def as_metrics(self) -> dict[str, float]:
        """The keys of a line of metrics.jsonl."""
        total = sum(self.seconds.values())
        share = self.seconds["productive"] / total if total else 0.0
        return {"goodput/share": share, **{f"goodput/{part}_seconds": self.seconds[part] for part in PARTS}}


def account_before(
    lines: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], heartbeat: Mapping[str, Any]
) -> Account | None:
    """What the files of a run say of its earlier processes; None where there were none.

    The heartbeat of rank 0 is a few seconds old at most when a process dies, the newest line up to
    `log_every` steps; whichever is newer counts.
    """
    accounts = []
    trained = max((line["step"] for line in lines), default=0)
    told = seconds_of(lines)
    start = next((event for event in events if event["event"] in ("start", "resume")), None)
    if told and start:  # a hang, or a checkpoint that was passed over, may have been told before it
        began = datetime.fromisoformat(start["time"]).timestamp() - sum(start["seconds"].values())
        accounts.append(Account(told, trained, began + sum(told.values())))
    if spent := heartbeat.get("goodput"):
        accounts.append(Account(spent, max(trained, heartbeat["trained"]), heartbeat["time"]))
    return max(accounts, key=lambda account: account.total, default=None)


def seconds_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by part as the newest line tells them; nothing where no line does."""
    newest = next((line for line in reversed(lines) if "goodput/share" in line), None)
    return {part: newest[f"goodput/{part}_seconds"] for part in PARTS} if newest else {}


# How often to save


def young(cost: float, between_failures: float) -> float:
    """Seconds between saves that lose least: sqrt(2 cost MTBF).

    J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17 (1974), 530.
    """
    return math.sqrt(2 * cost * between_failures)


def daly(cost: float, between_failures: float) -> float:
    """`young` to higher order, for failures that are frequent against the cost of a save.

    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22 (2006),
    303, eq. 37.
    """
    if cost >= 2 * between_failures:
        return between_failures
    ratio = cost / (2 * between_failures)
    return young(cost, between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def loss_of(interval: float, cost: float, between_failures: float) -> float:
    """The share of time that saves and lost work take, to first order: cost / t + t / (2 MTBF)."""
    return cost / interval + interval / (2 * between_failures)


def failures(events: Sequence[Mapping[str, Any]]) -> int:
    """How many processes ended without saying so: each start counts that comes after no orderly end."""
    count, running = 0, False
    for event in events:
        kind = event.get("event")
        if kind in ("start", "resume"):
            count += running
            running = True
        elif kind in ("end", "signal", "rewind"):
            running = False
    return count


@dataclass(frozen=True)
class Advice:
    """How often to save, from what a save costs and how long the run lasts between failures; in seconds."""

    cost: float
    between_failures: float
    failures: int
    """0: `between_failures` is an assumption."""

    @property
    def young(self) -> float:
        return young(self.cost, self.between_failures)

    @property
    def daly(self) -> float:
        return daly(self.cost, self.between_failures)

    @property
    def loss(self) -> float:
        """The share of time that saving so often loses."""
        return loss_of(self.young, self.cost, self.between_failures)


def advise(events: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]) -> Advice | None:
    """From the events of a run and its seconds by part; None before the first save."""
    costs = [event.get("stall_seconds", event["seconds"]) for event in events if event.get("event") == "save"]
    if not costs or not sum(costs):
        return None
    failed = failures(events)
    if failed:
        between = (sum(seconds.values()) - seconds.get("idle", 0.0)) / failed
    else:
        starts = [event for event in events if event.get("event") in ("start", "resume")]
        ranks = starts[-1].get("ranks", 1) if starts else 1
        between = DEVICE_HOURS_BETWEEN_FAILURES * 3600 / ranks
    return Advice(sum(costs) / len(costs), between, failed)
