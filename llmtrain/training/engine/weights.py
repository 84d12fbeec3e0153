"""DeepSpeed's checkpoint files, read as data: no pickled code ever runs."""

from __future__ import annotations

import copyreg
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from llmtrain import distributed
from llmtrain.training.engine.config import ResolvedPrecision


@contextmanager
def allow_state_classes() -> Iterator[None]:
    """Let `torch.load` build the three classes that DeepSpeed's state holds, and nothing else.

    `TORCH_FORCE_WEIGHTS_ONLY_LOAD` also binds the readers inside DeepSpeed, which ask for full unpickling.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def write_enums_by_value() -> None:
    """Make the enum in DeepSpeed's state one that `torch.load` reads as data.

    Python before 3.11.4 pickles its members as a call of `getattr`, which could fetch anything.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


def consolidated_weights(
    directory: Path, stage: int, precision: ResolvedPrecision
) -> dict[str, torch.Tensor]:
    """The whole model's fp32 weights by parameter name, from a checkpoint's engine files on the CPU.

    Needs neither the ranks nor the device that wrote them.
    """
    distributed.quiet_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    silence = io.StringIO()  # it prints as it goes, and draws a bar
    with allow_state_classes(), redirect_stdout(silence), redirect_stderr(silence):
        if stage == 0:
            state = _load(directory / "engine" / "mp_rank_00_model_states.pt")["module"]
        elif stage == 1 and precision == "bf16":
            state = _of_bf16_optimizer(directory / "engine")
        else:
            state = get_fp32_state_dict_from_zero_checkpoint(str(directory), tag="engine")
    return {name: tensor.float() for name, tensor in state.items()}


def _of_bf16_optimizer(directory: Path) -> dict[str, torch.Tensor]:
    """The masters that DeepSpeed's BF16_Optimizer saved.

    They are laid out as under ZeRO 1, but without the mark by which DeepSpeed's own reader knows the stage.
    """
    from deepspeed.utils import zero_to_fp32 as reader

    optimizers = [
        _load(Path(file))["optimizer_state_dict"] for file in reader.get_optim_files(str(directory))
    ]
    groups = [optimizer["single_partition_of_fp32_groups"] for optimizer in optimizers]
    models = reader.parse_model_states(reader.get_model_state_files(str(directory)))
    return reader._get_fp32_state_dict_from_zero2_checkpoint(len(optimizers), groups, models, False)


def _load(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)
