"""Kill runs and damage checkpoints, many times, and say what came of it as JSON and Markdown.

python -m tests.soak all --output soak.json
python -m tests.soak kills --kills 50 --stages 1,2,3 -- checkpoint.asynchronous=true
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.ranks import RankServer
from tests.soak.damage import detect, fall_back, stock_loads
from tests.soak.kills import MIDDLE, Soak, plan
from tests.soak.recovery import recovery
from tests.soak.stock import unresumable
from tests.soak.tables import markdown
from tests.tiny import tiny_run, write_corpus

LARGER = ["model.d_model=512", "model.d_ff=2048"]
"""8 M parameters: a save of DeepSpeed's takes long enough to be hit."""


class Proofs:
    """What can be shown, each in its own directory."""

    def __init__(self, a: argparse.Namespace, server: RankServer, directory: Path) -> None:
        self._a, self._server, self._directory = a, server, directory
        self._tiny = tiny_run(write_corpus(directory), directory / "cache", directory / "run")

    def kills(self) -> dict[str, Any]:
        """SIGKILL of all ranks, of one, of the launcher; the curve is held against the uninterrupted run."""
        found = {}
        stages: list[int] = self._a.stages
        for stage, count, launchers in zip(
            stages, _shares(self._a.kills, stages), _shares(self._a.launchers, stages), strict=True
        ):
            rng = random.Random(f"{self._a.seed}-{stage}")
            arguments = [*self._tiny, *MIDDLE, f"deepspeed=zero{stage}", f"max_steps={self._a.steps}"]
            soak = Soak(self._server, self._place(f"zero{stage}"), arguments, rng)
            tally = soak.survive(
                plan(count, launchers, rng),
                "checkpoint.every=1",
                *self._a.overrides,
                seconds=60 * self._a.minutes / len(stages),
            )
            found[f"zero{stage}"] = tally.as_dict()
        return found

    def stock(self) -> dict[str, Any]:
        """Kills during a save of the same trainer with DeepSpeed's own checkpoints."""
        arguments = [*self._tiny, *MIDDLE, *LARGER, "deepspeed=zero2", f"max_steps={self._a.steps}"]
        rng = random.Random(self._a.seed)
        return unresumable(self._server, self._place("stock"), arguments, self._a.stock_kills, rng)

    def damage(self) -> dict[str, Any]:
        """Damaged checkpoints: seen here, passed over by real runs, and what torch.load makes of them."""
        place, rng = self._place("damage"), random.Random(self._a.seed)
        run = place / "run"
        words = [*self._tiny, "max_steps=4", "checkpoint.every=2", "deepspeed=zero2", f"output_dir={run}"]
        self._server.run(words, 2, place)
        older, newer = (run / "checkpoints" / f"step_0000000{step}" for step in (2, 4))
        return {
            "detection": detect(older, newer, place, self._a.damages, rng),
            "fall_back": fall_back(self._server, self._place("back"), self._tiny, self._a.fall_backs, rng),
            "torch.load": stock_loads(self._server, self._place("load"), self._tiny, self._a.damages, rng),
        }

    def recovery(self) -> dict[str, Any]:
        """Seconds from a relaunch to the first new step, by part."""
        arguments = [*self._tiny, *MIDDLE, "deepspeed=zero2"]
        rng = random.Random(self._a.seed)
        return recovery(self._server, self._place("recovery"), arguments, self._a.relaunches, rng)

    def _place(self, name: str) -> Path:
        place = self._directory / name
        place.mkdir()
        return place


PROOFS = ("kills", "stock", "damage", "recovery")


def _shares(total: int, parts: list[int]) -> list[int]:
    """The total in nearly equal parts."""
    return [total // len(parts) + (number < total % len(parts)) for number in range(len(parts))]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """What is asked for; overrides come last, after `--` if one likes."""
    top = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    top.add_argument("proof", choices=("all", *PROOFS))
    for name, default, words in (
        ("kills", 50, "kills over all stages"),
        ("launchers", 10, "of these under launch/local.sh"),
        ("steps", 60, "steps of a run, after which another one begins"),
        ("stock-kills", 24, "kills during saves of DeepSpeed's"),
        ("damages", 400, "damaged checkpoints"),
        ("fall-backs", 8, "real runs on damaged checkpoints"),
        ("relaunches", 5, "relaunches that are timed"),
        ("seed", 0, "of the instants and damages"),
    ):
        top.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{words} ({default})")
    words = "after which no more kills begin (as many as it takes)"
    top.add_argument("--minutes", type=float, default=math.inf, metavar="N", help=words)
    stages: Callable[[str], list[int]] = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    top.add_argument("--stages", type=stages, default=[1, 2, 3], metavar="1,2,3", help="of ZeRO")
    top.add_argument("--output", type=Path, metavar="FILE", help="a JSON file with everything")
    top.add_argument("overrides", nargs="*", help="of the runs that are killed")
    return top.parse_intermixed_args(argv)


def main() -> int:
    """Run what was asked for in a directory that is removed at the end."""
    a = arguments()
    logging.getLogger("llmtrain").setLevel(logging.ERROR)  # a line for each damage, else
    server = RankServer()
    report: dict[str, Any] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="llmtrain-soak-") as place:
            proofs = Proofs(a, server, Path(place))
            for name in PROOFS if a.proof == "all" else (a.proof,):
                began = time.monotonic()
                report[name] = getattr(proofs, name)()
                report[f"{name}_seconds"] = time.monotonic() - began
                if a.output is not None:
                    a.output.write_text(json.dumps(report, indent=1) + "\n")
    finally:
        server.close()
    _say(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
