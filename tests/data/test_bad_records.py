"""Of a corpus with bad records every good one is read and every bad one counted, in bounded memory."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from llmtrain.config import UserError
from llmtrain.data import readers
from llmtrain.data.config import SourceConfig
from llmtrain.data.readers import json_array, jsonl
from llmtrain.data.records import KEPT_BYTES, REASONS, Document, Record, Rejected, Slice

LIMIT = 20_000


def source(path: Path, **keys: Any) -> SourceConfig:
    return SourceConfig(path=str(path), weight=1.0, **keys)


def read(path: Path, limit: int = LIMIT, **keys: Any) -> list[Record]:
    config = source(path, **keys)
    pieces = [piece for part in readers.parts(config) for piece in part.slices]
    return [record for piece in pieces for record in readers.read(config, piece, limit)]


def rejected(path: Path, limit: int = LIMIT, **keys: Any) -> Rejected:
    """The one record of a file, which is bad."""
    (record,) = read(path, limit, **keys)
    assert isinstance(record, Rejected)
    return record


def obj(text: Any) -> bytes:
    return json.dumps({"id": 7, "text": text}, ensure_ascii=False).encode("utf-8", "surrogatepass")


# (kind, line, reason, what the detail says)
BAD = [
    ("garbage", b"\x01\x02 % not JSON at all", "malformed JSON", "malformed JSON: Expecting value"),
    ("truncated", obj("cut off here")[:-6], "malformed JSON", "malformed JSON: Unterminated string"),
    ("two objects", obj("a") + obj("b"), "malformed JSON", "malformed JSON: Extra data"),
    ("too deep", b"[" * 15_000, "malformed JSON", "malformed JSON"),
    ("list", b'["text", "x"]', "not an object", "holds a list, not an object"),
    ("duplicate key", b'{"text": "a", "\\u0074ext": "b"}', "duplicate key", "the key 'text' stands twice"),
    (
        "missing",
        b'{"txt": "x", "id": 1}',
        "missing field",
        "no key 'text' (text_key); there are: txt, id; did you mean txt?",
    ),
    ("null", obj(None), "null", "'text' is null"),
    ("number", obj(5), "not text", "'text' holds a int, not text"),
    ("object", obj({"text": "x"}), "not text", "'text' holds a dict, not text"),
    ("not UTF-8", b'{"text": "\xff"}', "not UTF-8", "not UTF-8: byte 10 is 0xff"),
    ("escaped surrogate", b'{"text": "x\\uD83d"}', "half a surrogate pair", "surrogate pair at 1"),
    ("NUL", obj("a\0b"), "NUL", "'text' holds U+0000 at 1"),
    ("NUL byte", b'{"text": "a\0b"}', "NUL", "a NUL byte at 11"),
    ("too long", obj("x" * LIMIT), "too long", f"max_document_bytes is {LIMIT}"),
    ("empty", obj(" \u3000\t\u200b\ufeff\n"), "empty", "no visible character"),
]


@pytest.mark.parametrize(("line", "reason", "detail"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_each_kind(line: bytes, reason: str, detail: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(obj("good") + b"\n" + line + b"\n" + obj("also good"))
    before, record, after = read(file)
    place = len(obj("good")) + 1
    assert (before, after) == (Document("good", 0), Document("also good", place + len(line) + 1))
    assert isinstance(record, Rejected)
    assert record[:4] == (reason, place, line[:KEPT_BYTES], len(line))
    assert detail in record.detail
    assert reason in REASONS


def test_surrogates_in_utf8_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(obj("\ud83d"))
    assert rejected(tmp_path / "a.jsonl").reason == "not UTF-8"


def test_ten_thousand_good_and_five_hundred_bad(tmp_path: Path) -> None:
    """Also cut at random places, packed, and as one array."""
    rng = random.Random(3)
    alphabet = 'abc "\\\n\té漢🎉{}[],:'
    good = ["x" + "".join(rng.choices(alphabet, k=rng.randrange(120))) for _ in range(10_000)]
    kinds = [BAD[number % len(BAD)] for number in range(500)]
    lines: list[tuple[bytes, str | None]] = [(json.dumps({"n": 1, "text": t}).encode(), None) for t in good]
    for _, line, reason, _ in kinds:
        lines.insert(rng.randrange(len(lines)), (line, reason))
    lines.append((obj("the last one is cut")[:-1], "malformed JSON"))
    expected = Counter(reason for _, reason in lines if reason)
    content = b"\n".join(line for line, _ in lines)

    def check(records: list[Record]) -> None:
        assert [record.text for record in records if isinstance(record, Document)] == good
        assert Counter(record.reason for record in records if isinstance(record, Rejected)) == expected

    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    check(read(file))
    for cuts in (1, 2, 7, 100):
        edges = [0, *sorted(rng.sample(range(1, len(content)), cuts)), len(content)]
        pieces = [Slice(str(file), start, stop, "byte", None) for start, stop in itertools.pairwise(edges)]
        check([record for piece in pieces for record in readers.read(source(file), piece, LIMIT)])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    check(read(tmp_path / "a.jsonl.gz"))
    unclosed = {"truncated", "too deep"}  # of these no array can be told on from
    kept = [
        (line, reason) for line, reason in lines[:-1] if line not in {b[1] for b in BAD if b[0] in unclosed}
    ]
    expected = Counter(reason for _, reason in kept if reason)
    (tmp_path / "a.json").write_bytes(b"[" + b", ".join(line for line, _ in kept) + b"]")
    check(read(tmp_path / "a.json"))


def test_the_first_reason_counts_and_an_empty_text_comes_last(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for line, reason in [
        (b'{"text": "", "text": ""}', "duplicate key"),
        (b'{"text": "\\u0000"}', "NUL"),
        (b'{"text": "", "x": {"a": 1, "a": 2}}', "empty"),  # inside, keys are nobody's business
        (b'{"text": "\\u0001"}', "empty"),
    ]:
        file.write_bytes(line)
        assert rejected(file).reason == reason


@pytest.mark.parametrize("text", ["a", "。", "🎉", "\ue000", "\u200bx", "-"])
def test_anything_visible_is_not_empty(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(obj(text))
    assert read(tmp_path / "a.jsonl") == [Document(text, 0)]


def test_python_s_own_numbers_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x", "score": NaN, "rest": [Infinity, -Infinity]}\n')
    assert read(tmp_path / "a.jsonl") == [Document("x", 0)]


def test_templates(tmp_path: Path) -> None:
    file, template = tmp_path / "a.jsonl", "{{T}} {title}\n{content}{title}"

    def one(**record: Any) -> Record:
        file.write_bytes(json.dumps(record).encode())
        return read(file, template=template)[0]

    assert one(title="{content}", content="c") == Document(
        "{T} {content}\nc{content}", 0
    )  # fields are literal
    assert one(title="", content="c") == Document("{T} \nc", 0)
    for record, reason, detail in [
        ({"title": "t"}, "missing field", "no key 'content' (template); there are: title"),
        ({"title": "t", "content": None}, "null", "'content' is null"),
        ({"title": 1, "content": "c"}, "not text", "'title' holds a int"),
        ({"title": "t", "content": "\0"}, "NUL", "'title' and 'content' holds U+0000 at 6"),
        ({"title": " ", "content": ""}, "empty", "no visible"),
    ]:
        found = one(**record)
        assert isinstance(found, Rejected)
        assert found.reason == reason and detail in found.detail
    file.write_bytes(json.dumps({"title": "t" * 60, "content": "c"}).encode())
    assert rejected(file, 100, template=template).reason == "too long"  # the text is, the record is not


def test_lengths_at_the_limit(tmp_path: Path) -> None:
    line = obj("0123456789")
    for name, content in [("a.jsonl", line + b"\n" + line), ("a.json", b"[" + line + b" ,\n" + line + b"]")]:
        (tmp_path / name).write_bytes(content)
        assert [type(record) for record in read(tmp_path / name, len(line))] == [Document] * 2
        for record in read(tmp_path / name, len(line) - 1):
            assert isinstance(record, Rejected)
            assert (record.reason, record.record, record.size) == ("too long", line, len(line))
    (tmp_path / "a.txt").write_bytes("é".encode() * 10)
    assert isinstance(read(tmp_path / "a.txt", 20)[0], Document)
    assert rejected(tmp_path / "a.txt", 19).reason == "too long"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["é" * 10]}), tmp_path / "a.parquet")
    assert isinstance(read(tmp_path / "a.parquet", 20)[0], Document)
    assert rejected(tmp_path / "a.parquet", 19).reason == "too long"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"ok \xc3", "not UTF-8"),
        (b"a\0b", "NUL"),
        (b" \n", "empty"),
        (b"", "empty"),
        (b"\xef\xbb\xbf", "empty"),
    ],
)
def test_text_files(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert rejected(tmp_path / "a.txt").reason == reason


def test_rows_of_tables(tmp_path: Path) -> None:
    """Nobody checks parquet's text on its way: bytes that are no UTF-8 arrive in a string column."""
    raw = pyarrow.array([b"good", None, b"", b"\xff", b"a\0b", b"x" * 30], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column, "n": range(6)}), tmp_path / "a.parquet")
    good, *bad = read(tmp_path / "a.parquet", 20)
    assert good == Document("good", 0)
    assert [(r.reason, r.position, r.record) for r in bad if isinstance(r, Rejected)] == [
        ("null", 1, b'{"text": null}'),
        ("empty", 2, b""),
        ("not UTF-8", 3, b"\xff"),
        ("NUL", 4, b"a\0b"),
        ("too long", 5, b"x" * 30),
    ]
    numbers = read(tmp_path / "a.parquet", text_key="n")
    assert {record.reason for record in numbers if isinstance(record, Rejected)} == {"not text"}
    assert len(numbers) == 6


ARRAYS = [
    (b"", "is empty, not with the"),
    (b'{"text": "x"}\n', "begins with '{', .* set format=jsonl"),
    (b'[{"text": "x"}', "ends before the array does, in the element that begins at byte 1 "),
    (b'[{"text": "x"}, {"text": "y}, {"text": "z"}]', "in the element that begins at byte 16 "),
    (b'[{"text": "x"}, {"text": ["y"}, {"text": "z"}', "in the element that begins at byte 32 "),
    (b'[{"text": "x"}] [', r"byte 16: b'\[' follows the end of the array"),
    (b'[{"text": "x\\', "in the element that begins at byte 1 "),
    (b'[{"text": "x"}] \\', "byte 16: .* follows the end"),
]


@pytest.mark.parametrize(("content", "message"), ARRAYS)
def test_an_array_that_cannot_be_read_on(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json: .*{message}"):
        read(tmp_path / "a.json")


def test_malformed_elements_of_an_array_are_rejected_alone(tmp_path: Path) -> None:
    bad = [
        b'{"text" "x"}',
        b'{"text": "x"}}',
        b'{"text": ["x"}',
        b'{"text": "x"]}',
        b"nul",
        b'"text"',
        b"[{}]",
        b"7",
    ]
    (tmp_path / "a.json").write_bytes(
        b"\xef\xbb\xbf [" + b", ".join([obj("first"), *bad, obj("last")]) + b", ] \n"
    )
    first, *found, last, empty = read(tmp_path / "a.json")
    assert (first[0], last[0], empty[0]) == ("first", "last", "malformed JSON")
    reasons = [record.reason for record in found if isinstance(record, Rejected)]
    assert reasons == ["malformed JSON"] * 5 + ["not an object"] * 3
    assert [record.record for record in found if isinstance(record, Rejected)] == bad


@pytest.mark.parametrize("content", [b"[%s,,%s,]", b"[ %s , , %s , ] ", b"[\n%s,\n,\n%s,\n]\n"])
def test_empty_elements_are_counted(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content % (obj("a"), obj("b")))
    records = read(file)
    assert [record[0] for record in records] == ["a", "malformed JSON", "b", "malformed JSON"]
    for record in records:
        piece = Slice(str(file), record.position, record.position + 1, "byte", None)
        assert list(readers.read(source(file), piece, LIMIT)) == [record]
    file.write_bytes(b"[,]")
    assert [record[0] for record in read(file)] == ["malformed JSON"] * 2
    file.write_bytes(b"[ ]")
    assert read(file) == []


def element(number: int, text: str) -> dict[str, Any]:
    """With objects inside that look like elements, before and after the text."""
    inner = [{"text": "inner", "n": number}, {"text": "more", "n": {}}]
    before = [*inner, {"text": '"}, {"'}]
    return {"id": number, "before": before, "text": text, "inner": inner, "title": f"t{number}"}


STYLES: dict[str, tuple[int | None, str, str, str]] = {
    "one a line": (None, "[\n", ",\n", "\n]\n"),
    "close to the brackets": (None, "[", ",\n", "]"),
    "comma first": (None, "[\n  ", "\n, ", "\n]"),
    "carriage returns": (None, "[\r\n", ",\r\n", "\r\n]"),
    "pretty": (2, "[\n", ",\n", "\n]"),
    "pretty, joined": (2, "[", ", ", "]"),
    "pretty, a byte order mark": (1, "\ufeff[\n", ",\n", "]"),
}


def array(style: str, broken: tuple[int, ...], count: int) -> tuple[bytes, list[str]]:
    """An array whose elements `broken` lack the quote that closes their text, and the others' texts."""
    indent, begin, between, end = STYLES[style]
    texts = [f'text {number}, "quoted" }}, {{ "x": \n{{"a": 1}}\n漢' for number in range(count)]
    elements = []
    for number, text in enumerate(texts):
        content = json.dumps(element(number, text + "END"), ensure_ascii=False, indent=indent)
        if indent and style != "pretty, joined":
            content = "\n".join(" " * indent + line for line in content.split("\n"))
        assert content.count('END"') == 1
        elements.append(content.replace('END"', "END" if number in broken else 'END"'))
    good = [text + "END" for number, text in enumerate(texts) if number not in broken]
    return (begin + between.join(elements) + end).encode(), good


@pytest.mark.parametrize("chunk", [1 << 20, 97])
@pytest.mark.parametrize("broken", [(50, 450), (1, 2), (7,), (598, 599), (100, 200, 300)])
@pytest.mark.parametrize("style", STYLES)
def test_a_quote_that_is_missing_costs_its_element_alone(
    style: str, broken: tuple[int, ...], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_array, "CHUNK", chunk)
    content, good = array(style, broken, 600)
    file = tmp_path / "a.json"
    file.write_bytes(content)
    try:
        records = read(file)
    except UserError as error:  # the end of the last one is nobody's to tell where the bracket is on its line
        assert broken[-1] == 599 and "in the element that begins at byte" in str(error)
        return
    assert [record.text for record in records if isinstance(record, Document)] == good
    bad = [record for record in records if isinstance(record, Rejected)]
    assert [record.reason for record in bad] == ["malformed JSON"] * len(broken)
    for record in records[:: 1 if chunk > 97 else 50]:
        piece = Slice(str(file), record.position, record.position + 1, "byte", None)
        assert list(readers.read(source(file), piece, LIMIT)) == [record]


@pytest.mark.parametrize("broken", [(50, 450), (0, 450), (0, 599), (1, 2), (7,), (0, 1)])
@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ("[\n", "\n]\n"), ("[ ", "\n]")])
@pytest.mark.parametrize("between", [", ", ",", " , "])
def test_where_all_is_on_one_line_nothing_is_lost_in_silence(
    begin: str, between: str, end: str, broken: tuple[int, ...], tmp_path: Path
) -> None:
    STYLES["one line"] = (None, begin, between, end)
    content, _ = array("one line", broken, 600)
    (tmp_path / "a.json").write_bytes(content)
    place = content.index(b'{"id": %d,' % broken[0])
    with pytest.raises(UserError, match=rf"a\.json: .* in the element that begins at byte {place} "):
        read(tmp_path / "a.json")


def test_several_elements_a_line(tmp_path: Path) -> None:
    lines = [", ".join(json.dumps({"text": f"{n} {m}"}) for m in range(5)) for n in range(9)]
    content = "[\n" + ",\n".join(lines) + "\n]"
    (tmp_path / "a.json").write_text(content)
    assert len(read(tmp_path / "a.json")) == 45
    for broken in [("0 0", "0 4"), ("0 1", "0 3"), ("4 0", "4 4"), ("2 2", "5 3"), ("3 4",)]:
        mangled = content
        for text in broken:
            mangled = mangled.replace(f'"{text}"', f'"{text}')
        (tmp_path / "a.json").write_text(mangled)
        try:
            assert len(records := read(tmp_path / "a.json")) == 45
            assert sum(isinstance(record, Rejected) for record in records) == len(broken)
        except UserError as error:
            assert "in the element that begins at byte" in str(error)


@pytest.mark.parametrize("end", [",\n", "\n]"])
@pytest.mark.parametrize("broken", ['{text": "4"', '{"text": 4"', '{"text": "4'])
def test_whole_elements_on_the_line_of_a_broken_one_are_read(broken: str, end: str, tmp_path: Path) -> None:
    content = (
        '[\n{"text": "0"},\n{"text": "1"},\n' + broken + '}, {"text": "5"} , {"id": 6, "text": "6"}' + end
    )
    content += '{"text": "7"}\n]' if end == ",\n" else ""
    (tmp_path / "a.json").write_text(content)
    records = read(tmp_path / "a.json")
    texts = [record.text for record in records if isinstance(record, Document)]
    assert texts == ["0", "1", "5", "6", *(["7"] if end == ",\n" else [])]
    (bad,) = (record for record in records if isinstance(record, Rejected))
    assert bad.record.decode() == broken + "}"
    for record in records:
        piece = Slice(str(tmp_path / "a.json"), record.position, record.position + 1, "byte", None)
        assert list(readers.read(source(tmp_path / "a.json"), piece, LIMIT)) == [record]


def broken_array(chosen: random.Random) -> tuple[str, dict[str, str], set[str]]:
    """Elements, some on lines with others, some without a quote; the good ones by text; all texts."""
    good, texts, content = {}, set(), "[\n"
    for number in range(count := chosen.randint(4, 20)):
        text = f"text {number}" + chosen.choice(["", ' "q" x', "\nline", " }, { "])
        texts.add(text)
        whole = element = json.dumps(chosen.choice([{"text": text}, {"id": number, "text": text, "m": "v"}]))
        if chosen.random() < 0.15:
            quotes = [at for at, byte in enumerate(whole) if byte == '"' != whole[at - 1] != "\\"]
            element = whole[: (at := chosen.choice(quotes))] + whole[at + 1 :]
        else:
            good[text] = whole
        content += element + ("\n]" if number == count - 1 else chosen.choice([",\n", ",\n", ", "]))
    return content, good, texts


def test_no_element_is_lost_beside_broken_ones(tmp_path: Path) -> None:
    """Each good one is read, or stands in the text of a rejected one; or the file is refused."""
    chosen, found = random.Random(0), Counter[str]()
    for _ in range(1500):
        content, good, all_texts = broken_array(chosen)
        (tmp_path / "a.json").write_text(content)
        try:
            records = read(tmp_path / "a.json")
        except UserError:
            continue
        texts = [record.text for record in records if isinstance(record, Document)]
        kept = [record.record.decode() for record in records if isinstance(record, Rejected)]
        assert len(set(texts)) == len(texts) and set(texts) <= all_texts
        missing = good.keys() - set(texts)
        assert all(any(good[text] in record for record in kept) for text in missing), content
        found.update(read=len(texts), swallowed=len(missing))
    assert found["read"] > 3000 and found["swallowed"] < 0.005 * found["read"]


def test_text_with_lines_of_its_own_costs_its_element_alone(tmp_path: Path) -> None:
    """No JSON, but written by hand it happens: the ends of lines are not escaped."""
    text = 'one\n{\n  "a": 2 }\n]\n}, three'.replace('"', r"\"")
    elements = ['{"text": "good"}', f'{{"text": "{text}"}}', '{"text": "last"}']
    for between in (", ", ",\n"):
        (tmp_path / "a.json").write_text("[" + between.join(elements) + "]")
        assert [record[0] for record in read(tmp_path / "a.json")] == ["good", "malformed JSON", "last"]


def test_an_unclosed_string_does_not_swallow_the_file(tmp_path: Path) -> None:
    lines = "\n".join(["some text"] * 200_000)
    (tmp_path / "a.json").write_text('[\n{"text": "a},\n' + lines + '\n{"text": "b"}\n]')
    with pytest.raises(
        UserError, match=r"a\.json: a string is not closed in the element that begins at byte 2 "
    ):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("limit", [10, 1000, KEPT_BYTES, KEPT_BYTES + 1000])
def test_what_is_kept_of_a_long_record_is_told_by_the_file_alone(
    suffix: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"a.{suffix}"
    long = [obj(str(number) * (limit + 7 * number * 1000)) for number in range(1, 9)]
    content = b"\n".join(long) if suffix == "jsonl" else b"[" + b",\n".join(long) + b"]"
    file.write_bytes(content)
    for chunk in (1 << 20, 65_000, 4096, 777):
        for module in (jsonl, json_array):
            monkeypatch.setattr(module, "CHUNK", chunk)
        records = read(file, limit)
        assert [(r.record, r.size) for r in records if isinstance(r, Rejected)] == [
            (line[:KEPT_BYTES], len(line)) for line in long
        ]


MEMORY = """
import resource, sys
from llmtrain.data import readers
from llmtrain.data.config import SourceConfig
from llmtrain.data.records import Rejected, Slice
small, big, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
def read(path):
    source = SourceConfig(path=path, weight=1.0)
    return list(readers.read(source, Slice(path, 0, None, "byte", None), limit))
read(small)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = read(big)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print([(record.reason, record.size) if isinstance(record, Rejected) else record.text for record in found])
"""


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "json nested", "json escapes", "txt"])
def test_a_gigantic_record_is_not_held(suffix: str, tmp_path: Path) -> None:
    """64 MB in one line; peak memory grows by a few times a chunk or the limit, both 1 MiB."""
    size, limit = 64 << 20, 1 << 20
    suffix, _, kind = suffix.partition(" ")
    filling = {"": b"x", "nested": b'",["', "escapes": b"\\\\"}[kind]
    filling *= size // len(filling)
    if kind == "nested":
        filling = b'",["' * 5000 + b"x" * size + b'"' + b"]" * 5000 + b',"'
    long = b'{"text": "' + filling + b'"}'
    content = {
        "jsonl": b'{"text": "a"}\n' + long + b'\n{"text": "b"}\n',
        "json": b'[{"text": "a"}, ' + long + b', {"text": "b"}]',
        "txt": long,
    }[suffix.removesuffix(".gz")]
    pack = gzip.compress if suffix.endswith(".gz") else bytes
    (tmp_path / f"big.{suffix}").write_bytes(pack(content))
    (tmp_path / f"small.{suffix}").write_bytes(
        pack(b'[{"text": "x"}]' if suffix == "json" else b'{"text": "x"}')
    )
    paths = [str(tmp_path / f"{name}.{suffix}") for name in ("small", "big")]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *paths, str(limit)], capture_output=True, text=True, check=True
    )
    grown, found = done.stdout.splitlines()
    expected = [("too long", len(long))]
    assert found == str(expected if suffix == "txt" else ["a", *expected, "b"])
    assert int(grown) * 1024 < 8 * limit
