from __future__ import annotations

import math
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from llmtrain.data.batch import IGNORED, Batch
from llmtrain.data.dataset import PackedDataset
from llmtrain.data.heldout import HeldOut
from llmtrain.data.prepared import Prepared
from llmtrain.data.windows import TokenSource
from llmtrain.distributed import World
from llmtrain.training.build import open_alike
from llmtrain.training.evaluation import Unigram, evaluate_model, open_held_out, shuffle_context
from tests.data.array_source import ArraySource, GrowingSource

VOCAB = 11
SEQ_LEN = 6


def documents(seed: int, count: int, longest: int = 20) -> list[list[int]]:
    """Documents in which an id is mostly followed by the next one: order tells something."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = [int(draw.integers(VOCAB))]
        while len(ids) < draw.integers(1, longest):
            ids.append((ids[-1] + 1) % VOCAB if draw.random() < 0.8 else int(draw.integers(VOCAB)))
        found.append(ids)
    return found


def source(seed: int, count: int = 13) -> ArraySource:
    texts = documents(seed, count)
    return ArraySource(
        [texts[: count // 2], texts[count // 2 :]],
        [[3 * len(t) for t in texts[: count // 2]], [3 * len(t) for t in texts[count // 2 :]]],
    )


HELD_OUT = {"code": source(1), "prose": source(2, 9)}
TRAIN = {"code": source(3, 40), "prose": source(4, 25)}


def bigram_table() -> torch.Tensor:
    """Log probabilities [V, V] that agree with how the documents were drawn."""
    table = torch.full((VOCAB, VOCAB), 0.2 / VOCAB, dtype=torch.float64)
    table[torch.arange(VOCAB), (torch.arange(VOCAB) + 1) % VOCAB] += 0.8
    return table.log()


class Model:
    """A model with a closed form: log p(label | input) from a table."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table, self.calls = table, 0

    def __call__(self, batch: Batch) -> torch.Tensor:
        self.calls += 1
        trained = batch.labels != IGNORED
        log_p = self.table[batch.input_ids.long(), batch.labels.clamp(min=0).long()]
        return -(log_p * trained).sum(dim=1).float()


def evaluate(
    model: Callable[[Batch], torch.Tensor], held_out: dict[str, ArraySource] = HELD_OUT, **more: Any
) -> dict[str, Any]:
    settings: dict[str, Any] = {"rows": 4, "documents": "separate", "documents_limit": None, **more}
    keys = ("world", "unigram", "shuffle_seed")
    baselines = {key: settings.pop(key) for key in keys if key in settings}
    texts = {name: HeldOut(source, SEQ_LEN, **settings) for name, source in held_out.items()}
    return evaluate_model(model, texts, **{"world": World(), **baselines})


def texts_of(held_out: ArraySource, limit: int | None = None) -> list[list[int]]:
    found = []
    for shard, length in enumerate(held_out.lengths(np.arange(held_out.shards)).tolist()):
        tokens, offsets = held_out.read(shard, 0, length).tolist(), held_out.offsets(shard).tolist()
        found += [tokens[a:b] for a, b in pairwise(offsets)]
    return found[:limit]


def pairs(held_out: ArraySource, separate: bool = True, limit: int | None = None) -> list[tuple[int, int]]:
    """(input, target) of every trained position, read off the documents without any window."""
    texts = texts_of(held_out, limit)
    if not separate:
        texts = [[token for text in texts for token in text]]
    return [pair for text in texts for pair in pairwise(text)]


WEIGHTS = {"code": 3, "prose": 1}


def order_of(train: Mapping[str, TokenSource], **more: Any) -> PackedDataset:
    settings: dict[str, Any] = {
        "seq_len": SEQ_LEN, "global_batch_size": 4, "seed": 5, "documents": "separate", "shuffle_span": 2
    }  # fmt: skip
    return PackedDataset(train, WEIGHTS, **{**settings, **more})


BASELINES: dict[str, Any] = {"unigram": Unigram.of(order_of(TRAIN), 50, VOCAB), "shuffle_seed": 5}
"""After more than a pass over either source."""


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("limit", [None, 1, 8])
def test_loss_and_bits_per_byte_are_those_of_the_documents(separate: bool, limit: int | None) -> None:
    table = bigram_table()
    attention = "separate" if separate else "attend"
    result = evaluate(Model(table), documents=attention, documents_limit=limit)
    everything = [0.0, 0, 0]
    for name, held_out in HELD_OUT.items():
        targets = pairs(held_out, separate, limit)
        nats = -sum(table[a, b].item() for a, b in targets)
        size = sum(3 * len(text) for text in texts_of(held_out, limit))
        scores = result["sources"][name]
        assert scores["tokens"] == len(targets) and scores["bytes"] == size
        if targets:
            assert scores["loss"] == pytest.approx(nats / len(targets), rel=1e-6)
            assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
        everything = [everything[0] + nats, everything[1] + len(targets), everything[2] + size]
    nats, count, size = everything
    assert result["all"]["loss"] == pytest.approx(nats / count, rel=1e-6)
    assert result["all"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert result["all"]["unigram_bits_per_byte"] is None and result["all"]["shuffled_bits_per_byte"] is None


def test_the_unigram_baseline_is_mixed_add_one_frequencies_of_the_training_text() -> None:
    result = evaluate(Model(bigram_table()), **BASELINES)
    counts = {name: Counter(t for text in texts_of(train) for t in text) for name, train in TRAIN.items()}

    def probability(token: int) -> float:
        of = {name: (found[token] + 1) / (found.total() + VOCAB) for name, found in counts.items()}
        return (3 * of["code"] + 1 * of["prose"]) / 4

    for name, held_out in HELD_OUT.items():
        nats = -sum(math.log(probability(target)) for _, target in pairs(held_out))
        size = sum(3 * len(text) for text in texts_of(held_out))
        assert result["sources"][name]["unigram_bits_per_byte"] == pytest.approx(
            nats / math.log(2) / size, rel=1e-9
        )


def test_a_model_that_is_the_unigram_scores_as_the_unigram_with_and_without_its_context() -> None:
    """No context used: nothing to lose by shuffling it, and nothing between model and baseline."""
    p = np.zeros(VOCAB)
    for name, weight in WEIGHTS.items():
        found = Counter(t for text in texts_of(TRAIN[name]) for t in text)
        p += weight / 4 * np.array([found[t] + 1 for t in range(VOCAB)]) / (found.total() + VOCAB)
    scores = evaluate(Model(torch.from_numpy(np.log(p)).expand(VOCAB, VOCAB)), **BASELINES)["all"]
    assert scores["bits_per_byte"] == pytest.approx(scores["unigram_bits_per_byte"], rel=1e-6)
    assert scores["shuffled_bits_per_byte"] == scores["bits_per_byte"]


def test_a_model_that_uses_its_context_loses_by_shuffling_it() -> None:
    scores = evaluate(Model(bigram_table()), **BASELINES)["all"]
    assert scores["bits_per_byte"] < 0.7 * scores["unigram_bits_per_byte"]
    assert scores["shuffled_bits_per_byte"] > 1.3 * scores["bits_per_byte"]


def test_shuffling_permutes_inputs_within_each_piece_and_touches_nothing_else() -> None:
    held_out = HeldOut(source(7, 60), 40, 3)
    moved = 0
    for number in range(len(held_out)):
        batch = held_out.batch(number)
        shuffled = shuffle_context(batch, [(5, row) for row in range(3)])
        for field in fields(Batch):
            if field.name != "input_ids":
                assert torch.equal(getattr(shuffled, field.name), getattr(batch, field.name))
        before, after = batch.input_ids.reshape(-1), shuffled.input_ids.reshape(-1)
        for start, stop in pairwise(batch.cu_seqlens):
            assert torch.equal(before[start:stop].sort().values, after[start:stop].sort().values)
        moved += int((before != after).sum())
    assert moved > held_out.tokens / 2


def test_a_window_is_shuffled_alike_whatever_stands_beside_it() -> None:
    text = source(7, 60)
    wide, narrow = HeldOut(text, 16, 4), HeldOut(text, 16, 1)
    together = shuffle_context(wide.batch(1), [(9, window) for window in range(4, 8)]).input_ids
    alone = [shuffle_context(narrow.batch(window), [(9, window)]).input_ids for window in range(4, 8)]
    assert torch.equal(together, torch.cat(alone))
    other = shuffle_context(wide.batch(1), [(10, window) for window in range(4, 8)]).input_ids
    assert not torch.equal(together, other)


@pytest.mark.parametrize("rows", [1, 3, 7, 50])
def test_the_number_of_rows_changes_nothing(rows: int) -> None:
    expected = evaluate(Model(bigram_table()), **BASELINES)
    assert flat(evaluate(Model(bigram_table()), **BASELINES, rows=rows)) == pytest.approx(
        flat(expected), rel=1e-6
    )


def flat(result: dict[str, Any]) -> dict[str, float]:
    return {
        f"{name}/{key}": value
        for name, scores in {**result["sources"], "all": result["all"]}.items()
        for key, value in scores.items()
    }


def test_a_source_without_a_target_has_no_score_and_spoils_none() -> None:
    empty, single = ArraySource([]), ArraySource([[[3]]])
    result = evaluate(Model(bigram_table()), {"empty": empty, "single": single, **HELD_OUT}, **BASELINES)
    alone = evaluate(Model(bigram_table()), **BASELINES)
    for name, size in (("empty", 0), ("single", 1)):
        none = dict.fromkeys(("loss", "bits_per_byte", "unigram_bits_per_byte", "shuffled_bits_per_byte"))
        assert result["sources"][name] == {**none, "tokens": 0, "bytes": size}
    assert result["sources"]["code"] == alone["sources"]["code"]
    assert result["all"]["loss"] == alone["all"]["loss"]


def rank(number: int, ranks: int, port: int, directory: str) -> None:
    """One of several real processes that evaluate together."""
    world = World(number, ranks, number, ranks)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=number, world_size=ranks)
    model = Model(bigram_table())
    result = evaluate(model, world=world, **BASELINES)
    seen = (
        {"code": HELD_OUT["code"]} if number else HELD_OUT
    )  # one rank looked later: prose holds nothing out
    _, agreed = open_alike(cast(Prepared, SimpleNamespace(open=lambda: (TRAIN, seen))))
    found = {"result": result, "calls": model.calls, "held_out": list(agreed)}
    torch.save(found, Path(directory) / f"{number}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_agree_with_one_and_make_the_same_number_of_calls(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(rank, (2, port, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{number}.pt") for number in range(2)]
    alone = Model(bigram_table())
    expected = flat(evaluate(alone, **BASELINES))
    assert flat(found[0]["result"]) == pytest.approx(expected, rel=1e-6)
    for other in found[1:]:
        scores = flat(other["result"])
        without_unigram = {key: value for key, value in expected.items() if "unigram" not in key}
        assert {key: scores[key] for key in without_unigram} == pytest.approx(without_unigram, rel=1e-6)
    batches = [len(HeldOut(text, SEQ_LEN, 4)) for text in HELD_OUT.values()]
    assert any(count % 2 for count in batches), "no rank would run out of batches here"
    assert [one["calls"] for one in found] == [2 * sum(-(-count // 2) for count in batches)] * 2
    assert alone.calls == 2 * sum(batches)
    assert [one["held_out"] for one in found] == [["code"], ["code"]], "or one would wait for the other"


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_the_unigram_counts_what_the_run_has_come_to_and_waits_for_nothing_else(packing: str) -> None:
    """Text that is tokenised beside the training and text that was there before give the same numbers."""
    shards = {name: [[text] for text in documents(seed, 30)] for name, seed in (("code", 8), ("prose", 9))}
    complete = {name: ArraySource(texts) for name, texts in shards.items()}
    growing = {name: GrowingSource(source) for name, source in complete.items()}
    expected, order = (order_of(sources, packing=packing) for sources in (complete, growing))
    for step in (1, 2, 3):
        order.rows(step, 0, 4)
        asked = {name: set(source.asked) for name, source in growing.items()}
        found, again = Unigram.of(order, step, VOCAB), Unigram.of(expected, step, VOCAB)
        assert {name: set(source.asked) for name, source in growing.items()} == asked
        assert found.tokens == again.tokens
        np.testing.assert_array_equal(found.nats, again.nats)
    read = expected.shards_read(3)
    assert all(0 < len(read[name]) < 30 for name in read)
    counted = {name: sum(len(shards[name][shard][0]) for shard in read[name]) for name in read}
    assert again.tokens == counted
    assert evaluate(Model(bigram_table()), unigram=again)["unigram_tokens"] == counted


def test_the_unigram_is_of_the_last_step_also_where_a_stage_begins_behind_it() -> None:
    shards = {name: [[text] for text in documents(seed, 30)] for name, seed in (("code", 8), ("prose", 9))}
    sources = {name: ArraySource(texts) for name, texts in shards.items()}

    def frequencies(*stages: dict[str, float]) -> np.ndarray:
        order = PackedDataset(
            sources, [(12 * number, weights) for number, weights in enumerate(stages)],
            seq_len=SEQ_LEN, global_batch_size=4, seed=5, documents="separate", shuffle_span=2,
        )  # fmt: skip
        return Unigram.of(order, 3, VOCAB).nats

    both, other = {"code": 0.75, "prose": 0.25}, {"prose": 1.0}
    np.testing.assert_array_equal(frequencies(both, other), frequencies(both))


def test_held_out_documents_are_the_first_ones_however_far_the_text_is(run_config: Any) -> None:
    complete = {"code": source(1), "none": ArraySource([[], []])}
    growing = {name: GrowingSource(one) for name, one in complete.items()}
    found, expected = (open_held_out(some, run_config, 5) for some in (growing, complete))
    assert list(found) == list(expected) == ["code"], "a source without held-out documents has no score"
    assert growing["code"].asked == [0], "no shard behind the limit"
    assert growing["none"].asked == [0, 1]
    assert evaluate_model(Model(bigram_table()), found, world=World()) == evaluate_model(
        Model(bigram_table()), expected, world=World()
    )


@pytest.fixture
def run_config() -> SimpleNamespace:
    data = SimpleNamespace(documents="separate", trains_boundaries=False)
    return SimpleNamespace(seq_len=SEQ_LEN, micro_batch_size=2, data=data)
