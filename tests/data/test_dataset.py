from __future__ import annotations

import gc
import json
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config import UserError
from llmtrain.data.batch import Batch
from llmtrain.data.dataset import PackedDataset, Skip
from llmtrain.data.heldout import HeldOut
from llmtrain.data.shard_format import Header, shard_path
from llmtrain.data.shard_writer import ShardWriter, write_index
from llmtrain.data.shards import ShardedSource
from llmtrain.data.windows import TokenSource
from tests.data.array_source import ArraySource, GrowingSource, numbered

L, G = 16, 8
WEIGHTS = {"web": 0.5, "code": 0.3, "books": 0.2}


def sources() -> dict[str, ArraySource]:
    """Three sources that share no token; every one is passed over many times in 50 steps."""
    return {
        "web": numbered([[40, 3, 90], [], [200, 7]]),
        "code": numbered([[17, 100]], first=1000),
        "books": numbered([[1], [300], [16, 17]], first=2000),
    }


def dataset(
    given: Mapping[str, TokenSource] | None = None, weights: Any = WEIGHTS, **changes: Any
) -> PackedDataset:
    keys = {
        "seq_len": L,
        "global_batch_size": G,
        "seed": 1,
        "documents": "separate",
        "shuffle_span": 5,
        **changes,
    }
    return PackedDataset(given or sources(), weights, **keys)


def assert_equal(one: Batch, other: Batch) -> None:
    for field, tensor in vars(one).items():
        assert torch.equal(tensor, getattr(other, field)), field


def rows_on(ranks: int, data: PackedDataset, start_step: int, steps: int) -> list[list[torch.Tensor]]:
    """[input_ids, labels, position_ids, source_ids] of the global batch of each step, from its ranks."""
    per_rank = []
    for rank in range(ranks):
        batches = data.batches(start_step, rank, ranks)
        per_rank.append(list(islice(batches, steps)))
        batches.close()
    fields = ("input_ids", "labels", "position_ids", "source_ids")
    return [
        [torch.cat([getattr(b, field) for b in step]) for field in fields]
        for step in zip(*per_rank, strict=True)
    ]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_ranks_do_not_change_the_rows(ranks: int) -> None:
    alone, shared = rows_on(1, dataset(), 1, 50), rows_on(ranks, dataset(), 1, 50)
    for step, other in zip(alone, shared, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step, other, strict=True))


def test_micro_batches_are_the_rows_in_order() -> None:
    data = dataset()
    for step in range(1, 51):
        whole = data.rows(step, 0, G)
        for size in (1, 2, 4, 8):
            parts = whole.split(size)
            for i, part in enumerate(parts):
                assert_equal(part, data.rows(step, i * size, (i + 1) * size))


@pytest.mark.parametrize("steps_done", [0, 1, 13, 49])
def test_a_resumed_run_serves_what_the_uninterrupted_one_would(steps_done: int) -> None:
    state = json.loads(json.dumps(dataset().state(steps_done)))
    again = dataset().resumed(state)
    expected = rows_on(1, dataset(), 1, 50)[steps_done:]
    for step, other in zip(expected, rows_on(2, again, steps_done + 1, 50 - steps_done), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step, other, strict=True))


def test_rows_are_a_pure_function() -> None:
    data = dataset()
    late = data.rows(10**9, 0, G)
    first = data.rows(1, 0, G)
    assert_equal(first, dataset().rows(1, 0, G))
    assert_equal(late, dataset().rows(10**9, 0, G))


def test_source_ids_index_the_names() -> None:
    data = dataset()
    assert data.names == ["books", "code", "web"]
    batch = data.rows(3, 0, G)
    for row, source in zip(batch.input_ids, batch.source_ids.tolist(), strict=True):
        assert {min(int(token) // 1000, 2) for token in row} == {
            {"web": 0, "code": 1, "books": 2}[data.names[source]]
        }


@pytest.mark.parametrize(("field", "value"), [("seed", 2), ("shuffle_span", 6)])
def test_what_the_state_guards_changes_the_order(field: str, value: int) -> None:
    ours, other = (rows_on(1, dataset(**change), 1, 5) for change in ({}, {field: value}))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(ours, other, strict=True))


def test_the_served_windows_are_the_text() -> None:
    """One pass over a source of bytes, put back in the order of the stream and decoded, is its text."""
    texts = [
        "Es war einmal ",
        "ein König, der ",
        "hatte drei Töchter. ",
        "一个测试。",
        "def f(x):\n    return x\n",
    ]
    shards = [[list(text.encode()) for text in texts[:3]], [list(text.encode()) for text in texts[3:]]]
    data = dataset({"bytes": ArraySource(shards)}, {"bytes": 1}, documents="attend", seq_len=3)
    stream = data.streams["bytes"]
    total = sum(len(text.encode()) for text in texts)
    windows = -(-total // 3)
    rows = {}
    for k in range(windows):
        batch = data.rows(k // G + 1, k % G, k % G + 1)
        rows[stream.window(k)] = batch.input_ids[0].tolist()
    served = bytes(token for window in range(windows) for token in rows[window])
    one, other = "".join(texts[:3]), "".join(texts[3:])
    assert served[:total].decode() in (one + other, other + one)


def test_the_ledger_is_what_walking_finds() -> None:
    data, steps = dataset(), 23
    served = Counter(int(i) for step in range(1, steps + 1) for i in data.rows(step, 0, G).source_ids)
    ledger = data.ledger(steps)
    for source, name in enumerate(data.names):
        tokens = served[source] * L
        assert ledger[name] == {
            "weight": WEIGHTS[name],
            "share": served[source] / (steps * G),
            "tokens": tokens,
            "padding": 0,
            "trained": tokens,
            "skipped": 0,
            "total_tokens": sources()[name].tokens,
            "epochs": tokens / sources()[name].tokens,
            "to_come": -tokens % sources()[name].tokens,
        }
    assert sum(entry["tokens"] for entry in ledger.values()) == steps * G * L
    assert all(entry["tokens"] == entry["share"] == 0 for entry in data.ledger(0).values())


def test_the_state_is_small() -> None:
    five = {f"source-{i}": numbered([[1000 + i]]) for i in range(5)}
    for source in five.values():
        assert len(source.fingerprint) == len(source.manifest_hash or "") == 64
        source.tokens = 9_876_543_210_987
    weights = {name: 0.123456789 + i / 7 for i, name in enumerate(five)}
    data = dataset(five, weights, skip=[(100_000, 100_200)], packing="best_fit")
    assert len(json.dumps(data.state(10**7), separators=(",", ":"))) < 1024


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 7}, ["seed was 1", "is 7", "set seed=1"]),
        ({"seq_len": 32}, ["seq_len was 16", "is 32", "set seq_len=16"]),
        ({"global_batch_size": 4}, ["global_batch_size was 8", "is 4"]),
        ({"shuffle_span": 6}, ["shuffle_span was 5", "is 6"]),
    ],
)
def test_a_resume_that_would_change_the_order_is_refused(changes: dict[str, int], words: list[str]) -> None:
    state = dataset().state(3)
    with pytest.raises(UserError) as error:
        dataset(**changes).check_state(state)
    assert all(word in str(error.value) for word in [*words, "resume=never"])


def test_a_source_with_other_content_is_refused() -> None:
    changed = {**sources(), "code": numbered([[17, 101]], first=1000)}
    with pytest.raises(UserError) as error:
        dataset(changed).resumed(dataset().state(3))
    assert "manifest_hash of data.sources.code" in str(error.value)
    assert (sources()["code"].manifest_hash or "?")[:16] in str(error.value)
    with pytest.raises(UserError, match="version was 0 in the checkpoint and is 2 now"):
        dataset().check_state({**dataset().state(3), "version": 0})


def windows_served(data: PackedDataset, first_step: int, last_step: int) -> dict[str, list[int]]:
    """The k of every window, by source."""
    served: dict[str, list[int]] = {}
    picks = data.mixture.picks((first_step - 1) * G, last_step * G)
    for source, k in np.transpose(picks).tolist():
        served.setdefault(data.mixture.names[source], []).append(k)
    return served


def test_other_weights_are_a_new_stage_from_the_window_now() -> None:
    before = dataset()
    after = dataset(weights={"web": 0.1, "code": 0.9, "books": 0}).resumed(before.state(5))
    assert after.mixture.stages == [(0, {"books": 2, "code": 3, "web": 5}), (5 * G, {"code": 9, "web": 1})]
    for step in range(1, 6):
        assert_equal(after.rows(step, 0, G), before.rows(step, 0, G))
    served = windows_served(after, 1, 30)
    assert all(ks == list(range(len(ks))) for ks in served.values())  # nothing repeated, nothing skipped
    ledger = after.ledger(5 + 10)
    assert ledger["code"]["tokens"] == before.ledger(5)["code"]["tokens"] + 0.9 * 10 * G * L
    assert ledger["code"]["weight"] == 0.9
    # The same weights again, from a checkpoint of the second stage, are no third one.
    again = dataset(weights={"code": 9, "web": 1, "books": 0}).resumed(after.state(9))
    assert again.mixture.stages == after.mixture.stages


def test_a_source_can_join_leave_and_come_back() -> None:
    without = {name: source for name, source in sources().items() if name != "books"}
    joined = dataset().resumed(dataset(without, {"web": 0.5, "code": 0.5}).state(4))
    left = dataset(without, {"web": 0.5, "code": 0.5}).resumed(joined.state(9))
    back = dataset().resumed(left.state(12))
    for data in (joined, left, back):
        assert all(ks == list(range(len(ks))) for ks in windows_served(data, 1, 40).values())
    assert left.names == ["code", "web"]
    assert left.rows(20, 0, G).source_ids.max() == 1
    assert left.ledger(40)["books"]["tokens"] == joined.ledger(9)["books"]["tokens"] == G * L
    assert set(left.state(12)["sources"]) == set(WEIGHTS)
    with pytest.raises(UserError, match=r"data\.sources has no books"):
        for step in range(5, 10):
            left.rows(step, 0, G)
    changed = {**sources(), "books": numbered([[5]])}
    with pytest.raises(UserError, match=r"manifest_hash of data\.sources\.books"):
        dataset(changed).resumed(left.state(12))


def test_planned_stages_survive_a_resume() -> None:
    plan = [(0, WEIGHTS), (50, {"code": 1}), (90, {"books": 0.5, "web": 0.5})]
    data = dataset(weights=plan)
    assert data.resumed(data.state(10)).mixture.stages == data.mixture.stages
    assert {data.names[i] for i in data.rows(8, 0, G).source_ids.tolist()} == {"code"}


def test_sources_and_weights_have_to_fit() -> None:
    with pytest.raises(UserError, match="typo has a weight and is not in"):
        dataset(weights={**WEIGHTS, "typo": 1})
    with pytest.raises(UserError, match=r"data\.sources\.web: there is no token"):
        dataset({**sources(), "web": numbered([[], []])})


class Failing(ArraySource):
    """Fails at the n-th read."""

    reads = 0

    def read(self, shard: int, start: int, stop: int) -> np.ndarray:
        self.reads += 1
        if self.reads == 20:
            raise UserError("shard-00003: wrong digest")
        return super().read(shard, start, stop)


def data_threads() -> int:
    return sum(thread.name.startswith("llmtrain-data") for thread in threading.enumerate())


def assert_no_threads() -> None:
    """They end by themselves, after the batch that they are at."""
    deadline = time.monotonic() + 10
    while data_threads():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_error_of_the_thread_reaches_the_consumer() -> None:
    batches = dataset({"bad": Failing([[range(500)]])}, {"bad": 1}).batches(1, 0, 1)
    with pytest.raises(UserError, match="shard-00003"):
        list(islice(batches, 10))
    assert_no_threads()


def test_it_reads_ahead_but_not_far() -> None:
    source = Failing([[range(500)]])
    source.reads = 1000
    batches = dataset({"only": source}, {"only": 1}, global_batch_size=1, shuffle_span=1).batches(1, 0, 1)
    next(batches)
    deadline = time.monotonic() + 10
    while source.reads < 1003 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert source.reads == 1003  # the step that was asked for and two more
    batches.close()


@pytest.mark.parametrize("how", ["close", "drop"])
def test_the_thread_ends_with_the_iterator(how: str) -> None:
    batches = dataset().batches(1, 0, 1)
    next(batches)
    assert data_threads() == 1
    if how == "close":
        batches.close()
    else:
        del batches
        gc.collect()
    assert_no_threads()


def test_prepared_shards_give_the_same_rows_as_memory(tmp_path: Path) -> None:
    inside = numbered([[40, 3, 90], [200], [], [7, 60]])
    header = Header(tokenizer="", vocab_size=400, boundary="none")
    for shard in range(4):
        writer = ShardWriter(shard_path(tmp_path, shard), header)
        writer.begin("a.txt", "byte")
        for start, stop in pairwise(inside.offsets(shard).tolist()):
            writer.add(inside.read(shard, start, stop).astype(np.int32), stop - start, start)
        writer.finish()
    write_index(tmp_path, header, 4)
    prepared = ShardedSource.open(tmp_path)
    assert prepared.lengths(np.arange(4)).tolist() == [133, 200, 0, 67]
    for packing in ("cut", "best_fit"):
        ours, theirs = (dataset({"one": s}, {"one": 1}, packing=packing) for s in (inside, prepared))
        for step in (1, 2, 30):
            assert_equal(ours.rows(step, 0, G), theirs.rows(step, 0, G))
    held_in, held_out = (HeldOut(source, L, 2) for source in (inside, prepared))
    assert (held_in.text_bytes, held_in.documents) == (held_out.text_bytes, held_out.documents) == (400, 6)
    for one, other in zip(held_in, held_out, strict=True):
        assert_equal(one, other)


# Sources that grow


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_sources_that_grow_give_the_same_rows(packing: str) -> None:
    complete = dataset(packing=packing)
    growing = dataset({name: GrowingSource(source) for name, source in sources().items()}, packing=packing)
    for step in range(1, 40):
        assert_equal(growing.rows(step, 0, G), complete.rows(step, 0, G))


def test_what_is_not_known_yet_is_none() -> None:
    complete = numbered([[10 * L]] * 20)
    data = dataset({"only": GrowingSource(complete)}, {"only": 1}, shuffle_span=8)
    early = data.ledger(1)["only"]
    assert (early["tokens"], early["total_tokens"], early["epochs"], early["to_come"]) == (G * L, *[None] * 3)
    state = data.state(1)
    assert state["sources"]["only"] == {
        "manifest_hash": None, "tokens": None, "fingerprint": complete.fingerprint[:16],
    }  # fmt: skip
    data.rows(26, 0, G)  # beyond the first pass
    late = data.ledger(26)["only"]
    assert (late["total_tokens"], late["epochs"]) == (200 * L, 26 * G / 200)
    assert late["to_come"] == 400 * L - 26 * G * L
    # Whichever of the two is known first, the same text goes on and other text does not.
    ahead, other = numbered([[10 * L]] * 20), numbered([[10 * L]] * 20, first=1)
    for saved in (state, data.state(26)):
        for now in (ahead, GrowingSource(ahead)):
            assert dataset({"only": now}, {"only": 1}, shuffle_span=8).check_state(saved) == saved["windows"]
        for now in (other, GrowingSource(other)):
            with pytest.raises(UserError, match=r"(fingerprint|manifest_hash) of data\.sources\.only"):
                dataset({"only": now}, {"only": 1}, shuffle_span=8).check_state(saved)
    # What was known once is still known while the same text is prepared once more.
    again = dataset({"only": GrowingSource(ahead)}, {"only": 1}, shuffle_span=8).resumed(data.state(26))
    assert again.state(26) == data.state(26)
    # Equal content is enough: shards that were read from another place.
    moved = numbered([[10 * L]] * 20)
    moved.fingerprint = "elsewhere"
    assert dataset({"only": moved}, {"only": 1}, shuffle_span=8).check_state(data.state(26))


# What is left out

SKIPS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), max_size=4)


@given(SKIPS)
@settings(deadline=None)
def test_skip_is_a_remap_of_step_numbers(gaps: list[tuple[int, int]]) -> None:
    stretches, step = [], 0
    for gap, length in gaps:
        stretches.append((step + gap, step + gap + length))
        step = stretches[-1][1]
    skip = Skip(stretches)
    kept = [step for step in range(1, 60) if not any(first <= step <= last for first, last in stretches)]
    assert [skip.data_step(step) for step in range(1, len(kept) + 1)] == kept
    expected = dict(zip(kept, range(1, 60), strict=False))
    assert [skip.training_step(step) for step in range(1, 60)] == [
        expected.get(step) for step in range(1, 60)
    ]


def test_skipped_steps_are_not_trained_and_are_counted() -> None:
    plain, skipping = dataset(), dataset(skip=[(3, 5), (9, 9)])
    order = [1, 2, 6, 7, 8, 10, 11, 12]
    for step, data_step in enumerate(order, 1):
        assert skipping.data_step(step) == data_step
        assert_equal(skipping.rows(step, 0, G), plain.rows(data_step, 0, G))
    trained: Counter[int] = Counter()
    for step in range(1, 9):
        trained.update(skipping.rows(step, 0, G).source_ids.tolist())
    all_of_it, ledger = plain.ledger(12), skipping.ledger(8)
    for source, name in enumerate(skipping.names):
        row, total = ledger[name], sources()[name].tokens or 0
        assert row["tokens"] == trained[source] * L
        assert row["tokens"] + row["skipped"] == all_of_it[name]["tokens"]
        assert row["share"] == trained[source] / (8 * G)
        assert (row["tokens"] + row["skipped"] + row["to_come"]) % total == 0
        assert row["to_come"] == all_of_it[name]["to_come"] < total
    assert sum(row["skipped"] for row in ledger.values()) == 4 * G * L


def test_past_skips_stay_and_future_ones_are_free() -> None:
    before = dataset(skip=[(2, 3), (9, 12)])
    state = json.loads(json.dumps(before.state(5)))  # the steps 1, 4, 5, 6, 7 of the order
    assert (state["windows"], state["skip"]) == (7 * G, [[2, 3]])
    unchanged = dataset(skip=[(2, 3), (9, 12)]).resumed(state)
    assert [unchanged.data_step(step) for step in range(1, 9)] == [1, 4, 5, 6, 7, 8, 13, 14]
    other = dataset(skip=[(1, 1), (6, 9)]).resumed(state)  # what was trained is not taken back
    assert [other.data_step(step) for step in range(1, 9)] == [1, 4, 5, 6, 7, 10, 11, 12]
    none = dataset().resumed(state)
    assert [none.data_step(step) for step in range(1, 9)] == [1, 4, 5, 6, 7, 8, 9, 10]
    weights = dataset(weights={"web": 1, "code": 0, "books": 0}).resumed(state)
    assert weights.mixture.stages[1:] == [(7 * G, {"web": 1})]
    assert_equal(weights.rows(5, 0, G), before.rows(5, 0, G))
    assert {weights.names[i] for i in weights.rows(6, 0, G).source_ids.tolist()} == {"web"}
    at_the_start = dataset(skip=[(1, 2)])
    assert at_the_start.state(0)["windows"] == 0
    assert dataset().resumed(at_the_start.state(0)).data_step(1) == 1


# Packing


def test_best_fit_serves_whole_windows_a_pass() -> None:
    data = dataset(packing="best_fit", max_padding=0.1)
    rows = [data.rows(step, 0, G) for step in range(1, 60)]
    ledger = data.ledger(59)
    for source, name in enumerate(data.names):
        windows, total = data.streams[name].units or 0, sources()[name].tokens or 0
        served = sum(int((batch.source_ids == source).sum()) for batch in rows)
        assert ledger[name]["tokens"] + ledger[name]["padding"] == served * L
        assert ledger[name]["trained"] // total == served // windows, "a pass of windows is a pass of tokens"
        assert ledger[name]["epochs"] == ledger[name]["trained"] / total
        assert ledger[name]["total_tokens"] == total
    with pytest.raises(UserError, match="packing was best_fit in the checkpoint and is cut now"):
        dataset().check_state(data.state(3))
    with pytest.raises(UserError, match=r"max_padding was 0\.1 in the checkpoint and is 0\.2 now"):
        dataset(packing="best_fit", max_padding=0.2).check_state(data.state(3))
    assert dataset(max_padding=0.2).check_state(dataset(max_padding=0.1).state(3)) == 3 * G


FIELDS = ("input_ids", "labels", "source_ids")


def visible() -> dict[str, ArraySource]:
    """Three sources without the token 0, which is what padding looks like."""
    return {
        "web": numbered([[40, 3, 90], [], [200, 7]], first=1),
        "code": numbered([[17, 100]], first=1000),
        "books": numbered([[1], [300], [16, 17]], first=2000),
    }


@pytest.mark.parametrize("span", [5, 64])
def test_the_ledger_of_best_fit_counts_tokens_and_padding_apart(span: int) -> None:
    """Against every row that was read, from the first step on, over many passes, with stretches skipped."""
    data = dataset(visible(), packing="best_fit", max_padding=0.2, skip=[(2, 3), (7, 7)], shuffle_span=span)
    plain = dataset(visible(), packing="best_fit", max_padding=0.2, shuffle_span=span)
    rows = {step: plain.rows(step, 0, G) for step in range(1, 61)}
    found = {name: Counter[str]() for name in data.names}
    firsts = {1, 41, 44, 134, 334, 1000, 1017, 2000, 2001, 2301, 2317}
    sizes = {"web": 340, "code": 117, "books": 334}
    padded = 0
    for step in range(1, 58):
        for taken in range(data.data_step(step - 1) + 1 if step > 1 else 1, data.data_step(step) + 1):
            what = "trained" if taken == data.data_step(step) else "skipped"
            taken_rows = zip(*(getattr(rows[taken], field).tolist() for field in FIELDS), strict=True)
            for ids, labels, source in taken_rows:
                inputs = [token for token in ids if token]
                home = {*inputs} & firsts | {*labels} - {-100}
                found[data.names[source]].update(
                    {f"{what} inputs": len(inputs), f"{what} padding": L - len(inputs), what: len(home)}
                )
        ledger = data.ledger(step)
        assert sum(row["tokens"] + row["padding"] for row in ledger.values()) == step * G * L
        for name, row in ledger.items():
            said = (row["tokens"], row["padding"], row["trained"], row["skipped"])
            kinds = ("trained inputs", "trained padding", "trained", "skipped")
            assert said == tuple(found[name][kind] for kind in kinds)
            assert row["total_tokens"] == sizes[name]
            assert row["epochs"] == row["trained"] / sizes[name]
            assert (row["trained"] + row["skipped"] + row["to_come"]) % sizes[name] == 0
            assert 0 <= row["to_come"] < sizes[name] or row["trained"] == 0
        padded = sum(row["padding"] for row in ledger.values())
    assert padded > 20
    assert all(row["epochs"] > 2 for row in ledger.values())


def test_epochs_of_best_fit_are_known_before_the_pass_is_laid_out() -> None:
    """From the tokens alone: no shard is opened for them that the rows do not need."""

    class Prepared(ArraySource):
        def __init__(self, shards: Sequence[Sequence[Sequence[int]]]) -> None:
            super().__init__(shards)
            self.asked: list[int] = []

        def offsets(self, shard: int) -> np.ndarray:
            self.asked.append(shard)
            return super().offsets(shard)

    texts = [[[1 + i] * (30 + i % 7)] * 4 for i in range(40)]
    prepared = Prepared(texts)
    total = prepared.tokens or 0
    for source in (prepared, GrowingSource(ArraySource(texts))):
        data = dataset({"only": source}, {"only": 1}, packing="best_fit", shuffle_span=G)
        for step in range(1, 20):  # each ends with a span
            data.rows(step, 0, G)
            made = set(source.asked)
            row = data.ledger(step)["only"]
            assert row["trained"] > 0 and row["tokens"] + row["padding"] == step * G * L
            assert set(source.asked) == made and len(made) < 40
            if source is prepared:
                assert row["epochs"] == row["trained"] / total < 1
                assert row["trained"] + row["to_come"] == total
            else:
                assert row["epochs"] is row["to_come"] is row["total_tokens"] is None


def test_the_ledger_of_a_resumed_run_opens_no_earlier_span() -> None:
    """Nor does the thread that trains wait for text: what it asks, the thread that reads has counted."""

    class Watched(ArraySource):
        asked: ClassVar[list[tuple[str, int]]] = []

        def offsets(self, shard: int) -> np.ndarray:
            self.asked.append((threading.current_thread().name, shard))
            return super().offsets(shard)

    texts = [[[1 + i] * n for n in (20, 40, 9, 30, 61)] for i in range(60)]
    settings: dict[str, Any] = {"packing": "best_fit", "max_padding": 0.2, "skip": [(3, 4), (9, 9), (31, 32)]}
    first = dataset({"only": ArraySource(texts)}, {"only": 1}, **settings)
    state = json.loads(json.dumps(first.state(25)))
    counted = {step: first.ledger(step) for step in range(25, 33)}
    remembers = Watched(texts)
    remembers.memory = first.streams["only"].source.memory  # type: ignore[attr-defined]
    data = dataset({"only": remembers}, {"only": 1}, **settings).resumed(state)
    assert data.state(25) == first.state(25) and data.ledger(25) == counted[25]
    assert not Watched.asked
    batches = data.batches(26, 0, 1)
    for step in range(26, 33):
        next(batches)
        assert data.ledger(step) == counted[step]
        assert data.state(step) == first.state(step)
    batches.close()
    early = first.streams["only"].first_order[:8]
    assert Watched.asked and {thread[:13] for thread, _ in Watched.asked} == {"llmtrain-data"}
    assert not set(early) & {shard for _, shard in Watched.asked}


def test_a_far_ledger_reads_no_more_than_the_span_it_stands_in() -> None:
    """At step 10^9, where another process has counted the windows of every shard."""
    known = numbered([[30 + i % 7] * 40 for i in range(40)], first=1)
    made = dataset({"only": known}, {"only": 1}, packing="best_fit")
    for step in range(1, 500):
        made.rows(step, 0, G)

    class Counting(ArraySource):
        asked: ClassVar[set[int]] = set()

        def offsets(self, shard: int) -> np.ndarray:
            self.asked.add(shard)
            return super().offsets(shard)

    far = Counting([[[1] * (30 + i % 7)] * 40 for i in range(40)])
    far.memory = known.memory
    data = dataset({"only": far}, {"only": 1}, packing="best_fit")
    row = data.ledger(10**9)["only"]
    assert row["tokens"] + row["padding"] == 10**9 * G * L
    assert len(Counting.asked) <= 3
    whole = (10**9 * G) // (made.streams["only"].units or 1)
    assert whole <= row["epochs"] <= whole + 1


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_a_removed_source_keeps_its_numbers(packing: str) -> None:
    both = dataset(visible(), packing=packing, max_padding=0.2)
    without = {name: source for name, source in visible().items() if name != "books"}
    state = json.loads(json.dumps(both.state(11)))
    left = dataset(without, {"web": 1, "code": 1}, packing=packing, max_padding=0.2).resumed(state)
    then, now = both.ledger(11)["books"], left.ledger(30)["books"]
    assert then["tokens"] > 0 and (then["padding"] > 0) == (packing == "best_fit")
    for key in ("tokens", "padding", "trained", "skipped", "total_tokens", "epochs", "to_come"):
        assert now[key] == then[key], key
    again = dataset(without, {"web": 1, "code": 1}, packing=packing, max_padding=0.2)
    assert again.resumed(json.loads(json.dumps(left.state(30)))).ledger(30)["books"] == now
    total = sum(row["tokens"] + row["padding"] for row in left.ledger(30).values())
    assert total == 30 * G * L
    back = dataset(visible(), packing=packing, max_padding=0.2).resumed(left.state(30))
    assert back.ledger(30)["books"]["tokens"] == then["tokens"]


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_neither_ranks_nor_micro_batches_change_a_row(packing: str, ranks: int) -> None:
    data = dataset(packing=packing, documents="attend", skip=[(4, 6)], curriculum=(4, 9))
    for step in (1, 4, 12):
        whole = data.rows(step, 0, G).split(1)
        share = G // ranks
        for rank in range(ranks):
            for i, row in enumerate(data.rows(step, rank * share, (rank + 1) * share).split(1)):
                assert_equal(row, whole[rank * share + i])


def test_boundary_targets_default_to_what_documents_say() -> None:
    ignored = {}
    for documents, targets in (("separate", None), ("separate", True), ("attend", None), ("attend", False)):
        batch = dataset(documents=documents, boundary_targets=targets).rows(1, 0, G)
        ignored[documents, targets] = bool((batch.labels == -100).any())
    assert ignored == {
        ("separate", None): True, ("separate", True): False, ("attend", None): False, ("attend", False): True,
    }  # fmt: skip
    same = dataset(documents="attend", boundary_targets=True)
    assert same.check_state(dataset(documents="attend").state(2)) == 2 * G


def test_the_curriculum_cuts_segments_and_nothing_else() -> None:
    plain, growing = dataset(), dataset(curriculum=(4, 7))
    lengths = [growing.segment_length(step) for step in range(1, 9)]
    assert lengths == [4, 6, 8, 10, 12, 14, None, None]
    for step in range(1, 9):
        whole, cut = plain.rows(step, 0, G), growing.rows(step, 0, G)
        for field in ("input_ids", "labels", "position_ids", "source_ids"):
            assert torch.equal(getattr(whole, field), getattr(cut, field))
        length = lengths[step - 1] or L
        every = {row * L + place for row in range(G) for place in range(0, L, length)}
        assert set(cut.cu_seqlens.tolist()) == set(whole.cu_seqlens.tolist()) | every


def test_a_far_step_asks_for_no_more_than_an_early_one() -> None:
    """Resuming at step 10^9 is arithmetic: no count of what was asked of the sources grows with the step."""

    class Counting(ArraySource):
        asked = 0

        def lengths(self, shards: np.ndarray) -> np.ndarray:
            self.asked += len(shards)
            return super().lengths(shards)

    asked = []
    for step in (1, 10**9):
        source = Counting([[[i] * 500] for i in range(30)])
        dataset({"only": source}, {"only": 1}, skip=[(50, 60)]).rows(step, 0, G)
        asked.append(source.asked)
    assert max(asked) <= 6 * 30  # layouts of two passes and their hints, wherever they are
