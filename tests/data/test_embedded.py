"""The text that comes with Python: there is enough of it, and no source repeats another."""

from __future__ import annotations

import ast

import pytest

from llmtrain.data.embedded import _split, embedded_documents, embedded_fingerprint, embedded_size


@pytest.mark.parametrize(
    ("name", "documents", "megabytes"), [("code", 300, 4), ("docstrings", 1500, 0.6), ("prose", 50, 0.2)]
)
def test_there_is_enough_text(name: str, documents: int, megabytes: float) -> None:
    found = list(embedded_documents(name))
    assert len(found) >= documents
    assert sum(len(text.encode()) for text, _, _ in found) >= megabytes * 1e6
    assert found == list(embedded_documents(name))
    assert embedded_size(name) > 0


def test_code_is_python_without_the_docstrings() -> None:
    code = {file: text for text, file, _ in embedded_documents("code")}
    assert not any(
        set(file.split("/")) & {"test", "idlelib", "lib2to3", "encodings", "pydoc_data"} for file in code
    )
    for text, file, line in embedded_documents("docstrings"):
        assert len(text) > 120
        assert line >= 1 and text not in code[file]
    for text in list(code.values())[:100]:
        ast.parse(text)


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
