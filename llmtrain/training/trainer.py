"""The loop: rows in, steps out, everything optional in callbacks."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch

from llmtrain.config import ExitCode, UserError
from llmtrain.data.batch import Batch
from llmtrain.training.build import Run, describe_run
from llmtrain.training.checkpoint import (
    load_checkpoint,
    read_record,
    save_checkpoint,
    sweep,
)
from llmtrain.training.engine.engine import StepResult
from llmtrain.training.report import write_report

logger = logging.getLogger(__name__)

MAX_SKIPPED = 3
"""Steps in a row with a non-finite gradient after which a run ends."""


def fit(run: Run) -> None:
    """Train from the step after `run.step` to the last one, or until somebody asks to stop."""
    run.stop.listen()
    if run.world.is_main:
        run.directory.write_config(run.config)
        run.directory.append_event(
            "start" if run.checkpoint is None else "resume",
            step=run.step,
            checkpoint=run.checkpoint,
            parameters=run.engine.model.parameter_count,
            ranks=run.world.world_size,
            device=run.engine.device.type,
            precision=run.precision,
            micro_batch_size=run.config.micro_batch_size,
            gradient_accumulation_steps=run.engine.accumulation,
        )
    for callback in run.callbacks:
        callback.on_start(run)
    if not run.finished:
        pin = run.engine.device.type == "cuda"
        with closing(run.dataset.batches(run.step + 1, run.world.rank, run.world.world_size, pin)) as batches:
            _loop(run, batches)
    for callback in run.callbacks:
        callback.on_end(run)


def _loop(run: Run, batches: Iterator[Batch]) -> None:
    """A step's line is logged before its checkpoint is saved: a kill between them only logs it again."""
    while not (run.finished or run.stop.agreed):
        began = time.perf_counter()
        lr = run.config.optimizer.lr * run.schedule(run.step + 1)
        result = run.engine.train_step(next(batches), lr, stop=run.stop.requested)
        run.step += 1
        run.stop.agreed = result.stop
        _watch(run, result)
        line = _metrics(run, result, lr, time.perf_counter() - began) if _due(run) else {}
        for callback in run.callbacks:
            callback.after_step(run, run.step, line)
        if line:
            _log(run, line)
        if run.step % run.config.checkpoint.every == 0 or run.finished or run.stop.agreed:
            save(run)


def _log(run: Run, line: dict[str, Any]) -> None:
    """metrics.jsonl first: it is the record, the loggers only show it."""
    if run.world.is_main:
        run.directory.append_metrics(line)
    for sink in run.loggers:
        sink.log(line)


def save(run: Run) -> None:
    """Write a checkpoint of the step just done, and the ledger and the report beside it."""
    began = time.perf_counter()
    record = {
        "step": run.step,
        **describe_run(run.config, run.world, run.tokenizer, run.precision),
        "data": run.dataset.state(run.step),
    }
    keep = run.config.checkpoint.keep
    path = save_checkpoint(run.directory.checkpoints, run.engine, run.world, record, keep)
    if run.world.is_main:
        seconds = time.perf_counter() - began
        run.directory.append_event("save", step=run.step, path=path.name, seconds=seconds)
        write_ledger(run)
        write_report(run.directory.path)


def resume(run: Run) -> None:
    """Load the checkpoint that the run goes on from, if there is one."""
    if run.world.is_main:
        sweep(run.directory.checkpoints)
    if run.checkpoint is None:
        return
    load_checkpoint(run.checkpoint, run.engine, run.world)
    run.step = read_record(run.checkpoint)["step"]
    logger.info("resumed after step %d from %s", run.step, run.checkpoint)


def finish(run: Run) -> int:
    """Close the run; returns the exit code of the process."""
    for sink in run.loggers:
        sink.close()
    run.engine.close()
    if not run.finished:
        logger.info("stopped after step %d; the same command goes on from there", run.step)
        return run.stop.exit_code
    if run.world.is_main:
        run.directory.append_event("end", step=run.step)
        report = write_report(run.directory.path)
        run.directory.mark_done()
        logger.info("report: %s", report)
    return ExitCode.OK


def write_ledger(run: Run) -> None:
    """data.json: the mixture as asked and as served."""
    config = run.config
    run.directory.write_json(
        "data.json",
        {
            "step": run.step,
            "seq_len": config.seq_len,
            "global_batch_size": config.global_batch_size,
            "sources": run.dataset.ledger(run.step),
        },
    )


def _due(run: Run) -> bool:
    """A line is owed every `log_every` steps, at the last step, and where an evaluation writes into it."""
    every = run.config.callbacks.evaluation.every
    evaluates = every > 0 and run.step % every == 0
    return run.step % run.config.log_every == 0 or run.finished or evaluates or run.stop.agreed


def _watch(run: Run, result: StepResult) -> None:
    """Count steps that were left out; several in a row end the run."""
    if result.applied:
        run.skipped = 0
        return
    run.skipped += 1
    if run.world.is_main:
        run.directory.append_event("skip", step=run.step, reason="gradient not finite")
    logger.warning("step %d left out: its gradient is not finite", run.step)
    if run.skipped >= MAX_SKIPPED:
        raise UserError(
            f"{run.skipped} steps in a row had a gradient that is not finite, the last one step {run.step}; "
            "resume from the last checkpoint with a lower optimizer.lr",
            exit_code=ExitCode.NON_FINITE,
        )


def _metrics(run: Run, result: StepResult, lr: float, seconds: float) -> dict[str, Any]:
    """The step's line for metrics.jsonl; the keys are listed in the README."""
    config = run.config
    tokens = config.global_batch_size * config.seq_len
    losses, targets = result.source_losses.cpu(), result.source_targets.cpu()
    means = (losses / targets).tolist()  # NaN where a source had no target in this step
    line: dict[str, Any] = {
        "step": run.step,
        "train/loss": (losses.sum() / targets.sum()).item(),
        "train/grad_norm": result.grad_norm,
        "train/lr": lr,
        "train/tokens": run.step * tokens,
    }
    ledger = run.dataset.ledger(run.step)
    for name, mean in zip(run.dataset.names, means, strict=True):
        line[f"train/loss/{name}"] = mean
        line[f"data/share/{name}"] = ledger[name]["share"]
        line[f"data/epochs/{name}"] = ledger[name]["epochs"]
    line["perf/tokens_per_second"] = tokens / seconds
    line["perf/step_seconds"] = seconds
    line["perf/mfu"] = _mfu(run, tokens / seconds)
    return line


def _mfu(run: Run, tokens_per_second: float) -> float | None:
    """Model FLOPs utilisation against the device's dense bf16 peak; None where the peak is not known."""
    peak = peak_flops(run.engine.device)
    if peak is None:
        return None
    flops = run.engine.model.flops_per_token(run.config.seq_len)
    return flops * tokens_per_second / (peak * run.world.world_size)


PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
"""Dense bf16 FLOP/s by a part of the device's name (vendor data sheets, SXM boards)."""


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a device in FLOP/s, or None where it is not known (a CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
