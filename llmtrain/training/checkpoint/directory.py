"""The checkpoints of a run as directories: which there are, which stay, and how they come and go."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from llmtrain.files import sync
from llmtrain.training.checkpoint.manifest import MANIFEST, Manifest, Stamp, directory_name

logger = logging.getLogger(__name__)

TEMPORARY, TRASH, ABANDONED = ".tmp-", ".trash-", ".abandoned-"
NAME = re.compile(r"step_(\d{8,})")
FEWEST = 2
"""Verified checkpoints that nothing ever removes."""


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of the complete checkpoints below `directory`, oldest first."""
    if not directory.is_dir():
        return []
    found = [(NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def publish(temporary: Path, step: int, files: dict[str, Stamp]) -> Path:
    """Make files that are durable in `temporary` the checkpoint of `step`, seen whole or not at all.

    An OSError leaves `temporary` as it is, and no checkpoint.
    """
    Manifest(step, files).write(temporary)
    sync(temporary / MANIFEST)
    sync(temporary)
    final = temporary.with_name(directory_name(step))
    temporary.rename(final)
    try:
        sync(final.parent)
        sync(final.parent.parent)  # the first checkpoint makes the directory of all
    except OSError:
        final.rename(temporary)
        raise
    return final


def retained(
    steps: Sequence[int],
    verified: Collection[int],
    keep: int,
    keep_every: int | None,
    best: int | None = None,
) -> set[int]:
    """Steps that stay: the newest `keep`, every `keep_every`-th, the newest two verified ones, the best."""
    ordered = sorted(steps)
    trusted = [step for step in ordered if step in verified]
    for_ever = {step for step in ordered if keep_every and step % keep_every == 0}
    return {*ordered[-keep:], *trusted[-FEWEST:], *for_ever, *(step for step in ordered if step == best)}


def retire(
    directory: Path, verified: Collection[int], keep: int, keep_every: int | None, best: int | None = None
) -> list[Path]:
    """Remove what need not stay, now that there is a newer checkpoint; returns it."""
    found = checkpoints(directory)
    stay = retained([step for step, _ in found], verified, keep, keep_every, best)
    gone = [path for step, path in found if step not in stay]
    for path in gone:
        remove(path)
    for path in directory.glob(f"{ABANDONED}*"):
        delete(path)
    return gone


def abandon(directory: Path, after: int) -> None:
    """Take checkpoints of steps after `after` out of sight: the run goes on from there, and passes them anew.

    They were damaged, or a rewind left them behind; the next checkpoint removes them for good.
    """
    for step, path in checkpoints(directory):
        if step > after:
            hide(path)


def hide(checkpoint: Path) -> None:
    """Take one checkpoint out of sight, as `abandon` does."""
    aside = checkpoint.with_name(ABANDONED + checkpoint.name)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def remove(checkpoint: Path) -> None:
    """Renamed first, so that a checkpoint is never seen with half of its files."""
    trash = checkpoint.with_name(TRASH + checkpoint.name)
    checkpoint.rename(trash)
    shutil.rmtree(trash)


def sweep(directory: Path) -> None:
    """Remove what saves and removals that were interrupted left behind; no run ends for what has to stay."""
    for pattern in (f"{TEMPORARY}*", f"{TRASH}*"):
        for path in directory.glob(pattern):
            try:
                delete(path)
            except OSError as error:  # NFS keeps a file that a process somewhere has open
                logger.warning("%s: what an interrupted save left could not be removed: %s", path, error)


def delete(path: Path) -> None:
    """Remove a file, or a directory with all that is in it; of a link only the link."""
    path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
