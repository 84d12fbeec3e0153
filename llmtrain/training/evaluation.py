"""Held-out loss and bits per byte, and two baselines that say how much of it is due to context.

bits per byte = summed loss of the targets in nats / ln 2 / UTF-8 bytes of the covered documents: comparable
across tokenizers, unlike a loss a token. Where a document's first token is no target (data.documents=separate
without a bos id), its bytes still count, for the model and the baselines alike.

unigram   the best that a model without any context does: token frequencies of the training text
shuffled  the model itself, its inputs permuted within each document piece, its targets unchanged: a model
          that uses the order of its context gets worse
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import torch

from llmtrain import distributed
from llmtrain.config import UserError
from llmtrain.data.batch import IGNORED, Batch
from llmtrain.data.heldout import HeldOut, unigram_counts
from llmtrain.data.mixture import Weight
from llmtrain.data.packing import Documents
from llmtrain.data.shards import ShardedSource
from llmtrain.distributed import World

UNIGRAM_TOKENS = 50_000_000
"""Tokens from the beginning of a source that its unigram frequencies are taken from at most."""


@dataclass(frozen=True)
class Baselines:
    """What the baselines need: training text, its relative weights, the real vocabulary's size, a seed."""

    train_sources: Mapping[str, ShardedSource]
    weights: Mapping[str, Weight]
    vocab_size: int
    seed: int


@dataclass(frozen=True)
class Score:
    """Summed losses in nats over `tokens` targets that stand for `bytes` of text; None was not measured."""

    model: float
    unigram: float | None
    shuffled: float | None
    tokens: int
    bytes: int

    def __add__(self, other: Score) -> Score:
        return Score(
            self.model + other.model,
            _add(self.unigram, other.unigram),
            _add(self.shuffled, other.shuffled),
            self.tokens + other.tokens,
            self.bytes + other.bytes,
        )

    def as_dict(self) -> dict[str, float | int | None]:
        """The entry of eval/heldout.json; no targets or no bytes give None."""
        return {
            "loss": self.model / self.tokens if self.tokens else None,
            "bits_per_byte": self._bits(self.model),
            "unigram_bits_per_byte": self._bits(self.unigram),
            "shuffled_bits_per_byte": self._bits(self.shuffled),
            "tokens": self.tokens,
            "bytes": self.bytes,
        }

    def _bits(self, nats: float | None) -> float | None:
        return nats / math.log(2) / self.bytes if nats is not None and self.tokens and self.bytes else None


def evaluate_model(
    loss: Callable[[Batch], torch.Tensor],
    held_out: Mapping[str, ShardedSource],
    *,
    seq_len: int,
    rows: int,
    documents: Documents,
    documents_limit: int | None,
    boundary_targets: bool | None = None,
    world: World,
    baselines: Baselines | None = None,
) -> dict[str, Any]:
    """Scores of held-out sources: {"sources": {name: {loss, bits_per_byte, ...}}, "all": {...}}.

    `loss(batch)` sums each row's target losses [rows] without gradient; it gets `rows` rows at a time and is
    called equally often on every rank. Sums are float64 and over all ranks, so that neither ranks nor rows
    change the result beyond rounding. `documents`, its limit and `boundary_targets` are those of `HeldOut`.
    The unigram baseline is computed by the main rank alone and is None on the others.
    """
    if not held_out:
        raise UserError(
            "no held-out documents: data.validation_fraction was 0, or too small for so little text"
        )
    texts = [
        HeldOut(source, seq_len, rows, documents_limit, documents, boundary_targets)
        for source in held_out.values()
    ]
    seed = None if baselines is None else baselines.seed
    sums = torch.stack([_sum_losses(loss, text, world, seed) for text in texts])
    totals = distributed.all_reduce_sum(sums).tolist()
    unigram = _unigram(baselines) if baselines is not None and world.is_main else None
    scores = [
        Score(
            model,
            None if unigram is None else _unigram_loss(unigram, text),
            None if seed is None else shuffled,
            int(targets),
            text.text_bytes,
        )
        for text, (model, shuffled, targets) in zip(texts, totals, strict=True)
    ]
    sources = {name: score.as_dict() for name, score in zip(held_out, scores, strict=True)}
    return {"sources": sources, "all": reduce(operator.add, scores).as_dict()}


def shuffle_context(batch: Batch, seeds: Sequence[Sequence[int]]) -> Batch:
    """The batch with the inputs of each document piece permuted and everything else as it was.

    `seeds` holds one seed a row, so that a window is shuffled alike whatever rows stand beside it.
    """
    keys = np.stack([np.random.default_rng(list(seed)).random(batch.input_ids.shape[1]) for seed in seeds])
    lengths = np.diff(batch.cu_seqlens.numpy())
    pieces = np.repeat(np.arange(len(lengths)), lengths)
    order = torch.from_numpy(np.lexsort((keys.reshape(-1), pieces)))  # by piece, within it by random key
    shuffled = batch.input_ids.reshape(-1)[order].reshape(batch.input_ids.shape)
    return replace(batch, input_ids=shuffled)


def _sum_losses(
    loss: Callable[[Batch], torch.Tensor], text: HeldOut, world: World, seed: int | None
) -> torch.Tensor:
    """[model, shuffled, targets] of this rank's batches, float64, on the device of the losses.

    Batches are dealt out in turn; past the end of the text there are batches without targets, so that every
    rank makes the same number of calls, one at least.
    """
    total: torch.Tensor | float = 0.0
    for turn in range(max(1, math.ceil(len(text) / world.world_size))):
        index = turn * world.world_size + world.rank
        batch = text.batch(index)
        model = loss(batch).double().sum()
        shuffled = torch.zeros_like(model)
        if seed is not None:
            windows = range(index * batch.rows, (index + 1) * batch.rows)
            shuffled = loss(shuffle_context(batch, [(seed, window) for window in windows])).double().sum()
        targets = (batch.labels != IGNORED).sum().to(model)
        total = total + torch.stack([model, shuffled, targets])
    assert isinstance(total, torch.Tensor)
    return total


def _unigram(baselines: Baselines) -> np.ndarray:
    """Negative log probability of each id in nats: add-one frequencies a source, mixed by the weights."""
    whole = sum(float(weight) for weight in baselines.weights.values())
    probability = np.zeros(baselines.vocab_size)
    for name, weight in baselines.weights.items():
        source = baselines.train_sources[name]
        counts = unigram_counts(source, baselines.vocab_size, UNIGRAM_TOKENS) + 1
        probability += float(weight) / whole * counts / counts.sum()
    return -np.log(probability)


def _unigram_loss(unigram: np.ndarray, text: HeldOut) -> float:
    total = 0.0
    for batch in text:
        labels = batch.labels.numpy()
        total += float(unigram[labels[labels != IGNORED]].sum())
    return total


def _add(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
