"""The optimizer that DeepSpeed is given; its own Muon is told where the fused matrices are cut."""

from __future__ import annotations

from typing import Any

import torch

from llmtrain.model import Decoder
from llmtrain.model.decoder import Block
from llmtrain.model.feed_forward import Gated
from llmtrain.optim.base import OptimizerConfig
from llmtrain.optim.lion import Lion
from llmtrain.optim.muon import MuonConfig
from llmtrain.training.engine.config import DeepSpeedConfig, Precision


def build_optimizer(config: OptimizerConfig, model: Decoder) -> torch.optim.Optimizer:
    """The optimizer over the model's parameters, which may be partitioned already."""
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if Lion not in ZERO_SUPPORTED_OPTIMIZERS:  # it steps on any part of a parameter, as AdamW does
        ZERO_SUPPORTED_OPTIMIZERS.append(Lion)
    groups = config.parameter_groups(
        model.named_parameters(), lambda parameter: len(getattr(parameter, "ds_shape", parameter.shape))
    )
    return build_muon(groups, model) if isinstance(config, MuonConfig) else config.build(groups)


def build_muon(groups: list[dict[str, Any]], model: Decoder) -> torch.optim.Optimizer:
    """DeepSpeed's Muon over groups of which each says `use_muon`; AdamW steps the others.

    ZeRO orthogonalises a matrix in blocks of equal height, `muon_num_heads` of them.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    for parameter, blocks in fused(model):
        parameter.muon_num_heads = blocks  # type: ignore[attr-defined]
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True})


def fused(model: Decoder) -> list[tuple[torch.Tensor, int]]:
    """The matrices that hold several, and into how many blocks of rows they are cut.

    gate and up: 2. q, k and v: 3 where they are equally high (MHA). Under GQA and MQA a block is as high as
    k: k and v are one each, and q is H / K.
    """
    found = []
    for block in model.blocks:
        assert isinstance(block, Block)
        query, key, _ = block.attention.heads
        found.append((block.attention.qkv.weight, query // key + 2))
        if isinstance(block.feed_forward, Gated):
            found.append((block.feed_forward.gate_up.weight, 2))
    return found


def check_muon(deepspeed: DeepSpeedConfig, precision: Precision) -> None:
    """ValueError where DeepSpeed 0.19.8 computes another Muon than this one."""
    zero = deepspeed.zero_optimization
    if zero.stage == 0:
        raise ValueError(
            "optimizer=muon with deepspeed=zero0: DeepSpeed orthogonalises fused matrices as one there; "
            "use deepspeed=zero1, on one rank too"
        )
    if precision == "bf16":
        raise ValueError(
            "optimizer=muon with precision=bf16: DeepSpeed orthogonalises fused matrices as one (stage 1), "
            "or keeps the momentum in bf16 (stages 2 and 3); use precision=bf16_autocast"
        )
    if zero.parameter_alignment and zero.stage < 3:
        raise ValueError(
            "optimizer=muon with deepspeed.zero_optimization.parameter_alignment=true: DeepSpeed "
            "orthogonalises fused matrices as one there; use parameter_alignment=false"
        )
    if zero.reduce_scatter and zero.stage == 3:
        raise ValueError(
            "optimizer=muon with deepspeed=zero3: DeepSpeed needs whole gradients for it; "
            "add deepspeed.zero_optimization.reduce_scatter=false"
        )
