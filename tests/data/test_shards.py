"""What is written is what is read, and nothing damaged is read as if it were whole."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.benchmarks.big_source import write_big_source
from llmtrain.config import UserError
from llmtrain.data import shards as shards_module
from llmtrain.data.shard_format import BLOCK, ENTRY, load_manifest, load_sealed, write_sealed
from llmtrain.data.shards import (
    Header,
    LocalShards,
    ShardedSource,
    ShardWriter,
    load_index,
    shard_path,
    write_index,
)

HEADER = Header("t", 1000, "eos")
Documents = Sequence[Sequence[int]]


def write_shard(
    directory: Path, documents: Documents, header: Header = HEADER, name: str = "a.jsonl"
) -> None:
    """A shard whose documents stand in lines of 7 bytes, in files of three documents."""
    writer = ShardWriter(directory, header)
    for number, ids in enumerate(documents):
        writer.begin(f"{name}.{number // 3}", "byte")
        writer.add(np.array(ids, np.int32), 3 * len(ids), 7 * number)
    writer.finish()


def write(
    directory: Path, contents: Sequence[Documents], header: Header = HEADER, **extra: Any
) -> dict[str, Any]:
    for number, documents in enumerate(contents):
        write_shard(shard_path(directory, number), documents, header, f"{number}.jsonl")
    directory.mkdir(exist_ok=True)
    return write_index(directory, header, len(contents), **extra)


def read_back(source: ShardedSource) -> list[list[list[int]]]:
    """All documents of all shards, and a check of what stands beside them."""
    contents = []
    for shard, length in enumerate(source.lengths(np.arange(source.shards)).tolist()):
        offsets = source.offsets(shard)
        assert (offsets[0], offsets[-1], offsets.dtype) == (0, length, np.int64)
        pairs = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
        contents.append([source.read(shard, start, stop).tolist() for start, stop in pairs])
        assert source.text_bytes(shard).tolist() == (3 * np.diff(offsets)).tolist()
        for document in range(len(pairs)):
            expected = (f"{shard}.jsonl.{document // 3}", "byte", 7 * document)
            assert source.origin(shard, document) == expected
        assert sum(one["documents"] for one in source.inputs(shard)) == len(pairs)
    return contents


document_lists = st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=50), max_size=8)


@given(st.lists(document_lists, max_size=5))
@settings(max_examples=30, deadline=None)
def test_documents_come_back(
    tmp_path_factory: pytest.TempPathFactory, contents: list[list[list[int]]]
) -> None:
    directory = tmp_path_factory.mktemp("shards") / "new"
    index = write(directory, contents)
    source = ShardedSource.open(directory)
    assert read_back(source) == contents
    assert source.documents == index["documents"] == sum(map(len, contents))
    tokens = [sum(map(len, documents)) for documents in contents]
    assert source.tokens == index["tokens"] == sum(tokens)
    assert source.lengths(np.arange(len(contents))[::-1]).tolist() == tokens[::-1]
    assert (source.shards, source.complete) == (index["shards"], True) == (len(contents), True)


def test_a_batch_is_its_documents_one_by_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 1000, size).astype(np.int32) for size in rng.integers(1, 5000, 600)]
    sizes, positions = list(range(600)), list(range(0, 6000, 10))
    one, many = ShardWriter(tmp_path / "one", HEADER), ShardWriter(tmp_path / "many", HEADER)
    for begin, stop in [(0, 1), (1, 300), (300, 300), (300, 600)]:
        for writer in (one, many):
            writer.begin(f"file {stop}", "row")
        many.add_batch(documents[begin:stop], sizes[begin:stop], positions[begin:stop])
        for i in range(begin, stop):
            one.add(documents[i], sizes[i], positions[i])
    manifests = [writer.finish() for writer in (one, many)]
    assert manifests[0] == manifests[1]
    assert manifests[0]["inputs"] == [
        {"file": "file 1", "unit": "row", "documents": 1},
        {"file": "file 300", "unit": "row", "documents": 299},
        {"file": "file 600", "unit": "row", "documents": 300},
    ]
    ids = np.concatenate(documents)
    data = (tmp_path / "many/tokens.bin").read_bytes()
    assert data == ids.astype("<u2").tobytes() and len(data) > 2 * BLOCK  # three blocks
    assert manifests[0]["sha256"] == hashlib.sha256(data).hexdigest()
    blocks = [hashlib.sha256(data[i : i + BLOCK]).hexdigest()[:16] for i in range(0, len(data), BLOCK)]
    assert manifests[0]["block_digests"]["tokens.bin"] == blocks
    for name in ("tokens.bin", "offsets.npy", "text_bytes.npy", "origins.npy", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65_535, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (200_000, "<u4")]
)
def test_dtype_edge(vocab_size: int, dtype: str, tmp_path: Path) -> None:
    contents = [[[0, vocab_size - 1], [65_534]], []]
    write(tmp_path / "d", contents, Header("t", vocab_size, "eos"))
    source = ShardedSource.open(tmp_path / "d")
    assert (
        source.index["dtype"]
        == source.header.dtype
        == source.read(0, 0, 3).dtype.newbyteorder("<").str
        == dtype
    )
    assert read_back(source) == contents
    table = np.load(tmp_path / "d/index.npy")
    assert table[["min_id", "max_id"]].tolist() == [(0, vocab_size - 1), (0, -1)]
    assert (tmp_path / "d/shard-00000/tokens.bin").stat().st_size == 3 * np.dtype(dtype).itemsize


@pytest.mark.parametrize("wrong", [-1, 1000, 65_536, 2**31])
def test_ids_outside_the_vocabulary_are_not_cast(wrong: int, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "d/shard-00000", HEADER)
    writer.begin("file.jsonl", "byte")
    batch = [np.array(ids, np.int64) for ids in ([1], [5, 999], [7, wrong, 3], [2])]
    with pytest.raises(
        UserError, match=rf"file.jsonl:30: the tokenizer gave the id {wrong}, outside its own"
    ):
        writer.add_batch(batch, [1, 2, 3, 4], [10, 20, 30, 40])
    writer.add_batch(batch[:2], [1, 2], [10, 20])  # of a refused batch nothing was written
    assert writer.finish()["tokens"] == 3
    assert (tmp_path / "d/shard-00000/tokens.bin").stat().st_size == 6
    with pytest.raises(UserError, match="not a prepared directory"):
        ShardedSource.open(tmp_path / "d")  # nothing half-written can be opened


def test_a_document_without_ids_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "d", HEADER)
    writer.begin("file.jsonl", "byte")
    with pytest.raises(ValueError, match=r"file.jsonl:20: a document without ids"):
        writer.add_batch([np.array([1]), np.array([], np.int64)], [1, 0], [10, 20])


def test_numpy_alone_reads_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the docstring of the module shows, as it stands there."""
    write(tmp_path / "d", [[[1, 2], [3, 4, 5], [6]]])
    assert shards_module.__doc__ is not None
    lines = [line for line in shards_module.__doc__.splitlines() if line.startswith("    ")]
    assert len(lines) == 4
    monkeypatch.chdir(tmp_path / "d")
    names: dict[str, Any] = {"np": np}
    exec(textwrap.dedent("\n".join(lines)), names)
    assert (names["document"].tolist(), names["text_bytes"]) == ([3, 4, 5], 9)
    manifest = json.loads(Path("shard-00000/manifest.json").read_text())
    assert manifest["dtype"] == "<u2"
    assert np.load("shard-00000/origins.npy").tolist() == [0, 7, 14]
    assert {"version", "tokenizer", "vocab_size", "boundary", "sha256", "block_digests"} <= manifest.keys()


def test_what_was_rejected_is_counted(tmp_path: Path) -> None:
    for number, reasons in enumerate([["empty", "null", "empty"], [], ["null"]]):
        writer = ShardWriter(shard_path(tmp_path, number), HEADER)
        for reason in reasons:
            writer.begin(f"{reason}.txt", "byte")
            writer.reject(reason)
        manifest = writer.finish()
        assert manifest["inputs"] == []  # files that gave no document are not listed
    index = write_index(tmp_path, HEADER, 3, input={"documents": 4}, fingerprint="of the input")
    assert index["rejected"] == {"empty": 2, "null": 2} and index["input"] == {"documents": 4}
    source = ShardedSource.open(tmp_path)
    assert source.index == index and source.fingerprint == "of the input"
    assert (source.tokens, source.documents, read_back(source)) == (0, 0, [[], [], []])


def test_manifest_hash_is_the_contents_alone(tmp_path: Path) -> None:
    contents = [[[1, 2, 3], [4]], []]
    first = write(tmp_path / "a", contents)
    assert first["manifest_hash"] == ShardedSource.open(tmp_path / "a").manifest_hash
    assert first["manifest_hash"] == ShardedSource.open(tmp_path / "a").fingerprint
    for number, documents in enumerate(contents):
        write_shard(shard_path(tmp_path / "b", number), documents, name="elsewhere")
    assert first["manifest_hash"] == write_index(tmp_path / "b", HEADER, 2, fingerprint="f")["manifest_hash"]
    others = [
        [[[1, 2], [3, 4]], []],
        [[[1, 2, 3], [5]], []],
        [[[4], [1, 2, 3]], []],
        contents[::-1],
        contents[:1],
    ]
    hashes = [write(tmp_path / str(i), other)["manifest_hash"] for i, other in enumerate(others)]
    hashes += [write(tmp_path / "v", contents, Header("t", 999, "eos"))["manifest_hash"]]
    assert len({first["manifest_hash"], *hashes}) == 7


def test_where_documents_come_from(tmp_path: Path) -> None:
    for number, names in enumerate([["x", "y"], [], ["y", "z", "y"]]):
        writer = ShardWriter(shard_path(tmp_path, number), HEADER)
        for row, name in enumerate(names):
            writer.begin(name, "row")
            writer.add(np.array([number]), 1, row)
        writer.finish()
    write_index(tmp_path, HEADER, 3)
    source = ShardedSource.open(tmp_path)
    assert [[one["file"] for one in source.inputs(shard)] for shard in range(3)] == [[*"xy"], [], [*"yzy"]]
    assert [source.positions(shard).tolist() for shard in range(3)] == [[0, 1], [], [0, 1, 2]]
    assert source.origin(2, 2) == ("y", "row", 2) and source.origin(2, 1) == ("z", "row", 1)


def test_an_index_needs_every_manifest_and_one_tokenizer(tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path, 0), [[1]])
    with pytest.raises(UserError, match=r"shard-00001/manifest.json: cannot be read"):
        write_index(tmp_path, HEADER, 2)
    write_shard(shard_path(tmp_path, 1), [[1]], Header("other", 1000, "eos"))
    with pytest.raises(
        UserError, match=r"shard-00001/manifest.json: was written with tokenizer other, not t"
    ):
        write_index(tmp_path, HEADER, 2)
    assert not (tmp_path / "index.json").exists()


# A source that grows


class Growing:
    """Shards that become visible one by one, and then their index."""

    max_open = 4

    def __init__(self, directory: Path, count: int, header: Header = HEADER) -> None:
        self.directory, self.count, self.header, self.fingerprint = directory, count, header, "f"
        self.wanted: list[int] = []

    @property
    def complete(self) -> bool:
        return (self.directory / "index.json").exists()

    def table(self) -> np.ndarray | None:
        return load_index(self.directory)[2] if self.complete else None

    def path(self, shard: int) -> Path:
        while not (path := shard_path(self.directory, shard)).exists():
            time.sleep(0.005)
        return path

    def manifest(self, shard: int) -> dict[str, Any]:
        return load_manifest(self.path(shard), self.header)

    def want(self, shards: Sequence[int]) -> None:
        self.wanted += shards


def test_a_growing_source(tmp_path: Path) -> None:
    contents = [[[1, 2], [3]], [], [[4, 5, 6, 7]]]
    source = ShardedSource(Growing(tmp_path, 3))
    assert (source.shards, source.complete, source.tokens, source.manifest_hash) == (3, False, None, None)
    assert (source.documents, source.fingerprint) == (None, "f")
    source.want([2, 0])
    checked = threading.Event()

    def grow() -> None:
        for number in (2, 0, 1):
            time.sleep(0.05)
            assert number != 1 or checked.wait(60)
            aside = tmp_path / f".tmp-{number}"
            write_shard(aside, contents[number], name=f"{number}.jsonl")
            aside.rename(shard_path(tmp_path, number))

    thread = threading.Thread(target=grow)
    thread.start()
    assert source.lengths(np.array([2])).tolist() == [4]
    assert not shard_path(tmp_path, 1).exists()  # it waited for what was asked, and for no more
    assert source.read(0, 1, 3).tolist() == [2, 3]
    checked.set()
    assert source.lengths(np.array([0, 1, 2, 0])).tolist() == [3, 0, 4, 3]
    thread.join()
    assert read_back(source) == contents and not source.complete
    index = write_index(tmp_path, HEADER, 3)
    assert source.complete and (source.tokens, source.documents) == (7, 3)
    assert source.manifest_hash == index["manifest_hash"] and source.fingerprint == "f"
    assert source.index.items() <= index.items()
    assert read_back(source) == contents == read_back(ShardedSource.open(tmp_path))


def test_an_index_that_differs_from_what_was_read(tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path, 0), [[1, 2]])
    write(tmp_path / "other", [[[1, 2, 3]]])
    source = ShardedSource(Growing(tmp_path, 1))
    assert source.lengths(np.array([0])).tolist() == [2]
    for name in ("index.json", "index.npy"):
        shutil.copy(tmp_path / "other" / name, tmp_path / name)
    with pytest.raises(UserError, match=r"shard-00000/manifest.json: does not belong to index.json"):
        assert source.complete


def test_what_was_known_is_held_against_the_index(tmp_path: Path) -> None:
    """Two shards of equal length that changed places before the index was written."""
    write(tmp_path / "other", [[[1, 2]], [[3, 4]]])
    for number in range(2):
        write_shard(shard_path(tmp_path, 1 - number), [[1 + 2 * number, 2 + 2 * number]])
    source = ShardedSource(Growing(tmp_path, 2))
    assert source.lengths(np.array([0, 1])).tolist() == [2, 2]
    for name in ("index.json", "index.npy"):
        shutil.copy(tmp_path / "other" / name, tmp_path / name)
    assert source.complete
    with pytest.raises(UserError, match=r"shard-00001/manifest.json: does not belong to index.json"):
        source.read(1, 0, 2)


def test_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module.LocalShards, "max_open", 3)
    rng = np.random.default_rng(0)
    contents = [[rng.integers(0, 1000, 9).tolist() for _ in range(5)] for _ in range(12)]
    write(tmp_path, contents)
    source = ShardedSource.open(tmp_path)
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(read_back(source))) for _ in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that they meet everywhere
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert results == [contents] * 8


# Damage


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 600,000, 40,000 and 601,000 ids (uint16): two blocks, one, and two."""
    directory = tmp_path_factory.mktemp("damage") / "d"
    rng = np.random.default_rng(0)
    write(directory, [[rng.integers(0, 1000, 1000).tolist() for _ in range(n)] for n in (600, 40, 601)])
    return directory


@pytest.fixture
def copy(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals, tmp_path / "d"))


def everything(source: ShardedSource, truth: ShardedSource, order: list[int]) -> Iterator[bool]:
    """Read all there is, tokens first, in pieces of 4,001; whether each piece was the right one."""
    for shard in order:
        length = int(truth.lengths(np.array([shard]))[0])
        for start in range(0, length, 4001):
            stop = min(start + 4001, length)
            yield np.array_equal(source.read(shard, start, stop), truth.read(shard, start, stop))
    for shard in order:
        yield np.array_equal(source.offsets(shard), truth.offsets(shard))
        yield np.array_equal(source.text_bytes(shard), truth.text_bytes(shard))
        yield source.inputs(shard) == truth.inputs(shard)
        yield all(
            source.origin(shard, d) == truth.origin(shard, d) for d in range(len(truth.text_bytes(shard)))
        )


SHARD_FILES = ("tokens.bin", "offsets.npy", "text_bytes.npy", "origins.npy", "manifest.json")
INDEX_FILES = ("index.json", "index.npy")
Damage = Callable[[Path, random.Random], list[str]]


def _any_file(directory: Path, dice: random.Random, names: Sequence[str] = SHARD_FILES + INDEX_FILES) -> Path:
    name = dice.choice(names)
    return directory / name if name in INDEX_FILES else directory / f"shard-0000{dice.randrange(3)}" / name


def flip(directory: Path, dice: random.Random) -> list[str]:
    path = _any_file(directory, dice)
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)
    return [str(path)]


def truncate(directory: Path, dice: random.Random) -> list[str]:
    path = _any_file(directory, dice)
    path.write_bytes(path.read_bytes()[: dice.randrange(path.stat().st_size)])
    return [str(path)]


def swap(directory: Path, dice: random.Random) -> list[str]:
    """Two shards change places, or one file of each does."""
    one, other = (shard_path(directory, number) for number in dice.sample(range(3), 2))
    name = dice.choice([*SHARD_FILES, None])
    aside = directory / "aside"
    paths = (one, other) if name is None else (one / name, other / name)
    paths[0].rename(aside)
    paths[1].rename(paths[0])
    aside.rename(paths[1])
    if name not in (None, "manifest.json"):
        return [str(path) for path in paths]
    # Where the swapped manifest fits the directory no more, a file beside it may be the one that is named.
    return [str(one / "manifest.json"), str(other / "manifest.json")]


def wrong_dtype(directory: Path, dice: random.Random) -> list[str]:
    """The same values in another type, or another type in what describes them."""
    path = _any_file(directory, dice)
    if path.suffix == ".json":
        write_sealed(path, {**load_sealed(path), "dtype": dice.choice(["<u4", "<i2", ">u2", "<u1"])})
    elif path.suffix == ".bin":
        np.fromfile(path, "<u2").astype(dice.choice(["<u4", "<i8", "u1", ">u2"])).tofile(path)
    elif path.name == "index.npy":
        types = {name: dice.choice(["<i4", ">i8", "<f8", "<u8"]) for name in ("tokens", "max_id")}
        fields = [(name, types.get(name, ENTRY[name].str)) for name in ENTRY.names or ()]
        np.save(path, np.load(path).astype(fields))
        redo_index(directory)
    else:
        np.save(path, np.load(path).astype(dice.choice(["<i4", ">i8", "<f8", "<u8"])))
    return [str(path)]


def id_out_of_range(directory: Path, dice: random.Random) -> list[str]:
    """An id that the vocabulary does not have, in the tokens or in the ranges, with all digests put right."""
    path = _any_file(directory, dice, ["tokens.bin", "manifest.json", "index.npy"])
    number = dice.randrange(3)
    shard = shard_path(directory, number)
    path = path if path.parent == directory else shard / path.name
    manifest = load_sealed(shard / "manifest.json")
    if path.name == "tokens.bin":
        ids = np.fromfile(path, "<u2")
        ids[dice.randrange(len(ids))] = dice.choice([1000, 1001, 4464, 65_535])
        ids.tofile(path)
        _redo_digests(shard, manifest)
    else:
        key, value = dice.choice([("min_id", -1), ("max_id", 1000), ("max_id", 70_000), ("min_id", 999)])
        manifest[key] = value
        if key == "min_id" and value == 999:
            manifest["max_id"] = 998
    if path.name != "index.npy":
        write_sealed(shard / "manifest.json", manifest)
    table = np.load(directory / "index.npy")
    if path.name != "manifest.json":
        for name in ENTRY.names or ():
            value = manifest[name]
            table[number][name] = bytes.fromhex(value) if isinstance(value, str) else value
    np.save(directory / "index.npy", table)
    redo_index(directory)
    return [str(path)]


def redo_index(directory: Path) -> None:
    """Have index.json name the index.npy that is there."""
    index = load_sealed(directory / "index.json")
    keys = ("version", "tokenizer", "vocab_size", "boundary", "dtype")
    content = json.dumps({key: index[key] for key in keys}).encode()
    content += np.load(directory / "index.npy").tobytes()
    index["manifest_hash"] = hashlib.sha256(content).hexdigest()
    index["table_sha256"] = hashlib.sha256((directory / "index.npy").read_bytes()).hexdigest()
    write_sealed(directory / "index.json", index)


def _redo_digests(shard: Path, manifest: dict[str, Any]) -> None:
    """What an honest writer of wrong ids would have put there."""
    blocks = manifest["block_digests"]
    for name in blocks:
        data = (shard / name).read_bytes()
        blocks[name] = [
            hashlib.sha256(data[i : i + BLOCK]).hexdigest()[:16] for i in range(0, len(data), BLOCK)
        ]
    content = {name: value for name, value in blocks.items() if name != "origins.npy"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    manifest["blocks"] = hashlib.sha256(text.encode()).hexdigest()
    manifest["sha256"] = hashlib.sha256((shard / "tokens.bin").read_bytes()).hexdigest()


@pytest.mark.parametrize("damage", [flip, truncate, swap, wrong_dtype, id_out_of_range])
def test_damaged_shards_are_named_and_not_trained(damage: Damage, copy: Path, originals: Path) -> None:
    """40 of each kind, at random places: 200 named, and not one wrong token given away."""
    truth = ShardedSource.open(originals)
    assert all(everything(ShardedSource.open(copy), truth, [0, 1, 2]))  # undamaged, nothing is named
    contents = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    dice = random.Random(damage.__name__)
    named = wrong = 0
    for _ in range(40):
        blamed = damage(copy, dice)
        try:
            for right in everything(ShardedSource.open(copy), truth, dice.sample(range(3), 3)):
                wrong += not right
        except UserError as error:
            assert any(str(error).startswith(name) for name in blamed), (blamed, error)
            assert "delete" in str(error) and "prepare again" in str(error)
            named += 1
        for path, content in contents.items():
            path.write_bytes(content)
    assert (named, wrong) == (40, 0)


@pytest.mark.parametrize("damage", [flip, truncate, wrong_dtype])
def test_damage_in_a_growing_source(damage: Damage, copy: Path, originals: Path) -> None:
    """There is no index to hold the shards against: their manifests alone find it."""
    truth = ShardedSource.open(originals)
    index = {name: (copy / name).read_bytes() for name in INDEX_FILES}
    contents = {path: path.read_bytes() for path in copy.rglob("*") if path.parent != copy and path.is_file()}
    dice = random.Random(damage.__name__)
    tried = named = wrong = 0
    while tried < 20:
        for path, content in contents.items():
            path.write_bytes(content)
        for name in INDEX_FILES:
            (copy / name).write_bytes(index[name])
        blamed = damage(copy, dice)
        for name in INDEX_FILES:
            (copy / name).unlink()
        if Path(blamed[0]).parent == copy:
            continue
        tried += 1
        try:
            for right in everything(ShardedSource(Growing(copy, 3)), truth, dice.sample(range(3), 3)):
                wrong += not right
        except UserError as error:
            assert any(str(error).startswith(name) for name in blamed), (blamed, error)
            named += 1
    assert (named, wrong) == (20, 0)


MANIFEST = "manifest.json"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (MANIFEST, {"max_id": 1000}, "contradicts itself"),
        (MANIFEST, {"min_id": -1}, "contradicts itself"),
        (MANIFEST, {"min_id": 999, "max_id": 0}, "contradicts itself"),
        (MANIFEST, {"blocks": "00" * 32}, "contradicts itself"),
        (MANIFEST, {"documents": 4}, "contradicts itself"),
        (MANIFEST, {"tokens": 2**20}, "contradicts itself"),
        (MANIFEST, {"rejected": None}, "contradicts itself"),
        (MANIFEST, {"sha256": "xyz"}, "is not the manifest of a shard"),
        (MANIFEST, {"tokens": "many"}, "is not the manifest of a shard"),
        (MANIFEST, {"inputs": 5}, "is not the manifest of a shard"),
        (MANIFEST, {"vocab_size": 999}, "was written with vocab_size 999, not 1000"),
        (MANIFEST, {"boundary": "bos"}, "was written with boundary bos, not eos"),
        (
            "tokens.bin",
            np.array([1, 2, 3, 1000, 5, 6], "<u2"),
            "token 3 is 1000, outside the vocabulary of 1000",
        ),
        ("tokens.bin", np.array([1, 2, 3, 4, 5, 6], "<u4"), "has 24 bytes instead of 12"),
        ("offsets.npy", np.array([0, 2, 3, 6], "<i4"), "is not an array of 4 x int64"),
        ("offsets.npy", np.array([0, 2, 2, 6]), "does not fit manifest.json"),
        ("offsets.npy", np.array([0, 4, 3, 6]), "does not fit manifest.json"),
        ("offsets.npy", np.array([1, 2, 3, 6]), "does not fit manifest.json"),
        ("offsets.npy", np.array([0, 2, 3, 5]), "does not fit manifest.json"),
        ("text_bytes.npy", np.array([6, 3, 8]), "does not fit manifest.json"),
        ("text_bytes.npy", np.array([-6, 3, 21]), "does not fit manifest.json"),
        ("origins.npy", np.array([0, 7]), "is not an array of 3 x int64"),
        ("origins.npy", np.array([0, 7, -1]), "does not fit manifest.json"),
        ("origins.npy", b"no array", "is not an array of 3 x int64"),
        ("origins.npy", -8, "has 144 bytes instead of 152"),
    ],
)
def test_a_shard_of_a_writer_who_errs(file: str, change: Any, message: str, tmp_path: Path) -> None:
    """All its digests are right, and there is no index yet that could say otherwise."""
    shard = shard_path(tmp_path, 0)
    write_shard(shard, [[1, 2], [3], [4, 5, 6]], name="0.jsonl")
    truth, source = (ShardedSource(Growing(tmp_path, 1)) for _ in range(2))
    assert all(everything(truth, truth, [0]))
    manifest = load_sealed(shard / "manifest.json")
    if file == MANIFEST:
        manifest |= change
    else:
        _write(shard / file, change)
        _redo_digests(shard, manifest)
    write_sealed(shard / "manifest.json", manifest)
    with pytest.raises(UserError, match=rf"shard-00000/{file}: .*{message}"):
        source.inputs(0), source.read(0, 0, 1), source.offsets(0), source.text_bytes(0), source.origin(0, 0)


def _write(path: Path, values: np.ndarray | bytes | int) -> None:
    """Write an array, or these bytes, or so many bytes less than there are."""
    if isinstance(values, bytes):
        path.write_bytes(values)
    elif isinstance(values, int):
        path.write_bytes(path.read_bytes()[:values])
    elif path.suffix == ".bin":
        values.tofile(path)
    else:
        np.save(path, values)


def test_every_byte_of_the_index(tmp_path: Path) -> None:
    """Both index files, a bit of each byte: there is no place where a change goes unseen."""
    write(tmp_path, [[[1, 2], [3]]])
    for name in INDEX_FILES:
        content = (tmp_path / name).read_bytes()
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            (tmp_path / name).write_bytes(changed)
            with pytest.raises(UserError, match=rf"{name}: "):
                ShardedSource.open(tmp_path)
        (tmp_path / name).write_bytes(content)
    assert ShardedSource.open(tmp_path).tokens == 3


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_block_is_checked_at_its_first_read(copy: Path) -> None:
    _flip(copy / "shard-00002/tokens.bin", BLOCK + 10)  # in block 1: ids 524,288 and up
    source = ShardedSource.open(copy)
    source.read(2, 0, 524_288)
    source.read(0, 0, 600_000)
    for start, stop in [(524_287, 524_289), (0, 601_000), (600_999, 601_000)]:
        with pytest.raises(
            UserError, match=r"shard-00002/tokens.bin: block 1 .* wrong digest; delete .*prepare again"
        ):
            source.read(2, start, stop)
    assert source.read(2, 7, 7).tolist() == []


def test_a_file_that_came_anew_is_checked_anew(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache may drop a shard and fetch it again: a check of the first file says nothing of the second."""
    monkeypatch.setattr(shards_module.LocalShards, "max_open", 1)
    source = ShardedSource.open(copy)
    path = copy / "shard-00000/tokens.bin"
    held = source.read(0, 0, 10)
    first = held.tolist()
    aside = copy / "aside"
    shutil.copy(path, aside)
    _flip(aside, 0)
    aside.rename(path)
    source.read(1, 0, 10)  # shard 0 is let go
    with pytest.raises(UserError, match=r"shard-00000/tokens.bin: block 0"):
        source.read(0, 0, 10)
    assert held.tolist() == first  # a view that was given away stays what it was


@pytest.mark.parametrize("name", SHARD_FILES)
def test_missing_files_name_the_shard(name: str, copy: Path) -> None:
    (copy / "shard-00000" / name).unlink()
    source = ShardedSource.open(copy)
    with pytest.raises(UserError, match=rf"shard-00000/{name}: cannot be read: No such file.*prepare again"):
        for _ in everything(source, source, [0]):
            pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "version 1 of the format is not 2: prepare the text again"),
        ({"version": 99}, "version 99 of the format is not 2"),
        ({"vocab_size": 900}, r"index.npy: shard-00000: ids 5 to 999 do not fit vocab_size 900"),
        ({"dtype": "<u4"}, "dtype <u4 does not suit vocab_size 1000"),
        ({"tokens": 5}, "the tokens of the shards do not add up to 5"),
        ({"text_bytes": 7}, "the text_bytes of the shards do not add up to 7"),
        ({"shards": 2}, "index.npy: is not an array of 2 x"),
        ({"tokenizer": "other"}, "manifest_hash differs"),
        ({"manifest_hash": None}, "manifest_hash differs"),
        ({"boundary": ["eos"]}, "manifest_hash differs"),
        ({"vocab_size": "1000"}, "index.json: is not an index"),
    ],
)
def test_an_index_that_contradicts_itself(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    index = write(tmp_path / "d", [[[5, 999]]])
    write_sealed(tmp_path / "d/index.json", {**index, **change})
    with pytest.raises(UserError, match=message):
        ShardedSource.open(tmp_path / "d")


def test_directories_of_version_1(tmp_path: Path) -> None:
    """Such as were written before shards had origins."""
    index = {
        "version": 1,
        "tokenizer": "t",
        "vocab_size": 9,
        "shards": [{"name": "shard-00000", "tokens": 1}],
    }
    (tmp_path / "index.json").write_text(json.dumps(index, indent=1))
    with pytest.raises(UserError, match=r"index.json: version 1 of the format is not 2: prepare the text"):
        ShardedSource.open(tmp_path)


# Size and speed


def test_more_shards_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [[[i, i + 1]] for i in range(20)]
    write(tmp_path, contents)
    monkeypatch.setattr(shards_module.LocalShards, "max_open", 3)
    source = ShardedSource.open(tmp_path)
    views = [source.read(i, 0, 2) for i in range(20)]
    assert read_back(source) == read_back(source) == contents == [[view.tolist()] for view in views]
    assert len(source._open_shards) == 3
    assert len(source._tables) <= 3


OPEN = """
import sys, time
from pathlib import Path
import numpy as np
from llmtrain.data.shards import ShardedSource
peak = lambda: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1024
before, start = peak(), time.process_time()
source = ShardedSource.open(Path(sys.argv[1]))
total = int(source.lengths(np.arange(source.shards)).sum())
seconds = time.process_time() - start
rows = [source.read(77_777, 512 * k, 512 * k + 513) for k in (0, 100_000, 195_000)]
assert all(len(row) == 513 and not row.any() for row in rows)
assert source.origin(99_999, 1234) == ("part-99999", "row", 1234)
print(source.shards, total, source.tokens, seconds, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_a_hundred_thousand_shards_open_at_once(tmp_path: Path) -> None:
    """10^13 tokens: opened, measured in a process of its own, and rows of it read."""
    write_big_source(tmp_path / "big", documents_per_shard=20_000, materialised=[77_777, 99_999])
    run = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path / "big")], capture_output=True, text=True, check=True
    )
    shards, total, tokens, seconds, megabytes = map(float, run.stdout.split())
    assert (shards, total, tokens) == (100_000, 10**13, 10**13)
    assert seconds < 2 and megabytes < 200, (seconds, megabytes)


def test_opening_reads_the_index_alone(tmp_path: Path) -> None:
    """No file of a shard is looked at, however many there are."""
    write(tmp_path, [[[1]], [[2, 3]]])
    for number in range(2):
        shutil.rmtree(shard_path(tmp_path, number))
    assert ShardedSource(LocalShards(tmp_path)).lengths(np.array([1, 0])).tolist() == [2, 1]


def test_reading_is_fast_once_checked(originals: Path) -> None:
    """A slice costs microseconds: 2,000 of them in far less than a second, even on a loaded machine."""
    source = ShardedSource.open(originals)
    source.read(2, 0, 601_000)
    start = time.process_time()
    for k in range(2000):
        source.read(2, 300 * k, 300 * k + 513)
    assert time.process_time() - start < 0.5
