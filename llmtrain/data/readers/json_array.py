"""One JSON array a file, as WuDao ships them: elements are located as the bytes pass, and parsed one by one.

Locating looks at strings and brackets and nothing else, so an element that is malformed in itself is rejected
alone. Where a bracket or a quote does not close, nobody can say where the next element begins: the file ends
before the array does, and that is a UserError naming the element.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import BinaryIO

from llmtrain.config import UserError
from llmtrain.data.readers.fields import Fields
from llmtrain.data.readers.files import CHUNK, advance, opened
from llmtrain.data.readers.jsonl import BOM
from llmtrain.data.records import KEPT_BYTES, Document, Rejected, Slice

_ANY = re.compile(rb"[^ \t\r\n]")
# Whole strings, where no quote is escaped, and what stands between them, up to the next byte that matters:
# between elements a comma does, within one it does not.
_OUTSIDE = re.compile(rb'[^"{}\[\],]*+(?:"[^"]*+"[^"{}\[\],]*+)*+')
_INSIDE = re.compile(rb'[^"{}\[\]]*+(?:"[^"]*+"[^"{}\[\]]*+)*+')
_QUOTE, _COMMA = b'",'
_OPENING, _CLOSING = b"{[", b"}]"
_PARTNER = dict(zip(_CLOSING, _OPENING, strict=True))
_DEEPEST = 10_000  # json.loads gives up long before


def read_json_array(piece: Slice, compression: str, fields: Fields) -> Iterator[Document | Rejected]:
    """The records of the elements that begin in the slice; a start other than 0 is that of an element."""
    stop = sys.maxsize if piece.stop is None else piece.stop
    with opened(piece.file, compression) as stream:
        advance(stream, piece.start, bool(compression))
        scanner = _Scanner(stream, piece, fields.max_bytes)
        if piece.start == 0:
            scanner.open_array()
        for position, element, size in scanner.elements():
            if position >= stop:
                return
            if size > fields.max_bytes:
                yield fields.too_long(element, size, position)
            else:
                yield fields.document(element, position)


class _Scanner:
    """Finds the elements of an array in a stream; holds one element, of one that is too long its start."""

    def __init__(self, stream: BinaryIO, piece: Slice, limit: int) -> None:
        self._stream, self._name, self._limit = stream, piece.file, limit
        self._buffer = bytearray()
        self._marks = bytearray()  # the same without escapes: each of its quotes begins or ends a string
        self._half_escape = b""  # a backslash whose partner has not been read
        self._base = piece.start  # position of the buffer's first byte
        self._at = 0  # in the buffer: what lies before has been looked at
        self._first = 0  # in the buffer: where the element under way begins
        self._head = b""  # the start of an element that is too long to be held
        self._dropped = 0  # its bytes that are no longer in the buffer
        self._size = 0  # of these, those up to the last that is not blank

    def open_array(self) -> None:
        """Go past the bracket that opens the array."""
        self._more()
        if self._buffer.startswith(BOM):
            self._at = self._first = len(BOM)
        byte = self._next_byte()
        if byte != b"[":
            found = f"begins with {byte.decode('latin-1')!r}" if byte else "is empty"
            way = "; if it holds one object a line, set format=jsonl" if byte == b"{" else ""
            raise UserError(f"{self._name}: {found}, not with the [ of a JSON array{way}")
        self._at += 1

    def elements(self) -> Iterator[tuple[int, bytes, int]]:
        """(position, element, bytes) up to the array's end; of a long element only the start is given."""
        while True:
            self._next_byte()
            self._first, self._head, self._dropped = self._at, b"", 0
            position = self._base + self._at
            last = self._to_end_of_element(position)
            rest = bytes(self._buffer[self._first : self._at - 1]).rstrip()
            if self._head:
                yield position, self._head, self._dropped + len(rest) if rest else self._size
            elif rest:
                yield position, rest, len(rest)
            self._first = self._at
            if last:
                break
        if byte := self._next_byte():
            place = self._base + self._at
            raise UserError(f"{self._name}: byte {place}: {byte!r} follows the end of the array")

    def _next_byte(self) -> bytes:
        """The next byte that is not blank, not yet passed; nothing at the end of the file."""
        while not (found := _ANY.search(self._marks, self._at)):
            self._at = self._first = len(self._buffer)
            if not self._more():
                return b""
        self._at = found.start()
        return found[0]

    def _to_end_of_element(self, position: int) -> bool:
        """Go past the comma or bracket after an element; whether it was the bracket that ends the array."""
        marks, open_ = self._marks, bytearray()
        while True:
            skipped = (_INSIDE if open_ else _OUTSIDE).match(marks, self._at)
            assert skipped is not None
            self._at = skipped.end()
            if self._at == len(marks):
                self._more_of_element(position)
                continue
            byte = marks[self._at]
            self._at += 1
            if byte == _QUOTE:
                self._to_end_of_string(position)
            elif byte in _OPENING:
                open_.append(byte)
                if len(open_) > _DEEPEST:
                    raise UserError(f"{self._name}: byte {position}: nested too deeply")
            elif byte == _COMMA:
                return False
            elif not open_ and byte == _CLOSING[1]:
                return True
            elif (partner := open_.rfind(_PARTNER[byte])) >= 0:
                del open_[partner:]  # those above it were not closed: the element is malformed, but it ends

    def _to_end_of_string(self, position: int) -> None:
        """Go past the quote that ends a string."""
        while (end := self._marks.find(_QUOTE, self._at)) < 0:
            self._at = len(self._marks)
            self._more_of_element(position)
        self._at = end + 1

    def _more_of_element(self, position: int) -> None:
        if not self._more():
            raise UserError(
                f"{self._name}: the file ends before the array does, in the element that begins at byte"
                f" {position} of the text"
            )

    def _more(self) -> bool:
        """Read on, and let go of what is not needed; whether there was more."""
        done = self._first
        if self._at - self._first > self._limit:
            self._head = self._head or bytes(self._buffer[self._first : self._first + KEPT_BYTES])
            if solid := len(self._buffer[self._first : self._at].rstrip()):
                self._size = self._dropped + solid
            self._dropped += self._at - self._first
            done = self._at
        del self._buffer[:done], self._marks[:done]
        self._base, self._at, self._first = self._base + done, self._at - done, 0
        chunk = self._stream.read(CHUNK)
        content = self._half_escape + chunk
        cut = len(content) - (len(content) - len(content.rstrip(b"\\"))) % 2 if chunk else len(content)
        content, self._half_escape = content[:cut], content[cut:]
        self._buffer += content
        if b"\\" in content:
            content = content.replace(rb"\\", b"__").replace(rb"\"", b"__")
        self._marks += content
        return bool(chunk or content)
