"""What every door does around its work: logging, one line for a mistake, an exit code."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence

from llmtrain.config.errors import UserError
from llmtrain.distributed import World

SECONDS_FOR_RANK_0 = 3.0
"""How long the other ranks wait with a mistake: launchers end all ranks when the first one exits."""

INTERRUPTED = 130


def plain_door(run: Callable[[], int | None]) -> int:
    """Calls `run` and returns the process's exit code; a mistake (UserError) is printed once, by rank 0."""
    return rank_door(lambda _: run())


def rank_door(run: Callable[[World], int | None]) -> int:
    """`plain_door` for work that wants to know its rank."""
    world = World()
    try:
        world = World.from_environment()
        _set_up_logging(world)
        return int(run(world) or 0)
    except UserError as error:
        return _report(error.lines, error.exit_code, world)
    except KeyboardInterrupt:
        return _report(["interrupted"], INTERRUPTED, world)


def _report(lines: Sequence[str], exit_code: int, world: World) -> int:
    """Rank 0 prints in one write; the others stay until it must have happened."""
    if world.is_main:
        sys.stderr.write("".join(f"error: {line}\n" for line in lines))
        sys.stderr.flush()
    elif exit_code != INTERRUPTED:
        time.sleep(SECONDS_FOR_RANK_0)
    return exit_code


def _set_up_logging(world: World) -> None:
    """Our own notes from rank 0, warnings from everybody, on standard error."""
    prefix = "" if world.is_main else f"[rank {world.rank}] "
    logging.basicConfig(format=f"{prefix}%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("llmtrain").setLevel(logging.INFO if world.is_main else logging.WARNING)
