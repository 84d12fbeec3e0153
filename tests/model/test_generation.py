"""Generation: greedy and sampled, the context's end, eos, and a fixed number of forward passes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from llmtrain.model.generation import generate
from tests.model.small import SEQ_LEN, decoder


class Successor:
    """Logits that make id n + 1 likeliest after id n, of a vocabulary of 10; counts its calls."""

    def __init__(self) -> None:
        self.contexts: list[list[int]] = []

    def __call__(self, ids: Tensor) -> Tensor:
        self.contexts.append(ids[0].tolist())
        logits = torch.zeros(1, ids.shape[1], 10)
        logits[0, -1, (ids[0, -1] + 1) % 10] = 3.0
        return logits


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_temperature_0_takes_the_likeliest_within_seq_len() -> None:
    model = Successor()
    assert generate(model, [3, 4], 5, 3, 0.0, seeded(), None) == [5, 6, 7, 8, 9]
    assert model.contexts == [[3, 4], [3, 4, 5], [4, 5, 6], [5, 6, 7], [6, 7, 8]]


def test_eos_ends_the_text_but_not_the_forward_passes() -> None:
    model = Successor()
    assert generate(model, [3, 4], 8, 3, 0.0, seeded(), 7) == [5, 6]
    assert len(model.contexts) == 8


def test_an_eos_in_the_prompt_does_not_end_the_text() -> None:
    assert generate(Successor(), [5, 6], 2, 3, 0.0, seeded(), 5) == [7, 8]


def test_sampling_follows_the_temperature_and_the_generator() -> None:
    first = generate(Successor(), [0], 400, 2, 1.0, seeded(), None)
    assert first == generate(Successor(), [0], 400, 2, 1.0, seeded(), None)
    assert first != generate(Successor(), [0], 400, 2, 1.0, seeded(1), None)

    def successors(ids: list[int]) -> float:
        pairs = Counter((b - a) % 10 for a, b in zip([0, *ids], ids, strict=False))
        return pairs[1] / len(ids)

    share = torch.tensor([3.0] + [0.0] * 9).softmax(0)[0].item()
    assert successors(first) == pytest.approx(share, abs=0.08)
    assert successors(generate(Successor(), [0], 400, 2, 0.3, seeded(), None)) > 0.99
    assert successors(generate(Successor(), [0], 400, 2, 100.0, seeded(), None)) < 0.2


def test_a_prompt_may_not_be_empty() -> None:
    with pytest.raises(ValueError, match="at least one id"):
        generate(Successor(), [], 1, 3, 0.0, seeded(), None)


def test_a_decoder_generates_what_its_logits_say() -> None:
    model, ids = decoder(position={"kind": "learned"}), [1, 2, 3]
    new = generate(model, ids, SEQ_LEN, SEQ_LEN, 0.0, seeded(), None)
    for token in new:
        assert token == int(model(torch.tensor([ids[-SEQ_LEN:]]))[0, -1].argmax())
        ids = [*ids, token]
