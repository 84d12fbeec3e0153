"""One JSON array a file, as WuDao ships them: elements are located as the bytes pass, and parsed one by one.

Locating looks at strings and brackets and nothing else, so an element that is malformed in itself is rejected
alone. A string that holds the end of a line was not closed, or is no JSON anyway: where elements begin lines,
reading goes on at the next line that begins one, or before it with those that are whole. Where lines do not
help, nobody can say where the next element begins: that is a UserError naming the element, seen by the file's
end or by a string that ends like `}, {`, as the text between two elements does where outside and inside are
mistaken for each other.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

from llmtrain.config import UserError
from llmtrain.data.readers.fields import Fields
from llmtrain.data.readers.files import CHUNK, advance, opened
from llmtrain.data.readers.jsonl import BOM
from llmtrain.data.records import KEPT_BYTES, Document, Rejected, Slice

_ANY = re.compile(rb"[^ \t\r\n]")
# Whole strings, where no quote is escaped, and what stands between them, up to the next byte that matters:
# between elements a comma does, within one it does not. A string is left to be looked at if what follows it
# may follow no string, or (in the second of each pair, which is slower) if it holds the end of a line.
# The repetition is not possessive: Python before 3.11.5 matches that wrongly (python/cpython#106052).
_AFTER = rb"(?=[ \t\r\n,:}\]])"
_OUTSIDE, _INSIDE = (
    [re.compile(rb'%b(?:"[^%b]*+"%b%b)*' % (between, no, _AFTER, between)) for no in (rb'"', rb'"\n')]
    for between in (rb'[^"{}\[\],]*+', rb'[^"{}\[\]]*+')
)
_QUOTE_OR_LINE = re.compile(rb'["\n]')
_BOUNDARY = re.compile(rb'\}[ \t\r\n]*,[ \t\r\n]*\{[ \t\r\n]*"[^ \t\r\n,:}\]]')
_LINE_START = re.compile(rb"(?:\xef\xbb\xbf)?([ \t]*)(?:\}[ \t]*)?(?:,[ \t]*)?(\[?)[ \t]*\Z")
_NEXT_ELEMENT = re.compile(rb'\n([ \t]*)(?:\}[ \t]*)?(?:,[ \t]*)?(\{)[ \t\r\n]*["}]')
_NEXT_ON_LINE = re.compile(rb"\}[ \t]*,[ \t]*(?=\{)")
_TRIES = 100  # places on a line from which all the rest may be elements that are whole
_ARRAY_END = re.compile(rb"\n[ \t]*\][ \t\r\n]*\Z")
_AROUND = 256
"""Bytes before an element, at a string's end or a line's, that tell how elements stand on their lines."""
_LOST = 1 << 20  # bytes after a string that was not closed, at least, in which an element is looked for
_QUOTE, _COMMA = b'",'
_OPENING, _CLOSING = b"{[", b"}]"
_PARTNER = dict(zip(_CLOSING, _OPENING, strict=True))
_DEEPEST = 10_000  # json.loads gives up long before


def read_json_array(piece: Slice, compression: str, fields: Fields) -> Iterator[Document | Rejected]:
    """The records of the elements that begin in the slice; a start other than 0 is that of an element."""
    stop = sys.maxsize if piece.stop is None else piece.stop
    with opened(piece.file, compression) as stream:
        before = max(0, piece.start - _AROUND)
        advance(stream, before, bool(compression))
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
        self._held = max(limit, KEPT_BYTES)  # bytes of an element: what is kept is told by the file alone
        self._base = max(0, piece.start - _AROUND)  # position of the buffer's first byte
        self._at = 0  # in the buffer: what lies before has been looked at
        self._first = 0  # in the buffer: where the element under way begins
        self._start = piece.start
        self._end = 0  # in the buffer: where the element ends that has been passed
        self._indent: int | None = None  # of the line that the element under way begins; None if it does not
        self._own_line = False  # whether it has the line, as it seems, to itself
        self._lines = min(1, piece.start)  # elements that began a line so far, one before the slice
        self._shared = False  # whether one did not
        self._doubt = 0  # where the element under way may have run into another
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
        """(position, element, bytes) up to the array's end; of a long element only the start is given.

        Between two commas, or a comma and the end, there is an empty one.
        """
        if self._start:
            self._go_to_start()
        last, comma = False, self._start > 0
        while not last:
            self._next_byte()
            self._first, self._head, self._dropped = self._at, b"", 0
            position = self._base + self._at
            self._look_at_line()
            last = self._to_end_of_element(position)
            rest = bytes(self._buffer[self._first : self._end]).rstrip()
            if self._head:
                yield position, self._head, self._dropped + len(rest) if rest else self._size
            elif rest or comma or not last:
                yield position, rest, len(rest)
            self._first = self._at
            comma = True
        if byte := self._next_byte():
            place = self._base + self._at
            raise UserError(f"{self._name}: byte {place}: {byte!r} follows the end of the array")

    def _go_to_start(self) -> None:
        """Pass over what was read of the bytes before the slice."""
        while len(self._buffer) < self._start - self._base and self._more():
            pass
        self._at = self._first = min(self._start - self._base, len(self._buffer))

    def _look_at_line(self) -> None:
        """Find out whether the element that begins here begins its line, and how far that is indented."""
        self._doubt = 0
        before = bytes(self._buffer[max(0, self._at - _AROUND) : self._at])
        line = before[before.rfind(b"\n") + 1 :]
        begins = _LINE_START.match(line)
        if begins is None or (len(line) == len(before) < self._base + self._at):
            self._indent, self._own_line, self._shared = None, False, True
            return
        self._indent = len(line) if begins[2] else len(begins[1])
        self._lines += 1
        # The first after the bracket may have all the others on its line.
        self._own_line = not self._shared and not begins[2]

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
            fast, exact = _INSIDE if open_ else _OUTSIDE
            skipped = fast.match(marks, self._at)
            if skipped and marks.find(b"\n", self._at, skipped.end()) >= 0:
                skipped = exact.match(marks, self._at)
            assert skipped is not None
            self._at = skipped.end()
            if self._at == len(marks):
                self._more_of_element(position)
                continue
            byte = marks[self._at]
            self._at += 1
            if byte == _QUOTE:
                if (last := self._to_end_of_string(position)) is not None:
                    return last
            elif byte in _OPENING:
                open_.append(byte)
                if len(open_) > _DEEPEST:
                    raise UserError(f"{self._name}: byte {position}: nested too deeply")
            elif byte == _COMMA or (not open_ and byte == _CLOSING[1]):
                self._end = self._at - 1
                if self._doubt:
                    self._check_end_of_line(position, last=byte != _COMMA)
                return byte != _COMMA
            elif (partner := open_.rfind(_PARTNER[byte])) >= 0:
                del open_[partner:]  # those above it were not closed: the element is malformed, but it ends

    def _to_end_of_string(self, position: int) -> bool | None:
        """Go past the quote that ends a string.

        If the end of a line comes before it, and there are lines that begin elements, go to the next, or past
        the bracket that ends the array: whether it was that; None after a quote.
        """
        begun = self._base + self._at
        while True:
            found = _QUOTE_OR_LINE.search(self._marks, self._at)
            if found is None:
                self._at = len(self._marks)
                self._more_of_element(position)
            elif found[0] == b'"':
                break
            elif self._indent is not None:
                self._at = found.start()
                return self._to_next_line(position)
            else:
                self._at = found.end()
        self._at = found.start()
        if not self._has(2):
            self._more_of_element(position)
        earliest = max(0, begun - self._base, self._at - _AROUND)
        self._at += 1
        for boundary in _BOUNDARY.finditer(self._marks, earliest, self._at + 1):
            if boundary.end() == self._at + 1:
                self._doubt = self._base + boundary.start()
                if not self._own_line:
                    raise self._swallowed(position)
        return None

    def _check_end_of_line(self, position: int, last: bool) -> None:
        """UserError unless an element that may have swallowed others has its line to itself as others do."""
        self._at -= 1
        self._has(_AROUND)
        self._at += 1
        following = self._marks[self._at : self._at + _AROUND - 1].lstrip(b" \t\r")
        if self._lines < 2 or not (last or following.startswith(b"\n")):
            raise self._swallowed(position)

    def _swallowed(self, position: int) -> UserError:
        return UserError(
            f"{self._name}: a quote is missing or one too many in the element that begins at byte {position}"
            f" of the text: a string in it goes on into what looks like another, at byte {self._doubt};"
            " mend or remove the element, or write one element a line"
        )

    def _to_next_line(self, position: int) -> bool:
        """Go from a line's end to the next that begins an element, indented no further."""
        assert self._indent is not None
        deeper, most = 0, max(_LOST, self._limit)
        while True:
            self._has(_AROUND)
            until = self._at + _AROUND
            if found := _NEXT_ELEMENT.match(self._marks, self._at, until):
                if len(found[1]) <= self._indent:
                    self._end, self._at = self._whole_elements() or (self._at, found.start(2))
                    return False
                deeper = deeper or self._base + found.start(2)
            elif len(self._marks) < until and (found := _ARRAY_END.match(self._marks, self._at)):
                if deeper:  # of this element, or the last ones that are
                    self._doubt = deeper
                    raise self._swallowed(position)
                whole = self._whole_elements()
                self._end, self._at = whole or (self._at, found.end())
                return whole is None
            if self._base + self._at - position > most:
                raise UserError(
                    f"{self._name}: a string is not closed in the element that begins at byte {position} of"
                    f" the text, and in the {most} bytes after it no line begins another; mend or remove it"
                )
            self._at += 1
            while (line := self._marks.find(b"\n", self._at)) < 0:
                self._at = len(self._marks)
                self._more_of_element(position)
            self._at = line

    def _whole_elements(self) -> tuple[int, int] | None:
        """Where the element under way ends and others begin, if up to here nothing but whole ones follow."""
        for found in islice(_NEXT_ON_LINE.finditer(self._buffer, self._first, self._at), _TRIES):
            rest = bytes(self._buffer[found.end() : self._at]).rstrip().removesuffix(b",")
            try:
                json.loads(b"[%b]" % rest)
            except (ValueError, RecursionError):
                continue
            return found.start() + 1, found.end()
        return None

    def _has(self, count: int) -> bool:
        """Read on until there are so many bytes to look at; whether there are."""
        while len(self._marks) - self._at < count:
            if not self._more():
                return False
        return True

    def _more_of_element(self, position: int) -> None:
        if not self._more():
            raise UserError(
                f"{self._name}: the file ends before the array does, in the element that begins at byte"
                f" {position} of the text"
            )

    def _more(self) -> bool:
        """Read on, and let go of what is not needed; whether there was more."""
        if self._at - self._first > self._held:
            self._head = self._head or bytes(self._buffer[self._first : self._first + KEPT_BYTES])
            if solid := len(self._buffer[self._first : self._at].rstrip()):
                self._size = self._dropped + solid
            self._dropped += self._at - self._first
            self._first = self._at
        done = max(0, self._first - _AROUND)
        del self._buffer[:done], self._marks[:done]
        self._base += done
        self._at, self._first, self._end = self._at - done, self._first - done, self._end - done
        chunk = self._stream.read(CHUNK)
        content = self._half_escape + chunk
        cut = len(content) - (len(content) - len(content.rstrip(b"\\"))) % 2 if chunk else len(content)
        content, self._half_escape = content[:cut], content[cut:]
        self._buffer += content
        if b"\\" in content:
            content = content.replace(rb"\\", b"__").replace(rb"\"", b"__")
        self._marks += content
        return bool(chunk or content)
