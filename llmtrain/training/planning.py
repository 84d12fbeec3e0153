"""From the config of a run to its plan, and the files that say it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from llmtrain import __version__
from llmtrain.config.secrets import redact
from llmtrain.data.config import DataConfig, SourceConfig
from llmtrain.data.plan import (
    Kind,
    Plan,
    PlannedSource,
    PlannedStage,
    RunLength,
    Size,
    helper_weights,
    make_plan,
)
from llmtrain.data.plan_page import plan_page
from llmtrain.data.prepare import build_tokenizer, check_inputs, prepared_tokens
from llmtrain.data.sizes import needs_tokenizer, source_sizes
from llmtrain.tokenizer import Tokenizer, TokenizerConfig, vocab_size_of
from llmtrain.training.config import TrainConfig
from llmtrain.training.run_directory import RunDirectory, write_atomically
from llmtrain.training.sizing.choose import Sizing, size
from llmtrain.training.sizing.hardware import device_name
from llmtrain.training.words import short


class PlanConfig(TrainConfig):
    """The config of a run, and what to print of its plan."""

    weights: Kind
    """Where the weights come from: the config, or a helper that computes them from the sizes."""
    temperature: Annotated[float, Field(gt=0)]
    """weights=temperature: a weight is the source's size to the power 1 / temperature."""
    max_epochs: Annotated[float, Field(gt=0)]
    """weights=unimax: no source is passed over more often."""
    gpus: Annotated[int, Field(gt=0)] | None
    """Devices to train on; null: those of one node of `hardware`, or 1."""
    headroom_gib: Annotated[float, Field(ge=0)]
    """Left free on each: CUDA's context, NCCL's buffers, what fragments."""
    format: Literal["table", "json"]
    """What goes to stdout."""


def run_length(config: TrainConfig) -> RunLength:
    """The run's length as the plan counts it."""
    return RunLength(config.seq_len, config.global_batch_size, config.max_steps)


def measure(config: TrainConfig, tokenizer: Tokenizer | None = None) -> dict[str, Size]:
    """The size of every source: declared, counted by `prepare`, or estimated from a sample."""
    tokenizer = tokenizer or _tokenizer(config)

    def prepared(name: str, source: SourceConfig) -> int | None:
        return prepared_tokens(name, source, config.data, tokenizer, config.cache_dir)

    return source_sizes(config.data, tokenizer, prepared)


def _tokenizer(config: TrainConfig) -> Tokenizer | None:
    """The run's tokenizer if a source is text: a mixture of bare sizes, or of tokens, needs none."""
    paths = {name: source for name, source in config.data.sources.items() if source.path is not None}
    data: DataConfig = config.data.model_copy(update={"sources": paths})
    check_inputs(data)
    if not any(map(needs_tokenizer, paths.values())):
        return None
    wanted: TokenizerConfig = config.tokenizer
    return build_tokenizer(data, wanted, config.cache_dir)[0]


def plan_of(config: PlanConfig, sizes: dict[str, Size]) -> Plan:
    """The plan with the weights that `weights` asks for."""
    length = run_length(config)
    weights = None if config.weights == "given" else _helper(config.weights, config, sizes)
    return make_plan(config.data, sizes, length, weights)


def _helper(kind: Kind, config: PlanConfig, sizes: dict[str, Size]) -> dict[str, float]:
    budget = run_length(config).tokens
    return helper_weights(kind, sizes, budget, temperature=config.temperature, max_epochs=config.max_epochs)


def size_of(config: PlanConfig) -> Sizing:
    """Parameters, memory and time on the hardware that `config` names, or on that of this machine."""
    hardware = config.hardware.resolve(device_name())
    ranks = config.gpus or hardware.gpus_per_node or 1
    return size(config, vocab_size_of(config.tokenizer), ranks, hardware, config.headroom_gib)


def plan_json(config: PlanConfig, plan: Plan, sizing: Sizing) -> dict[str, Any]:
    """The content of plan.json: llmtrain/data/plan.py and llmtrain/training/sizing/ say what is in it."""
    keys = {
        "name", "seed", "seq_len", "global_batch_size", "max_steps", "tokenizer", "data",
        "weights", "temperature", "max_epochs", "model", "deepspeed", "precision", "micro_batch_size",
        "activation_checkpointing",
    }  # fmt: skip
    said = redact(config.model_dump(mode="json", include=keys))
    costs = sizing.as_dict(run_length(config).tokens)
    return {"llmtrain": __version__, **plan.as_dict(), "sizing": costs, "config": said}


def write_plan(config: PlanConfig, plan: Plan, sizes: dict[str, Size], sizing: Sizing) -> tuple[Path, Path]:
    """Write plan.json and the page into the run directory: plan.html beside the report of a run."""
    directory = RunDirectory(config.output_dir)
    file = directory.write_json("plan.json", plan_json(config, plan, sizing))
    page = directory.path / "plan.html" if directory.metrics.exists() else directory.report
    presets = {}
    if all(size.tokens for size in sizes.values()):
        labels: dict[Kind, str] = {
            "proportional": "Proportional",
            "temperature": f"Temperature {config.temperature:g}",
            "unimax": f"UniMax, {config.max_epochs:g} epochs at most",
        }
        presets = {label: _helper(kind, config, sizes) for kind, label in labels.items()}
    return file, write_atomically(page, plan_page(config.name, plan, config.data, presets))


# Words

HEADINGS = ("source", "tokens", "weight", "share", "served", "epochs", "")
"""Of the columns of the table."""


def rows(plan: Plan) -> list[list[str]]:
    """The cells of the table; `~` marks what is estimated, `!` a source that a remark is about."""
    return [_row(name, source) for name, source in plan.sources.items()]


def _row(name: str, source: PlannedSource) -> list[str]:
    about = "" if source.exact else "~"
    return [
        name,
        "?" if source.size is None else about + short(source.size),
        f"{source.weight:.4g}",
        f"{source.share:.2%}",
        short(source.tokens),
        "?" if source.epochs is None else f"{about}{source.epochs:.2f}",
        "!" if source.warnings else "",
    ]


def remarks(plan: Plan) -> list[str]:
    """Totals, estimates, warnings and notes, a line each."""
    total = plan.total
    about = "" if total["exact"] else "~"
    lines = [f"{short(plan.run.tokens_per_step)} tokens a step"]
    if total["size"] is not None:
        unread = (
            f"{about}{short(total['unread'])} ({total['unread'] / total['size']:.1%}) of them left unread"
        )
        lines[0] += f"; the sources hold {about}{short(total['size'])} tokens, {unread}"
    if plan.skipped_windows:
        lines.append(
            f"data.skip leaves out {short(plan.skipped_windows * plan.run.seq_len)} tokens on the way"
        )
    lines += [_stage_line(stage) for stage in plan.stages[1:]]
    lines += [f"~ {name}: {source.how}" for name, source in plan.sources.items() if not source.exact]
    lines += [f"! {name}: {text}" for name, source in plan.sources.items() for text in source.warnings]
    return lines + [f"* {note}" for note in plan.notes]


def _stage_line(stage: PlannedStage) -> str:
    shares = ", ".join(f"{name} {share:.2%}" for name, share in stage.shares.items())
    return f"from step {stage.from_step:,} on: {shares}"
