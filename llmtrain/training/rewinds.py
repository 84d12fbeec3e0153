"""Rewinds of a run: back to a commit before a loss spike, past the steps of data that led to it.

PaLM (Chowdhery et al. 2022, section 5.1) went back about 100 steps and left 200 to 500 steps of data out:
the same data did not spike from another state of the model. DeepSpeed cannot load a second checkpoint in one
process under ZeRO-3, so a run writes down what it decided and ends, and the next start carries it out. Once
`rewinds.json` is written its decisions hold for ever: every start replays them.

A checkpoint says how many rewinds its history holds. One that is later than the commit of a rewind that it
does not know is stale: the run never came to it. It is taken out of sight before a checkpoint is chosen, and
removed when the new branch has a commit of its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from llmtrain.config import UserError
from llmtrain.data.dataset import PackedDataset
from llmtrain.training.checkpoint import DamagedError, checkpoints, hide, read_record
from llmtrain.training.run_directory import RunDirectory, write_atomically

logger = logging.getLogger(__name__)

FILE = "rewinds.json"

Stretch = tuple[int, int]


@dataclass(frozen=True)
class Rewind:
    """From the spike at a step back to the commit `to`, 0: the start; z-scores as in spikes.py.

    skip: [first, last], steps of the order of the data (see data/dataset.py) that are left out from then on.
    """

    spike: int
    to: int
    skip: Stretch
    loss_z: float | None
    grad_norm_z: float | None


def read_rewinds(directory: RunDirectory) -> list[Rewind]:
    """The rewinds of a run, oldest first."""
    found = directory.read_json(FILE) or []
    try:
        return [Rewind(**{**one, "skip": (one["skip"][0], one["skip"][1])}) for one in found]
    except (TypeError, KeyError, IndexError) as error:
        raise UserError(
            f"{directory.path / FILE}: not what llmtrain wrote ({error}); put it back as it was"
        ) from None


def write_rewinds(directory: RunDirectory, rewinds: Sequence[Rewind]) -> None:
    """Replace the file durably: after a crash it is the old one or the new one."""
    text = json.dumps([asdict(rewind) for rewind in rewinds], indent=2) + "\n"
    write_atomically(directory.path / FILE, text, durable=True)


def choose_rewind(
    step: int,
    zs: tuple[float | None, float | None],
    commits: Iterable[int],
    start: int,
    dataset: PackedDataset,
    rewind_steps: int,
    skip_steps: int,
) -> Rewind:
    """Where a run that began at `start` goes back to after a spike at `step`, and what data it leaves out.

    The newest commit at least `rewind_steps` before the spike, else the oldest one before it, else the start.
    `skip_steps` steps of data are left out from there on, and all of them up to the spike at least.
    """
    before = sorted(commit for commit in commits if commit < step)
    far = [commit for commit in before if commit <= step - rewind_steps]
    to = far[-1] if far else before[0] if before else start
    last = max(step, to + skip_steps)
    return Rewind(step, to, (dataset.data_step(to + 1), dataset.data_step(last)), *zs)


def merged(stretches: Iterable[Sequence[int]]) -> list[Stretch]:
    """Stretches of steps, ascending and apart, of those that may overlap."""
    found: list[Stretch] = []
    for first, last in sorted((first, last) for first, last in stretches):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def hide_stale(directory: Path, rewinds: Sequence[Rewind]) -> None:
    """Take the checkpoints in `directory` that the run never came to out of sight; those damaged stay."""
    for step, path in checkpoints(directory) if rewinds else ():
        with suppress(DamagedError):  # nobody will choose it
            known = read_record(path).get("rewinds", 0)
            if any(step > rewind.to for rewind in rewinds[known:]):
                hide(path)
                logger.info("%s is from before the rewind to step %d", path.name, rewinds[-1].to)
