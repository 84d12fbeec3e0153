"""The loop: rows in, steps out, everything optional in callbacks."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import torch

from llmtrain import distributed
from llmtrain.config import ExitCode, UserError
from llmtrain.data.batch import Batch
from llmtrain.data.dataset import Batches
from llmtrain.training.build import Run
from llmtrain.training.callbacks import Callback
from llmtrain.training.changes import other_text
from llmtrain.training.checkpoint import abandon, checkpoints, mark_best, sweep
from llmtrain.training.crashes import AnotherRankError
from llmtrain.training.engine.transfer import PendingStep
from llmtrain.training.messages import closing_lines
from llmtrain.training.metrics import step_metrics
from llmtrain.training.requeue import scheduled_job
from llmtrain.training.saves import load, report, save
from llmtrain.training.spikes import Verdict
from llmtrain.training.suspects import rewind, tell

logger = logging.getLogger(__name__)

DATA_POLL = 0.2
"""Seconds after which ranks whose text is not there look whether somebody wants to stop."""


@dataclass(frozen=True)
class Launched:
    """A step that the device was given."""

    step: int
    lr: float
    pending: PendingStep
    began: float
    """When it was begun, by time.perf_counter."""


def fit(run: Run) -> None:
    """Train from the step after `run.step` to the last one, or until somebody asks to stop."""
    with ExitStack() as ends:
        for callback in run.callbacks:
            ends.callback(callback.on_end, run)
            callback.on_start(run)
        ends.enter_context(run.saver)
        pin = run.engine.device.type == "cuda"
        batches = run.dataset.batches(run.step + 1, run.world.rank, run.world.world_size, pin)
        gc.collect()
        gc.freeze()  # what a run is built of stays: the collection at each save need not look at it
        run.heart.source = lambda: "" if batches.upcoming.done() else run.dataset.asked.name
        _loop(run, ends.enter_context(closing(batches)))


def _loop(run: Run, batches: Batches) -> None:
    """The result of a step is read while the next one is computed; where something is due after it, at once.

    A step's line is logged before its checkpoint is saved: a kill between them only logs it again.
    """
    every = run.config.checkpoint.every
    late: Launched | None = None
    completed = False
    if not run.finished:  # else all that is due is done below
        _catch_up(run, [callback for callback in run.callbacks if callback.is_owed(run)])
    _go(run)
    while not (run.finished or run.stop.agreed):
        due = [callback for callback in run.callbacks if callback.is_due(run, run.step + 1)]
        if not _load(run, batches, due):
            return
        launched = _launch(run, next(batches))
        completed = run.finished
        if late is not None:
            _settle(run, late)
        saves = run.finished or run.step % every == 0
        checks = run.corruption.is_due(run.step)
        if not (saves or due or checks or run.skipped or run.stop.agreed or run.waits):
            late = launched
            continue
        late = None
        _settle(run, launched, due, saves)
        saves |= run.finished
        if checks:
            run.corruption.check(run)
        if saves or run.stop.agreed:
            save(run)
            run.stop.poll(run.engine.device)
        if saves or due:
            _go(run)
    if run.finished and not completed:  # it was, or became so, after callbacks did what is due after any step
        _catch_up(run, [callback for callback in run.callbacks if callback.is_due(run, run.step)])


def _catch_up(run: Run, due: Sequence[Callback]) -> None:
    """Let callbacks do what is due after the step that is done and saved, and add it to the step's line."""
    if not due:
        return
    line: dict[str, Any] = {"step": run.step}
    if run.world.is_main:
        lines = run.directory.read_metrics()
        line = next((before for before in reversed(lines) if before["step"] == run.step), line)
    for callback in due:
        callback.load(run, run.step)
        run.heart.beat("eval")
        callback.after_step(run, line)
    _log(run, line)
    if run.world.is_main:
        mark_best(run.directory, run.early_stop.scores)


def _go(run: Run) -> None:
    """Steps come: the next one begins now."""
    for callback in run.callbacks:
        callback.on_go(run)
    run.clock.restart(run.step)


def _launch(run: Run, batch: Batch) -> Launched:
    """Give the device the next step; nothing waits for it."""
    lr = run.config.optimizer.lr * run.schedule(run.step + 1)
    began = time.perf_counter()
    run.corruption.watch(batch)
    limits = run.spikes.limits(run.step + 1)
    pending = run.engine.train_step(batch, lr, stop=run.stop.requested, limits=limits)
    run.step += 1
    return Launched(run.step, lr, pending, began)


def _settle(run: Run, launched: Launched, due: Sequence[Callback] = (), saves: bool = False) -> None:
    """Read what a step was, and see to what follows from it; `saves`: a save is part of that."""
    run.heart.beat("read")
    step, result = launched.step, launched.pending.result()
    run.stop.step_took(time.perf_counter() - launched.began)
    run.stop.agree(result.stop)
    run.skipped = 0 if result.applied else run.skipped + 1
    run.goodput.trained = max(run.goodput.trained, step)
    run.losses.add(result)
    last = step == run.step and (run.finished or result.stop)
    logged = due or last or run.skipped or step % run.config.log_every == 0
    if logged or saves:
        seconds = run.clock.lap(step, launched.pending.done)
    if due or last or saves:
        for callback in run.callbacks:
            callback.on_pause(run)
    if logged:
        line = step_metrics(run, step, result, launched.lr, seconds)
        for callback in due:
            run.heart.beat("eval")
            callback.after_step(run, line)
        run.heart.beat("read")
        _log(run, line)
    verdict = run.spikes.judge(step, result)
    if verdict.kind:
        tell(run, step, result, verdict)
        _follow(run, step, verdict)


def _load(run: Run, batches: Batches, due: Sequence[Callback]) -> bool:
    """Have the rows of the next step there, and the text that callbacks read after it; whether they are.

    While text may be on its way the ranks wait for it together.
    """
    step = run.step + 1
    run.heart.beat("data", step)
    if not run.waits:
        for callback in due:
            run.heart.beat("eval")
            callback.load(run, step)
        run.heart.beat("data")
        return True
    reader = ThreadPoolExecutor(1, thread_name_prefix="llmtrain-callbacks")
    loads = [reader.submit(callback.load, run, step) for callback in due]
    reader.shutdown(wait=False)
    run.stop.polled = True
    try:
        return _await(run, [batches.upcoming, *loads])
    finally:
        run.stop.polled = False


def _await(run: Run, loads: Sequence[Future[Any]]) -> bool:
    """Wait until every rank has loaded its text; False where somebody asked to stop while some had not.

    All ranks agree about it, so that none stands in a collective for one that never comes. The step that is
    done is saved first, also where a rank's text cannot be read, which ends the run. As long as more text
    comes to some rank, none hangs.
    """
    prepared, sources = run.prepared, run.train_sources.values()
    waited, come = False, None
    while True:
        done, missing = wait(loads, DATA_POLL)
        errors = [load.exception() for load in done] + ([prepared.error] if missing else [])
        error = next(filter(None, errors), None)
        growing = prepared.is_remote or not all(source.complete for source in sources)
        before, come = come, prepared.come
        flags = bool(missing), error is not None, run.stop.requested, growing, come != before
        waiting, failed, stop, growing, moves = _any_rank(run, *flags)
        if moves:
            run.heart.beat("data")
        if (failed or (stop and waiting)) and run.step:
            save(run, wait=True)
        if error is not None:
            raise error
        if failed:
            raise AnotherRankError(
                f"another rank cannot read its text of step {run.step + 1}: see what it says"
            )
        if not waiting:
            run.waits = growing
            if waited:
                run.clock.restart(run.step)
            return True
        if run.stop.agree(stop):
            return False
        waited = True


def _any_rank(run: Run, *flags: bool) -> list[bool]:
    """Of each flag, whether some rank has raised it; collective."""
    raised = torch.tensor(flags, dtype=torch.int32, device=run.engine.device)
    return [count > 0 for count in distributed.all_reduce_sum(raised).tolist()]


def _log(run: Run, line: dict[str, Any]) -> None:
    """metrics.jsonl first: it is the record, the loggers only show it."""
    if run.world.is_main:
        run.directory.append_metrics(line)
    run.loggers.log(line)


def _follow(run: Run, step: int, verdict: Verdict) -> None:
    """End the run where a step calls for it: left out once too often, or to be rewound."""
    if run.skipped >= run.config.spikes.max_skipped:
        saved = save(run, wait=True)
        if run.world.is_main:
            report(run)
        raise UserError(
            f"{run.skipped} steps in a row were left out, not finite or spikes, the last one step {step}; "
            f"{'its' if saved else 'the last'} checkpoint holds the weights from before them: "
            "go on with a lower optimizer.lr and resume_changes=[optimizer.lr]",
            exit_code=ExitCode.NON_FINITE,
        )
    if verdict.kind == "spike" and run.config.spikes.action == "rewind":
        rewind(run, step, verdict)


def begin(run: Run) -> None:
    """Load the checkpoint to go on from, and write down what starts. Nothing was changed on disk before."""
    if run.checkpoint is not None:
        load(run, run.checkpoint)
        run.heart.beat("build")
        logger.info("resumed after step %d from %s", run.step, run.checkpoint)
        if run.finished:
            key = "callbacks.evaluation.patience" if run.step < run.config.max_steps else "max_steps"
            logger.info("nothing to train: the checkpoint is at step %d; raise %s to go on", run.step, key)
    anew = bool(run.held_out) and other_text(run.changed)
    if anew:
        logger.info("what is held out has changed: evaluations and the best checkpoint are counted anew")
    if not run.world.is_main:
        return
    directory = run.directory
    if run.config.resume == "never":
        directory.set_aside()
    directory.clear_done()
    directory.cut_unterminated()
    sweep(directory.checkpoints)
    abandon(directory.checkpoints, after=run.step)
    mark_best(directory, run.early_stop.scores)
    if run.rejected:
        directory.append_event("rejected", rejected=[damaged.as_dict() for damaged in run.rejected])
    directory.write_config(run.config)
    run.tokenizer.save(directory.path / "tokenizer")
    before = directory.read_json("data/prepared.json") or {}
    directory.write_json("data/prepared.json", before | run.prepared.as_dict())  # `where` knows removed ones
    directory.write_json("data/order.json", run.dataset.state(run.step))
    run.loggers = run.config.logger.build(directory, run.config, run.step)
    run.heart.beat("build")
    directory.append_event(
        "start" if run.checkpoint is None else "resume",
        step=run.step,
        checkpoint=run.checkpoint,
        parameters=run.engine.model.parameter_count,
        ranks=run.world.world_size,
        device=run.engine.device.type,
        precision=run.precision,
        micro_batch_size=run.config.micro_batch_size,
        gradient_accumulation_steps=run.engine.accumulation,
        **({"changes": {change.key: change.as_dict() for change in run.changed}} if run.changed else {}),
        **({"evaluations": "anew"} if anew else {}),
        **({"job": job} if (job := scheduled_job()) else {}),
        seconds=run.goodput.start,
    )


def finish(run: Run) -> int:
    """Close the run; returns the exit code of the process. Collective."""
    done = run.finished and not run.cut_short
    run.stop.saved |= run.saver.holds(run.step)  # one that was written in the background, too
    code = 1 if run.saver.failures else ExitCode.OK if done else run.stop.exit_code
    run.engine.close()
    if run.world.is_main:
        if not done:
            run.directory.append_event("signal", step=run.step, signal=run.stop.name)
        elif not run.saver.failures:
            run.directory.append_event("end", step=run.step)
        report(run)
        run.loggers.close(code)
        for line in closing_lines(run.directory):
            logger.info("%s", line)
    if run.saver.failures:
        _tell_unsaved(run)
    elif not done:
        again = "resume=auto" if run.config.resume == "never" else "the same command"
        logger.info("stopped after step %d; %s goes on from there", run.step, again)
    else:
        code = _mark_done(run)
    return code


def _mark_done(run: Run) -> int:
    """Write DONE, or say why it cannot be written; returns the exit code, the same on every rank."""
    refused = False
    if run.world.is_main:
        try:
            run.directory.mark_done()
        except OSError as error:
            refused = True
            logger.error(
                "%s: %s; every step is saved: make room, and the same command writes it",
                run.directory.done, error.strerror,
            )  # fmt: skip
    return 1 if distributed.broadcast_object(refused) else ExitCode.OK


def _tell_unsaved(run: Run) -> None:
    """Say that the last step could not be saved, and from where the run goes on."""
    found = checkpoints(run.directory.checkpoints)
    from_where = f"step {found[-1][0]}" if found else "the beginning"
    if run.world.is_main:
        logger.error(
            "ended after step %d, which is not saved: %s; the same command goes on from %s",
            run.step, run.saver.failures[-1], from_where,
        )  # fmt: skip
