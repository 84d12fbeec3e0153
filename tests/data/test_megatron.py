from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain import export_tokens
from llmtrain.config import UserError
from llmtrain.data import megatron
from llmtrain.data.megatron import megatron_documents, nanogpt_documents, write_megatron
from tests.data.array_source import ArraySource

FORMATS = {"B": 1, "b": 2, "h": 3, "i": 4, "q": 5, "H": 8}
"""Dtype codes by the letters of `struct`."""
EOS = 9

quick = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
many_documents = st.lists(st.lists(st.integers(0, 99), max_size=8), min_size=1, max_size=10)


class Prepared(ArraySource):
    """Documents as of a prepared directory."""

    def __init__(self, shards: list[list[list[int]]], vocab_size: int) -> None:
        super().__init__(shards)
        self.shards = len(shards)
        self.index = {"vocab_size": vocab_size}


def write_by_hand(prefix: Path, documents: list[list[list[int]]], letter: str = "H") -> None:
    """An indexed dataset by `struct` alone: documents of sequences of ids."""
    sequences = [sequence for document in documents for sequence in document]
    size = struct.calcsize("<" + letter)
    pointers, edges, place = [], [0], 0
    for sequence in sequences:
        pointers.append(place)
        place += size * len(sequence)
    for document in documents:
        edges.append(edges[-1] + len(document))
    prefix.with_name(prefix.name + ".bin").write_bytes(
        b"".join(struct.pack(f"<{len(sequence)}{letter}", *sequence) for sequence in sequences)
    )
    prefix.with_name(prefix.name + ".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, FORMATS[letter], len(sequences), len(edges))
        + struct.pack(f"<{len(sequences)}i", *map(len, sequences))
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(edges)}q", *edges)
    )


def lists(documents: Any) -> list[list[int]]:
    return [document.ids.tolist() for document in documents]


@pytest.mark.parametrize("letter", FORMATS)
def test_every_dtype_is_read(tmp_path: Path, letter: str) -> None:
    write_by_hand(tmp_path / "a", [[[1, 2, 3]], [[4]], [[5, 127]]], letter)
    index = megatron_documents(tmp_path / "a")
    assert (index.count, index.tokens) == (3, 6)
    assert index.lengths.tolist() == [3, 1, 2]
    assert lists(index.read()) == [[1, 2, 3], [4], [5, 127]]
    assert [document.position for document in index.read(1, 3)] == [1, 2]
    assert {document.ids.dtype for document in index.read()} == {np.dtype(np.int32)}


@quick
@given(
    st.lists(st.lists(st.lists(st.integers(0, 200), max_size=5), max_size=3), max_size=8),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(1, 4),
)
def test_a_document_is_its_sequences(
    tmp_path: Path, documents: list[list[list[int]]], start: int, stop: int, chunk: int
) -> None:
    write_by_hand(tmp_path / "a", documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron, "CHUNK", chunk)
        index = megatron_documents(tmp_path / "a")
        expected = [[i for sequence in document for i in sequence] for document in documents]
        assert index.lengths.tolist() == list(map(len, expected))
        assert lists(index.read()) == expected
        assert lists(index.read(start, stop)) == expected[start:stop]


@pytest.mark.parametrize("name", ["v1.5", "v1.5.bin", "v1.5.idx"])
def test_a_dataset_has_three_names(tmp_path: Path, name: str) -> None:
    write_by_hand(tmp_path / "v1.5", [[[1]]])
    assert lists(megatron_documents(tmp_path / name).read()) == [[1]]


@quick
@given(st.lists(many_documents, min_size=1, max_size=3), st.sampled_from([100, 65_499, 65_500, 200_000]))
def test_what_is_written_is_the_format(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[list[int]]], vocab_size: int
) -> None:
    documents = [document for shard in shards for document in shard]
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron, "CHUNK", 3)
        written = write_megatron(Prepared(shards, vocab_size), folder / "ours")
    letter = "H" if vocab_size < 65_500 else "i"
    write_by_hand(folder / "theirs", [[document] for document in documents], letter)
    for suffix in (".bin", ".idx"):
        assert (folder / f"ours{suffix}").read_bytes() == (folder / f"theirs{suffix}").read_bytes()
    assert written == (len(documents), sum(map(len, documents)), "uint16" if letter == "H" else "int32")
    assert sorted(path.name for path in folder.iterdir()) == [
        "ours.bin",
        "ours.idx",
        "theirs.bin",
        "theirs.idx",
    ]


def damage(path: Path, at: int, new: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    path.write_bytes(data)


SEQUENCES = 34  # bytes of the header
MISTAKES = {
    "magic": (".idx", lambda p: damage(p, 0, b"X"), r"a\.idx: begins with b'XMIDIDX.*no Megatron-LM index"),
    "version": (".idx", lambda p: damage(p, 9, b"\2"), r"a\.idx: version 2 of the format is not 1"),
    "float": (".idx", lambda p: damage(p, 17, b"\6"), r"a\.idx: dtype code 6 is none of ids .*8 uint16"),
    "code": (".idx", lambda p: damage(p, 17, b"\x63"), r"a\.idx: dtype code 99 is none of ids"),
    "header": (".idx", lambda p: p.write_bytes(p.read_bytes()[:20]), r"a\.idx: has 20 bytes and ends in"),
    "short": (".idx", lambda p: p.write_bytes(p.read_bytes()[:-1]), r"a\.idx: has \d+ bytes instead of \d+"),
    "modes": (".idx", lambda p: p.write_bytes(p.read_bytes() + b"\0\0"), r"a\.idx: .*modes.*only text"),
    "counts": (".idx", lambda p: damage(p, 18, b"\xff" * 8), r"a\.idx: has \d+ bytes instead of \d+"),
    "length": (".idx", lambda p: damage(p, SEQUENCES, b"\7"), r"sequence 1 of 1 tokens .* byte 14, not 6"),
    "pointer": (".idx", lambda p: damage(p, SEQUENCES + 8, b"\2"), r"sequence 0 of 3 .* byte 0, not 2"),
    "negative": (".idx", lambda p: damage(p, SEQUENCES, b"\xff" * 4), r"sequence 0 of -1 tokens"),
    "edges": (".idx", lambda p: damage(p, SEQUENCES + 24 + 8, b"\5"), r"a\.idx: its documents do not begin"),
    "ids": (".bin", lambda p: p.write_bytes(p.read_bytes()[:-2]), r"a\.bin: has 6 bytes, and a\.idx says 8"),
    "more": (".bin", lambda p: p.write_bytes(bytes(10)), r"a\.bin: has 10 bytes, and a\.idx says 8"),
    "no idx": (".idx", Path.unlink, r"a\.idx: No such file"),
    "no bin": (".bin", Path.unlink, r"a\.bin: No such file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_damaged_dataset_is_named(tmp_path: Path, mistake: str) -> None:
    suffix, spoil, message = MISTAKES[mistake]
    write_by_hand(tmp_path / "a", [[[1, 2, 3]], [[4]]])
    spoil(tmp_path / f"a{suffix}")
    with pytest.raises(UserError, match=message):
        megatron_documents(tmp_path / "a")


def test_what_is_checked_in_chunks_is_checked_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron, "CHUNK", 1)
    for mistake in ("edges", "length", "pointer", "negative"):
        test_a_damaged_dataset_is_named(tmp_path, mistake)


def test_an_id_that_no_token_has_is_not_wrapped(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "a", [[[1, 2]], [[3, 2**32 + 5]]], "q")
    with pytest.raises(UserError, match=r"a\.bin: document 1 has the id 4294967301"):
        list(megatron_documents(tmp_path / "a").read())


def test_a_file_that_shrinks_is_named(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "a", [[[1, 2, 3]], [[4] * 9]])
    index = megatron_documents(tmp_path / "a")
    (tmp_path / "a.bin").write_bytes(bytes(8))
    with pytest.raises(UserError, match=r"a\.bin: became shorter"):
        list(index.read())


def flat(path: Path, ids: list[int], header: tuple[int, int] | None = None) -> Path:
    """A file of ids, behind llm.c's header of 256 int32 where magic and version are given."""
    letter = "I" if header == (20240801, 7) else "H"
    front = b"" if header is None else struct.pack("<3i", *header, len(ids)).ljust(1024, b"\0")
    path.write_bytes(front + struct.pack(f"<{len(ids)}{letter}", *ids))
    return path


no_eos = st.lists(st.lists(st.integers(0, EOS - 1), max_size=7), min_size=1, max_size=8)


@quick
@given(no_eos, st.booleans(), st.integers(1, 9))
def test_nanogpt_documents_end_with_end_of_text(
    tmp_path: Path, texts: list[list[int]], last_is_whole: bool, chunk: int
) -> None:
    texts[0] = [1, *texts[0]]  # a file that begins with the id has it in front of all documents
    documents = [[*text, EOS] for text in texts]
    if not last_is_whole:
        documents[-1] = texts[-1]
    ids = [i for document in documents for i in document]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron, "CHUNK", chunk)
        found = list(nanogpt_documents(flat(tmp_path / "train.bin", ids), EOS, 10))
        starts = np.cumsum([0, *map(len, documents)]).tolist()
        assert lists(found) == [document for document in documents if document]
        assert [document.position for document in found] == starts[: len(found)]
        for place, start in enumerate(starts[: len(found)]):
            rest = list(nanogpt_documents(tmp_path / "train.bin", EOS, 10, start))
            assert lists(rest) == lists(found)[place:]
            assert rest[0].position == start


@quick
@given(no_eos, st.lists(st.integers(0, 8), max_size=5), st.integers(1, 9), st.booleans())
def test_behind_llm_cs_header_documents_begin_with_it(
    tmp_path: Path, texts: list[list[int]], of_the_file_before: list[int], chunk: int, wide: bool
) -> None:
    documents = [[EOS, *text] for text in texts]
    if of_the_file_before:
        documents.insert(0, of_the_file_before)
    ids = [i for document in documents for i in document]
    header = (20240801, 7) if wide else (20240520, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron, "CHUNK", chunk)
        found = list(nanogpt_documents(flat(tmp_path / "train.bin", ids, header), EOS, 10))
    assert lists(found) == documents
    assert [d.position for d in found] == np.cumsum([0, *map(len, documents)])[:-1].tolist()


def test_a_flat_file_that_begins_with_it_has_it_in_front(tmp_path: Path) -> None:
    path = flat(tmp_path / "train.bin", [EOS, 1, 2, EOS, EOS, 3])
    assert lists(nanogpt_documents(path, EOS, 10)) == [[EOS, 1, 2], [EOS], [EOS, 3]]
    assert lists(nanogpt_documents(path, EOS, 10, 3)) == [[EOS], [EOS, 3]]


def test_an_empty_flat_file_has_no_document(tmp_path: Path) -> None:
    assert list(nanogpt_documents(flat(tmp_path / "train.bin", []), EOS, 10)) == []


def test_mistakes_of_flat_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.bin"

    def fails(message: str) -> None:
        with pytest.raises(UserError, match=rf"train\.bin: {message}"):
            list(nanogpt_documents(path, EOS, 10))

    fails("No such file")
    path.write_bytes(bytes(7))
    fails("has 7 bytes, which are no uint16 ids")
    flat(path, [1, 2, 3], (20240520, 2))
    fails("version 2 of its header is not 1")
    flat(path, [1, 2, 3], (20240520, 1))
    path.write_bytes(path.read_bytes()[:-2])
    fails("has 1028 bytes instead of 1030 for the 3 tokens of its header")
    flat(path, [1, 2, 10, EOS])
    fails("token 2 is the id 10, outside the vocabulary of 10")
    monkeypatch.setattr(megatron, "MAX_DOCUMENT", 5)
    flat(path, [1, EOS, 2, 2, 2, 2, 2, 2])
    fails("no end-of-text id 9 in the 6 tokens after token 2")


def test_a_file_without_end_of_text_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = flat(tmp_path / "train.bin", [1, 2, 3])
    assert lists(nanogpt_documents(path, EOS, 10)) == [[1, 2, 3]]
    assert "no end-of-text id 9 in 3 tokens" in caplog.text


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"a\.bin: exists already"):
        write_megatron(Prepared([[[1]]], 10), tmp_path / "a")
    assert (tmp_path / "a.bin").read_bytes() == b"mine"

    class Failing(Prepared):
        def read(self, shard: int, start: int, stop: int) -> np.ndarray:
            if shard == 1:
                raise UserError("shard 1 is damaged")
            return super().read(shard, start, stop)

    with pytest.raises(UserError, match="shard 1 is damaged"):
        write_megatron(Failing([[[1]], [[2]]], 10), tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    with pytest.raises(UserError, match="there is no document to write"):
        write_megatron(Prepared([[]], 10), tmp_path / "c")


def test_the_door_exports_a_prepared_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llmtrain.data.shard_format import Header, shard_path
    from llmtrain.data.shard_writer import ShardWriter, write_index

    prepared, header = tmp_path / "prepared", Header("some tokenizer", 300, "eos")
    documents = [[[1, 2, 299], [4]], [], [[5, 6]]]
    for number, shard in enumerate(documents):
        writer = ShardWriter(shard_path(prepared, number), header)
        writer.begin("a.jsonl", "byte")
        for position, document in enumerate(shard):
            writer.add(np.array(document, np.int32), 10, position)
        writer.finish()
    write_index(prepared, header, len(documents))
    prefix = tmp_path / "out" / "text"
    assert export_tokens.main([str(prepared), str(prefix)]) == 0
    assert lists(megatron_documents(prefix).read()) == [[1, 2, 299], [4], [5, 6]]
    printed = capsys.readouterr().out
    assert "3 documents, 6 tokens, uint16" in printed
    assert f"--data-path {prefix}" in printed
    assert export_tokens.main([str(prepared), str(prefix)]) == 78
    assert "text.idx: exists already; name another prefix" in capsys.readouterr().err
    assert export_tokens.main([str(tmp_path), str(tmp_path / "x")]) == 78
    assert capsys.readouterr().err.startswith("error: ")
