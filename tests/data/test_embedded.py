"""The text that comes with Python: there is enough of it, and no source repeats another."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path
from pydoc_data import topics

import pytest

from llmtrain.data import readers
from llmtrain.data.config import SourceConfig
from llmtrain.data.readers.embedded import _split, embedded_fingerprint
from llmtrain.data.records import Document, Rejected


def source(name: str) -> SourceConfig:
    return SourceConfig(path=name, format="embedded", weight=1.0)


def documents(name: str) -> list[tuple[str, int, str]]:
    """(file, position, text) of each document that is not empty, as some modules are."""
    found = []
    for part in readers.parts(source(name)):
        for piece in part.slices:
            for record in readers.read(source(name), piece, 1 << 24):
                assert isinstance(record, Document | Rejected)
                if isinstance(record, Document):
                    found.append((piece.file, record.position, record.text))
                else:
                    assert (name, record.reason, record.size) == ("code", "empty", 0)
    return found


@pytest.mark.parametrize(
    ("name", "count", "megabytes"), [("code", 300, 4), ("docstrings", 1500, 0.6), ("prose", 50, 0.2)]
)
def test_there_is_enough_text(name: str, count: int, megabytes: float) -> None:
    found = documents(name)
    assert len(found) >= count
    text_bytes = sum(len(text.encode()) for _, _, text in found)
    assert text_bytes >= megabytes * 1e6
    assert found == documents(name)
    sizes = [part.size for part in readers.parts(source(name))]
    assert 0.5 * text_bytes < sum(size or 0 for size in sizes) < 2 * text_bytes
    readers.check(source(name))


def test_code_is_python_without_the_docstrings() -> None:
    code = {file: text for file, _, text in documents("code")}
    assert not any(
        set(file.split("/")) & {"test", "idlelib", "lib2to3", "encodings", "pydoc_data"} for file in code
    )
    library = Path(sysconfig.get_path("stdlib"))
    for file, line, text in documents("docstrings"):
        assert len(text) > 120
        assert text not in code[file]
        assert any(quote in (library / file).read_text().split("\n")[line] for quote in ('"', "'"))
    for text in list(code.values())[:100]:
        ast.parse(text)


def test_prose_is_the_topics_in_order() -> None:
    assert [text for _, _, text in documents("prose")] == [text for _, text in sorted(topics.topics.items())]
    assert [(file, row) for file, row, _ in documents("prose")][:2] == [
        ("pydoc_data/topics.py", 0),
        ("pydoc_data/topics.py", 1),
    ]


def test_long_docstrings_are_cut_out_where_they_stand() -> None:
    long = "Word " * 30
    source = (
        f'"""{long}é"""\nx = "é"\nclass A:\n    if x:\n        def f(self):\n'
        f'            "short"\n            return """{long}"""\n\n'
        f"    async def g(self): '''{long}\n        more'''; y = 1\n"
    )
    code, docstrings = _split(source)
    assert [line for _, line in docstrings] == [1, 9]
    assert docstrings[1][0].endswith("\nmore")
    assert code == source.replace(f'"""{long}é"""', '"""..."""').replace(
        f"'''{long}\n        more'''", '"""..."""'
    )


def test_fingerprints_are_stable_and_tell_the_files_apart() -> None:
    assert embedded_fingerprint("code") == embedded_fingerprint("code") != embedded_fingerprint("prose")
