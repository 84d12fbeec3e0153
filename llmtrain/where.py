"""Say which documents were in a step, or which steps saw a document or a text.

llmtrain where runs/mine step=1200              the rows of a step
llmtrain where runs/mine step=1200 row=7        one row; loss=true adds the loss of its documents
llmtrain where runs/mine document=web/a.jsonl:8192
llmtrain where runs/mine text="a piece of text" the documents with it, and their steps
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtrain.config import UserError
from llmtrain.config.door import Parser, plain_door
from llmtrain.config.errors import did_you_mean

KEYS = ("step", "row", "document", "text", "until", "most", "loss", "format")
GOES_WITH = {"row": ("step",), "loss": ("step",), "until": ("document", "text"), "most": ("text",)}
"""The questions that a key says something about."""
MOST = 10


def where(run: Path, question: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The answers, one dict a row or a document; UserError for a question that has no meaning."""
    from llmtrain.training.finished import open_finished
    from llmtrain.training.where import find_document, find_text, open_data, rows_at, steps_with, with_losses

    asked = [key for key in ("step", "document", "text") if key in question]
    if len(asked) != 1:
        raise UserError(f"ask for one of step=, document= or text= (got {', '.join(asked) or 'none'})")
    check(question, asked[0])
    data = open_data(run)
    if "step" in question:
        rows = rows_at(data, number(question, "step"), number(question, "row") if "row" in question else None)
        if question.get("loss") == "true":
            finished = open_finished(run)
            rows = (with_losses(data, finished, row) for row in rows)
        yield from rows
        return
    until = number(question, "until") if "until" in question else data.step
    if "document" in question:
        found = find_document(data, question["document"])
    else:
        found = find_text(data, question["text"], number(question, "most") if "most" in question else MOST)
    yield from steps_with(data, found, until)


def check(question: dict[str, str], asked: str) -> None:
    """UserError for a key that says nothing about what is `asked`, and for a loss= that is no yes or no."""
    for key, wanted in GOES_WITH.items():
        if key in question and asked not in wanted:
            ways = " or ".join(f"{one}=" for one in wanted)
            raise UserError(f"{key}={question[key]}: goes with {ways}, not with {asked}=")
    if question.get("loss", "false") not in ("true", "false"):
        raise UserError(f"loss={question['loss']}: must be true or false")


def number(question: dict[str, str], key: str) -> int:
    """The whole number that a key was given."""
    try:
        return int(question[key])
    except ValueError:
        raise UserError(f"{key}={question[key]}: must be a whole number") from None


def parse(words: list[str]) -> dict[str, str]:
    """`key=value` words as a dict; UserError for a key that is not known."""
    question = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in KEYS:
            raise UserError(f"{word}: keys are {', '.join(KEYS)}, as key=value{did_you_mean(key, KEYS)}")
        question[key] = value
    return question


def main(argv: list[str] | None = None) -> int:
    """The door of `llmtrain where`."""
    parser = Parser(
        prog="llmtrain where", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory, finished or running")
    parser.add_argument("question", nargs="+", metavar="key=value", help=f"keys: {', '.join(KEYS)}")
    a = parser.parse_args(argv)

    def answer() -> None:
        from llmtrain.training.where import readable

        question = parse(a.question)
        if question.get("format", "text") not in ("text", "json"):
            raise UserError(f"format={question['format']}: must be text or json")
        as_json = question.get("format") == "json"
        for one in where(a.run, question):
            sys.stdout.write((json.dumps(one, ensure_ascii=False) if as_json else readable(one)) + "\n")

    return plain_door(answer)


if __name__ == "__main__":
    raise SystemExit(main())
