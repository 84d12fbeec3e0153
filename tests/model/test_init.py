"""Initial values: the table of model/init.py, and that only (seed, name) matters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llmtrain.model.init import initial_value, initialize_parameters
from tests.model.small import POSITIONS, VOCAB, config, decoder, tokens

SHAPE = {"d_model": 128, "n_layers": 3, "d_ff": 256, "tie_embeddings": False, "position": {"kind": "learned"}}


def test_the_table() -> None:
    model = decoder(sharp=False, norm="layernorm", **SHAPE)
    residual = 0.02 / math.sqrt(2 * 3)
    for name, parameter in model.named_parameters():
        if "norm." in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
            continue
        drawn = parameter[:VOCAB] if name in ("embedding.weight", "head.weight") else parameter
        expected = residual if name.endswith(("out.weight", "down.weight")) else 0.02
        assert drawn.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(drawn.mean().item()) < expected / 10, name


def test_values_depend_on_seed_and_name_alone() -> None:
    """Not on the order of construction, the parts beside it, the global generator or the dtype."""
    whole = decoder(sharp=False, seed=5, **SHAPE).state_dict()
    torch.manual_seed(123)
    other = config(**SHAPE, norm="layernorm").assemble(vocab_size=VOCAB, seq_len=24)
    reverse = SimpleNamespace(n_layers=3, vocab_size=VOCAB)
    reverse.named_parameters = lambda: reversed(list(other.named_parameters()))
    initialize_parameters(reverse, 5)
    common = {name: value for name, value in other.named_parameters() if name in whole}
    assert len(common) > 15
    assert all(torch.equal(value, whole[name]) for name, value in common.items())
    bf16 = config(**SHAPE).assemble(vocab_size=VOCAB, seq_len=24).bfloat16()
    initialize_parameters(bf16, 5)
    assert all(torch.equal(value, whole[name].bfloat16()) for name, value in bf16.state_dict().items())


def test_seed_and_name_both_matter() -> None:
    draw = [initial_value(name, torch.Size([8]), seed, 1) for name in ("a", "b") for seed in (0, 1)]
    assert len({tuple(value.tolist()) for value in draw}) == 4


def test_each_write_is_inside_gather() -> None:
    model = config().assemble(vocab_size=VOCAB, seq_len=24)
    gathered: list[nn.Parameter] = []

    @contextmanager
    def gather(parameter: nn.Parameter) -> Iterator[None]:
        """As ZeRO-3: outside of it there is nothing to see of a parameter."""
        parameter.data, parameter.whole = parameter.whole, None
        gathered.append(parameter)
        yield
        parameter.data, parameter.whole = torch.empty(0), parameter.data

    for parameter in model.parameters():
        parameter.data, parameter.whole = torch.empty(0), parameter.data
    initialize_parameters(model, 0, gather)
    assert [id(p) for p in gathered] == [id(p) for p in model.parameters()]
    plain = decoder(sharp=False)
    assert all(torch.equal(a.whole, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("position", POSITIONS)
def test_the_first_loss_is_about_ln_vocab(position: str, tied: bool) -> None:
    model = decoder(
        sharp=False, vocab_size=4096, d_model=128, d_ff=256, n_layers=3, tie_embeddings=tied,
        position=POSITIONS[position],
    )  # fmt: skip
    ids = torch.randint(0, 4096, (16, 25), generator=torch.Generator().manual_seed(0))
    loss = model(ids[:, :-1], ids[:, 1:]).total / (16 * 24)
    assert loss.item() == pytest.approx(math.log(4096), abs=0.1)


def test_rows_of_padding_stay_zero() -> None:
    model = decoder(sharp=False, tie_embeddings=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(tokens(), tokens(seed=3)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    for table in (model.embedding.weight, model.head.weight):
        assert len(table) == 384
        assert not table[VOCAB:].any()
