"""The checkpoints of a run as rows of a table, read cheaply or to the last byte; and what may go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtrain.config import UserError
from llmtrain.training.checkpoint.best import best_step
from llmtrain.training.checkpoint.directory import (
    ABANDONED,
    FEWEST,
    TEMPORARY,
    TRASH,
    checkpoints,
    delete,
    remove,
    retained,
)
from llmtrain.training.checkpoint.manifest import DamagedError, Manifest, damages, raise_first, read_record
from llmtrain.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Row:
    """A checkpoint; `damage` is empty where nothing is wrong, as far as was read."""

    step: int
    path: str
    bytes: int
    ranks: int | None
    stage: int | None
    precision: str | None
    damage: str
    best: bool
    """Whether the run marked it as the best."""

    def as_dict(self) -> dict[str, Any]:
        """For a line of JSON."""
        return asdict(self)


def inspect(directory: Path, *, content: bool) -> Iterator[Row]:
    """A row a checkpoint, oldest first: names and sizes compared, with `content` every byte.

    One that the run removes meanwhile, because there are newer ones, is left out.
    """
    best = best_step(RunDirectory(directory.parent))
    for step, path in checkpoints(directory):
        record, damage = {}, ""
        try:
            record = read_record(path)
            raise_first(damages(path, Manifest.read(path).files, content=content))
        except DamagedError as error:
            damage = f"{error.file}: {error.reason}"
        size = _size(path)
        if size is None:
            continue
        yield Row(
            step=step,
            path=str(path),
            bytes=size,
            ranks=record.get("world_size"),
            stage=record.get("stage"),
            precision=record.get("precision"),
            damage=damage,
            best=step == best,
        )


def _size(checkpoint: Path) -> int | None:
    """Bytes of all its files; None where it is gone by now."""
    with suppress(FileNotFoundError):
        size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        checkpoint.stat()
        return size
    return None


def leftovers(directory: Path) -> list[Path]:
    """What interrupted saves and removals left behind, and checkpoints that a run went back behind."""
    return sorted(path for start in (TEMPORARY, TRASH, ABANDONED) for path in directory.glob(f"{start}*"))


def prunable(rows: Sequence[Row], keep: int, keep_every: int | None) -> list[Row]:
    """Of rows whose every byte was read, those that need not stay: damaged ones, and older ones but the best.

    UserError where fewer than two are whole: then each may be needed.
    """
    whole = [row.step for row in rows if not row.damage]
    if len(whole) < min(FEWEST, len(rows)):
        raise UserError(
            f"{Path(rows[0].path).parent}: {len(whole)} of {len(rows)} checkpoints are whole, and at least "
            f"{FEWEST} always stay; nothing is removed"
        )
    best = next((row.step for row in rows if row.best), None)
    stay = retained(whole, whole, keep, keep_every, best)
    return [row for row in rows if row.step not in stay]


def prune(directory: Path, rows: Sequence[Row]) -> None:
    """Remove these checkpoints, and what was left behind."""
    for row in rows:
        remove(Path(row.path))
    for path in leftovers(directory):
        delete(path)
