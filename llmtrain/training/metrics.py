"""The line of metrics.jsonl that describes a step, and the ledger of the mixture in data.json."""

from __future__ import annotations

import math
from typing import Any

import psutil
import torch

from llmtrain.training.build import Run
from llmtrain.training.engine.transfer import StepResult
from llmtrain.training.sizing.hardware import device_name


def step_metrics(run: Run, step: int, result: StepResult, lr: float, seconds: float) -> dict[str, Any]:
    """The keys of a step's line; a source without a trained target in this step has the loss NaN."""
    config = run.config
    tokens = config.global_batch_size * config.seq_len
    losses, targets = result.source_losses.tolist(), result.source_targets.tolist()
    line: dict[str, Any] = {
        "step": step,
        "train/loss": result.loss,
        "train/grad_norm": result.grad_norm,
        "train/lr": lr,
        "train/tokens": step * tokens,
    }
    for name, loss, count in zip(run.dataset.names, losses, targets, strict=True):
        line[f"train/loss/{name}"] = _mean(loss, count)
    for name, row in run.dataset.ledger(step).items():  # sources of earlier mixtures included
        line[f"data/tokens/{name}"] = row["tokens"]
        if run.config.data.packing == "best_fit":
            line[f"data/padding/{name}"] = row["padding"]
        line[f"data/share/{name}"] = row["share"]
        line[f"data/epochs/{name}"] = row["epochs"]
    line["perf/tokens_per_second"] = tokens / seconds
    line["perf/step_seconds"] = seconds
    line["perf/mfu"] = model_flops_utilisation(run, tokens / seconds)
    line["perf/memory_bytes"] = memory_held(run.engine.device)
    return line | run.goodput.as_metrics()


def memory_held(device: torch.device) -> int:
    """Bytes that this process, rank 0, holds of its GPU now; on the CPU, of the machine."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return int(psutil.Process().memory_info().rss)


def _mean(loss: float, targets: float) -> float:
    return loss / targets if targets else math.nan


def model_flops_utilisation(run: Run, tokens_per_second: float) -> float | None:
    """Model FLOPs against the devices' dense bf16 peak; None where the peak is not known."""
    peak = run.config.hardware.resolve(device_name(run.engine.device)).peak_flops
    if peak is None:
        return None
    flops = run.engine.model.flops_per_token(run.config.seq_len)
    return flops * tokens_per_second / (peak * run.world.world_size)


def write_ledger(run: Run) -> None:
    """data.json: the mixture as asked and as served, and what became of every document that came in."""
    config, losses = run.config, run.losses.take(run.dataset.names)
    sources: dict[str, dict[str, Any]] = {}
    for name, row in run.dataset.ledger(run.step).items():
        if name in run.train_sources:
            row["input"] = run.prepared.conservation(name)
        else:
            before = run.directory.read_json("data.json") or {}
            row = _last_known(row, before.get("sources", {}).get(name, {}))
        sources[name] = {**row, "loss": losses.get(name)}
    run.directory.write_json(
        "data.json",
        {
            "step": run.step,
            "seq_len": config.seq_len,
            "global_batch_size": config.global_batch_size,
            "sources": sources,
        },
    )


def _last_known(row: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The row of a source that was removed, completed from the last ledger that had the source."""
    if any(row[key] != before.get(key) for key in ("tokens", "padding")):
        return row  # the run was killed before it wrote that ledger
    return {**row, **{key: before.get(key) for key in (*row, "input") if row.get(key) is None}}
