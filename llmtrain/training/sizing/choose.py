"""Every way to train a model on given devices, which of them fit, and which is cheapest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from llmtrain.config import UserError, label
from llmtrain.optim.muon import MuonConfig
from llmtrain.training.config import TrainConfig
from llmtrain.training.engine.config import OffloadConfig, ZeroConfig
from llmtrain.training.sizing.hardware import HardwareConfig
from llmtrain.training.sizing.memory import Layout, Memory, checkpoint_bytes, memory
from llmtrain.training.sizing.model import Model
from llmtrain.training.sizing.speed import Time, step_time

GIB = 2**30

OPTIONS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
"""The files of conf/deepspeed/ that are compared."""

WHOLE_GRADIENTS = "deepspeed.zero_optimization.reduce_scatter=false"
"""What Muon needs under ZeRO-3."""

CLOSE = 0.02
"""Differences in time that the model cannot tell: it was within a few percent of tuned runs."""


@dataclass(frozen=True)
class Way:
    """One way to train: an option of `deepspeed`, with or without recomputation, at one micro-batch."""

    option: str
    layout: Layout
    memory: Memory
    time: Time | None
    fits: bool | None
    """None where the device's memory is not known."""

    @property
    def overrides(self) -> str:
        """What to write on the command line."""
        recompute = str(self.layout.recompute).lower()
        rows = self.layout.rows
        said = f"deepspeed={self.option} micro_batch_size={rows} activation_checkpointing={recompute}"
        whole = "" if self.layout.zero.reduce_scatter else f" {WHOLE_GRADIENTS}"
        return said + whole

    def as_dict(self) -> dict[str, Any]:
        """For plan.json."""
        layout = self.layout
        return {
            "deepspeed": self.option,
            "precision": layout.precision,
            "activation_checkpointing": layout.recompute,
            "micro_batch_size": layout.rows,
            "gradient_accumulation_steps": layout.accumulation,
            "fits": self.fits,
            "memory": self.memory.as_dict(),
            "seconds": self.time.as_dict() if self.time else None,
        }


@dataclass(frozen=True)
class Sizing:
    """What a run costs on some devices."""

    model: Model
    hardware: HardwareConfig
    ranks: int
    headroom: float
    """GiB of a device that are left free."""
    configured: Way
    refused: str | None
    """Why a run as configured would not start; its time is then None."""
    ways: tuple[Way, ...]
    """For every option and with or without recomputation, all micro-batches."""
    uncounted: tuple[str, ...]
    """What of the config changes the time of a step, and the model of time does not know."""

    @property
    def best(self) -> list[Way]:
        """Of each option, with and without recomputation: the largest micro-batch that fits, else one row.

        Where the device's memory is not known, the micro-batch as configured.
        """
        chosen: dict[tuple[str, bool], Way] = {}
        for way in self.ways:
            key, asked = (way.option, way.layout.recompute), way.layout.rows == self.configured.layout.rows
            if way.fits or (way.fits is None and asked) or key not in chosen:
                chosen[key] = way
        return list(chosen.values())

    @property
    def simplest(self) -> Way | None:
        """The first of OPTIONS that fits, without recomputation if it does, at its largest micro-batch."""
        return next((way for way in self.best if way.fits), None)

    @property
    def cheapest(self) -> Way | None:
        """The fastest that fits: on given devices the cheapest. None where nothing fits or is known.

        Of ways that are as good as equal the first of OPTIONS: less sharding, less that can wait.
        """
        known = [(way.time.step, way) for way in self.ways if way.fits and way.time is not None]
        if not known:
            return None
        fastest = min(seconds for seconds, _ in known)
        close = [pair for pair in known if pair[0] <= fastest * (1 + CLOSE)]
        first = next(option for option in OPTIONS if any(way.option == option for _, way in close))
        return min((pair for pair in close if pair[1].option == first), key=lambda pair: pair[0])[1]

    def as_dict(self, tokens: int) -> dict[str, Any]:
        """For plan.json; `tokens` are those of the run."""
        model, cheapest = self.model, self.cheapest
        return {
            "hardware": self.hardware.model_dump(),
            "gpus": self.ranks,
            "headroom_gib": self.headroom,
            "times_without": self.uncounted,
            "parameters": model.parameters,
            "embedding_parameters": model.embedding_parameters,
            "flops_per_token": model.flops_per_token(causal=False),
            "flops_per_token_causal": model.flops_per_token(causal=True),
            "checkpoint_bytes": checkpoint_bytes(model),
            "configured": {**self.configured.as_dict(), **duration(self.configured, tokens)},
            "cheapest": cheapest
            and {**cheapest.as_dict(), **duration(cheapest, tokens), "overrides": cheapest.overrides},
            "ways": [way.as_dict() for way in self.ways],
        }


def duration(way: Way, tokens: int) -> dict[str, float | None]:
    """Days and GPU-hours of a run of `tokens`."""
    if way.time is None:
        return {"days": None, "gpu_hours": None}
    hours = tokens / way.time.tokens_per_second / 3600
    return {"days": hours / 24, "gpu_hours": hours * way.layout.ranks}


def size(
    config: TrainConfig, vocab_size: int, ranks: int, hardware: HardwareConfig, headroom: float
) -> Sizing:
    """Compare all ways to train what `config` describes on `ranks` devices; it is the reference otherwise.

    A global batch that the ranks do not divide is a UserError.
    """
    if config.global_batch_size % ranks:
        raise UserError(
            f"gpus={ranks} does not divide global_batch_size={config.global_batch_size}: change one"
        )
    model = Model.of(config, vocab_size)
    on_cpu = hardware.name == "cpu"
    device = "cpu" if on_cpu else "cuda"
    layout = Layout.of(config, ranks, config.precision_on(device))
    if on_cpu:
        layout = replace(layout, compiled=config.compile is True)
    refused = None
    if config.global_batch_size % (ranks * config.micro_batch_size):
        refused = (
            f"global_batch_size={config.global_batch_size} is not a multiple of {ranks} devices x "
            f"micro_batch_size={config.micro_batch_size}"
        )

    def way(option: str, layout: Layout) -> Way:
        needed = memory(model, layout)
        fits = None
        if hardware.memory_gib is not None:
            fits = needed.total <= (hardware.memory_gib - headroom) * GIB
        return Way(option, layout, needed, step_time(model, layout, hardware), fits)

    configured = way("as configured", layout)
    return Sizing(
        model=model,
        hardware=hardware,
        ranks=ranks,
        headroom=headroom,
        configured=replace(configured, time=None) if refused else configured,
        refused=refused,
        ways=tuple(way(option, layout) for option, layout in layouts(config, layout, device)),
        uncounted=uncounted(config),
    )


def uncounted(config: TrainConfig) -> tuple[str, ...]:
    """Choices whose time is not that of AdamW and bf16 products, which is what step_time counts."""
    optimizer = label(config.optimizer)
    choices = {f"optimizer={optimizer}": optimizer != "adamw", f"fp8={config.fp8}": config.fp8}
    return tuple(choice for choice, other in choices.items() if other)


def layouts(config: TrainConfig, given: Layout, device: str) -> Iterator[tuple[str, Layout]]:
    """All that are compared, micro-batches rising: those that divide a rank's rows of the global batch."""
    rows = config.global_batch_size // given.ranks
    for option in OPTIONS:
        zero = with_option(given.zero, option)
        if zero.stage == 3 and isinstance(config.optimizer, MuonConfig):
            zero = zero.model_copy(update={"reduce_scatter": False})
        for recompute in (False, True):
            changed = with_section(config, zero, recompute)
            if not trains_right(changed):
                continue
            layout = replace(given, zero=zero, precision=changed.precision_on(device), recompute=recompute)
            for micro in (size for size in range(1, rows + 1) if rows % size == 0):
                yield option, replace(layout, rows=micro, accumulation=rows // micro)


def with_section(config: TrainConfig, zero: ZeroConfig, recompute: bool) -> TrainConfig:
    """The config with another section of DeepSpeed's, not checked."""
    deepspeed = config.deepspeed.model_copy(update={"zero_optimization": zero})
    return config.model_copy(update={"deepspeed": deepspeed, "activation_checkpointing": recompute})


def trains_right(config: TrainConfig) -> bool:
    """Whether the config takes itself for one that does."""
    try:
        config.check()
    except ValueError:
        return False
    return True


def with_option(zero: ZeroConfig, option: str) -> ZeroConfig:
    """The section as conf/deepspeed/<option>.yaml changes it; sizes of buckets stay as configured."""
    stage, offload = int(option[4]), option.endswith("_offload")

    def place(part: OffloadConfig, wanted: bool) -> OffloadConfig:
        return part.model_copy(update={"device": "cpu" if wanted else "none"})

    return zero.model_copy(
        update={
            "stage": stage,
            "overlap_comm": stage >= 2,
            "round_robin_gradients": option == "zero2_offload",
            "offload_optimizer": place(zero.offload_optimizer, offload),
            "offload_param": place(zero.offload_param, offload and stage == 3),
        }
    )
