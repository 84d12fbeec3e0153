"""The plan's arithmetic against references written in another way, and sizes against full counts."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config import UserError
from llmtrain.config.hydra import config_directory
from llmtrain.data import sizes as sizes_module
from llmtrain.data.config import DataConfig
from llmtrain.data.mixture import Mixture
from llmtrain.data.plan import (
    Plan,
    RunLength,
    Size,
    helper_weights,
    kept_steps,
    make_plan,
    plain_weights,
    weights_yaml,
)
from llmtrain.data.sizes import estimate, needs_tokenizer, source_sizes
from llmtrain.tokenizer import BytesConfig

BASE = yaml.safe_load((config_directory() / "data" / "base.yaml").read_text())


def config(sources: Mapping[str, Mapping[str, Any]], **more: Any) -> DataConfig:
    return DataConfig.model_validate({**BASE, "sources": sources, **more})


def bare(weights: Mapping[str, float], tokens: int = 10_000, **more: Any) -> DataConfig:
    return config({name: {"tokens": tokens, "weight": weight} for name, weight in weights.items()}, **more)


def declared(data: DataConfig) -> dict[str, Size]:
    return {name: Size(source.tokens, True, "declared") for name, source in data.sources.items()}


def planned(data: DataConfig, steps: int = 100, seq_len: int = 8, rows: int = 4) -> Plan:
    return make_plan(data, declared(data), RunLength(seq_len, rows, steps))


# GPT-3


def gpt3() -> tuple[DataConfig, RunLength]:
    text = yaml.safe_load((config_directory() / "data" / "gpt3.yaml").read_text())
    length = RunLength(text["seq_len"], text["global_batch_size"], text["max_steps"])
    return config(text["data"]["sources"]), length


TABLE = {  # Brown et al. 2020, table 2.2: billions of tokens, weight in the mix, epochs as printed there
    "common_crawl": (410, "0.60", 0.44),
    "webtext2": (19, "0.22", 2.9),
    "books1": (12, "0.08", 1.9),
    "books2": (55, "0.08", 0.43),
    "wikipedia": (3, "0.03", 3.4),
}


def test_the_preset_is_the_table_of_the_paper() -> None:
    data, length = gpt3()
    assert length.tokens == pytest.approx(300e9, abs=length.tokens_per_step)
    assert {name: (source.tokens, source.weight, source.path) for name, source in data.sources.items()} == {
        name: (size * 10**9, float(weight), None) for name, (size, weight, _) in TABLE.items()
    }


def test_gpt3_gives_what_the_arithmetic_gives() -> None:
    data, length = gpt3()
    plan = planned(data, length.steps, length.seq_len, length.global_batch_size)
    whole = sum(Fraction(weight) for _, weight, _ in TABLE.values())
    assert whole == Fraction("1.01")
    for name, (size, weight, printed) in TABLE.items():
        share = Fraction(weight) / whole
        served = share * length.tokens
        row = plan.sources[name]
        assert row.weight == float(weight) and row.exact
        assert abs(row.tokens - served) < length.seq_len, "to the window"
        assert row.share == pytest.approx(float(share), abs=1e-8)
        assert row.epochs == pytest.approx(float(served / (size * 10**9)), abs=1e-6)
        assert row.unread == max(0, size * 10**9 - row.tokens)
        assert row.epochs == pytest.approx(printed, rel=0.2) and row.warnings == ()
    epochs = {name: round(row.epochs or 0, 2) for name, row in plan.sources.items()}
    assert epochs == {
        "common_crawl": 0.43, "webtext2": 3.44, "books1": 1.98, "books2": 0.43, "wikipedia": 2.97
    }  # fmt: skip
    assert sum(row.windows for row in plan.sources.values()) == length.windows
    (note,) = plan.notes
    assert "sum to 1.01" in note and "webtext2 3.47" in note, "22 % of the run, as it stands in the paper"


def test_weights_that_are_no_fractions_need_no_note() -> None:
    assert planned(bare({"a": 3, "b": 1})).notes == []
    assert planned(bare({"a": 0.3, "b": 0.7})).notes == []
    assert planned(bare({"a": 0.3, "b": 0.6}, stages=[{"from_step": 2, "weights": {"a": 1}}])).notes == []


# Windows


def kept_one_by_one(skip: list[tuple[int, int]], steps: int) -> list[int]:
    left_out = {step for first, last in skip for step in range(first, last + 1)}
    kept, step = list[int](), 0
    while len(kept) < steps:
        step += 1
        if step not in left_out:
            kept.append(step)
    return kept


@st.composite
def stretches(draw: st.DrawFn) -> list[tuple[int, int]]:
    edges = sorted(draw(st.sets(st.integers(1, 60), max_size=8)))
    pairs = zip(edges[::2], edges[1::2], strict=False)
    return list(pairs)


@given(stretches(), st.integers(1, 50))
def test_skipped_steps_are_left_out_one_by_one(skip: list[tuple[int, int]], steps: int) -> None:
    kept = [step + 1 for first, stop in kept_steps(skip, steps) for step in range(first, stop)]
    assert kept == kept_one_by_one(skip, steps)


WEIGHT = st.sampled_from([0.01, 0.2, 0.3, 0.5, 1.0, 7.0])


@st.composite
def runs(draw: st.DrawFn) -> tuple[DataConfig, RunLength]:
    names = ["web", "books", "code", "a.b-c"][: draw(st.integers(1, 4))]
    stages = []
    for step in sorted(draw(st.sets(st.integers(2, 40), max_size=2))):
        weights = {name: draw(st.one_of(st.just(0.0), WEIGHT)) for name in names}
        weights[draw(st.sampled_from(names))] = 0.5
        stages.append({"from_step": step, "weights": weights})
    data = bare({name: draw(WEIGHT) for name in names}, 1000, stages=stages, skip=draw(stretches()))
    return data, RunLength(draw(st.sampled_from([8, 16])), draw(st.integers(1, 5)), draw(st.integers(1, 40)))


@settings(max_examples=100, deadline=None)
@given(runs())
def test_windows_are_those_that_the_order_gives_one_by_one(run: tuple[DataConfig, RunLength]) -> None:
    data, length = run
    weights = {name: source.weight or 0 for name, source in data.sources.items()}
    rows = length.global_batch_size
    stages = [(0, weights), *(((stage.from_step - 1) * rows, stage.weights) for stage in data.stages)]
    mixture = Mixture(stages)
    kept = set(kept_one_by_one(data.skip, length.steps))
    trained, skipped = Counter[str](), Counter[str]()
    for step in range(1, max(kept) + 1):
        for window in range((step - 1) * rows, step * rows):
            name = mixture.names[mixture.source_of(window)[0]]
            (trained if step in kept else skipped)[name] += 1
    plan = make_plan(data, declared(data), length)
    assert plan.skipped_windows == skipped.total()
    for name, row in plan.sources.items():
        assert row.windows == trained[name]
        assert row.tokens == trained[name] * length.seq_len
        assert row.skipped == skipped[name] * length.seq_len
        assert row.epochs == trained[name] * length.seq_len / 1000
        assert row.share == trained[name] / length.windows
        assert row.unread == max(0, 1000 - row.tokens)
    assert plan.total["unread"] == sum(row.unread or 0 for row in plan.sources.values())


def test_epochs_become_weights() -> None:
    data = config({"a": {"tokens": 1000, "epochs": 3.2}, "b": {"tokens": 4000, "epochs": 0.8}})
    plan = planned(data, steps=200)
    assert [row.epochs for row in plan.sources.values()] == [3.2, 0.8]
    assert plan.sources["a"].weight == 0.5


# What is warned of


@pytest.mark.parametrize(
    ("epochs", "word"),
    [(0.5, None), (4.0, None), (4.2, "above 4"), (16.0, "above 4"), (16.2, "far above 16")],
)
def test_repetition_is_warned_of(epochs: float, word: str | None) -> None:
    steps = 1000
    plan = planned(bare({"a": 1}, round(8 * 4 * steps / epochs)), steps)
    warnings = plan.sources["a"].warnings
    assert (warnings == ()) if word is None else (len(warnings) == 1 and f", {word}" in warnings[0])
    assert word is None or "Muennighoff" in warnings[0]


def test_a_source_that_the_run_never_comes_to_is_named() -> None:
    plan = planned(bare({"a": 999, "b": 1}), steps=2)
    assert plan.sources["b"].windows == 0 and plan.sources["b"].warnings[0].startswith("never used")
    assert plan.sources["a"].windows == 8 and plan.sources["a"].warnings == ()


def test_a_share_too_small_for_the_mixture_is_named_and_the_rest_is_planned() -> None:
    plan = planned(bare({"a": 1, "b": 1e-7, "c": 3e-7}))
    assert plan.sources["a"].share == 1
    for name in "bc":
        (warning,) = plan.sources[name].warnings
        assert "below 1/65,536" in warning and "training refuses it" in warning
    with pytest.raises(UserError, match="no source has a weight above 0"):
        make_plan(bare({"a": 1}), {"a": Size(1, True, "declared")}, RunLength(8, 4, 1), {"a": 0})


def test_an_unknown_size_leaves_what_follows_from_it_open() -> None:
    data = config({"a": {"path": "x", "weight": 1}, "b": {"tokens": 9, "weight": 1}})
    sizes = {"a": Size(None, False, "on a hub"), "b": Size(9, True, "declared")}
    plan = make_plan(data, sizes, RunLength(8, 4, 10))
    assert plan.sources["a"].epochs is plan.sources["a"].unread is plan.total["size"] is None
    assert plan.sources["a"].windows == 20 and plan.sources["b"].epochs == 20 * 8 / 9
    by_epochs = config({"a": {"path": "x", "epochs": 1}})
    with pytest.raises(UserError, match=r"data\.sources\.a: its size is not known \(on a hub\).*prepare"):
        make_plan(by_epochs, sizes | {}, RunLength(8, 4, 10))


def test_a_stage_after_the_end_and_empty_windows_are_said() -> None:
    data = bare({"a": 1}, packing="best_fit", stages=[{"from_step": 101, "weights": {"a": 1}}])
    assert len(planned(data, steps=100).notes) == 2
    assert len(planned(data, steps=101).notes) == 1
    skipping = bare({"a": 1}, skip=[[5, 5]], stages=[{"from_step": 101, "weights": {"a": 1}}])
    assert planned(skipping, steps=100).notes == [], "step 100 trains the order's 101st"


def test_the_plan_is_json() -> None:
    data = config({"a": {"tokens": 1000, "epochs": 3}, "b": {"tokens": 4000, "epochs": 0.7}})
    plan = planned(data)
    said = json.loads(json.dumps(plan.as_dict(), allow_nan=False))
    assert said["run"] == {
        "seq_len": 8, "global_batch_size": 4, "steps": 100, "windows": 400, "tokens": 3200,
        "tokens_per_step": 32, "skipped_windows": 0,
    }  # fmt: skip
    assert said["sources"]["a"]["epochs"] == plan.sources["a"].epochs
    assert said["stages"][0]["weights"]["a"] == 3000 / 5800


# Helpers


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(1e-6, 1e6), min_size=1))
def test_plain_weights_are_short_decimals_that_sum_to_one(weights: dict[str, float]) -> None:
    plain = plain_weights(weights)
    assert sum(Fraction(str(weight)) for weight in plain.values()) == 1
    total = sum(weights.values())
    for name, weight in plain.items():
        assert 0 < weight <= 1 and len(str(Fraction(str(weight)).denominator)) <= 7
        assert weight == pytest.approx(weights[name] / total, rel=0.011, abs=1e-5)


def test_helpers_mix_the_sizes() -> None:
    data = config(
        {name: {"tokens": 10**size, "weight": 1} for name, size in zip("abc", (6, 7, 8), strict=True)}
    )
    sizes, length = declared(data), RunLength(1000, 10, 10_000)

    def epochs(kind: Any, **more: float) -> list[float]:
        weights = helper_weights(kind, sizes, length.tokens, temperature=3, **{"max_epochs": 4, **more})
        return [row.epochs or 0 for row in make_plan(data, sizes, length, weights).sources.values()]

    assert epochs("proportional") == pytest.approx([100 / 111] * 3, rel=1e-3)
    assert epochs("temperature") == pytest.approx(
        [100 * 100 ** (1 / 3) ** 1 / (1 + 10 ** (1 / 3) + 100 ** (1 / 3)) / 100 ** (1 / 3),
         10 * 10 ** (1 / 3) / (1 + 10 ** (1 / 3) + 100 ** (1 / 3)),
         1 * 100 ** (1 / 3) / (1 + 10 ** (1 / 3) + 100 ** (1 / 3))],
        rel=1e-3,
    )  # fmt: skip
    assert epochs("unimax") == pytest.approx([4, 4, 0.56], rel=1e-3), "4 of a, 40 of b, and 56 are left for c"
    weights = helper_weights("unimax", sizes, length.tokens, temperature=3, max_epochs=4)
    copied = yaml.safe_load(weights_yaml(weights, data))["data"]["sources"]
    assert copied == {name: {"weight": weight} for name, weight in weights.items()}
    plan = make_plan(data, sizes, length, weights)
    assert all(row.warnings == () for row in plan.sources.values()), "4 epochs were asked for"


def test_helpers_need_sizes() -> None:
    sizes = {"a": Size(None, False, "on a hub")}
    with pytest.raises(UserError, match=r"data\.sources\.a: its size.*weights=unimax follows from it"):
        helper_weights("unimax", sizes, 10, temperature=1, max_epochs=1)


# Sizes: the ids of the bytes tokenizer are counted without it


def documents(count: int) -> list[str]:
    """Short ones first, long ones last: a sample of the beginning alone would be far off."""
    made = random.Random(0)
    words = ["token", "weight", "a", "mixture", "of", "schön", "epochs"]
    return [" ".join(made.choices(words, k=3 + 60 * n // count)) for n in range(count)]


TEXTS = documents(60_000)
TOKENS = sum(len(text.encode()) + 2 for text in TEXTS)
LINES = [json.dumps({"id": 7, "text": text}) for text in TEXTS]


def write_parquet(file: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": TEXTS}), file, row_group_size=5000)


def write_zstd(file: Path) -> None:
    import zstandard

    file.write_bytes(zstandard.ZstdCompressor().compress("\n".join(LINES).encode()))


def write_text_files(directory: Path) -> None:
    directory.mkdir()
    for number in range(0, len(TEXTS), 200):
        (directory / f"{number:06d}.txt").write_text("\n".join(TEXTS[number : number + 200]))


WRITERS: dict[str, Any] = {
    "a.jsonl": lambda file: file.write_text("\n".join(LINES)),
    "a.jsonl.gz": lambda file: file.write_bytes(gzip.compress("\n".join(LINES).encode())),
    "a.jsonl.zst": write_zstd,
    "a.parquet": write_parquet,
    "a.json": lambda file: file.write_text(f"[{', '.join(LINES)}]"),
    "texts": write_text_files,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("validation_fraction", [0.0, 0.25])
def test_raw_text_is_estimated(tmp_path: Path, name: str, validation_fraction: float) -> None:
    WRITERS[name](tmp_path / name)
    data = config({"a": {"path": str(tmp_path / name), "weight": 1}}, validation_fraction=validation_fraction)
    size = source_sizes(data, BytesConfig(kind="bytes").load(), lambda *_: None)["a"]
    assert not size.exact and "sample" in size.how
    assert size.tokens == pytest.approx((1 - validation_fraction) * TOKENS, rel=0.03)


def test_a_small_source_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(LINES[:1000]) + "\nnot json\n")
    data = config({"a": {"path": str(tmp_path / "a.jsonl"), "weight": 1}}, validation_fraction=0)
    size = estimate(data.sources["a"], data, BytesConfig(kind="bytes").load())
    assert size.tokens == sum(len(text.encode()) + 2 for text in TEXTS[:1000])


@pytest.mark.parametrize("name", WRITERS)
def test_the_sample_stays_small(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    encoded = 0

    class Counting:
        def encode_batch(self, texts: list[str]) -> list[bytes]:
            nonlocal encoded
            encoded += sum(len(text.encode()) for text in texts)
            return [text.encode() for text in texts]

    data = config({"a": {"path": str(tmp_path / name), "weight": 1}})
    size = estimate(data.sources["a"], data, Counting())  # type: ignore[arg-type]
    assert size.tokens is not None
    assert 0.3 * sizes_module.SAMPLE_BYTES < encoded < 1.1 * sizes_module.SAMPLE_BYTES


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_large_compressed_file_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Its disk bytes are told from how far its beginning is compressed."""
    monkeypatch.setattr(sizes_module, "SAMPLE_BYTES", 100_000)
    monkeypatch.setattr(sizes_module, "RATIO_BYTES", 4 << 20)
    shuffled = random.Random(1).sample(LINES, len(LINES))
    monkeypatch.setitem(globals(), "LINES", shuffled)
    file = tmp_path / f"a.jsonl.{suffix}"
    WRITERS[file.name](file)
    data = config({"a": {"path": str(file), "weight": 1}}, validation_fraction=0)
    size = estimate(data.sources["a"], data, BytesConfig(kind="bytes").load())
    assert size.tokens == pytest.approx(TOKENS, rel=0.1)


def test_known_sizes_are_not_measured(tmp_path: Path) -> None:
    data = config(
        {
            "bare": {"tokens": 123, "weight": 1},
            "ready": {"path": str(tmp_path / "nowhere.jsonl"), "weight": 1},
        }
    )
    sizes = source_sizes(data, None, lambda name, source: {"ready": 77}[name])
    assert sizes == {"bare": Size(123, True, "declared"), "ready": Size(77, True, "prepared")}
    assert [needs_tokenizer(source) for source in data.sources.values()] == [False, True]


@pytest.mark.parametrize("magic", [None, 20240520, 20240801])
def test_files_of_tokens_are_counted_by_their_headers(tmp_path: Path, magic: int | None) -> None:
    """nanoGPT's uint16 ids alone; those of llm.c, uint16 or uint32, after a header of 256 int32."""
    for name, count in (("a", 700), ("b", 300)):
        header = np.zeros(0 if magic is None else 256, "<i4")
        header[:3] = (magic, {20240520: 1, 20240801: 7}[magic], count) if magic else ()
        ids = np.arange(count, dtype="<u4" if magic == 20240801 else "<u2")
        (tmp_path / f"{name}.bin").write_bytes(header.tobytes() + ids.tobytes())
    source = {"path": str(tmp_path), "format": "nanogpt", "weight": 1}
    data = config({"a": source}, validation_fraction=0)
    assert source_sizes(data, None, lambda *_: None)["a"].tokens == 1000


def test_text_without_text_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    data = config({"a": {"path": str(tmp_path / "a.jsonl"), "weight": 1}})
    assert estimate(data.sources["a"], data, BytesConfig(kind="bytes").load()).tokens is None
