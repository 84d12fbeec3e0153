"""Every key of a config as a page of Markdown: its type from the class, default and meaning from conf/."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from llmtrain.config.base import TARGET, Config
from llmtrain.config.help_page import SHARED, config_groups
from llmtrain.config.yaml_comments import Entry, chosen_options, entries

NAMES = {Path: "path", int: "int", float: "float", str: "text", bool: "true | false", NoneType: "null"}
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
ANY_NAME = "<name>"
KIND = "kind"
"""Is set by the choice of an option, and stands in no table."""
HEAD = "| key | type | default | meaning |\n|---|---|---|---|"


def reference(
    root: type[Config], directory: Path, primary: str = "config", known: type[Config] = Config
) -> str:
    """Tables of the keys of `root` in their order, a heading a group; without the keys of `known`."""
    said = _by_pattern(entries(directory, primary))
    chosen = chosen_options(directory, primary)
    sections: dict[str, list[str]] = {}
    for name, types in _merged(keys(root)).items():
        group, _, below = name.partition(".")
        if group not in known.model_fields:
            lines = sections.setdefault(group if below else "", [])
            lines.append(_row(name, types, _preferred(said.get(name, []), chosen, directory)))
    parts = []
    for group, rows in sections.items():
        comment = next((entry.comment for entry in said.get(group, []) if entry.comment), "")
        above = [f"## {group}\n"] if group else []
        above += [f"{_cell(comment[:1].upper() + comment[1:])}.\n"] if comment else []
        above += _options(group, directory, chosen)
        parts.append("\n".join([*above, HEAD, *rows, ""]))
    return "\n".join(parts)


def keys(cls: type[Config], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, type, docstring) of every key; a choice between classes has the keys of all of them."""
    said = _docstrings(cls)
    for name, field in cls.model_fields.items():
        key, holder = f"{prefix}{name}", get_origin(field.annotation)
        inner = list(_classes(field.annotation))
        if name != KIND and (not inner or holder is list or NoneType in get_args(field.annotation)):
            type_ = type_text(field.annotation)
            yield key, " ".join([type_, *_bounds(field.metadata)]), said.get(name, "")
        below = f".{ANY_NAME}" if holder is dict else ".<n>" if holder is list else ""
        for member in inner:
            yield from keys(member, f"{key}{below}.")


def type_text(annotation: Any) -> str:
    """An annotation as a user may write the value."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return " ".join([type_text(arguments[0]), *_bounds(arguments[1:])])
    if origin is Literal:
        return " | ".join(map(_value, arguments))
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(type_text, arguments)))
    if origin is dict:
        return f"{{{ANY_NAME}: {type_text(arguments[1])}}}"
    if origin in (list, tuple):
        return f"[{', '.join(map(type_text, arguments))}{', ...' if origin is list else ''}]"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return "{" + ", ".join(annotation.model_fields or [f"{TARGET}: package.Class"]) + "}"
    return NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds(metadata: Iterable[Any]) -> Iterator[str]:
    for item in metadata:
        for part in getattr(item, "metadata", [item]):
            yield from (
                f"{sign} {getattr(part, name)}" for name, sign in BOUNDS.items() if hasattr(part, name)
            )


def _classes(annotation: Any) -> Iterator[type[Config]]:
    """The config classes with keys that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        if annotation.model_fields:
            yield annotation
        return
    for argument in get_args(annotation):
        yield from _classes(argument)


@cache
def _docstrings(cls: type[Config]) -> dict[str, str]:
    """What stands below each field of a class and of its bases."""
    said: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if issubclass(base, Config)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = getattr(tree, "body", [])
        for field, below in pairwise(body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    said[name] = " ".join(text.split())
    return said


def _merged(found: Iterable[tuple[str, str, str]]) -> dict[str, tuple[str, str]]:
    """{key: (types of all who have it, the first docstring)}."""
    merged: dict[str, tuple[str, str]] = {}
    for key, type_, said in found:
        before, text = merged.get(key, ("", ""))
        types = [before, type_] if before and type_ not in before else [before or type_]
        merged[key] = " | ".join(types), text or said
    return merged


def _by_pattern(said: Mapping[str, list[Entry]]) -> dict[str, list[Entry]]:
    """With the names of sources as `<name>`."""
    found: dict[str, list[Entry]] = {}
    for key, listed in said.items():
        found.setdefault(re.sub(r"^(data\.sources)\.[^.]+", rf"\1.{ANY_NAME}", key), []).extend(listed)
    return found


def _preferred(said: list[Entry], chosen: Mapping[str, str | None], directory: Path) -> list[Entry]:
    """That of the option in use first, then what all options share."""

    def rank(entry: Entry) -> int:
        group = entry.file.parent.relative_to(directory).as_posix()
        return [chosen.get(group, entry.file.stem), SHARED, entry.file.stem].index(entry.file.stem)

    return sorted(said, key=rank)


def _row(name: str, typed: tuple[str, str], said: list[Entry]) -> str:
    type_, docstring = typed
    of_all = [entry for entry in said if entry.file.stem == SHARED or entry.at_the_top]
    comments = [entry.comment for entry in of_all] + [docstring] + [entry.comment for entry in said]
    comment = next(filter(None, comments), "")
    default = f"`{_cell(_value(said[0].value))}`" if said and ANY_NAME not in name else ""
    return f"| `{name}` | `{_cell(type_, code=True)}` | {default} | {_cell(comment)} |"


def _options(group: str, directory: Path, chosen: Mapping[str, str | None]) -> Iterator[str]:
    for name, options in config_groups([directory]).items():
        if name.split("/")[0] == group and (len(options) > 1 or "/" in name):
            listed = (f"**{option}**" if chosen.get(name) == option else option for option in options)
            yield f"`{name}=` {', '.join(listed)}\n"


def _value(value: Any) -> str:
    plain = isinstance(value, str) and value.isprintable() and value == value.strip()
    return value if plain else json.dumps(value, ensure_ascii=False)


def _cell(text: str, code: bool = False) -> str:
    """Text as it may stand in a table of Markdown."""
    return re.sub(r"([|])" if code else r"([|*<])", r"\\\1", text)
