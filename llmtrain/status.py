"""Say what a run is doing, or what became of it: llmtrain status runs/mine.

llmtrain status runs/mine          step, loss, speed, time left, last checkpoint, events, who is at work
llmtrain status runs/* --json      a line of JSON a run

Only reads, also beside a run and on another machine. Ends with 1 where a run is hung, failed or dead, else 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.config.door import Parser, plain_door
from llmtrain.config.table import print_lines

if TYPE_CHECKING:
    from llmtrain.training.status import Status

UNWELL = 1


def describe(status: Status) -> Iterator[tuple[str, str]]:
    """(name, words) of everything that is known."""
    from llmtrain.training.words import percent, short, span

    most = status.max_steps
    step = f"{status.step:,}" + (f" of {most:,} ({percent(status.step / most)})" if most else "")
    yield "step", step if status.seconds_left is None else f"{step}, {span(status.seconds_left)} left"
    if status.tokens is not None:
        yield "tokens", short(status.tokens)
        yield "loss", "not finite" if status.loss is None else f"{status.loss:.4f}"
    if status.tokens_per_second is not None:
        mfu = "" if status.mfu is None else f", {percent(status.mfu)} MFU"
        yield "speed", f"{short(status.tokens_per_second)} tok/s{mfu}"
    if (saved := status.checkpoint) is None:
        yield "checkpoint", "none yet"
    else:
        yield "checkpoint", f"step {saved.step:,}, {span(saved.age_seconds)} old: {saved.path}"
    if status.goodput:
        parts = sorted(status.goodput.items(), key=lambda part: -part[1])
        yield "time", ", ".join(f"{percent(share)} {part}" for part, share in parts if share >= 0.0005)
    if (owner := status.owner) is not None:
        known = {"pid", "host", "started"} <= set(owner)
        who = f"process {owner['pid']} on {owner['host']} since {owner['started']}" if known else "a process"
        yield "lock", who
    else:
        yield "lock", "nobody is at work"
    yield "events", ", ".join(f"{number} {kind}" for kind, number in status.events.items()) or "none"


def show(status: Status) -> None:
    """Print it for people."""
    print_lines(f"{status.run}: {status.state}, {status.why}")
    print_lines(*(f"  {name:<11} {words}" for name, words in describe(status)))
    for event in status.newest_events:
        step = f"step {event['step']:,}" if "step" in event else ""
        print_lines(f"    {event['time'][:19].replace('T', ' ')}  {event['event']:<11} {step}".rstrip())


def status(runs: Sequence[Path], *, as_json: bool) -> int:
    """Look at each; the exit code."""
    from llmtrain.training.status import TROUBLE, status_of

    found = []
    for run in runs:
        found.append(status_of(run))
        if as_json:
            sys.stdout.write(json.dumps(found[-1].as_dict(), ensure_ascii=False) + "\n")
        else:
            show(found[-1])
    return UNWELL if any(one.state in TROUBLE for one in found) else 0


def main(argv: list[str] | None = None) -> int:
    """The door of `llmtrain status`."""
    parser = Parser(
        prog="llmtrain status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="+", help="a run directory, whatever has become of it")
    parser.add_argument("--json", action="store_true", help="a line of JSON a run")
    a = parser.parse_args(argv)
    return plain_door(lambda: status(a.run, as_json=a.json))


if __name__ == "__main__":
    raise SystemExit(main())
