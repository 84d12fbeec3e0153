"""What follows a step that was not like the others: its documents are named, and a spike is rewound."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from typing import Any, NoReturn

from llmtrain import distributed
from llmtrain.config import ExitCode, UserError
from llmtrain.data.provenance import row_of
from llmtrain.training.build import Run
from llmtrain.training.checkpoint import checkpoints
from llmtrain.training.engine.transfer import StepResult
from llmtrain.training.rewinds import Rewind, choose_rewind, hide_stale, write_rewinds
from llmtrain.training.saves import report
from llmtrain.training.spikes import Verdict
from llmtrain.training.where import document_at

logger = logging.getLogger(__name__)

MOST_ROWS = 64
"""Rows of a step whose documents an event names: not finite ones first, then those of the highest loss."""


def tell(run: Run, step: int, result: StepResult, verdict: Verdict) -> None:
    """Write down what a step was, with its documents and the losses of its rows; collective."""
    mine = result.row_losses.tolist(), result.row_targets.tolist()
    ranks = distributed.gather_objects(mine)
    if not run.world.is_main:
        return
    losses = {
        row: loss / targets
        for row, (loss, targets) in enumerate(pair for rank in ranks for pair in zip(*rank, strict=True))
        if targets
    }
    worst = sorted(losses, key=lambda row: (math.isfinite(losses[row]), -losses[row]))[:MOST_ROWS]
    rows: list[dict[str, Any]] = [
        {"row": row, "loss": losses[row], "source": "", "documents": []} for row in worst
    ]
    try:
        for row in rows:
            row |= _origin(run, step, row["row"])
    except (OSError, UserError) as error:  # shards that were let go again may be out of reach by now
        logger.warning("not all documents of step %d can be named: %s", step, error)
    run.directory.append_event(
        verdict.kind,
        step=step,
        reason=f"{_spoilt(result)} not finite" if verdict.kind == "skip" else "above its threshold",
        applied=result.applied,
        loss=result.loss,
        grad_norm=result.grad_norm,
        loss_z=verdict.loss_z,
        grad_norm_z=verdict.grad_norm_z,
        rows=rows,
    )
    logger.warning("step %d %s; its worst row: %s", step, _words(result, verdict), _first(rows))


def _origin(run: Run, step: int, row: int) -> dict[str, Any]:
    """The source of a row and its documents, by file and position."""
    origin = row_of(run.dataset, step, row)
    source = run.train_sources[origin.source]
    documents = []
    for span in origin.documents:
        tokens = {"first_token": span.start, "last_token": span.stop - 1}
        documents.append({**document_at(source, span.shard, span.document), **tokens})
    return {"source": origin.source, "documents": documents}


def _words(result: StepResult, verdict: Verdict) -> str:
    if verdict.kind == "skip":
        return f"left out: its {_spoilt(result)} is not finite"
    left_out = "" if result.applied else ", left out"
    return (
        f"is a spike{left_out}: loss {result.loss:.4f} (z {verdict.loss_z:.1f}), "
        f"gradient norm {result.grad_norm:.3g} (z {verdict.grad_norm_z:.1f})"
    )


def _spoilt(result: StepResult) -> str:
    """What of a step is not finite: gradients of a loss that is not are not, either."""
    return "gradient" if math.isfinite(result.loss) else "loss"


def _first(rows: list[dict[str, Any]]) -> str:
    """The row to look at first, in words."""
    if not rows:
        return "none has a target"
    row = rows[0]
    files = ", ".join(dict.fromkeys(document["file"] for document in row["documents"]))
    return f"{row['row']} of {row['source']}, loss {row['loss']:.4f} ({files})"


def rewind(run: Run, step: int, verdict: Verdict) -> NoReturn:
    """Decide where to go back to, write it down durably, and end the process with exit code 89; collective.

    After `max_rewinds` the run ends with 87 instead.
    """
    config = run.config.spikes
    if len(run.rewinds) >= config.max_rewinds:
        if run.world.is_main:
            report(run)
        raise UserError(
            f"step {step} is a spike after {len(run.rewinds)} rewinds, and spikes.max_rewinds="
            f"{config.max_rewinds}: lower optimizer.lr (and resume_changes=[optimizer.lr]), look at the "
            "documents in events.jsonl, or go on with spikes.action=log",
            exit_code=ExitCode.NON_FINITE,
        )
    run.saver.join()
    decided = distributed.broadcast_object(_decide(run, step, verdict) if run.world.is_main else None)
    if isinstance(decided, OSError):
        raise UserError(
            f"step {step} is a spike, and its rewind could not be written down: {decided}; make room: the "
            "same command comes to it again",
            exit_code=1,
        )
    near = ""
    if step - decided.to < config.rewind_steps:
        near = f", nearer than spikes.rewind_steps={config.rewind_steps}: there is none older"
    first, last = decided.skip
    again = "resume=auto" if run.config.resume == "never" else "the same command"
    raise UserError(
        f"step {step} is a spike: back to step {decided.to}{near}; past steps {first} to {last} of the data; "
        f"{again} goes on from there",
        exit_code=ExitCode.REWIND,
    )


def _decide(run: Run, step: int, verdict: Verdict) -> Rewind | OSError:
    """Choose a rewind and make it the run's; the error where the disk refuses."""
    config, directory = run.config.spikes, run.directory
    chosen = choose_rewind(
        step,
        (verdict.loss_z, verdict.grad_norm_z),
        [commit for commit, _ in checkpoints(directory.checkpoints)],
        run.began,
        run.dataset,
        config.rewind_steps,
        config.skip_steps,
    )
    rewinds = [*run.rewinds, chosen]
    try:
        write_rewinds(directory, rewinds)
        hide_stale(directory.checkpoints, rewinds)
        directory.append_event("rewind", step=step, number=len(rewinds), **asdict(chosen))
    except OSError as error:
        return error
    report(run)
    return chosen
