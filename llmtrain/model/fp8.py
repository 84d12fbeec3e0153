"""FP8 for the large matrix products of the blocks, through torchao (the extra `fp8`).

Weights, their gradients and the checkpoint stay what they are: operands are cast to FP8 for each product,
scaled by the largest value of a tensor (tensorwise: fastest) or of each row and column (rowwise: closer).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from llmtrain.config import UserError
from llmtrain.importing import quiet_libraries

if TYPE_CHECKING:
    from llmtrain.model.decoder import Decoder

Fp8Recipe = Literal["tensorwise", "rowwise"]

MULTIPLE = 16
"""The tensor cores' FP8 products want both sizes of a matrix, and the tokens, to be multiples of this."""

CAPABILITY = (8, 9)
"""The oldest CUDA architecture that has them: Ada."""


def check_fp8(recipe: Fp8Recipe) -> Any:
    """torchao.float8; UserError where it is missing or the GPU is too old. A CPU computes in emulation."""
    try:
        with quiet_libraries():
            import torchao.float8
    except ImportError as error:
        raise UserError(
            f"fp8={recipe}: torchao cannot be imported ({error}); pip install 'llmtrain[fp8]', or fp8=false"
        ) from error
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability()) < CAPABILITY:
        raise UserError(
            f"fp8={recipe}: {torch.cuda.get_device_name()} has compute capability {found[0]}.{found[1]}, "
            "FP8 needs 8.9 (Ada) or newer: fp8=false"
        )
    return torchao.float8


def convert_to_fp8(decoder: Decoder, recipe: Fp8Recipe) -> list[str]:
    """Exchange the blocks' matrices whose sizes allow it for torchao's; returns their names.

    Names and values of the parameters stay. The head, the embedding, norms and attention's own products are
    left alone. UserError where nothing is left to convert.
    """
    float8 = check_fp8(recipe)
    converted: list[str] = []

    def chosen(module: nn.Module, name: str) -> bool:
        assert isinstance(module, nn.Linear)
        fits = all(size % MULTIPLE == 0 for size in (module.in_features, module.out_features))
        converted.extend([name] if fits else [])
        return fits

    config = float8.Float8LinearConfig.from_recipe_name(recipe)
    config = dataclasses.replace(config, emulate=not torch.cuda.is_available())
    float8.convert_to_float8_training(decoder.blocks, module_filter_fn=chosen, config=config)
    if not converted:
        raise UserError(
            f"fp8={recipe}: no matrix of the blocks has sizes that are multiples of {MULTIPLE}: "
            "change model.d_model and model.d_ff, or fp8=false"
        )
    return converted


@contextmanager
def without_fp8(decoder: Decoder) -> Iterator[None]:
    """Inside, converted matrices multiply as before; not for compiled blocks, whose graphs are made again.

    A scale is one number of a whole tensor under tensorwise: there every token moves all others a little.
    """
    float8 = sys.modules.get("torchao.float8.float8_linear")  # not imported: nothing is converted
    matrices = [m for m in decoder.blocks.modules() if float8 and isinstance(m, float8.Float8Linear)]
    for matrix in matrices:
        matrix.forward = partial(nn.Linear.forward, matrix)
    try:
        yield
    finally:
        for matrix in matrices:
            del matrix.forward
