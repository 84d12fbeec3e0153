"""What is written is what is read, and nothing damaged is read as if it were whole."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config import UserError
from llmtrain.data import shards
from llmtrain.data.shards import ShardedSource, ShardWriter


def write(
    directory: Path, documents: list[list[int]], vocab_size: int = 1000, shard_tokens: int = 100
) -> dict[str, Any]:
    keys = {"tokenizer": "t", "vocab_size": vocab_size, "boundary": "eos", "shard_tokens": shard_tokens}
    writer = ShardWriter(directory, **keys)
    for row, ids in enumerate(documents, start=1):
        writer.add(np.array(ids, np.int32), 3 * len(ids), "file.jsonl", row)
    return writer.finish()


def read_back(source: ShardedSource) -> list[list[int]]:
    documents = []
    for shard, length in enumerate(source.lengths.tolist()):
        offsets = source.offsets(shard)
        assert (offsets[0], offsets[-1], offsets.dtype) == (0, length, np.int64)
        pairs = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        documents += [source.read(shard, start, stop).tolist() for start, stop in pairs]
        assert source.text_bytes(shard).tolist() == (3 * np.diff(offsets)).tolist()
    return documents


@given(
    st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=50), max_size=30),
    st.integers(1, 200),
)
@settings(max_examples=40, deadline=None)
def test_documents_come_back(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], shard_tokens: int
) -> None:
    directory = tmp_path_factory.mktemp("shards") / "new"
    write(directory, documents, shard_tokens=shard_tokens)
    source = ShardedSource.open(directory)
    assert read_back(source) == documents
    assert source.documents == len(documents)
    assert source.tokens == source.lengths.sum() == sum(map(len, documents))
    assert all(source.lengths[:-1] >= shard_tokens)  # a shard is closed once it is full


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65_535, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (200_000, "<u4")]
)
def test_dtype_edge(vocab_size: int, dtype: str, tmp_path: Path) -> None:
    write(tmp_path / "d", [[0, vocab_size - 1], [65_534]], vocab_size)
    source = ShardedSource.open(tmp_path / "d")
    assert source.index["dtype"] == dtype
    assert read_back(source) == [[0, vocab_size - 1], [65_534]]
    entry = source.index["shards"][0]
    assert (entry["min_id"], entry["max_id"]) == (0, vocab_size - 1)
    assert (tmp_path / "d/shard-00000/tokens.bin").stat().st_size == 3 * np.dtype(dtype).itemsize


@pytest.mark.parametrize("wrong", [-1, 1000, 65_536])
def test_ids_outside_the_vocabulary_are_not_cast(wrong: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"file.jsonl:2: the tokenizer gave the id {wrong}"):
        write(tmp_path / "d", [[1], [5, wrong]])
    with pytest.raises(UserError, match="not a prepared directory"):
        ShardedSource.open(tmp_path / "d")  # nothing half-written can be opened


def test_memmap_alone_reads_a_shard(tmp_path: Path) -> None:
    write(tmp_path / "d", [[1, 2], [3]])
    assert np.memmap(tmp_path / "d/shard-00000/tokens.bin", "<u2", "r").tolist() == [1, 2, 3]
    assert np.load(tmp_path / "d/shard-00000/offsets.npy").tolist() == [0, 2, 3]
    manifest = json.loads((tmp_path / "d/shard-00000/manifest.json").read_text())
    assert manifest["inputs"] == [{"file": "file.jsonl", "first_row": 1, "last_row": 2, "documents": 2}]
    assert {"tokenizer", "vocab_size", "boundary", "dtype", "sha256", "block_digests"} <= manifest.keys()


def test_manifest_hash_is_the_contents_alone(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [4]]
    first = write(tmp_path / "a", documents)["manifest_hash"]
    assert first == write(tmp_path / "elsewhere", documents)["manifest_hash"]
    others = [[[1, 2], [3, 4]], [[1, 2, 3], [5]], [[4], [1, 2, 3]]]
    hashes = [write(tmp_path / str(i), other)["manifest_hash"] for i, other in enumerate(others)]
    assert len({first, *hashes, write(tmp_path / "v", documents, vocab_size=999)["manifest_hash"]}) == 5


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """One shard of 1.2M ids (uint16): three blocks."""
    rng = np.random.default_rng(0)
    write(tmp_path / "d", [rng.integers(0, 1000, 1000).tolist() for _ in range(1200)], shard_tokens=10**9)
    return tmp_path / "d"


def test_a_block_is_checked_at_its_first_read(large: Path) -> None:
    _flip(large / "shard-00000/tokens.bin", shards.BLOCK + 10)  # in block 1: ids 524,288 to 1,048,575
    source = ShardedSource.open(large)
    source.read(0, 0, 524_288)
    source.read(0, 1_048_576, 1_200_000)
    for start, stop in [(524_287, 524_289), (0, 1_200_000), (1_048_575, 1_048_576)]:
        with pytest.raises(
            UserError, match=r"shard-00000/tokens.bin: block 1 .* wrong digest; delete .*prepare again"
        ):
            source.read(0, start, stop)
    assert source.read(0, 7, 7).tolist() == []


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["offsets.npy", "text_bytes.npy", "manifest.json"])
def test_damage_beside_the_tokens_is_found(name: str, large: Path) -> None:
    digest = (large / "shard-00000/manifest.json").read_text().rindex('"tokens": [') + 20
    _flip(large / "shard-00000" / name, digest if name == "manifest.json" else 5000)
    source = ShardedSource.open(large)
    with pytest.raises(UserError, match=f"shard-00000/{name}"):
        source.read(0, 0, 1)
        source.offsets(0)
        source.text_bytes(0)


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "manifest.json"])
def test_missing_and_short_files_name_the_shard(name: str, large: Path) -> None:
    path = large / "shard-00000" / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=rf"shard-00000/{name}: .*prepare again"):
        _touch(ShardedSource.open(large))
    path.unlink()
    with pytest.raises(UserError, match=rf"shard-00000/{name}: .*prepare again"):
        _touch(ShardedSource.open(large))


def _touch(source: ShardedSource) -> None:
    source.read(0, 0, 1)
    source.offsets(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99 is not 1"),
        ({"vocab_size": 900}, "shard-00000: ids 5 to 999 do not fit vocab_size 900"),
        ({"dtype": "<u4"}, "dtype <u4 does not suit vocab_size 1000"),
        ({"tokens": 5}, "do not add up to 5"),
        ({"tokenizer": "other"}, "manifest_hash does not fit"),
    ],
)
def test_an_index_that_contradicts_itself(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    index = write(tmp_path / "d", [[5, 999]])
    (tmp_path / "d/index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(UserError, match=message):
        ShardedSource.open(tmp_path / "d")


def test_more_shards_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[i, i + 1] for i in range(20)]
    write(tmp_path / "d", documents, shard_tokens=1)
    monkeypatch.setattr(shards, "MAX_OPEN", 3)
    source = ShardedSource.open(tmp_path / "d")
    views = [source.read(i, 0, 2) for i in range(20)]
    assert read_back(source) == read_back(source) == documents == [view.tolist() for view in views]
    assert len(source._open_shards) == len(source._tables) == 3


def test_opening_reads_the_index_alone(tmp_path: Path) -> None:
    """So that 100,000 shards open as fast as ten: no file of a shard is looked at."""
    write(tmp_path / "d", [[1], [2]], shard_tokens=1)
    for shard in ("shard-00000", "shard-00001"):
        shutil.rmtree(tmp_path / "d" / shard)
    assert ShardedSource.open(tmp_path / "d").lengths.tolist() == [1, 1]


def test_reading_is_fast_once_checked(large: Path) -> None:
    """A slice costs microseconds: 2,000 of them in far less than a second, even on a loaded machine."""
    source = ShardedSource.open(large)
    source.read(0, 0, 1_200_000)
    start = time.perf_counter()
    for k in range(2000):
        source.read(0, 500 * k, 500 * k + 513)
    assert time.perf_counter() - start < 0.5
