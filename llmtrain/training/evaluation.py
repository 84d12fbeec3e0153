"""Held-out loss and bits per byte, and two baselines that say how much of it is due to context.

bits per byte = summed loss of the targets in nats / ln 2 / UTF-8 bytes of the covered documents: comparable
across tokenizers, unlike a loss a token. Where a document's first token is no target (data.documents=separate
without a bos id), its bytes still count, for the model and the baselines alike.

unigram   the best that a model without any context does: token frequencies of the training text, as far as
          the run has read it
shuffled  the model itself, its inputs permuted within each document piece, its targets unchanged: a model
          that uses the order of its context gets worse
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmtrain import distributed
from llmtrain.config import UserError
from llmtrain.data.batch import IGNORED, Batch
from llmtrain.data.dataset import PackedDataset
from llmtrain.data.heldout import HeldOut, unigram_counts
from llmtrain.data.shards import ShardedSource
from llmtrain.distributed import World

if TYPE_CHECKING:
    from llmtrain.training.config import TrainConfig

UNIGRAM_TOKENS = 50_000_000
"""Tokens of a source that its unigram frequencies are taken from at most."""


@dataclass(frozen=True)
class Unigram:
    """Token frequencies of the training text, mixed as the last step mixed it."""

    nats: np.ndarray
    """The negative log probability of each id, [vocab_size]."""
    tokens: dict[str, int]
    """How many tokens of each source were counted."""

    @classmethod
    def of(cls, dataset: PackedDataset, step: int, vocab_size: int) -> Unigram:
        """Add-one frequencies a source, mixed by the weights of the step; waits for shards that it reads.

        Counted are the first UNIGRAM_TOKENS tokens of the shards that the run has come to by this step, in
        the order of the first pass: the order of the data decides, not how fast text is tokenised.
        """
        weights = dataset.weights(step)
        probability, tokens = np.zeros(vocab_size), {}
        for name, shards in dataset.shards_read(step).items():
            counts = unigram_counts(dataset.streams[name].source, shards, vocab_size, UNIGRAM_TOKENS)
            tokens[name] = int(counts.sum())
            probability += weights.get(name, 0.0) * (counts + 1) / (tokens[name] + vocab_size)
        # Sums to 1, but for a source that was removed at this very step.
        return cls(-np.log(probability / probability.sum()), tokens)

    def loss(self, text: HeldOut) -> float:
        """The sum of the losses of a text's targets, in nats."""
        total = 0.0
        for batch in text:
            labels = batch.labels.numpy()
            total += float(self.nats[labels[labels != IGNORED]].sum())
        return total


class CutShortError(Exception):
    """Somebody asked to stop amid an evaluation."""


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


def open_held_out(
    sources: Mapping[str, ShardedSource], config: TrainConfig, documents_limit: int | None
) -> dict[str, HeldOut]:
    """The first `documents_limit` documents of each source in the order of its shards; waits for them.

    They are the same however far the text is tokenised. Sources that turn out to have none are left out.
    """
    texts = {
        name: HeldOut(
            source,
            config.seq_len,
            config.micro_batch_size,
            documents_limit,
            config.data.documents,
            config.data.trains_boundaries,
        )
        for name, source in sources.items()
    }
    return {name: text for name, text in texts.items() if text.documents}


def evaluate_model(
    loss: Callable[[Batch], torch.Tensor],
    held_out: Mapping[str, HeldOut],
    *,
    world: World,
    unigram: Unigram | None = None,
    shuffle_seed: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Scores of held-out text: {"sources": {name: {loss, bits_per_byte, ...}}, "all": {...}}.

    `loss(batch)` sums each row's target losses [rows] without gradient and is called equally often on every
    rank. Sums are float64 and over all ranks, so that neither ranks nor rows change the result beyond
    rounding. A baseline is None without its `unigram` (which one rank may have alone; "unigram_tokens" says
    what it was counted from) or its `shuffle_seed`. `stop` is asked before each batch and answers alike on
    every rank; once it says so, this raises CutShortError.
    """
    if not held_out:
        raise UserError(
            "no held-out documents: data.validation_fraction was 0, or too small for so little text"
        )
    sums = torch.stack([_sum_losses(loss, text, world, shuffle_seed, stop) for text in held_out.values()])
    totals = distributed.all_reduce_sum(sums).tolist()
    scores = [
        Score(
            model,
            None if unigram is None else unigram.loss(text),
            None if shuffle_seed is None else shuffled,
            int(targets),
            text.text_bytes,
        )
        for text, (model, shuffled, targets) in zip(held_out.values(), totals, strict=True)
    ]
    sources = {name: score.as_dict() for name, score in zip(held_out, scores, strict=True)}
    counted = {} if unigram is None else {"unigram_tokens": unigram.tokens}
    return {"sources": sources, "all": reduce(operator.add, scores).as_dict(), **counted}


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
    loss: Callable[[Batch], torch.Tensor],
    text: HeldOut,
    world: World,
    seed: int | None,
    stop: Callable[[], bool],
) -> torch.Tensor:
    """[model, shuffled, targets] of this rank's batches, float64, on the device of the losses.

    Batches are dealt out in turn; past the end of the text there are batches without targets, so that every
    rank makes the same number of calls, one at least.
    """
    total: torch.Tensor | float = 0.0
    for turn in range(max(1, math.ceil(len(text) / world.world_size))):
        if stop():
            raise CutShortError
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


def _add(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
