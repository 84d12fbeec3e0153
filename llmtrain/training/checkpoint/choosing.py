"""Which checkpoint a run goes on from: the newest that is whole, and never silently none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmtrain import distributed
from llmtrain.config import UserError
from llmtrain.distributed import World
from llmtrain.training.checkpoint.directory import checkpoints
from llmtrain.training.checkpoint.manifest import (
    RECORD,
    DamagedError,
    Manifest,
    damages,
    read_record,
    share,
    verify,
)
from llmtrain.training.run_directory import RunDirectory

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Chosen:
    """A checkpoint of which every byte was verified, and those that were passed over for it."""

    path: Path
    record: Mapping[str, Any]
    rejected: Sequence[DamagedError]


def candidates(resume: str, directory: Path) -> list[Path]:
    """The checkpoints that `resume` may mean, the best first; none where the run begins anew.

    `auto`: those in `directory`, newest first. `never`: none. A path: that checkpoint, or those of that run
    directory. A path says where a run begins; once `directory` has checkpoints of its own, those are meant,
    as a requeue needs it. UserError where it had some, and has none any more.
    """
    if resume == "never":
        return []
    own = _newest_first(directory)
    if not own:
        _check_untrained(resume, directory)
    if own or resume == "auto":
        _refuse_to_lose(resume, own)
        return own
    named = Path(resume)
    found = [named] if (named / RECORD).is_file() else _newest_first(named / "checkpoints")
    if not found:
        beside = [path.name for path in _newest_first(named.parent)]
        way = (
            f"there are {', '.join(beside[:3])}{' and older ones' if len(beside) > 3 else ''}"
            if beside
            else "a path is like runs/name/checkpoints/step_00000100"
        )
        raise UserError(
            f"resume={resume}: neither a checkpoint nor a run directory with one; "
            f"{way}; or use resume=auto or resume=never"
        )
    return found


def find_checkpoint(resume: str, directory: Path) -> Path | None:
    """The first of the `candidates` whose record is as it was written, for a look at the record.

    UserError where there are candidates and none is.
    """
    found, rejected = candidates(resume, directory), []
    for path in found:
        try:
            read_record(path)
        except DamagedError as error:
            rejected.append(error)
            continue
        return path
    _fail_if_none(rejected)
    return None


def choose(
    resume: str,
    directory: Path,
    world: World,
    tick: Callable[[], None] = lambda: None,
) -> Chosen | None:
    """The first of the `candidates` of which every byte is as it was written; collective.

    Ranks share the reading, and call `tick` meanwhile. UserError with every reason where there are candidates
    and none is good.
    """
    found = distributed.broadcast_object(candidates(resume, directory) if world.is_main else None)
    rejected: list[DamagedError] = []
    for path in found:
        manifest = distributed.broadcast_object(_tried(Manifest.read, path) if world.is_main else None)
        if isinstance(manifest, DamagedError):
            wrong = [manifest]
        else:
            mine = damages(path, share(manifest.files, world.rank, world.world_size), tick=tick)
            wrong = [error for errors in distributed.gather_objects(mine) for error in errors]
        if not wrong:
            record = distributed.broadcast_object(_tried(read_record, path) if world.is_main else None)
            if not isinstance(record, DamagedError):
                return Chosen(path, record, rejected)
            wrong = [record]
        rejected.append(wrong[0])
        logger.warning("%s is damaged and passed over: %s: %s", path, wrong[0].file, wrong[0].reason)
    _fail_if_none(rejected)
    return None


def newest_verified(directory: Path) -> Path:
    """The newest checkpoint of which every byte is as it was written, for readers; UserError without one."""
    rejected = []
    for path in _newest_first(directory):
        try:
            _verify_and_read(path)
        except DamagedError as error:
            logger.warning("%s is damaged and passed over: %s: %s", path, error.file, error.reason)
            rejected.append(error)
            continue
        return path
    _fail_if_none(rejected)
    raise UserError(f"{directory.parent}: no checkpoint in it yet")


def verified_checkpoint(checkpoint: Path) -> Path:
    """The checkpoint itself, every byte of it verified; UserError where one is wrong."""
    try:
        _verify_and_read(checkpoint)
    except DamagedError as error:
        raise UserError(f"{error}; choose another checkpoint") from error
    return checkpoint


def _newest_first(directory: Path) -> list[Path]:
    return [path for _, path in reversed(checkpoints(directory))]


def _tried(read: Callable[[Path], T], checkpoint: Path) -> T | DamagedError:
    """What is read, or what is wrong with it, for all ranks to hear."""
    try:
        return read(checkpoint)
    except DamagedError as error:
        return error


def _verify_and_read(checkpoint: Path) -> None:
    """DamagedError unless every byte is as it was written, and the record is one."""
    verify(checkpoint)
    read_record(checkpoint)


def _refuse_to_lose(resume: str, own: Sequence[Path]) -> None:
    """UserError where `resume` names an older checkpoint of the same run."""
    if resume == "auto" or not own:
        return
    named, directory = Path(resume).resolve(), own[0].parent
    if named.parent == directory.resolve() and named != own[0].resolve():
        raise UserError(
            f"resume={resume}: {directory} goes on to {own[0].name}, which would be lost; "
            "give another output_dir to branch off, or use resume=auto"
        )


def _check_untrained(resume: str, directory: Path) -> None:
    """UserError for a run that was trained and saved, and whose checkpoints are not there."""
    run = RunDirectory(directory.parent)
    steps = [line["step"] for line in run.read_metrics() if "step" in line]
    told = run.events.exists()
    if not steps or (told and not any(event["event"] == "save" for event in run.read_events())):
        return
    raise UserError(
        f"{directory}: no checkpoint in it, but the run was trained to step {max(steps)}"
        f"{' and saved' if told else ''}: put its checkpoints back, or "
        f"{'start anew with resume=never' if resume == 'auto' else 'give another output_dir'}"
    )


def _fail_if_none(rejected: Sequence[DamagedError]) -> None:
    if not rejected:
        return
    raise UserError(
        *(f"{error}" for error in rejected),
        f"{rejected[0].path.parent}: none of its checkpoints can be gone on from; put a good one back, "
        "or start anew with resume=never",
    )
