"""Kill runs and damage checkpoints, many times, and say what came of it as JSON and Markdown.

python -m tests.soak kills --kills 50 --stages 1,2,3
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.ranks import RankServer
from tests.soak.kills import MIDDLE, Soak, plan
from tests.tiny import tiny_run, write_corpus


def kills(a: argparse.Namespace, server: RankServer, directory: Path, tiny: list[str]) -> dict[str, Any]:
    """SIGKILL of all ranks, of one, of the launcher; the curve is held against the uninterrupted run."""
    found = {}
    for stage, count, launchers in zip(
        a.stages, _shares(a.kills, a.stages), _shares(a.launchers, a.stages), strict=True
    ):
        rng = random.Random(f"{a.seed}-{stage}")
        arguments = [*tiny, *MIDDLE, f"deepspeed=zero{stage}", f"max_steps={a.steps}"]
        soak = Soak(server, directory / f"zero{stage}", arguments, rng)
        tally = soak.survive(plan(count, launchers, rng), "checkpoint.every=1", *a.overrides)
        found[f"zero{stage}"] = tally.as_dict()
        _say(f"zero{stage}: {json.dumps(found[f'zero{stage}'])}")
    return found


def _shares(total: int, parts: list[int]) -> list[int]:
    """The total in nearly equal parts."""
    return [total // len(parts) + (number < total % len(parts)) for number in range(len(parts))]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """Run one proof in a directory that is removed at the end."""
    top = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    top.add_argument("proof", choices=("kills",))
    top.add_argument("--kills", type=int, default=50)
    top.add_argument("--launchers", type=int, default=10, help="of the kills, so many under launch/local.sh")
    top.add_argument("--stages", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 3])
    top.add_argument("--steps", type=int, default=60, help="of a run before another one begins")
    top.add_argument("--seed", type=int, default=0, help="of the instants")
    top.add_argument("--output", type=Path, help="a JSON file")
    top.add_argument(
        "overrides", nargs="*", help="of the runs that are killed, such as checkpoint.asynchronous=true"
    )
    a = top.parse_args()
    server = RankServer()
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="llmtrain-soak-") as place:
            directory = Path(place)
            tiny = tiny_run(write_corpus(directory), directory / "cache", directory / "run")
            report = {a.proof: kills(a, server, directory, tiny), "seconds": time.monotonic() - began}
    finally:
        server.close()
    if a.output is not None:
        a.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
