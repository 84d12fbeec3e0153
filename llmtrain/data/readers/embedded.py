"""Real text that every Python brings along: library code, docstrings, reference prose."""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import platform
import pydoc_data
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from llmtrain.data.readers.fields import Fields
from llmtrain.data.records import Document, Rejected, Slice

_LEFT_OUT = {
    "test", "tests", "idlelib", "lib2to3", "encodings",  # fixtures, tables, a second Python grammar
    "pydoc_data",  # the prose source
    "site-packages", "dist-packages",
}  # fmt: skip
_SHORTEST_DOCSTRING = 120  # characters; shorter ones say little beyond the name of their function


def embedded_slices(name: str) -> list[Slice]:
    """A slice for each file behind a source; `size`: about its bytes of text."""
    part = {"prose": (1, 1), "code": (6, 7), "docstrings": (1, 7)}[name]  # of the library in Python 3.11
    return [
        Slice(relative, 0, None, "row", path.stat().st_size * part[0] // part[1])
        for relative, path in _files("prose" if name == "prose" else "code")
    ]


def read_embedded(name: str, piece: Slice, fields: Fields) -> Iterator[Document | Rejected]:
    """The documents of one file: a module's code, its docstrings (by line), or the topics of Python's help.

    The text differs between Python versions. No docstring of `docstrings` is left in `code`, so that a
    docstring held out of the one is not trained on in the other.
    """
    for row, text in _documents(name, piece.file):
        if row >= piece.start and (piece.stop is None or row < piece.stop):
            yield fields.of_text(text, row)


def _documents(name: str, file: str) -> Iterator[tuple[int, str]]:
    """(line or ordinal, both from 0, text) of the documents of one file."""
    if name == "prose":
        yield from enumerate(text for _, text in sorted(_topics().items()))
        return
    code, docstrings = _library()[file]
    if name == "code":
        yield 0, code
    else:
        yield from ((line - 1, text) for text, line in docstrings)


def embedded_fingerprint(name: str) -> str:
    """Hex sha256 of the Python version and the content of the files behind a source."""
    return _hash_of_files("prose" if name == "prose" else "code")


@lru_cache
def _hash_of_files(name: str) -> str:
    digest = hashlib.sha256(platform.python_version().encode())
    for relative, path in _files(name):
        content = path.read_bytes()
        digest.update(f"\0{relative}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


@lru_cache
def _files(name: str) -> list[tuple[str, Path]]:
    """(path below the library, path) of the files behind a source, sorted."""
    if name == "prose":
        return [("pydoc_data/topics.py", Path(pydoc_data.__path__[0]) / "topics.py")]
    library = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, files in os.walk(library):
        folders[:] = [one for one in folders if one not in _LEFT_OUT]
        found += [Path(folder, file) for file in files if file.endswith(".py")]
    return sorted((path.relative_to(library).as_posix(), path) for path in found)


def _topics() -> dict[str, str]:
    from pydoc_data import topics  # half a megabyte of text, wanted only here

    return topics.topics


@lru_cache(maxsize=1)  # 10 MB of text; parsing it takes seconds, and both sources need it more than once
def _library() -> dict[str, tuple[str, list[tuple[str, int]]]]:
    """(code without its docstrings, [(docstring, line)]) of each module, by file."""
    return {relative: _split(path.read_bytes().decode()) for relative, path in _files("code")}


def _split(source: str) -> tuple[str, list[tuple[str, int]]]:
    """A module's code with `...` in the place of each long docstring, and those docstrings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # old escapes in someone else's strings
        tree = ast.parse(source)
    lines = source.encode().splitlines(keepends=True)
    starts = [0]  # byte offset of each line: ast counts columns in bytes
    for line in lines:
        starts.append(starts[-1] + len(line))
    found, kept, end = [], [], 0
    for node in sorted(_docstrings(tree), key=lambda node: node.lineno):
        text = inspect.cleandoc(node.value)  # type: ignore[arg-type]
        if len(text) > _SHORTEST_DOCSTRING:
            found.append((text, node.lineno))
            kept.append((end, starts[node.lineno - 1] + node.col_offset))
            end = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
    content = source.encode()
    parts = [content[first:last].decode() for first, last in [*kept, (end, len(content))]]
    return '"""..."""'.join(parts), found


def _docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Docstring nodes, found through statements only: ast.walk would visit ten times as many nodes."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            statements = getattr(node, field, ())
            stack += statements if isinstance(statements, list) else ()  # the body of a lambda is no list
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value
