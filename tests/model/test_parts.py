"""Norms and feed-forward parts against torch's formulas, documents' masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.model.documents import Documents
from llmtrain.model.feed_forward import build_feed_forward
from llmtrain.model.kernels import eager
from llmtrain.model.kernels.base import repeat_heads
from llmtrain.model.norm import build_norm
from tests.model.small import PACKED, POSITIONS, SEQ_LEN, decoder, packed_batch, relative_error

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norms_equal_torch_and_reduce_in_fp32(kind: str) -> None:
    norm, x = build_norm(kind, 96, 1e-3), torch.randn(5, 96)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(96))
    bias = getattr(norm, "bias", None)
    functional = F.rms_norm if kind == "rmsnorm" else F.layer_norm
    arguments = (norm.weight,) if kind == "rmsnorm" else (norm.weight, bias)
    torch.testing.assert_close(norm(x), functional(x, (96,), *arguments, eps=1e-3))
    assert (bias is not None) == (kind == "layernorm")

    large = (1000 * x + 30_000).bfloat16()  # its squares need more than bf16's 8 bits
    half, exact = norm.bfloat16()(large), norm.double()(large.double())
    assert half.dtype == torch.bfloat16
    assert relative_error(half, exact) < 2**-7


def test_swiglu_and_gelu_are_their_formulas() -> None:
    x = torch.randn(2, 3, 16)
    swiglu, gelu = build_feed_forward("swiglu", 16, 24), build_feed_forward("gelu", 16, 24)
    with torch.no_grad():
        for parameter in [*swiglu.parameters(), *gelu.parameters()]:
            parameter.normal_(0, 0.3)
    gate, up = swiglu.gate_up.weight[:24], swiglu.gate_up.weight[24:]
    torch.testing.assert_close(swiglu(x), (F.silu(x @ gate.T) * (x @ up.T)) @ swiglu.down.weight.T)
    torch.testing.assert_close(gelu(x), F.gelu(x @ gelu.up.weight.T) @ gelu.down.weight.T)


def recorded_masks(monkeypatch: pytest.MonkeyPatch, position: str, packed: bool) -> list[Tensor | None]:
    """The masks that the layers of one forward pass hand to torch."""
    masks: list[Tensor | None] = []
    fused = F.scaled_dot_product_attention

    def record(*args: Tensor, **options: object) -> Tensor:
        masks.append(options["attn_mask"])  # type: ignore[arg-type]
        assert options["is_causal"] == (options["attn_mask"] is None)
        return fused(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    batch = packed_batch()
    starts = batch["cu_seqlens"] if packed else torch.tensor([0, SEQ_LEN, 2 * SEQ_LEN])
    decoder(n_layers=3, position=POSITIONS[position], attention={"backend": "sdpa"})(
        batch["input_ids"], cu_seqlens=starts
    )
    return masks


def test_one_document_a_row_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorded_masks(monkeypatch, "rope", packed=False) == [None, None, None]


@pytest.mark.parametrize(
    ("position", "packed", "heads"), [("rope", True, 1), ("alibi", False, 4), ("alibi", True, 4)]
)
def test_layers_share_one_mask(
    monkeypatch: pytest.MonkeyPatch, position: str, packed: bool, heads: int
) -> None:
    masks = recorded_masks(monkeypatch, position, packed)
    assert len(masks) == 3
    assert masks[0] is masks[1] is masks[2]
    assert masks[0].shape == (2 if packed else 1, heads, SEQ_LEN, SEQ_LEN)


@pytest.mark.parametrize("starts", [PACKED, [0, 24, 48], [0, 5, 24, 48], [0, 24, 47, 48]], ids=str)
def test_documents_against_a_loop(starts: list[int]) -> None:
    documents = Documents(2, SEQ_LEN, torch.tensor(starts, dtype=torch.int32), CPU)
    assert documents.one_per_row == (starts == [0, 24, 48])
    owner = [max(n for n, start in enumerate(starts) if start <= position) for position in range(2 * SEQ_LEN)]
    for row in range(2):
        mine = owner[row * SEQ_LEN : (row + 1) * SEQ_LEN]
        expected = [[j <= i and mine[i] == mine[j] for j in range(SEQ_LEN)] for i in range(SEQ_LEN)]
        assert documents.allowed.expand(2, -1, -1, -1)[row, 0].tolist() == expected


def test_the_bias_falls_with_distance_and_ends_with_the_document() -> None:
    documents = Documents(2, SEQ_LEN, torch.tensor(PACKED, dtype=torch.int32), CPU)
    bias = documents.bias(torch.tensor([0.5, 0.25]), torch.float32)
    assert bias.shape == (2, 2, SEQ_LEN, SEQ_LEN)
    assert bias[1, 1, 5, 2] == -0.75
    assert bias[0, 0, 6, 5] == float("-inf")


def test_the_softmax_of_eager_is_fp32_for_bf16_heads() -> None:
    seen: list[torch.dtype] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "softmax" in str(function):
                seen.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    q = torch.randn(1, 5, 2, 4).bfloat16()
    with Watch():
        out = eager.attend(q, q, q, eager.prepare(Documents(1, 5, None, CPU), None, q.dtype))
    assert (seen, out.dtype) == ([torch.float32], torch.bfloat16)


def test_repeated_heads_are_grouped_heads() -> None:
    k = torch.randn(2, 3, 2, 4)
    repeated, _ = repeat_heads(k, k, 6)
    assert [torch.equal(repeated[:, :, h], k[:, :, h // 3]) for h in range(6)] == [True] * 6
