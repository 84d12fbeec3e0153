"""What a run saves: a checkpoint, the ledger and the report beside it; and what it tells of that."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from llmtrain.training.build import Run, describe_run
from llmtrain.training.checkpoint import CheckpointTensors, seed_random_states, set_random_states
from llmtrain.training.metrics import write_ledger
from llmtrain.training.report import write_report
from llmtrain.training.run_directory import disk_may_refuse

logger = logging.getLogger(__name__)

REPORT_SECONDS = 60.0
"""A report is written with a checkpoint at most this often: it reads all the metrics so far."""


def load(run: Run, checkpoint: Path) -> None:
    """Put the engine and this rank's random numbers where a checkpoint, which was verified, has them.

    Its ranks, ZeRO stage and precision may have been others. Random numbers follow from seed, step and
    rank if there are more or fewer ranks than then; no step of training draws any.
    """
    run.heart.beat("load")
    found, ranks = CheckpointTensors(checkpoint), run.world.world_size
    run.engine.restore(found.read, found.record["scalars"])
    if found.record["world_size"] == ranks:
        set_random_states(found.random_states(run.world.rank))
    else:
        logger.info(
            "%d ranks now, %d when it was saved: random numbers begin anew", ranks, found.record["world_size"]
        )
        seed_random_states(run.config.seed, run.step, run.world.rank)


def save(run: Run, *, wait: bool = False) -> bool:
    """Save the step just done, and write the ledger and the report; collective.

    Where checkpoints are written in the background it may go on when this returns, unless the run ends here
    or `wait` is set. Whether the newest save that is over succeeded; a failed one is told, and no error.
    """
    run.corruption.check(run)
    run.heart.beat("save")
    if run.world.is_main:
        with disk_may_refuse():
            run.directory.sync()
    record = {
        "step": run.step,
        **describe_run(run.config, run.world, run.tokenizer.fingerprint, run.precision),
        "data": run.dataset.state(run.step),
        "spikes": run.spikes.state(),
        "left_out": run.skipped % run.config.spikes.max_skipped,  # after an end for them, none
        "rewinds": len(run.rewinds),
        "scores": list(run.early_stop.scores),
    }
    run.saver.save(run.engine.state(), record, wait=wait or run.finished or run.stop.agreed)
    run.stop.saved |= run.saver.holds(run.step)
    if run.saver.seconds is not None:
        run.stop.save_took(run.saver.seconds)
    if run.world.is_main:
        with disk_may_refuse():
            write_ledger(run)
            keep_bad_records(run)
        if time.monotonic() - run.reported > REPORT_SECONDS:
            report(run)
    return not run.saver.failures


def keep_bad_records(run: Run) -> None:
    """Put what preparation set aside into the run directory, as far as it has come."""
    for name in run.prepared.sources if run.config.data.bad_records == "quarantine" else ():
        for file in run.prepared.quarantine(name):
            run.directory.keep(file, f"data/quarantine/{name}/{file.name}")


def report(run: Run) -> None:
    """Write report.html; what goes wrong there is told and ends nothing."""
    run.reported = time.monotonic()
    try:
        write_report(run.directory.path)
    except Exception as error:  # days of training are worth more than any page
        logger.warning("no report: %s: %s", type(error).__name__, error)
