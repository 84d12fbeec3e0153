"""What a run is doing, or what became of it, from the files of its directory alone.

starting   a process holds the lock and does not train yet
running    its ranks move
hung       a rank has not moved for `hang_timeout`, or the job ended itself because of that
finished   the last step is done: DONE
stopped    it was asked to stop; the same command goes on
failed     an error ended it: crash-rank*.json
dead       it ended without a word, by SIGKILL or with its machine
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llmtrain.training.checkpoint import checkpoints
from llmtrain.training.checkpoint.manifest import MANIFEST
from llmtrain.training.crashes import FILES
from llmtrain.training.goodput import PARTS, START, Part, account_before
from llmtrain.training.hang import Vital, verdict
from llmtrain.training.report import by_step
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.words import count

State = Literal["starting", "running", "hung", "finished", "stopped", "failed", "dead"]
TROUBLE: tuple[State, ...] = ("hung", "failed", "dead")

PATIENCE = 600.0
"""Seconds without a move after which ranks count as hung where `hang_timeout` is null."""

MOST_EVENTS = 5
PACE_LINES = 50
"""Logged steps whose pace tells the time left."""

BEGINS, ENDS = ("start", "resume"), ("end", "signal", "rewind", "hang")
"""Events that begin the work of a process, and those with which one says that it ends."""

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """The newest one."""

    step: int
    path: str
    age_seconds: float


@dataclass(frozen=True)
class Status:
    """What there is to say of a run; what is not known is None."""

    run: str
    state: State
    why: str
    """The state in one sentence."""
    step: int
    """The newest logged one."""
    max_steps: int | None
    tokens: int | None
    loss: float | None
    tokens_per_second: float | None
    mfu: float | None
    seconds_left: float | None
    """Of a run that is at work, at the pace of late with all that is between the steps."""
    checkpoint: Checkpoint | None
    owner: Mapping[str, Any] | None
    """Who holds the lock."""
    goodput: Mapping[str, float] | None
    """Share of the time by what it was spent on."""
    events: Mapping[str, int]
    """How many of each kind."""
    newest_events: Sequence[Line]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def status_of(run: Path) -> Status:
    """Look at a run directory, whatever has become of it; writes nothing. UserError where there is no run."""
    directory = RunDirectory(run)
    owner = directory.owner()
    config = {} if owner is not None and not directory.config.exists() else directory.read_config()
    beats = _heartbeats(directory.starting) or _heartbeats(directory.heartbeats)
    lines, events = by_step(directory.newest_metrics()), directory.read_events()
    patience = config.get("hang_timeout") or PATIENCE
    if owner is None:
        state, why = _ended(directory, config, events, beats)
    else:
        state, why = _at_work(owner, beats, patience)
    last = lines[-1] if lines else {}
    account = account_before(lines, events, beats.get(0, {}))
    return Status(
        run=str(run),
        state=state,
        why=why,
        step=last.get("step", 0),
        max_steps=config.get("max_steps"),
        tokens=last.get("train/tokens"),
        loss=last.get("train/loss"),
        tokens_per_second=last.get("perf/tokens_per_second"),
        mfu=last.get("perf/mfu"),
        seconds_left=_seconds_left(lines, config["max_steps"]) if state == "running" and lines else None,
        checkpoint=_newest(directory),
        owner=owner,
        goodput={part: spent / account.total for part, spent in account.seconds.items()} if account else None,
        events=dict(Counter(event["event"] for event in events)),
        newest_events=events[-MOST_EVENTS:],
    )


def _heartbeats(directory: Path) -> dict[int, Line]:
    """What each rank wrote there last, of whatever job."""
    beats: dict[int, Line] = {}
    for file in sorted(directory.glob("rank_*.json")):
        with suppress(OSError, ValueError):  # one that its rank replaces, or removes, at this moment
            beat = json.loads(file.read_text(encoding="utf-8"))
            beats[beat["rank"]] = beat
    return beats


def _at_work(owner: Line, beats: Mapping[int, Line], patience: float) -> tuple[State, str]:
    """What the process does that holds the lock, and whether every rank of its job moves."""
    first = beats.get(0)
    if first is None or first["pid"] != owner.get("pid", first["pid"]):
        return "starting", "a process has the lock and no rank has moved yet"
    vitals, now = [], time.time()
    for beat in beats.values():
        if beat["job"] == first["job"]:
            answers = now - beat["time"] < patience / 2
            vitals.append(Vital.of(beat["rank"], {**beat, "answers": answers}, now))
    if max(vital.seconds for vital in vitals) > patience:
        return "hung", verdict(vitals)
    state: State = "starting" if first["phase"] in START else "running"
    return state, f"in {vitals[0].place}, {count(len(vitals), 'rank')}"


def _ended(
    directory: RunDirectory, config: Line, events: Sequence[Line], beats: Mapping[int, Line]
) -> tuple[State, str]:
    """What the last process came to."""
    if directory.done.exists():
        return "finished", f"done at {directory.done.read_text(encoding='utf-8').strip()}"
    began = next((event["time"] for event in reversed(events) if event["event"] in BEGINS), "")
    if crash := _crash(directory, since=began):
        message = crash["message"].partition("\n")[0]
        return "failed", f"rank {crash['rank']} on host {crash['host']}: {crash['type']}: {message}"
    lasts = {config.get("max_steps"), *(event["step"] for event in events if event["event"] == "early_stop")}
    if events and events[-1]["event"] == "save_failed" and events[-1]["step"] in lasts:
        return "failed", "the last step could not be saved; the same command goes on"
    last = next((event for event in reversed(events) if event["event"] in (*BEGINS, *ENDS)), None)
    if last is None:
        return "dead", "no process is at work, and none has trained yet"
    match last["event"]:
        case "hang":
            return "hung", f"{last['verdict']}; the job ended itself"
        case "end":
            return "failed", "every step is saved; DONE could not be written, which the same command does"
        case "rewind":
            return "stopped", "to go back before a loss spike; the same command does"
        case "signal":
            return "stopped", f"by {last['signal']} after step {last['step']}; the same command goes on"
    where = f", last heard of in {Vital.of(0, beats[0], now=0).place}" if 0 in beats else ""
    return "dead", f"ended without a word{where}; the same command goes on"


def _crash(directory: RunDirectory, since: str) -> Line | None:
    """What the rank failed of that failed first, of those that failed since a time (ISO 8601, UTC)."""
    crashes = [directory.read_json(file.name) for file in directory.path.glob(FILES)]
    found = [crash for crash in crashes if crash and crash["time"] >= since]
    return min(found, key=lambda crash: (crash["secondary"], crash["time"]), default=None)


def _seconds_left(lines: Sequence[Line], max_steps: int) -> float | None:
    """At the pace of the newest lines of this process, evaluations and saves included; None before a step.

    A line that has only an evaluation, of a checkpoint that a run begins from, is no step.
    """
    lines = [line for line in lines if "perf/step_seconds" in line]
    if not lines:
        return None
    last = lines[-1]

    def spent(line: Line, *parts: Part) -> float:
        return sum(line[f"goodput/{part}_seconds"] for part in parts)

    here = spent(last, "restart", "idle")
    first = next(line for line in lines[-PACE_LINES:] if spent(line, "restart", "idle") == here)
    steps = last["step"] - first["step"]
    pace = (spent(last, *PARTS) - spent(first, *PARTS)) / steps if steps else last["perf/step_seconds"]
    return max(0, max_steps - last["step"]) * pace


def _newest(directory: RunDirectory) -> Checkpoint | None:
    for step, path in reversed(checkpoints(directory.checkpoints)):
        with suppress(FileNotFoundError):  # the run may remove one at any time
            age = time.time() - (path / MANIFEST).stat().st_mtime
            return Checkpoint(step, str(path), max(0.0, age))
    return None
