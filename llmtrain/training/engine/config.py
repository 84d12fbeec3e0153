"""What DeepSpeed is told: the keys a user sets, and the settings derived from the rest of the run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from llmtrain.config import Config

Precision = Literal["auto", "fp32", "bf16", "bf16_autocast"]
ResolvedPrecision = Literal["fp32", "bf16", "bf16_autocast"]

OWNERS = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size (accumulation is derived from it)",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "scheduler",
    "bf16": "precision",
    "fp16": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "activation_checkpointing": "activation_checkpointing",
}
"""DeepSpeed's names of numbers that llmtrain owns elsewhere: one owner per number."""


Elements = Annotated[int, Field(ge=0)]
Bucket = Annotated[int, Field(gt=0, multiple_of=2)]  # DeepSpeed keeps flat buffers at 4 bytes of bf16


class OffloadConfig(Config):
    """Where a part of the state waits while it is not needed."""

    device: Literal["none", "cpu"]
    pin_memory: bool


class ZeroConfig(Config):
    """DeepSpeed's `zero_optimization` section (Rajbhandari et al. 2020), as far as it is ours to set."""

    stage: Literal[0, 1, 2, 3]
    contiguous_gradients: bool
    reduce_scatter: bool
    reduce_bucket_size: Bucket
    allgather_bucket_size: Bucket
    overlap_comm: bool
    round_robin_gradients: bool
    parameter_alignment: bool
    stage3_prefetch_bucket_size: Elements
    stage3_param_persistence_threshold: Elements
    stage3_max_live_parameters: Elements
    stage3_max_reuse_distance: Elements
    stage3_module_granularity_threshold: Elements
    offload_optimizer: OffloadConfig
    offload_param: OffloadConfig

    @field_validator("offload_optimizer", "offload_param")
    @classmethod
    def _has_such_parts(cls, value: OffloadConfig, info: ValidationInfo) -> OffloadConfig:
        lowest = {"offload_optimizer": 2, "offload_param": 3}[str(info.field_name)]
        if value.device != "none" and info.data.get("stage", lowest) < lowest:
            raise ValueError(f"needs ZeRO stage {lowest}: deepspeed=zero{lowest}_offload")
        return value

    def settings(self) -> dict[str, Any]:
        """The section as DeepSpeed reads it: what is not offloaded has no section of its own there."""
        section = self.model_dump()
        for part in ("offload_optimizer", "offload_param"):
            if section[part]["device"] == "none":
                del section[part]
        return section


class DeepSpeedConfig(Config):
    """The `deepspeed` group. Keys that have their owner elsewhere in the config are refused by name."""

    disable_python_gc: bool
    zero_optimization: ZeroConfig

    @model_validator(mode="before")
    @classmethod
    def _one_owner(cls, value: Any) -> Any:
        for key in value if isinstance(value, dict) else ():
            if key in OWNERS:
                raise ValueError(f"{key} is set by {OWNERS[key]}, not here")
        return value

    @property
    def stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return self.zero_optimization.stage

    def resolve_precision(
        self, precision: Precision, device: str, fast_bf16_cpu: bool, fp32_weights: bool = False
    ) -> ResolvedPrecision:
        """`auto` made concrete.

        On CUDA: bf16 weights with fp32 masters under ZeRO 1 to 3, autocast over fp32 weights under stage 0
        (which DeepSpeed runs wrongly with bf16 weights) and where the optimizer needs `fp32_weights`. On a
        CPU: autocast where bf16 products are fast.
        """
        if precision != "auto":
            return precision
        if device == "cuda":
            return "bf16" if self.stage and not fp32_weights else "bf16_autocast"
        return "bf16_autocast" if fast_bf16_cpu else "fp32"

    def settings(
        self, *, micro_batch_size: int, accumulation: int, clipping: float, precision: ResolvedPrecision
    ) -> dict[str, Any]:
        """The dictionary for `deepspeed.initialize`.

        Stage 0 has a bare torch optimizer, which our engine clips itself: with an exact norm, that DeepSpeed
        does not report there. Everything that prints or synchronises the device is off.
        """
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clipping if self.stage else 0.0,
            "zero_optimization": self.zero_optimization.settings(),
            # Torch's fused AdamW steps on a CPU as well; DeepSpeed's own would be compiled at first use.
            "zero_force_ds_cpu_optimizer": False,
            # Any torch optimizer may be given; those it does not know it warns of.
            "zero_allow_untested_optimizer": True,
            "disable_python_gc": self.disable_python_gc,
            "timers": {"throughput": {"enabled": False, "synchronized": False}},
            "steps_per_print": 10**9,
        }
        if precision == "bf16":
            # The default accumulates in bf16 too, which loses bits with every micro-batch.
            settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        if precision == "bf16_autocast":
            settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        return settings
