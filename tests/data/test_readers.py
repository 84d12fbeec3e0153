"""Every format gives the same documents in the same order, however it is cut; a mistake is one clear line."""

from __future__ import annotations

import errno
import functools
import gzip
import http.server
import importlib
import itertools
import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
import zstandard
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llmtrain.config import UserError
from llmtrain.data import readers
from llmtrain.data.config import DataConfig, SourceConfig
from llmtrain.data.readers import cutting, files, urls
from llmtrain.data.readers import json_array as json_array_module
from llmtrain.data.readers import jsonl as jsonl_module
from llmtrain.data.readers.fields import Fields
from llmtrain.data.readers.formats import input_files, resolve_format
from llmtrain.data.records import Document, Record, Rejected, Slice, TokenDocument

TEXTS = ["first\n\ttext", "x", "漢字 🎉 \u2028 end", "</s> is text", "last"]
LIMIT = 1 << 24


def source(path: Path | str, **keys: Any) -> SourceConfig:
    return SourceConfig(path=str(path), weight=1.0, **keys)


def slices_of(config: SourceConfig) -> list[Slice]:
    return [piece for part in readers.parts(config) for piece in part.slices]


def read(config: SourceConfig, pieces: list[Slice] | None = None) -> list[Record]:
    """The records of slices; of every part of the source if none are given."""
    pieces = slices_of(config) if pieces is None else pieces
    return [record for piece in pieces for record in readers.read(config, piece, LIMIT)]


def texts_of(config: SourceConfig) -> list[str]:
    """The texts of a source in which nothing is bad."""
    records = read(config)
    assert all(isinstance(record, Document) for record in records), records
    return [record.text for record in records if isinstance(record, Document)]


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, key: text}).encode() + b"\n" for i, text in enumerate(texts))


def write_jsonl(path: Path) -> None:
    path.write_bytes(jsonl(TEXTS))


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(jsonl(TEXTS[:2])) + gzip.compress(jsonl(TEXTS[2:])))


def write_zstd(path: Path) -> None:
    """Two frames, as `cat a.zst b.zst` makes them."""
    compress = zstandard.ZstdCompressor().compress
    path.write_bytes(compress(jsonl(TEXTS[:2])) + compress(jsonl(TEXTS[2:])))


def write_parquet(path: Path) -> None:
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    pyarrow.parquet.write_table(table, path, row_group_size=2)


def write_array(path: Path) -> None:
    """As WuDao's files look."""
    keys = {"id": 1, "uniqueKey": "k", "titleUkey": "t", "dataType": "百科", "title": "题"}
    path.write_text(
        json.dumps([{**keys, "text": text} for text in TEXTS], ensure_ascii=False, indent=1), "utf-8"
    )


@pytest.mark.parametrize(
    ("name", "write", "unit"),
    [
        ("a.jsonl", write_jsonl, "byte"),
        ("a.jsonl.gz", write_gzip, "byte"),
        ("a.jsonl.zst", write_zstd, "byte"),
        ("a.json", write_array, "byte"),
        ("a.parquet", write_parquet, "row"),
    ],
)
def test_records(name: str, write: Callable[[Path], None], unit: str, tmp_path: Path) -> None:
    """Each is found again by its position alone."""
    write(tmp_path / name)
    config = source(tmp_path / name)
    readers.check(config)
    assert texts_of(config) == TEXTS
    (piece,) = slices_of(config)
    stat = (tmp_path / name).stat()
    mark = f"{stat.st_size} {stat.st_mtime_ns}"
    assert piece == Slice(str(tmp_path / name), 0, None, unit, stat.st_size, mark)
    for record in read(config):
        (again,) = read(config, [piece._replace(start=record.position, stop=record.position + 1)])
        assert again == record
    if unit == "row":
        assert [record.position for record in read(config)] == list(range(len(TEXTS)))


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
def test_a_text_file_is_one_document(suffix: str, tmp_path: Path) -> None:
    content = "\ufeffone\r\ntwo\n\n\tthree 漢\n".encode()
    pack = {".txt": bytes, ".txt.gz": gzip.compress, ".txt.zst": zstandard.ZstdCompressor().compress}[suffix]
    (tmp_path / f"a{suffix}").write_bytes(pack(content))
    assert texts_of(source(tmp_path / f"a{suffix}")) == ["one\r\ntwo\n\n\tthree 漢\n"]


def test_lines_longer_than_a_chunk(tmp_path: Path) -> None:
    texts = ["x" * (1 << 20), "y" * (3 << 20), "z"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts).rstrip(b"\n"))  # and no newline at the end
    assert texts_of(source(tmp_path / "a.jsonl")) == texts


def test_blank_lines_are_no_records(tmp_path: Path) -> None:
    one, two = jsonl(["one"]), jsonl(["two"])
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\r\n" + one + b"  \r\n\n" + two + b" \t")
    assert read(source(tmp_path / "a.jsonl")) == [Document("one", 5), Document("two", 5 + len(one) + 5)]


LINE = st.one_of(
    st.sampled_from(
        [b"", b"\r", b" ", b"{", b"nonsense", b'{"text": null}', b'{"text": "\xff"}', b"\xef\xbb\xbf"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(
        lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()
    ),
)


@given(lines=st.lists(LINE, max_size=12), ends=st.booleans(), data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cut_of_a_file_gives_the_records_of_the_whole(
    lines: list[bytes], ends: bool, data: st.DataObject, tmp_path: Path
) -> None:
    content = b"\n".join(lines) + b"\n" * ends
    starts = [0, *(place + 1 for place, byte in enumerate(content) if byte == 10)]
    there = [(start, content[start:].split(b"\n")[0].removeprefix(b"\xef\xbb\xbf")) for start in starts]
    expected = [(start, line) for start, line in there if line.strip()]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=6)))
    edges = [0, *cuts, data.draw(st.sampled_from([None, len(content)]))]
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path / "a.jsonl"
        patch.setattr(jsonl_module, "CHUNK", data.draw(st.integers(1, 40)))
        path.write_bytes(content)
        config = source(path)
        found: list[Record] = []
        for start, stop in itertools.pairwise(edges):
            assert start is not None
            records = list(readers.read(config, Slice(str(path), start, stop, "byte", None), LIMIT))
            assert all(
                start <= record.position < (len(content) if stop is None else stop) for record in records
            )
            found += records
    assert [record.position for record in found] == [start for start, _ in expected]
    fields = Fields(config, LIMIT)
    assert found == [fields.document(line, start) for start, line in expected]


JSON = st.recursive(
    st.one_of(st.none(), st.integers(), st.text('ab"\\{}[],:\n漢', max_size=9)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text('"\\]}', max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
BLANK = st.text(" \n\r\t", max_size=3).map(str.encode)


@given(elements=st.lists(st.tuples(BLANK, JSON, BLANK), max_size=8), blank=BLANK, chunk=st.integers(1, 30))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_elements_of_an_array_are_found_where_they_are(
    elements: list[tuple[bytes, Any, bytes]], blank: bytes, chunk: int, tmp_path: Path
) -> None:
    content, expected = bytearray(blank + b"["), []
    for number, (before, value, after) in enumerate(elements):
        content += b"," * (number > 0) + before
        expected.append((len(content), {"text": "x", "value": value}))
        content += json.dumps(expected[-1][1], ensure_ascii=number % 2 == 0).encode() + after
    content += b"]" + blank
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array_module, "CHUNK", chunk)
        assert read(source(path)) == [Document("x", place) for place, _ in expected]
        tight = list(readers.read(source(path), Slice(str(path), 0, None, "byte", None), 1))
    sizes = [
        len(json.dumps(value, ensure_ascii=n % 2 == 0).encode()) for n, (_, value) in enumerate(expected)
    ]
    assert [(r.position, r.size) for r in tight if isinstance(r, Rejected)] == list(
        zip([place for place, _ in expected], sizes, strict=True)
    )


@pytest.mark.parametrize("saved", ["dataset", "dict"])
def test_huggingface_dataset_on_disk(saved: str, tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset.from_dict({"id": list(range(len(TEXTS))), "text": TEXTS})
    (datasets.DatasetDict({"train": dataset}) if saved == "dict" else dataset).save_to_disk(
        str(tmp_path / "d")
    )
    assert texts_of(source(tmp_path / "d")) == TEXTS
    assert texts_of(source(tmp_path / "d", format="huggingface")) == TEXTS
    for keys, message in [
        ({"split": "test"}, "no split 'test'; there are: train"),
        ({"text_key": "txt"}, r"no key 'txt'.*there are: id, text; did you mean text\?"),
        ({"revision": "main"}, "revision means nothing for a dataset on disk"),
    ]:
        for fails in (readers.check, read):
            with pytest.raises(UserError, match=message):
                fails(source(tmp_path / "d", **keys))
    (piece,) = slices_of(source(tmp_path / "d"))
    assert piece.file == f"{tmp_path / 'd'}[train]" and piece.unit == "row" and (piece.size or 0) > 0
    cut = [piece._replace(start=start, stop=stop) for start, stop in [(0, 1), (1, 4), (4, 5)]]
    assert read(source(tmp_path / "d"), cut) == [Document(text, row) for row, text in enumerate(TEXTS)]


def test_a_saved_dataset_is_cut_at_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    texts = [f"{number} " * 40 for number in range(1000)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "d"))
    monkeypatch.setattr(cutting, "SMALLEST", 16 << 10)
    config = source(tmp_path / "d")
    assert len(readers.parts(config)) > 5
    assert all(0 < (part.size or 0) <= 16 << 10 for part in readers.parts(config))
    assert read(config) == [Document(text, row) for row, text in enumerate(texts)]


def test_huggingface_streams_and_takes_a_subset(tmp_path: Path) -> None:
    """A directory laid out like a repository of the Hub, with two configurations."""
    names = {"one": "a.jsonl", "two": "b.jsonl"}
    configs = "".join(f"- config_name: {name}\n  data_files: {file}\n" for name, file in names.items())
    card = f"---\nconfigs:\n{configs}---\n"
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["from one"]))
    (tmp_path / "b.jsonl").write_bytes(jsonl(["from two"]))
    for subset in ("one", "two"):
        assert texts_of(source(tmp_path, format="huggingface", subset=subset)) == [f"from {subset}"]
    with pytest.raises(UserError, match=r"Hugging Face dataset .*three"):
        texts_of(source(tmp_path, format="huggingface", subset="three"))


def test_a_streamed_dataset_is_cut_at_its_shards(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_bytes(jsonl([f"{number} {row}" for row in range(300)]))
    config = source(tmp_path, format="huggingface")
    readers.check(config)
    parts = readers.parts(config)
    assert [part.slices[0].file for part in parts] == [f"{tmp_path}[train]#{shard}" for shard in range(3)]
    assert all(len(part.slices) == 1 and part.size is None for part in parts)
    for number, part in enumerate(parts):
        assert read(config, list(part.slices)) == [Document(f"{number} {row}", row) for row in range(300)]
    (piece,) = parts[1].slices
    assert read(config, [piece._replace(start=270, stop=271)]) == [Document("1 270", 270)]
    with pytest.raises(UserError, match=r"#3: the dataset now has 3 shards; set revision"):
        read(config, [piece._replace(file=f"{tmp_path}[train]#3")])


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"nobody/nothing: .*is the Hub reachable"):
        texts_of(source("nobody/nothing", format="huggingface"))


def test_directories_and_globs_are_sorted(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/9.jsonl", "b/10.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([name]))
    (tmp_path / "note.txt").write_text("note")
    (tmp_path / "b" / "ignored.bin").write_bytes(b"\0")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.jsonl").write_bytes(jsonl(["hidden"]))
    ordered = ["a/9.jsonl", "b/10.jsonl", "b/2.jsonl"]
    assert texts_of(source(tmp_path)) == [*ordered, "note"]
    assert texts_of(source(tmp_path, format="jsonl")) == ordered
    assert texts_of(source(tmp_path / "*" / "*.jsonl")) == ordered
    assert texts_of(source(tmp_path / "**" / "1*.jsonl")) == ["b/10.jsonl"]
    assert [
        r.reason for r in read(source(tmp_path / "b" / "*.bin", format="text")) if isinstance(r, Rejected)
    ] == ["NUL"]
    (tmp_path / "many").mkdir()
    for number in (7 * i % 32 for i in range(32)):
        (tmp_path / "many" / f"{number:02d}.txt").write_text(f"{number}")
    assert (
        texts_of(source(tmp_path / "many"))
        == texts_of(source(tmp_path / "many/*"))
        == list(map(str, range(32)))
    )


def test_text_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one"], key="content"))
    assert texts_of(source(tmp_path / "a.jsonl", text_key="content")) == ["one"]


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(["x" * 9999]))[:-20])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read"):
        texts_of(source(tmp_path / "a.jsonl.gz"))
    (tmp_path / "a.jsonl.zst").write_bytes(b"no zstandard at all")
    with pytest.raises(UserError, match=r"a\.jsonl\.zst cannot be read"):
        texts_of(source(tmp_path / "a.jsonl.zst"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(UserError, match=r"a\.parquet: row 0 cannot be read as parquet"):
        texts_of(source(tmp_path / "a.parquet"))


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress], ids=["gz", "zst"])
def test_a_cut_file_does_not_end_in_silence(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """The zstandard package's own reader returns the first part of it, and no error."""
    suffix = "gz" if pack is gzip.compress else "zst"
    whole = pack(os.urandom(500_000).hex().encode())
    (tmp_path / f"a.txt.{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"a\.txt\.{suffix} cannot be read: "):
        texts_of(source(tmp_path / f"a.txt.{suffix}"))


def test_parquet_columns(tmp_path: Path) -> None:
    table = pyarrow.table({"txt": ["a"], "n": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for fails in (readers.check, read):
        with pytest.raises(
            UserError, match=r"a\.parquet: no key 'text'.*there are: txt, n; did you mean txt\?"
        ):
            fails(source(tmp_path / "a.parquet"))
    assert texts_of(source(tmp_path / "a.parquet", template="<{txt}>{{}}")) == ["<a>{}"]


def test_parquet_is_cut_at_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    texts = [rng.randbytes(50).hex() for _ in range(1000)]
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=70)
    monkeypatch.setattr(cutting, "SMALLEST", 16 << 10)
    config = source(file)
    pieces = slices_of(config)
    assert len(pieces) == 7
    assert sum(piece.size or 0 for piece in pieces) == file.stat().st_size
    edges = [0, *(piece.stop for piece in pieces)]
    assert edges[-1] == 1000 and all(edge % 70 == 0 for edge in edges[:-1] if edge is not None)
    assert [piece.start for piece in pieces] == edges[:-1]
    assert read(config) == [Document(text, row) for row, text in enumerate(texts)]
    whole = Slice(str(file), 0, None, "row", None)
    assert read(config, [whole._replace(start=345, stop=346)]) == [Document(texts[345], 345)]


def test_damaged_parquet_names_its_row(tmp_path: Path) -> None:
    """Pages with a checksum: a single wrong bit in any is found, and what lies before it is read."""
    rng = random.Random(0)
    texts = [rng.randbytes(50).hex() for _ in range(1000)]
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), file, row_group_size=100, compression="none", write_page_checksum=True
    )
    content = bytearray(file.read_bytes())
    content[content.index(texts[550].encode()) + 7] ^= 1
    file.write_bytes(content)
    found = []
    with pytest.raises(UserError, match=r"a\.parquet: row 5\d\d cannot be read as parquet"):
        for record in readers.read(source(file), Slice(str(file), 0, None, "row", None), LIMIT):
            found.append(record)  # noqa: PERF402 (what came before the error is wanted)
    assert found == [Document(text, row) for row, text in enumerate(texts[: len(found)])]


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file matches .*format=huggingface"):
        readers.check(source("someone/dataset"))
    with pytest.raises(UserError, match=r"\*\.jsonl: no file matches"):
        texts_of(source(tmp_path / "*.jsonl"))
    with pytest.raises(UserError, match="the directory holds no"):
        texts_of(source(tmp_path))
    (tmp_path / "a.docx").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.docx has an unknown suffix; known are \.jsonl"):
        readers.check(source(tmp_path / "a.docx"))
    with pytest.raises(UserError, match="has tokens and no path"):
        readers.check(SourceConfig(tokens=5, weight=1))


@pytest.mark.parametrize(
    "keys",
    [{"subset": "x"}, {"revision": "x"}, {"split": "test"}, {"text_key": "x"}, {"template": "{x}"}],
    ids=lambda keys: next(iter(keys)),
)
def test_keys_without_meaning_are_refused(keys: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    key = next(iter(keys))
    with pytest.raises(UserError, match=f"{key} means nothing for format=text"):
        readers.check(source(tmp_path / "a.txt", **keys))
    with pytest.raises(ValidationError, match=f"{key} means nothing for format=embedded"):
        source("code", format="embedded", **keys)


def test_fingerprint_follows_the_input(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    write_jsonl(file)
    config = source(file)
    first = readers.fingerprint(config)
    assert first == readers.fingerprint(SourceConfig(path=str(file), weight=0.3))  # a weight is no text
    others = [{"text_key": "other"}, {"template": "{text}"}, {"format": "json"}]
    assert len({first, *(readers.fingerprint(source(file, **keys)) for keys in others)}) == 4
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    second = readers.fingerprint(config)
    (tmp_path / "b.jsonl").write_bytes(jsonl(["new"]))
    third = readers.fingerprint(source(tmp_path))
    assert len({first, second, third}) == 3


def test_fingerprint_of_datasets(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(str(tmp_path / "d"))
    first = readers.fingerprint(source(tmp_path / "d"))
    assert first == readers.fingerprint(source(tmp_path / "d"))
    os.utime(tmp_path / "d" / "state.json", ns=(0, 0))
    assert first != readers.fingerprint(source(tmp_path / "d"))
    hub = [{}, {"revision": "a"}, {"revision": "b"}, {"subset": "a"}, {"split": "a"}]
    prints = {readers.fingerprint(source("nobody/nothing", format="huggingface", **keys)) for keys in hub}
    assert len(prints) == len(hub)


# Parts


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (0, 2**24),
        (1, 2**24),
        (2**36, 2**24),
        (2**36 + 1, 2**25),
        (3 * 10**11, 2**27),
        (2**41, 2**29),
        (10**15, 2**29),
    ],
)
def test_part_bytes(total: int, expected: int) -> None:
    assert cutting.part_bytes(total) == expected


def test_parts_cover_the_input_in_order(tmp_path: Path) -> None:
    """Large jsonl is cut, everything else is whole; small neighbours share a part."""
    mib = 2**20
    sizes = {"a.jsonl": 40, "b.jsonl.gz": 40, "c.jsonl": 10, "d.txt": 6, "e.json": 1, "f.jsonl": 20}
    for name, size in sizes.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(size * mib)  # nothing is read
    parts = readers.parts(source(tmp_path))
    cuts = [0, *(40 * mib * number // 3 for number in (1, 2, 3))]
    a = [
        Slice(str(tmp_path / "a.jsonl"), *edges, "byte", edges[1] - edges[0])
        for edges in itertools.pairwise(cuts)
    ]

    def whole(name: str) -> Slice:
        return Slice(str(tmp_path / name), 0, None, "byte", sizes[name] * mib)

    f = [
        Slice(str(tmp_path / "f.jsonl"), n * 10 * mib, (n + 1) * 10 * mib, "byte", 10 * mib) for n in range(2)
    ]
    expected = [[a[0]], [a[1]], [a[2]], [whole("b.jsonl.gz")], [whole("c.jsonl"), whole("d.txt")]]
    unmarked = [[piece._replace(mark="") for piece in part.slices] for part in parts]
    assert unmarked == [*expected, [whole("e.json"), f[0]], [f[1]]]
    assert [part.size for part in parts][-2:] == [11 * mib, 10 * mib]
    assert parts == readers.parts(source(tmp_path))


def test_prepared_shards_are_known_by_their_index(tmp_path: Path) -> None:
    import fsspec

    (tmp_path / "index.json").write_text('{"my": "own"}')
    assert readers.resolve_format(source(tmp_path)) == "files"
    (tmp_path / "index.json").write_text('{"shards": 3, "manifest_hash": "x"}')
    assert readers.resolve_format(source(tmp_path)) == "shards"
    assert readers.resolve_format(source(f"file://{tmp_path}")) == "shards"
    fsspec.filesystem("memory").pipe("/shards/index.json", b"{}")
    assert readers.resolve_format(source("memory://shards")) == "shards"
    assert readers.resolve_format(source("memory://elsewhere")) == "files"
    with pytest.raises(UserError, match="text_key means nothing for format=shards"):
        readers.check(source(tmp_path, text_key="x"))


def test_token_files(tmp_path: Path) -> None:
    """By prefix, index, tokens, directory or glob; the formats themselves are tested elsewhere."""
    np.array([5, 6, 1, 7, 1], "<u2").tofile(tmp_path / "a.bin")
    flat = source(tmp_path / "a.bin", format="nanogpt")
    readers.check(flat)
    (piece,) = slices_of(flat)
    records = [
        r for r in readers.read(flat, piece, LIMIT, eos_id=1, vocab_size=9) if isinstance(r, TokenDocument)
    ]
    assert [(record.ids.tolist(), record.position) for record in records] == [([5, 6, 1], 0), ([7, 1], 3)]
    again = list(readers.read(flat, piece._replace(start=3, stop=4), LIMIT, eos_id=1, vocab_size=9))
    assert [record.position for record in again] == [3]
    with pytest.raises(UserError, match="need a tokenizer with an eos id"):
        read(flat)
    with pytest.raises(
        UserError, match=r"a\.idx: no such file; a Megatron-LM dataset is a \.bin and an \.idx"
    ):
        readers.check(source(tmp_path / "a.bin", format="megatron"))
    header = b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + b"\x08" + np.array([2, 3], "<u8").tobytes()
    index = np.array([3, 2], "<i4").tobytes() + np.array([0, 6, 0, 1, 2], "<i8").tobytes()
    (tmp_path / "a.idx").write_bytes(header + index)
    for name in ("a", "a.bin", "a.idx", "", "*.idx", "*.bin"):
        config = source(tmp_path / name, format="megatron")
        readers.check(config)
        (piece,) = slices_of(config)
        assert piece._replace(mark="") == Slice(str(tmp_path / "a.bin"), 0, None, "row", 10)
        found = [record for record in read(config) if isinstance(record, TokenDocument)]
        assert [(record.ids.tolist(), record.position) for record in found] == [([5, 6, 1], 0), ([7, 1], 1)]
    first = readers.fingerprint(config)
    os.utime(tmp_path / "a.idx", ns=(0, 0))
    assert readers.fingerprint(config) != first
    with pytest.raises(UserError, match="copy them here"):
        readers.check(source("memory://a.bin", format="nanogpt"))


# URLs


def write_all(write: Callable[[str, bytes], object]) -> dict[str, list[str]]:
    """A small tree of files; the texts of each, by path."""
    texts = {"b/2.jsonl": ["two"], "a/9.jsonl.gz": TEXTS, "b/10.jsonl": ["ten"], ".x/h.jsonl": ["hidden"]}
    for name, content in texts.items():
        write(name, gzip.compress(jsonl(content)) if name.endswith("gz") else jsonl(content))
    write("b/ignored.bin", b"?")
    return texts


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_urls(protocol: str, tmp_path: Path) -> None:
    import fsspec

    root = f"memory://{tmp_path.name}" if protocol == "memory" else f"file://{tmp_path}"

    def write(name: str, content: bytes) -> None:
        with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
            file.write(content)

    write_all(write)
    for url, expected in [
        (f"{root}/b/2.jsonl", ["two"]),
        (f"{root}/b", ["ten", "two"]),
        (f"{root}/", [*TEXTS, "ten", "two"]),
        (f"{root}/*/*.jsonl", ["ten", "two"]),
        (f"{root}/**/*.gz", TEXTS),
    ]:
        readers.check(source(url))
        assert texts_of(source(url)) == expected
    assert [piece.size for piece in slices_of(source(f"{root}/b"))] == [
        len(jsonl(["ten"])),
        len(jsonl(["two"])),
    ]
    with pytest.raises(UserError, match=r"nothing\.jsonl: no file matches"):
        readers.check(source(f"{root}/nothing.jsonl"))
    table = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), table)
    write("t.parquet", table.getvalue().to_pybytes())
    assert texts_of(source(f"{root}/t.parquet")) == TEXTS
    (piece,) = slices_of(source(f"{root}/b/2.jsonl"))
    first = readers.fingerprint(source(piece.file))
    assert first == readers.fingerprint(source(piece.file))
    write("b/2.jsonl", jsonl(["other"]))
    assert first != readers.fingerprint(source(piece.file))
    fsspec.open(piece.file).fs.rm(fsspec.core.url_to_fs(piece.file)[1])
    with pytest.raises(UserError, match=r"2\.jsonl cannot be read: "):
        read(source(piece.file), [piece])


def test_a_remote_file_is_cut_as_a_local_one() -> None:
    import fsspec

    texts = [f"{number} " * 50 for number in range(2000)]
    fsspec.filesystem("memory").pipe("/cut/a.jsonl", content := jsonl(texts))
    edges = [0, 1, 777, 77_777, len(content)]
    config = source("memory://cut/a.jsonl")
    pieces = [Slice(config.location, *pair, "byte", None) for pair in itertools.pairwise(edges)]
    records = [record for record in read(config, pieces) if isinstance(record, Document)]
    assert [record.text for record in records] == texts


def test_archives_are_chained_urls(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/a.jsonl", jsonl(TEXTS))
    config = source(f"zip://in/a.jsonl::file://{tmp_path}/a.zip", format="jsonl")
    readers.check(config)
    assert texts_of(config) == TEXTS


def test_protocols_that_cannot_be_had() -> None:
    with pytest.raises(UserError, match=r"nope://x/a\.jsonl: Protocol not known: nope"):
        readers.check(source("nope://x/a.jsonl"))
    with pytest.raises(UserError, match=r"dvc://x/a\.jsonl: .*dvc.* \(with pip\)"):
        readers.check(source("dvc://x/a.jsonl"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a web server that lists directories and knows no ranges."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_http(server: str, tmp_path: Path) -> None:
    def write(name: str, content: bytes) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)

    write_all(write)
    assert texts_of(source(f"{server}/a/9.jsonl.gz?download=true")) == TEXTS
    assert texts_of(source(f"{server}/b/*.jsonl")) == ["ten", "two"]
    assert texts_of(source(f"{server}/b/")) == ["ten", "two"]
    assert [piece.size for piece in slices_of(source(f"{server}/b/"))] == [
        len(jsonl(["ten"])),
        len(jsonl(["two"])),
    ]
    with pytest.raises(UserError, match=r"no file matches|cannot be listed"):
        readers.check(source(f"{server}/nothing.jsonl"))
    texts = [f"{number} " * 5000 for number in range(900)]  # more than fsspec asks for at a time
    write("long.jsonl", content := jsonl(texts))
    long = source(f"{server}/long.jsonl")
    cuts = [0, 1 << 20, 9 << 20, len(content)]
    pieces = [Slice(long.location, *edges, "byte", None) for edges in itertools.pairwise(cuts)]
    records = [record for record in read(long, pieces) if isinstance(record, Document)]
    assert [record.text for record in records] == texts
    first = readers.fingerprint(source(f"{server}/b/2.jsonl"))
    write("b/2.jsonl", jsonl(["changed"]))
    assert first != readers.fingerprint(source(f"{server}/b/2.jsonl"))


def test_heavy_libraries_are_left_alone_until_they_are_needed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    program = """
import sys
from llmtrain.data import readers
from llmtrain.data.config import SourceConfig
source = SourceConfig(path=sys.argv[1], weight=1)
readers.check(source), readers.fingerprint(source)
for part in readers.parts(source):
    for piece in part.slices:
        list(readers.read(source, piece, 1000))
print([name for name in ("torch", "pyarrow", "datasets", "fsspec", "transformers") if name in sys.modules])
"""
    path = str(tmp_path / "a.jsonl")
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def data(**sources: dict[str, Any]) -> DataConfig:
    base = Path(__file__).parents[2] / "conf" / "data" / "base.yaml"
    keys = yaml.safe_load(base.read_text("utf-8"))
    return DataConfig.model_validate({"sources": sources, **keys})


def test_config_cross_checks() -> None:
    assert data(a={"path": "x", "weight": 1}, b={"path": "y", "weight": 2}).sources["b"].weight == 2
    for sources, message in [
        ({}, "at least 1"),
        ({"a": {"path": "x"}}, "give weight .* or epochs"),
        ({"a": {"path": "x", "weight": 1, "epochs": 1}}, "give weight .* or epochs"),
        ({"a": {"path": "x", "weight": -1}}, "greater than"),
        ({"a": {"path": "x", "epochs": -1}}, "greater than 0"),
        (
            {"a": {"path": "x", "weight": 1}, "b": {"path": "y", "epochs": 1}},
            r"sources\.a has weight, sources\.b epochs",
        ),
        ({"a": {"path": "x", "weight": 1, "format": "csv"}}, "'jsonl'"),
        ({"a": {"path": "poems", "weight": 1, "format": "embedded"}}, "one of code, docstrings, prose"),
    ]:
        with pytest.raises(ValidationError, match=message):
            data(**sources)


@pytest.mark.parametrize("name", ["a/b", "..", ".", ".hidden", "", "a b", "a\n", "a\x00", "..\\a", "é" * 101])
def test_a_source_has_the_name_of_a_directory(name: str) -> None:
    with pytest.raises(ValidationError, match="a name is made of letters, digits"):
        data(**{name: {"path": "x", "weight": 1}})


@pytest.mark.parametrize("name", ["web", "web.v2", "_a", "0", "-", "悟道", "Économie", "a.", "é" * 100])
def test_names_that_sources_may_have(name: str) -> None:
    assert list(data(**{name: {"path": "x", "weight": 1}}).sources) == [name]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".json.gz", ".txt.gz", ".txt.zst"])
def test_a_compressed_file_of_no_bytes_is_damaged(suffix: str, tmp_path: Path) -> None:
    import fsspec

    path = tmp_path / f"a{suffix}"
    path.touch()
    kind = "gzip" if suffix.endswith("gz") else "zstd"
    with pytest.raises(UserError, match=rf"a{suffix} is empty, not a {kind} file"):
        read(source(path))
    fsspec.filesystem("memory").pipe(f"/empty/a{suffix}", b"")
    with pytest.raises(UserError, match=rf"a{suffix} is empty, not a {kind} file"):
        read(source(f"memory://empty/a{suffix}"))
    (tmp_path / "a.jsonl").touch()
    assert read(source(tmp_path / "a.jsonl")) == []
    path.write_bytes(gzip.compress(b" ") if kind == "gzip" else zstandard.compress(b" "))
    if suffix.startswith(".jsonl"):
        assert read(source(path)) == []


def change_nothing(path: Path) -> None:
    pass


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"text": "new"}\n')


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def rewrite(path: Path) -> None:
    """The same size; only the time tells."""
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b"a", b"b"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


@pytest.mark.parametrize("change", [append, truncate, rewrite, Path.unlink])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet", ".txt"])
def test_a_file_that_changes_while_it_is_read(
    suffix: str, change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where what it became is no longer whole: that it changed is the reason."""
    monkeypatch.setattr(cutting, "SMALLEST", 1 << 12)
    path = tmp_path / f"a{suffix}"
    texts = [f"{number} " + "a" * 100 for number in range(1000)]
    rng = random.Random(1)
    content = {
        ".jsonl": jsonl(texts),
        ".jsonl.gz": gzip.compress(rng.randbytes(50) + jsonl(texts)),
        ".json": json.dumps([{"text": text} for text in texts]).encode(),
        ".txt": "\n".join(texts).encode(),
    }
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=100)
    else:
        path.write_bytes(content[suffix])
    config = source(path)
    pieces = slices_of(config)
    assert (len(pieces) > 1) == (suffix in (".jsonl", ".parquet"))
    before = read(config, pieces)
    assert len(before) == (1 if suffix == ".txt" else 1000)
    records = readers.read(config, pieces[-1], LIMIT)
    next(records)
    change(path)
    with pytest.raises(UserError, match=rf"a{suffix} has changed while it was prepared: .*start again"):
        list(records)
    for piece in pieces:
        with pytest.raises(UserError, match="has changed while it was prepared"):
            read(config, [piece])
    if change in (append, rewrite) and suffix == ".jsonl":
        assert read(config, [piece._replace(mark="") for piece in pieces])


class Unsteady(http.server.BaseHTTPRequestHandler):
    """Serves one file; answers a request for bytes beyond `after` with `status`, `times` times."""

    content = b""
    ranges, after, status, times, cut = True, 0, 503, 0, False
    refused = 0

    def do_HEAD(self) -> None:
        self.begin(200, len(self.content))

    def begin(self, status: int, size: int, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        for header in headers:
            self.send_header(*header)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def do_GET(self) -> None:
        kind = type(self)
        asked = self.headers.get("Range") if self.ranges else None
        start, stop = 0, len(self.content)
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(stop, int(last) + 1 if last else stop)
        late = start >= self.after if self.ranges else self.headers.get("Range") is None
        if late and kind.refused < self.times:
            kind.refused += 1
            if not self.cut:
                self.begin(self.status, 0)
                return
            self.begin(206 if asked else 200, stop - start, *self.range_of(asked, start, stop))
            self.wfile.write(self.content[start : (start + stop) // 2])
            self.close_connection = True
            return
        self.begin(206 if asked else 200, stop - start, *self.range_of(asked, start, stop))
        self.wfile.write(self.content[start:stop])

    def range_of(self, asked: str | None, start: int, stop: int) -> list[tuple[str, str]]:
        return [("Content-Range", f"bytes {start}-{stop - 1}/{len(self.content)}")] if asked else []

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def unsteady(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Unsteady]]]:
    """(address of a file on a web server of 300 kB that is asked for 64 kB at a time, its settings)."""
    monkeypatch.setattr(jsonl_module, "CHUNK", 1 << 14)
    monkeypatch.setattr(files, "_REMOTE_BLOCK", 1 << 16)
    monkeypatch.setattr(urls, "FIRST_DELAY", 0.01)

    class Handler(Unsteady):
        content = jsonl([f"{number} " + "a" * 250 for number in range(1000)])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/a.jsonl", Handler
        server.shutdown()


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_stumbles_is_asked_again(
    ranges: bool, cut: bool, unsteady: tuple[str, type[Unsteady]], caplog: pytest.LogCaptureFixture
) -> None:
    url, handler = unsteady
    handler.ranges = ranges
    config, size = source(url), len(handler.content)
    pieces = [Slice(url, *edges, "byte", None) for edges in itertools.pairwise([0, 70_001, size])]
    expected = read(config, pieces)
    assert len(expected) == 1000
    handler.after, handler.times, handler.cut = 100_000 if ranges else 0, 2, cut
    assert read(config, pieces) == expected
    assert handler.refused == 2
    assert "attempt 2 of 8" in caplog.text  # and 3, unless each slice met one failure


@pytest.mark.parametrize(("status", "asked"), [(503, 3), (404, 1), (401, 1), (403, 1)])
def test_a_server_that_does_not_recover_ends_it(
    status: int, asked: int, unsteady: tuple[str, type[Unsteady]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a further attempt cannot change is not tried again."""
    url, handler = unsteady
    monkeypatch.setattr(urls, "TRIES", 3)
    handler.after, handler.status, handler.times = 100_000, status, 99
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read: "):
        read(source(url), [Slice(url, 0, None, "byte", None)])
    assert handler.refused == asked


# Listing what is behind a server that stumbles


class UnsteadyDirectory(http.server.SimpleHTTPRequestHandler):
    """Serves a directory, with listings; fails at the first `times` requests of each path that `at` names."""

    fault, at, times = "503", "", 1
    asked: ClassVar[Counter[str]] = Counter()

    def do_HEAD(self) -> None:
        self.stumble(super().do_HEAD)

    def do_GET(self) -> None:
        self.stumble(super().do_GET)

    def stumble(self, answer: Callable[[], None]) -> None:
        kind = type(self)
        path = self.path.rstrip("/") or "/"
        kind.asked[path] += 1
        if not path.endswith(kind.at) or kind.asked[path] > kind.times:
            answer()
        elif kind.fault.isdigit():
            self.send_error(int(kind.fault))
        else:  # a reset, which fsspec's own `find` takes for an empty directory
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def stumbling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, type[UnsteadyDirectory]]]:
    monkeypatch.setattr(urls, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(urls, "TRIES", 4)

    class Handler(UnsteadyDirectory):
        asked: ClassVar[Counter[str]] = Counter()

    for name in ("a.jsonl", "in/b.jsonl", "in/deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl(TEXTS))
    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", Handler
        server.shutdown()


@pytest.mark.parametrize("fault", ["503", "reset"])
@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("/in/b.jsonl", ["in/b.jsonl"]),
        ("/*.jsonl", ["a.jsonl"]),
        ("/*/*.jsonl", ["in/b.jsonl"]),
        ("/**/*.jsonl", ["a.jsonl", "in/b.jsonl", "in/deep/c.jsonl"]),
        ("/in/", ["in/b.jsonl", "in/deep/c.jsonl"]),
    ],
)
def test_a_server_that_stumbles_is_asked_again_what_it_has(
    url: str, expected: list[str], fault: str, stumbling: tuple[str, type[UnsteadyDirectory]]
) -> None:
    address, handler = stumbling
    handler.fault, handler.times = fault, 3  # HEAD and GET are one attempt
    found = files.list_files(address + url, lambda name: name.endswith(".jsonl"))
    assert [file.name for file in found] == [f"{address}/{name}" for name in expected]
    assert all(file.size == len(jsonl(TEXTS)) for file in found)


def test_a_directory_that_does_not_answer_is_not_left_out(
    stumbling: tuple[str, type[UnsteadyDirectory]],
) -> None:
    address, handler = stumbling
    handler.fault, handler.at, handler.times = "reset", "/deep", 99
    with pytest.raises(UserError, match=r"cannot be listed: 4 attempts failed; the last: Client"):
        files.list_files(f"{address}/**/*.jsonl", lambda name: True)
    assert handler.asked["/in/deep"] >= 4  # aiohttp asks again itself where a connection was used before


def test_a_directory_that_may_not_be_read_is_not_left_out() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        (place / "a.jsonl").touch()
        closed = place / "deep" / "closed"
        closed.mkdir(parents=True)
        config = SourceConfig(path=name, weight=1)
        assert [file.name for file in input_files(config)] == [f"{name}/a.jsonl"]
        for directory in (closed, place):
            directory.chmod(0)
            with (
                as_another_user(),
                pytest.raises(UserError, match=rf"^{name} cannot be listed: .*Permission"),
            ):
                assert resolve_format(config) == "files"
                input_files(config)
        place.chmod(0o755)
        for pattern in ("**", "**/*.jsonl", "*/*/*.jsonl"):
            config = SourceConfig(path=f"{name}/{pattern}", weight=1)
            with as_another_user(), pytest.raises(UserError, match=r"cannot be listed: .*Permission"):
                input_files(config)
        config = SourceConfig(path=f"{name}/*.jsonl", weight=1)  # which looks no deeper
        with as_another_user():
            assert [file.name for file in input_files(config)] == [f"{name}/a.jsonl"]


@contextmanager
def as_another_user() -> Iterator[None]:
    """Root may read everything; nobody may not."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_path_that_cannot_be_is_a_mistake() -> None:
    with pytest.raises(UserError, match="too long"):
        input_files(SourceConfig(path=f"/tmp/{'x' * 300}.jsonl", weight=1))


def test_a_server_that_does_not_answer_is_not_one_without_the_file(
    stumbling: tuple[str, type[UnsteadyDirectory]], tmp_path: Path
) -> None:
    address, handler = stumbling
    (tmp_path / "index.json").write_text("{}")
    handler.times = 3
    assert files.holds(address, "index.json")
    assert not files.holds(address, "nothing.json")
    handler.at, handler.times = "/index.json", 99
    with pytest.raises(UserError, match=r"cannot be listed: 4 attempts failed; the last: .*503"):
        files.holds(f"{address}/", "index.json")
    handler.fault = "403"  # what some servers say of every file that they do not have
    assert not files.holds(f"{address}/", "index.json")
    with pytest.raises(UserError, match=r"index\.json cannot be listed: .*403"):
        files.list_files(f"{address}/index.json", lambda name: True)


def _of_library(name: str, *bases: type[Exception], **values: Any) -> Exception:
    """An error of a package that need not be installed."""
    module, _, kind = name.rpartition(".")
    error = type(kind, bases or (Exception,), {"__module__": module})("said so")
    for key, value in values.items():
        setattr(error, key, value)
    return error


def _of_s3(status: int) -> Exception:
    response = {"Error": {"Code": "X"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return _of_library("botocore.exceptions.ClientError", response=response)


HTTPX = importlib.import_module(HfHubHTTPError.__mro__[1].__module__)
"""What huggingface_hub asks with: httpx, or httpx2."""


def _of_hub(status: int) -> Exception:
    response = HTTPX.Response(status, request=HTTPX.Request("GET", "https://hub"))
    return HfHubHTTPError("said so", response=response)


def _from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passes", "missing"),
    [
        (OSError("no"), True, False),
        (TimeoutError(), True, False),
        (OSError(errno.ENOSPC, "full"), False, False),
        (PermissionError(), False, False),
        (ValueError(), False, False),
        (FileNotFoundError(), False, True),
        (_from(FileNotFoundError(), KeyError()), False, True),
        (_from(FileNotFoundError(), aiohttp.ServerDisconnectedError()), True, False),
        (_from(FileNotFoundError(), TimeoutError()), True, False),
        (_from(FileNotFoundError(), _of_library("x.Error", status=404)), False, True),
        (_from(FileNotFoundError(), _of_library("x.Error", status=403)), False, False),
        (_from(FileNotFoundError(), _of_library("x.Error", status=503)), True, False),
        (_from(OSError(errno.EIO, "?"), _of_s3(401)), False, False),
        (_from(OSError(errno.EBUSY, "SlowDown"), _of_s3(503)), True, False),
        (_from(FileNotFoundError(), _of_s3(404)), False, True),
        (_of_s3(403), False, False),
        (_of_s3(429), True, False),
        (_of_library("botocore.exceptions.NoCredentialsError"), False, False),
        (_of_library("botocore.exceptions.HTTPClientError"), True, False),
        (_of_library("gcsfs.retry.HttpError", code=403), False, False),
        (_of_library("gcsfs.retry.HttpError", code="502"), True, False),
        (_of_library("azure.core.exceptions.HttpResponseError", status_code=409), False, False),
        (_of_library("azure.core.exceptions.ServiceRequestError"), True, False),
        (_of_library("google.auth.exceptions.TransportError"), True, False),
        (_of_library("huggingface_hub.errors.OfflineModeIsEnabled", ConnectionError), False, False),
        (_of_hub(401), False, False),
        (_of_hub(500), True, False),
        (HTTPX.ReadTimeout("slow"), True, False),
        (HTTPX.ConnectError("refused"), True, False),
        (HTTPX.UnsupportedProtocol("nope"), False, False),
        (_of_library("httpcore.RemoteProtocolError"), True, False),
        (aiohttp.ClientPayloadError("cut"), True, False),
        (aiohttp.InvalidURL("nope"), False, False),
    ],
    ids=lambda value: repr(value) if isinstance(value, Exception) else "",
)
def test_what_may_pass(error: Exception, passes: bool, missing: bool) -> None:
    assert (urls.may_pass(error), urls.is_missing(error)) == (passes, missing)
