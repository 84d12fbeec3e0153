"""The decoder against a float64 reference, its kernels against each other, packed rows against documents."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.model import Decoder
from tests.model import reference
from tests.model.small import (
    KV_HEADS,
    PACKED,
    POSITIONS,
    VOCAB,
    decoder,
    packed_batch,
    plain_batch,
    relative_error,
)

BATCHES = {"one": plain_batch, "packed": packed_batch}
CASES = [pytest.param(*case, id="-".join(case)) for case in itertools.product(POSITIONS, KV_HEADS, BATCHES)]


def forward(model: Decoder, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["input_ids"], None, batch["position_ids"], batch["cu_seqlens"])


def reference_logits(model: Decoder, batch: dict[str, Tensor]) -> Tensor:
    """[B, T, V]: every document alone through the reference."""
    starts, ids = batch["cu_seqlens"].tolist(), batch["input_ids"].flatten().tolist()
    documents = [ids[a:b] for a, b in itertools.pairwise(starts)]
    weights = model.state_dict()
    rows = [reference.logits(model.config, weights, document, VOCAB) for document in documents]
    return torch.cat(rows).view(*batch["input_ids"].shape, VOCAB)


@pytest.mark.parametrize(("position", "heads", "documents"), CASES)
def test_eager_equals_a_float64_reference(position: str, heads: str, documents: str) -> None:
    model = decoder(position=POSITIONS[position], n_kv_heads=KV_HEADS[heads])
    batch = BATCHES[documents]()
    expected = reference_logits(model, batch)
    assert relative_error(forward(model, batch), expected) < 1e-5
    assert relative_error(forward(model.double(), batch), expected) < 1e-12


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "layernorm"},
        {"norm": "layernorm_no_bias"},
        {"feed_forward": "geglu"},
        {"feed_forward": "gelu"},
        {"feed_forward": "gelu_tanh"},
        {"feed_forward": "relu_squared"},
        {"embedding_norm": True},
        {"qk_norm": True},
        {"residual": "parallel"},
        {"residual": "parallel_one_norm"},
        {"bias": "qkv"},
        {"bias": "all", "feed_forward": "gelu"},
        {"bias": "all"},
        {"tie_embeddings": False},
        {"head_dim": 6, "n_kv_heads": 2},
        {"norm_eps": 0.1},
    ],
    ids=lambda changes: "-".join(f"{key}={value}" for key, value in changes.items()),
)
def test_every_other_option_equals_the_reference(changes: dict[str, Any]) -> None:
    model, batch = decoder(**changes), packed_batch()
    assert relative_error(forward(model, batch), reference_logits(model, batch)) < 1e-5


@pytest.mark.parametrize(("position", "heads", "documents"), CASES)
def test_sdpa_equals_eager_in_every_gradient(position: str, heads: str, documents: str) -> None:
    batch = BATCHES[documents]()
    results = []
    for backend in ("eager", "sdpa"):
        model = decoder(
            position=POSITIONS[position], n_kv_heads=KV_HEADS[heads], attention={"backend": backend}
        )
        losses = model(**batch)
        losses.total.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({"logits": forward(model, batch), "losses": losses.rows, **gradients})
    eager, sdpa = results
    for name, value in eager.items():
        assert relative_error(sdpa[name], value) < 1e-5, name


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_packed_row_equals_its_documents_alone(position: str, backend: str) -> None:
    model = decoder(position=POSITIONS[position], attention={"backend": backend})
    batch = packed_batch()
    packed = forward(model, batch).flatten(0, 1)
    ids = batch["input_ids"].flatten()
    for start, stop in itertools.pairwise(PACKED):
        assert relative_error(packed[start:stop], model(ids[None, start:stop])[0]) < 1e-5


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_relative_positions_need_no_restart(position: str, backend: str) -> None:
    model = decoder(position=POSITIONS[position], attention={"backend": backend})
    batch = packed_batch()
    running = {**batch, "position_ids": torch.arange(24).expand(2, -1)}
    assert relative_error(forward(model, running), forward(model, batch)) < 1e-5


def test_documents_are_seen_only_through_cu_seqlens() -> None:
    """The packed result differs from the plain one, or the tests above could not fail."""
    model = decoder()
    assert relative_error(forward(model, packed_batch()), forward(model, plain_batch())) > 0.1


@pytest.mark.parametrize("heads", KV_HEADS)
@pytest.mark.parametrize("position", POSITIONS)
def test_bf16_weights_stay_near_fp32(position: str, heads: str) -> None:
    """The reference is the bf16-rounded model in float64, so only the arithmetic is judged."""
    for backend in ("eager", "sdpa"):
        model = decoder(
            sharp=False,
            position=POSITIONS[position],
            n_kv_heads=KV_HEADS[heads],
            attention={"backend": backend},
        ).bfloat16()
        batch = packed_batch()
        logits, losses = forward(model, batch), model(**batch).rows
        assert (logits.dtype, losses.dtype) == (torch.bfloat16, torch.float32)
        exact = model.double()
        assert relative_error(logits, forward(exact, batch)) < 2e-2
        assert relative_error(losses, exact(**batch).rows) < 2e-3


def test_autocast_keeps_fp32_where_it_matters() -> None:
    model, batch = decoder(sharp=False, attention={"backend": "sdpa"}), packed_batch()
    streams: list[torch.dtype] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _args, out: streams.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(**batch).rows
    assert (losses.dtype, set(streams)) == (torch.float32, {torch.float32})
    assert 0 < relative_error(losses, model(**batch).rows) < 2e-3
