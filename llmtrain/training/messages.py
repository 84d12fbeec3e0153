"""What a run says of itself when it begins, and when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmtrain.training.checkpoint import checkpoints
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.sizing.hardware import device_name
from llmtrain.training.words import count, describe_model, percent, short, span

if TYPE_CHECKING:
    from llmtrain.distributed import World
    from llmtrain.training.config import TrainConfig
    from llmtrain.training.engine.config import ResolvedPrecision
    from llmtrain.training.engine.engine import Engine


def opening_line(config: TrainConfig, world: World, engine: Engine, precision: ResolvedPrecision) -> str:
    """One line: the model, the tokens, who trains it and how, and which attention it has and why."""
    model, kernel = engine.model, engine.model.kernel
    shape = ", ".join(describe_model(config.model.model_dump(mode="json")))
    tokens = config.max_steps * config.global_batch_size * config.seq_len
    device = device_name(engine.device) or engine.device.type
    return " · ".join(
        [
            f"{config.name}: {short(model.parameter_count)} parameters ({shape})",
            f"{short(tokens)} tokens in {count(config.max_steps, 'step')}",
            f"{count(world.world_size, 'rank')} on {device}, {precision}, ZeRO {config.deepspeed.stage}",
            f"attention {kernel.name} ({kernel.why})",
        ]
    )


def closing_lines(directory: RunDirectory) -> Iterator[str]:
    """What came of it in one line, if a step was logged, and where it lies."""
    line = next(iter(directory.newest_metrics()[-1:]), {})
    if "train/tokens" in line:
        parts = [f"{short(line['train/tokens'])} tokens in {count(line['step'], 'step')}"]
        if (loss := line["train/loss"]) is not None:
            parts.append(f"loss {loss:.4f}")
        held_out = ((directory.read_json("eval/heldout.json") or {}).get("all") or {}).get("bits_per_byte")
        if held_out is not None:
            parts.append(f"{held_out:.4f} bits per byte of held-out text")
        seconds = sum(value for key, value in line.items() if key.endswith("_seconds") and "goodput/" in key)
        parts.append(f"{span(seconds)}, {percent(line['goodput/share'])} of it in training")
        yield " · ".join(parts)
    yield f"report:      {directory.report}"
    yield f"metrics:     {directory.metrics}"
    for _, path in checkpoints(directory.checkpoints)[-1:]:
        yield f"checkpoint:  {path}"
    if (best := directory.read_json("best.json")) is not None:
        yield f"best:        {directory.path / best['path']} ({best['value']:.4f} bits per byte)"
