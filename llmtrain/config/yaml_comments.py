"""What the files of conf/ say of their keys: values and comments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

GLOBAL = "# @package _global_"
KEY = re.compile(r"( *)(\w+):(?= |$)([^#]*)(?:# (.*))?$")
CONTINUED = re.compile(r" +# +(.*)$")


@dataclass(frozen=True)
class Entry:
    """A key of one file."""

    file: Path
    value: Any
    """As YAML reads it; a mapping of the keys below it."""
    comment: str
    at_the_top: bool
    """Whether the file belongs to no group."""


def entries(directory: Path, primary: str) -> dict[str, list[Entry]]:
    """{dotted key: what each file says of it}, `primary`.yaml and the groups of `directory`, by path.

    Files that hold a whole experiment are left out.
    """
    found: dict[str, list[Entry]] = {}
    for file in [directory / f"{primary}.yaml", *sorted(directory.glob("*/**/*.yaml"))]:
        text = file.read_text(encoding="utf-8")
        if text.startswith(GLOBAL):
            continue
        group = file.parent.relative_to(directory).parts
        comments = dict(_comments(text))
        for key, value in _nodes(yaml.safe_load(text), ()):
            if key[0] != "defaults":
                entry = Entry(file, value, comments.get(key, ""), not group)
                found.setdefault(".".join([*group, *key]), []).append(entry)
    return found


def chosen_options(directory: Path, primary: str) -> dict[str, str | None]:
    """{group: its option where nobody chooses}, as `primary`.yaml and the groups' base.yaml say."""
    chosen: dict[str, str | None] = {}
    for file in [directory / f"{primary}.yaml", *directory.glob("*/base.yaml")]:
        above = file.parent.relative_to(directory)
        for item in yaml.safe_load(file.read_text(encoding="utf-8")).get("defaults", []):
            for group, option in item.items() if isinstance(item, Mapping) else ():
                chosen[(above / group).as_posix()] = option
    return chosen


def _nodes(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of every key, also of those that hold others."""
    if path:
        yield path, value
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _nodes(inner, (*path, str(key)))


def _comments(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, comment) of every key with one; lines that hold nothing else go on with it."""
    above: list[tuple[int, str]] = []
    key, comment = tuple[str, ...](), list[str]()
    for line in [*text.splitlines(), ""]:
        if comment and (more := CONTINUED.match(line)):
            comment.append(more[1])
            continue
        if comment:
            yield key, " ".join(comment)
            comment = []
        if found := KEY.match(line):
            above = [place for place in above if place[0] < len(found[1])] + [(len(found[1]), found[2])]
            key, comment = tuple(name for _, name in above), [found[4]] if found[4] else []
