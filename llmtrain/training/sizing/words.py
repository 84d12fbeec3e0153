"""What is said about sizes: a table of the ways to train, and lines below it."""

from __future__ import annotations

from llmtrain.training.sizing.choose import GIB, Sizing, Way, duration
from llmtrain.training.sizing.memory import checkpoint_bytes
from llmtrain.training.words import short

HEADINGS = (
    "deepspeed", "recompute", "rows", "state", "gradients", "activations", "head", "buckets", "GiB", "host",
    "tokens/s", "days", "",
)  # fmt: skip
"""Of the columns: rows of a micro-batch, memory in GiB. `state` are weights, masters, optimizer states."""


def title(sizing: Sizing) -> str:
    """Of the table."""
    of = f" of {sizing.hardware.memory_gib:g} GiB" if sizing.hardware.memory_gib else ""
    return f"{short(sizing.model.parameters)} parameters on {sizing.ranks} x {sizing.hardware.name}{of}"


def rows(sizing: Sizing, tokens: int) -> list[list[str]]:
    """The cells: each option at its largest micro-batch that fits; `*` the cheapest, `x` does not fit."""
    return [_row(way, tokens, sizing) for way in [sizing.configured, *sizing.best]]


def _row(way: Way, tokens: int, sizing: Sizing) -> list[str]:
    memory, days = way.memory, duration(way, tokens)["days"]
    parts = (
        memory.weights + memory.masters + memory.optimizer,
        memory.gradients + memory.accumulators,
        memory.activations,
        memory.head,
        memory.buckets + memory.gathered,
        memory.total,
        memory.host,
    )
    return [
        way.option,
        "yes" if way.layout.recompute else "no",
        str(way.layout.rows),
        *(_gib(part) for part in parts),
        short(way.time.tokens_per_second) if way.time else "?",
        "?" if days is None else f"{days:.3g}",
        _mark(way, sizing),
    ]


def _mark(way: Way, sizing: Sizing) -> str:
    if way is sizing.configured and sizing.refused:
        return "!"
    return "x" if way.fits is False else "*" if way == sizing.cheapest else ""


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size else "-"


def remarks(sizing: Sizing, tokens: int) -> list[str]:
    """Parameters, FLOPs, checkpoints, time as configured, and what to write for the cheapest way."""
    model, hardware = sizing.model, sizing.hardware
    lines = [
        f"{model.parameters:,} parameters, {model.embedding_parameters:,} of them in embedding tables",
        f"{short(model.flops_per_token(causal=False))} FLOPs a token "
        f"({short(model.flops_per_token(causal=True))} with the causal half of attention only)",
        f"{checkpoint_bytes(model) / GIB:.2f} GiB a checkpoint",
        "memory by part as it is at the peak: where backward begins, or where gradients are reduced; * the "
        "cheapest way, x does not fit, ! needs a change",
    ]
    if hardware.memory_gib is None:
        way = "" if hardware.name == "cpu" else "name one, as hardware=h100_80gb, or "
        lines.append(f"memory of hardware={hardware.name} is not known: {way}set hardware.memory_gib")
    if sizing.refused:
        lines.append(f"! as configured it does not start: {sizing.refused}")
    elif sizing.configured.fits is False:
        lines.append("! as configured it does not fit")
    if not any(way.time for way in sizing.ways):
        reason = f"hardware={hardware.name} has no {', '.join(hardware.unknown)}" if hardware.unknown else ""
        lines.append(f"no time predicted: {reason or 'the rates are those of bf16, and precision=fp32'}")
        return [*lines, *_fitting(sizing)]
    if sizing.uncounted:
        lines.append(f"times are those of AdamW in bf16, not of {' and '.join(sizing.uncounted)}")
    if sizing.configured.time:
        lines.append(f"as configured: {_cost(sizing.configured, tokens)}")
    cheapest = sizing.cheapest
    if cheapest is None:
        return [*lines, *_fitting(sizing)]
    return [*lines, f"cheapest that fits: {_cost(cheapest, tokens)}: {cheapest.overrides}"]


def _fitting(sizing: Sizing) -> list[str]:
    """What can be told of memory where no time is known; nothing where the device's is not."""
    if sizing.hardware.memory_gib is None:
        return []
    if sizing.simplest is None:
        return ["! no way fits: more gpus, or a smaller model"]
    return [f"least sharded that fits: {sizing.simplest.overrides}"]


def _cost(way: Way, tokens: int) -> str:
    assert way.time is not None
    cost = duration(way, tokens)
    return (
        f"{short(way.time.tokens_per_second)} tokens/s, {way.time.step * 1000:,.0f} ms a step, "
        f"{cost['days']:.3g} days, {cost['gpu_hours']:,.1f} GPU-hours"
    )
