"""Every format gives the same documents in the same order, and each mistake one clear line."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from pydantic import ValidationError

from llmtrain.config import UserError
from llmtrain.data import readers
from llmtrain.data.config import DataConfig, SourceConfig

TEXTS = ["first\n\ttext", "", "漢字 🎉 \u2028 end", "</s> is text", "last"]


def source(path: Path | str, **keys: Any) -> SourceConfig:
    return SourceConfig(path=str(path), weight=1.0, **keys)


def texts_of(config: SourceConfig) -> list[str]:
    return [document.text for document in readers.documents(config)]


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


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_jsonl),
        ("a.jsonl.gz", write_gzip),
        ("a.jsonl.zst", write_zstd),
        ("a.parquet", write_parquet),
    ],
)
def test_records(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / name)
    documents = list(readers.documents(source(tmp_path / name)))
    assert [document.text for document in documents] == TEXTS
    assert [document.origin for document in documents] == [f"{tmp_path / name}:{i}" for i in range(1, 6)]
    assert documents[-1].consumed == (tmp_path / name).stat().st_size


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


def test_blank_lines_are_no_documents_but_count_as_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n" + jsonl(["one"]) + b"  \r\n" + jsonl(["two"]))
    documents = list(readers.documents(source(tmp_path / "a.jsonl")))
    assert [(document.text, document.row) for document in documents] == [("one", 2), ("two", 4)]


@pytest.mark.parametrize("saved", ["dataset", "dict"])
def test_huggingface_dataset_on_disk(saved: str, tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset.from_dict({"id": list(range(len(TEXTS))), "text": TEXTS})
    (datasets.DatasetDict({"train": dataset}) if saved == "dict" else dataset).save_to_disk(
        str(tmp_path / "d")
    )
    assert texts_of(source(tmp_path / "d")) == TEXTS
    assert texts_of(source(tmp_path / "d", format="huggingface")) == TEXTS
    with pytest.raises(UserError, match="no split 'test'; there are: train"):
        texts_of(source(tmp_path / "d", split="test"))
    with pytest.raises(UserError, match=r"no key 'txt'.*there are: id, text; did you mean text\?"):
        texts_of(source(tmp_path / "d", text_key="txt"))
    with pytest.raises(UserError, match="revision means nothing for a dataset on disk"):
        texts_of(source(tmp_path / "d", revision="main"))


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
    assert texts_of(source(tmp_path / "b" / "*.bin", format="text")) == ["\0"]
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


BAD_LINES = [
    (b'{"txt": "x", "id": 1}', r"no key 'text' \(text_key\); there are: txt, id; did you mean txt\?"),
    (b'{"text": "x"', "malformed JSON: .*delimiter"),
    (b'{"text": 5}', "'text' holds a int, not text"),
    (b'{"text": null}', "'text' holds a NoneType, not text"),
    (b'["x"]', "holds a list, not an object"),
    (b'{"text": "\xff"}', "not UTF-8: byte 10 is 0xff"),
    (b'{"text": "\\ud83d"}', "half a surrogate pair"),
    (b"[" * 100_000, "malformed JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[message[:20] for _, message in BAD_LINES])
def test_a_bad_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["good"]) + line + b"\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{message}"):
        texts_of(source(tmp_path / "a.jsonl"))


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok \xc3")
    with pytest.raises(UserError, match=r"a\.txt:1: not UTF-8: byte 3 is 0xc3"):
        texts_of(source(tmp_path / "a.txt"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(["x" * 9999]))[:-20])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read"):
        texts_of(source(tmp_path / "a.jsonl.gz"))
    (tmp_path / "a.jsonl.zst").write_bytes(b"no zstandard at all")
    with pytest.raises(UserError, match=r"a\.jsonl\.zst cannot be read"):
        texts_of(source(tmp_path / "a.jsonl.zst"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(UserError, match=r"a\.parquet:1 cannot be read as parquet"):
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
    with pytest.raises(UserError, match=r"no key 'text'.*there are: txt, n; did you mean txt\?"):
        texts_of(source(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"a\.parquet:1: 'n' holds a int, not text"):
        texts_of(source(tmp_path / "a.parquet", text_key="n"))


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file matches .*format=huggingface"):
        texts_of(source("someone/dataset"))
    with pytest.raises(UserError, match=r"\*\.jsonl: no file matches"):
        texts_of(source(tmp_path / "*.jsonl"))
    with pytest.raises(UserError, match="the directory holds no"):
        texts_of(source(tmp_path))
    (tmp_path / "a.docx").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.docx has an unknown suffix; known are \.jsonl"):
        texts_of(source(tmp_path / "a.docx"))


@pytest.mark.parametrize(
    "keys",
    [{"subset": "x"}, {"revision": "x"}, {"split": "test"}, {"text_key": "x"}],
    ids=lambda keys: next(iter(keys)),
)
def test_keys_without_meaning_are_refused(keys: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    key = next(iter(keys))
    with pytest.raises(UserError, match=f"{key} means nothing for format=text"):
        texts_of(source(tmp_path / "a.txt", **keys))
    with pytest.raises(ValidationError, match=f"{key} means nothing for format=embedded"):
        source("code", format="embedded", **keys)


def test_fingerprint_follows_the_input(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    write_jsonl(file)
    config = source(file)
    first = readers.input_fingerprint(config)
    assert first == readers.input_fingerprint(SourceConfig(path=str(file), weight=0.3))  # a weight is no text
    assert first != readers.input_fingerprint(source(file, text_key="other"))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    second = readers.input_fingerprint(config)
    (tmp_path / "b.jsonl").write_bytes(jsonl(["new"]))
    third = readers.input_fingerprint(source(tmp_path))
    assert len({first, second, third}) == 3


def test_config_cross_checks() -> None:
    def data(**sources: dict[str, Any]) -> DataConfig:
        keys = {"documents": "separate", "boundary": "eos", "shuffle_span": 1, "validation_fraction": 0.0}
        return DataConfig.model_validate({"sources": sources, **keys})

    assert data(a={"path": "x", "weight": 1}, b={"path": "y", "weight": 2}).sources["b"].weight == 2
    for sources, message in [
        ({}, "at least 1"),
        ({"a": {"path": "x"}}, "give weight .* or epochs"),
        ({"a": {"path": "x", "weight": 1, "epochs": 1}}, "give weight .* or epochs"),
        ({"a": {"path": "x", "weight": 0}}, "greater than 0"),
        ({"a": {"path": "x", "epochs": -1}}, "greater than 0"),
        (
            {"a": {"path": "x", "weight": 1}, "b": {"path": "y", "epochs": 1}},
            r"sources\.a has weight, sources\.b epochs",
        ),
        ({"a": {"path": "x", "weight": 1, "format": "csv"}}, "'jsonl'"),
        ({"a": {"path": "poems", "weight": 1, "format": "embedded"}}, "one of code, docstrings, prose"),
        ({"a/b": {"path": "x", "weight": 1}}, "letters, digits"),
    ]:
        with pytest.raises(ValidationError, match=message):
            data(**sources)
