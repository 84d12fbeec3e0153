"""A record to the text of its document, with every check; what fails one is `Rejected`, and says why."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from llmtrain.config.errors import did_you_mean
from llmtrain.data.config import SourceConfig
from llmtrain.data.records import EMPTY, KEPT_BYTES, Document, Rejected

# Objects become tuples of pairs, which only arrays' lists could be confused with: a key that stands twice is
# then seen at the price of a `len`, where a hook in Python would cost a quarter of the parsing.
_scan: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder(object_pairs_hook=tuple))["scan_once"]
_scan_loosely: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder(strict=False))["scan_once"]
_BLANK = " \t\r\n"  # all that JSON allows between its tokens
_PIECES = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[^{}]+")
# Not white space, control characters, or those of Unicode's Default_Ignorable_Code_Point; spelled out because
# str.isprintable changes with Python's Unicode tables.
_VISIBLE = re.compile(
    "[^\\s\0-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]"
)
_NAMES = {"tuple": "dict"}  # what a user calls the types of parsed JSON
_MOST_NAMES = 20  # of a record's keys, in a message
_LONGEST_NAME = 60


class BadRecordError(Exception):
    """Why a record has no usable text."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail.encode(
            "utf-8", "backslashreplace"
        ).decode()  # it may quote half a surrogate pair

    def rejected(self, position: int, record: bytes) -> Rejected:
        """As the record that readers yield."""
        return Rejected(self.reason, position, record[:KEPT_BYTES], len(record), self.detail)


class Fields:
    """What makes a document of a record: one field, or a template of several."""

    def __init__(self, source: SourceConfig, max_bytes: int) -> None:
        self.names = source.text_fields
        """The fields that a record must have."""
        self.max_bytes = max_bytes
        self._named = " and ".join(repr(name) for name in self.names)
        self._key = "text_key" if source.template is None else "template"
        self._pieces = None if source.template is None else _PIECES.findall(source.template)

    def document(self, line: bytes, position: int) -> Document | Rejected:
        """The document of one JSON object."""
        try:
            return Document(self.text(parse_object(line)), position)
        except BadRecordError as bad:
            return bad.rejected(position, line)

    def of_text(self, text: str, position: int) -> Document | Rejected:
        """The document of a text that stands in no record."""
        try:
            return Document(self.checked(text, text, "the text"), position)
        except BadRecordError as bad:
            return bad.rejected(position, text.encode("utf-8", "backslashreplace"))

    def too_long(self, head: bytes, size: int, position: int) -> Rejected:
        """A record that is not even looked at; `head` is its start."""
        detail = f"{size} bytes; max_document_bytes is {self.max_bytes}"
        return Rejected("too long", position, head[:KEPT_BYTES], size, detail)

    def text(self, record: Mapping[str, Any]) -> str:
        """The text of a record, checked."""
        if self._pieces is None:
            text = record.get(self.names[0])
            if type(text) is not str:
                raise self._not_text(record)
            return self.checked(text, text, self._named)
        values = {name: value for name in self.names if type(value := record.get(name)) is str}
        if len(values) < len(self.names):
            raise self._not_text(record)
        parts = [
            _literal(piece) if len(piece) < 3 or piece[0] != "{" else values[piece[1:-1]]
            for piece in self._pieces
        ]
        return self.checked("".join(parts), "".join(values.values()), self._named)

    def checked(self, text: str, content: str, named: str) -> str:
        """The text if it is usable; `content` is what of it comes from the record, `named` so for people."""
        size = len(text)
        if not text.isascii():
            try:
                size = len(text.encode())
            except UnicodeEncodeError as error:
                detail = f"{named} holds half a surrogate pair at {error.start}"
                raise BadRecordError("half a surrogate pair", detail) from None
        if "\0" in text:
            raise BadRecordError("NUL", f"{named} holds U+0000 at {text.index(chr(0))}")
        if size > self.max_bytes:
            raise BadRecordError("too long", f"{size} bytes of text; max_document_bytes is {self.max_bytes}")
        if _VISIBLE.search(content) is None:
            raise BadRecordError(EMPTY, f"{named} holds no visible character")
        return text

    def no_such_key(self, name: str, there: list[str]) -> str:
        """The message about a field that is not there, with the nearest that is."""
        shown = [
            key if len(key) <= _LONGEST_NAME else f"{key[:_LONGEST_NAME]}..." for key in there[:_MOST_NAMES]
        ]
        listed = ", ".join(shown) or "nothing"
        return f"no key {name!r} ({self._key}); there are: {listed}{did_you_mean(name, there)}"

    def _not_text(self, record: Mapping[str, Any]) -> BadRecordError:
        for name in self.names:
            if name not in record:
                return BadRecordError("missing field", self.no_such_key(name, list(record)))
        for name in self.names:
            if record[name] is None:
                return BadRecordError("null", f"{name!r} is null")
        for name in self.names:
            value = record[name]
            if isinstance(value, UnicodeDecodeError):
                return BadRecordError("not UTF-8", _not_utf8(value))
            if type(value) is not str:
                kind = type(value).__name__
                return BadRecordError("not text", f"{name!r} holds a {_NAMES.get(kind, kind)}, not text")
        raise AssertionError("every field is text")


def _literal(piece: str) -> str:
    return piece[0] if piece in ("{{", "}}") else piece


def decode(content: bytes) -> str:
    """UTF-8, strictly."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BadRecordError("not UTF-8", _not_utf8(error)) from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}"


def parse_object(line: bytes) -> dict[str, Any]:
    """The object that the bytes hold, its own objects as tuples of pairs."""
    text = decode(line).strip(_BLANK)
    try:
        value, end = _scan(text, 0)
    except (ValueError, StopIteration, RecursionError):
        raise _malformed(text) from None
    if end != len(text):
        raise _malformed(text)
    if type(value) is not tuple:
        raise BadRecordError("not an object", f"holds a {type(value).__name__}, not an object")
    record = dict(value)
    if len(record) != len(value):
        names = [name for name, _ in value]
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise BadRecordError("duplicate key", f"the key {twice[:_LONGEST_NAME]!r} stands twice")
    return record


def _malformed(text: str) -> BadRecordError:
    """What is wrong with it in the words of `json`; a NUL byte that is all that is wrong has its own name."""
    try:
        _, end = _scan_loosely(text, 0)
        if end == len(text) and "\0" in text:
            return BadRecordError("NUL", f"holds a NUL byte at {text.index(chr(0))}")
    except (ValueError, StopIteration, RecursionError):
        pass
    try:
        json.loads(text)
    except ValueError as error:
        return BadRecordError("malformed JSON", f"malformed JSON: {error}")
    except RecursionError:
        return BadRecordError("malformed JSON", "malformed JSON: nested too deeply")
    raise AssertionError("the record can be parsed")
