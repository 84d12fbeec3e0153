"""Checkpoints: `<run>/checkpoints/step_00000100/`, complete or invisible.

    engine/           DeepSpeed's files, each rank its part
    rank_00000.pt     that rank's random number states
    checkpoint.json   step, ranks, stage, precision, fingerprints, the state of the data

Everything is written to `.tmp-*`, fsynced by the rank that wrote it, and renamed when every rank is done.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from llmtrain import distributed
from llmtrain.config import Config, UserError
from llmtrain.distributed import World
from llmtrain.files import sync
from llmtrain.training.engine.engine import Engine

REPLACED = ".replaced-"
NAME = re.compile(r"step_(\d{8,})")


class CheckpointConfig(Config):
    """When to save, and how many to keep."""

    every: Annotated[int, Field(gt=0)]
    keep: Annotated[int, Field(gt=0)]


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of the complete checkpoints below `directory`, oldest first."""
    if not directory.is_dir():
        return []
    found = [(NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def read_record(checkpoint: Path) -> dict[str, Any]:
    """What checkpoint.json says; UserError where the directory is not a checkpoint."""
    try:
        return json.loads((checkpoint / "checkpoint.json").read_text())
    except FileNotFoundError as error:
        raise UserError(f"{checkpoint}: not a checkpoint (no checkpoint.json in it)") from error


def find_checkpoint(resume: str, directory: Path) -> Path | None:
    """The checkpoint that `resume` means: the newest in `directory` for `auto`, none for `never`, or a path.

    A path may be a checkpoint or a run directory, which stands for its newest checkpoint. It is where a run
    begins; once `directory` has checkpoints of its own, the newest of those is meant, as a requeue needs it.
    """
    if resume == "never":
        return None
    if resume == "auto":
        found = checkpoints(directory)
        return found[-1][1] if found else None
    named, own = _named(resume), checkpoints(directory)
    if not own or own[-1][1].resolve() == named.resolve():
        return named
    if named.resolve().parent == directory.resolve():
        raise UserError(
            f"resume={resume}: {directory} goes on to {own[-1][1].name}, which would be lost; "
            "give another output_dir to branch off, or use resume=auto"
        )
    return own[-1][1]  # it has begun there already: a job that was requeued


def _named(resume: str) -> Path:
    path = Path(resume)
    if (path / "checkpoint.json").is_file():
        return path
    found = checkpoints(path / "checkpoints")
    if not found:
        raise UserError(
            f"resume={resume}: neither a checkpoint nor a run directory with one; "
            "use resume=auto, resume=never or a path like runs/name/checkpoints/step_00000100"
        )
    return found[-1][1]


def save_checkpoint(directory: Path, engine: Engine, world: World, record: dict[str, Any], keep: int) -> Path:
    """Write the state after step `record["step"]` as a new checkpoint and drop all but the newest `keep`.

    Collective. A checkpoint of that step that stands already is replaced only by the finished new one.
    """
    step = record["step"]
    final = directory / f"step_{step:08d}"
    temporary = directory / f".tmp-step_{step:08d}"
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    distributed.barrier()
    _raise_together(_write(temporary, engine, world, record), temporary, world)
    if world.is_main:
        _publish(temporary, final)
        for _, path in checkpoints(directory)[:-keep]:
            if path != final:
                _remove(path)
    distributed.barrier()
    return final


def _write(temporary: Path, engine: Engine, world: World, record: dict[str, Any]) -> str | None:
    """Write this rank's part and make it durable; returns what went wrong."""
    error = None
    try:
        engine.save(temporary)
        torch.save(_random_states(), temporary / f"rank_{world.rank:05d}.pt")
        if world.is_main:
            (temporary / "checkpoint.json").write_text(json.dumps(record, indent=2))
    except (OSError, RuntimeError) as cause:
        error = f"rank {world.rank}: {cause}"
    distributed.barrier()
    try:
        _fsync_tree(temporary)
    except OSError as cause:
        error = error or f"rank {world.rank}: {cause}"
    return error


def _raise_together(error: str | None, temporary: Path, world: World) -> None:
    """One rank's failure is everybody's: none is left waiting, and nothing half-written stays."""
    errors = [found for found in distributed.gather_objects(error) if found]
    if not errors:
        return
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    raise UserError(
        f"{temporary.parent}: a checkpoint could not be written: {errors[0]}; those before it stand",
        exit_code=1,
    )


def load_checkpoint(checkpoint: Path, engine: Engine, world: World) -> None:
    """Put the engine and this rank's random number generators into the state that `checkpoint` holds.

    Collective. The caller has compared the record with the run.
    """
    engine.load(checkpoint)
    _set_random_states(torch.load(checkpoint / f"rank_{world.rank:05d}.pt", weights_only=True))


def sweep(directory: Path) -> None:
    """Put back what an interrupted replacement moved aside, and remove what else was left behind."""
    for path in directory.glob(f"{REPLACED}*"):
        final = path.with_name(path.name.removeprefix(REPLACED))
        if not final.exists():
            path.rename(final)
    for pattern in (".tmp-*", ".trash-*", f"{REPLACED}*"):
        for path in directory.glob(pattern):
            shutil.rmtree(path)


def _random_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _publish(temporary: Path, final: Path) -> None:
    """Rename into place; a checkpoint that stood there goes only when the new one is durable."""
    replaced = final.with_name(REPLACED + final.name)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _remove(checkpoint: Path) -> None:
    """Renamed first, so that a checkpoint is never seen with half of its files."""
    trash = checkpoint.with_name(f".trash-{checkpoint.name}")
    checkpoint.rename(trash)
    shutil.rmtree(trash)


def _fsync_tree(directory: Path) -> None:
    """Every rank calls it: on a node's own page cache only the node that wrote a file can flush it."""
    for path in [directory, *directory.rglob("*")]:
        sync(path)
