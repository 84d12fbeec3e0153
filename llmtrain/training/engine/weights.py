"""DeepSpeed's checkpoint files, read as data: no pickled code ever runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


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


def consolidated_weights(directory: Path, stage: int) -> dict[str, torch.Tensor]:
    """The whole model's fp32 weights by parameter name, from a checkpoint's engine files on the CPU.

    Needs neither the ranks nor the device that wrote them.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with allow_state_classes():
        if stage == 0:
            state = torch.load(
                directory / "engine" / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True
            )["module"]
        else:
            state = get_fp32_state_dict_from_zero_checkpoint(str(directory), tag="engine")
    return {name: tensor.float() for name, tensor in state.items()}
