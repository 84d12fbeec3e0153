"""The loss a row, the vocabulary's padding, and activation checkpointing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.model import Decoder
from tests.model.small import (
    POSITIONS,
    SEQ_LEN,
    VOCAB,
    decoder,
    packed_batch,
    plain_batch,
    relative_error,
    tokens,
)


def test_the_loss_of_a_row_is_the_sum_of_its_cross_entropies() -> None:
    model, batch = decoder(), packed_batch()
    logits = model(batch["input_ids"], None, batch["position_ids"], batch["cu_seqlens"])
    losses = model(**batch).rows
    assert losses.shape == (2,)
    for row in range(2):
        expected = F.cross_entropy(logits[row], batch["labels"][row].long(), reduction="sum")
        torch.testing.assert_close(losses[row], expected)


def test_a_row_without_targets_costs_nothing() -> None:
    model, labels = decoder(), tokens(seed=2)
    labels[1] = -100
    losses = model(tokens(), labels)
    assert losses.rows[0] > 0
    assert losses.rows[1] == 0
    losses.total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_shift_of_the_labels_is_the_callers() -> None:
    """Position t is scored against labels[t], and one label moves only its own row."""
    model, ids = decoder(), tokens()
    labels = torch.full_like(ids, -100)
    labels[0, 7] = 11
    expected = -model(ids)[0, 7].log_softmax(-1)[11]
    torch.testing.assert_close(model(ids, labels).rows, torch.stack([expected, torch.zeros(())]))


@pytest.mark.parametrize("tied", [True, False])
def test_padding_is_neither_in_the_logits_nor_in_the_loss(tied: bool) -> None:
    model, batch = decoder(tie_embeddings=tied), packed_batch()
    logits, losses = model(batch["input_ids"]), model(**batch).rows
    assert logits.shape == (2, SEQ_LEN, VOCAB)
    with torch.no_grad():
        (model.embedding if tied else model.head).weight[VOCAB:] = 100.0
    assert torch.equal(model(batch["input_ids"]), logits)
    assert torch.equal(model(**batch).rows, losses)
    model(**batch).total.backward()
    assert not (model.embedding if tied else model.head).weight.grad[VOCAB:].any()


def test_the_last_id_is_a_target_and_the_next_is_not() -> None:
    model, ids = decoder(), tokens()
    assert model(ids, torch.full_like(ids, VOCAB - 1)).rows.isfinite().all()
    with pytest.raises(IndexError):
        model(ids, torch.full_like(ids, VOCAB))


def test_the_loss_is_fp32_under_bf16_weights() -> None:
    model, batch = decoder().bfloat16(), plain_batch()
    logits, losses = model(batch["input_ids"]), model(**batch).rows
    assert (logits.dtype, losses.dtype) == (torch.bfloat16, torch.float32)
    for row in range(2):
        expected = F.cross_entropy(logits[row].double(), batch["labels"][row].long(), reduction="sum")
        assert losses[row].item() == pytest.approx(expected.item(), rel=1e-6)


def saved_for_backward(model: Decoder, batch: dict[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
    """Elements that the forward pass keeps for the backward pass, and the gradients."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model(**batch)
    losses.total.backward()
    return kept, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_activation_checkpointing_keeps_less_and_changes_nothing(position: str) -> None:
    plain = decoder(n_layers=4, position=POSITIONS[position], attention={"backend": "sdpa"})
    frugal = decoder(n_layers=4, position=POSITIONS[position], attention={"backend": "sdpa"})
    frugal.activation_checkpointing = True
    kept, gradients = saved_for_backward(plain, packed_batch())
    kept_frugal, gradients_frugal = saved_for_backward(frugal, packed_batch())
    assert kept_frugal < kept / 3
    for name, gradient in gradients.items():
        assert relative_error(gradients_frugal[name], gradient) < 1e-6, name
    with torch.no_grad():
        assert torch.equal(frugal(tokens()), plain(tokens()))
