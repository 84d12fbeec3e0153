"""The root of the configuration: every key of a run, typed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from llmtrain.config import Config, choice
from llmtrain.data.config import DataConfig
from llmtrain.distributed import fast_bf16_cpu
from llmtrain.model import DecoderConfig
from llmtrain.model.fp8 import MULTIPLE, Fp8Recipe
from llmtrain.optim.adamw import AdamWConfig
from llmtrain.optim.base import OptimizerConfig
from llmtrain.optim.lion import LionConfig
from llmtrain.optim.muon import MuonConfig
from llmtrain.optim.schedules import (
    ConstantConfig,
    CosineConfig,
    LinearConfig,
    SchedulerConfig,
    WsdConfig,
)
from llmtrain.tokenizer import BytesConfig, HuggingFaceConfig, SentencePieceConfig, TokenizerConfig
from llmtrain.training.callbacks import CallbackConfig
from llmtrain.training.callbacks.evaluation import EvaluationConfig
from llmtrain.training.callbacks.profile import ProfileConfig
from llmtrain.training.callbacks.samples import SampleConfig
from llmtrain.training.changes import check_permissions
from llmtrain.training.checkpoint.config import CheckpointConfig
from llmtrain.training.corruption import CorruptionConfig
from llmtrain.training.engine.config import DeepSpeedConfig, Precision, ResolvedPrecision
from llmtrain.training.engine.optimizers import check_muon
from llmtrain.training.loggers import LoggerConfig
from llmtrain.training.signals import Seconds
from llmtrain.training.sizing.hardware import HardwareConfig
from llmtrain.training.spikes import SpikeConfig

Count = Annotated[int, Field(gt=0)]


class CallbacksConfig(Config):
    """What happens beside the training itself."""

    evaluation: EvaluationConfig
    sample: SampleConfig
    extra: dict[str, choice(CallbackConfig)]  # type: ignore[valid-type]
    """Those of other packages, by a name of one's own."""


class ModelConfig(DecoderConfig):
    """The decoder of a run."""

    init_from: Path | None
    """A Hugging Face directory whose weights the run begins with, and whose shape it has."""


class TrainConfig(Config):
    """One training run. conf/ says what each key means and sets its default."""

    name: str
    seed: Annotated[int, Field(ge=0)]
    seq_len: Count
    max_steps: Count
    global_batch_size: Count
    micro_batch_size: Count
    precision: Precision
    fp8: Literal[False] | Fp8Recipe
    compile: bool | Literal["auto"]
    activation_checkpointing: bool
    z_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    output_dir: Path
    cache_dir: Path
    resume: str
    resume_changes: list[str]
    log_every: Count
    hang_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    time_limit: Seconds | None
    grace_seconds: Annotated[float, Field(gt=0)]
    model: ModelConfig
    tokenizer: choice(TokenizerConfig, SentencePieceConfig, HuggingFaceConfig, BytesConfig)  # type: ignore[valid-type]
    data: DataConfig
    optimizer: choice(OptimizerConfig, AdamWConfig, LionConfig, MuonConfig)  # type: ignore[valid-type]
    scheduler: choice(SchedulerConfig, CosineConfig, LinearConfig, ConstantConfig, WsdConfig)  # type: ignore[valid-type]
    deepspeed: DeepSpeedConfig
    hardware: HardwareConfig
    profile: ProfileConfig
    corruption_check: CorruptionConfig
    spikes: SpikeConfig
    checkpoint: CheckpointConfig
    callbacks: CallbacksConfig
    logger: LoggerConfig

    @classmethod
    def complete(cls, value: Mapping[str, Any], given: Mapping[str, str]) -> Mapping[str, Any]:
        """With the shape of `model.init_from`."""
        from llmtrain.training.pretrained import with_shape

        return with_shape(value, given)

    def precision_on(self, device: str) -> ResolvedPrecision:
        """What `precision` means on "cuda", or on a processor like this one."""
        return self.deepspeed.resolve_precision(
            self.precision, device, fast_bf16_cpu(), self.optimizer.fp32_weights
        )

    @field_validator("resume_changes")
    @classmethod
    def _can_be_allowed(cls, value: list[str]) -> list[str]:
        check_permissions(value)
        return value

    @field_validator("name")
    @classmethod
    def _stays_below(cls, name: str) -> str:
        if not name or name.startswith(("/", "~")) or ".." in Path(name).parts or not name.isprintable():
            raise ValueError("names a directory below runs/: printable, not empty, no .., no / in front")
        return name

    @model_validator(mode="after")
    def _runs_right(self) -> Self:
        self.check()
        return self

    def check(self) -> None:
        """ValueError for what DeepSpeed 0.19.8 computes wrongly, and for what does not fit together."""
        if self.deepspeed.stage == 0 and self.precision == "bf16":
            raise ValueError(
                "precision=bf16 with deepspeed=zero0: DeepSpeed takes a spurious first optimizer step there, "
                "and the losses are wrong; use precision=bf16_autocast, or deepspeed=zero1"
            )
        if isinstance(self.optimizer, MuonConfig):
            check_muon(self.deepspeed, self.precision)
        kept = self.compile is False and not self.activation_checkpointing
        if self.fp8 and self.deepspeed.stage == 3 and kept:
            raise ValueError(
                f"fp8={self.fp8} with deepspeed=zero3 and compile=false: every gathered weight would stay "
                "until the backward pass; use compile=true, or activation_checkpointing=true"
            )
        if self.fp8 and self.precision == "fp32":
            raise ValueError(
                f"fp8={self.fp8} with precision=fp32: FP8 is a step below bf16; use precision=auto"
            )
        tokens = self.micro_batch_size * self.seq_len
        if self.fp8 and tokens % MULTIPLE:  # the inner size of the weights' gradients
            raise ValueError(
                f"fp8={self.fp8}: micro_batch_size x seq_len = {self.micro_batch_size} x {self.seq_len} = "
                f"{tokens} tokens, not a multiple of {MULTIPLE}; change one of the two, or fp8=false"
            )
        if self.time_limit is not None and self.time_limit <= self.grace_seconds:
            raise ValueError(
                f"time_limit={self.time_limit:g} seconds is not above grace_seconds={self.grace_seconds:g}, "
                "which finishing may take of it; change one of the two"
            )
        self._check_early_stop()
        curriculum = self.data.curriculum
        if curriculum is not None and curriculum.from_length > self.seq_len:
            raise ValueError(
                f"data.curriculum.from_length={curriculum.from_length} is above seq_len={self.seq_len}: "
                "segments grow up to seq_len"
            )
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of "
                f"micro_batch_size={self.micro_batch_size}"
            )

    def _check_early_stop(self) -> None:
        """ValueError where there is nothing to stop by, or the best evaluation would have no checkpoint."""
        evaluation, key = self.callbacks.evaluation, "callbacks.evaluation"
        if evaluation.patience is None:
            return
        if not self.data.validation_fraction:
            raise ValueError(
                f"{key}.patience={evaluation.patience} with data.validation_fraction=0: "
                "nothing is held out; raise it"
            )
        if evaluation.every % self.checkpoint.every:
            raise ValueError(
                f"{key}.every={evaluation.every} is not a multiple of checkpoint.every="
                f"{self.checkpoint.every}: with "
                f"{key}.patience={evaluation.patience} the best step has to have a checkpoint"
            )


class PrepareConfig(TrainConfig):
    """A run whose text is turned into shards ahead, wholly or one part of many."""

    part: str
    """`3/16`: the third of sixteen equal shares, so that as many machines can work side by side."""
