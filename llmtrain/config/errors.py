"""Mistakes a user can make, told as one line each: key, value, what is allowed, what was probably meant."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from enum import IntEnum
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import Tag, ValidationError

from llmtrain.config.base import TARGET, Config, target_class
from llmtrain.config.secrets import redact

YAML = {"False": "false", "True": "true", "None": "null"}
LONGEST_VALUE = 60
"""Characters of a wrong value that a message repeats."""


class ExitCode(IntEnum):
    """What a process's exit code says; 128 + n is a signal."""

    OK = 0
    LOCKED = 73
    """Another job is at work in the run directory."""
    CONFIG = 78
    """A mistake in keys, files or environment (EX_CONFIG of sysexits.h)."""
    PREEMPTED = 85
    """A signal asked to stop; a checkpoint is written and the run can go on."""
    HANG = 86
    NON_FINITE = 87
    CORRUPTION = 88
    """Ranks that should hold or compute the same do not."""
    REWIND = 89
    """A loss spike is to be rewound: the same command, started again, goes on before it."""


class UserError(Exception):
    """Mistakes the user can repair; each line names the key or file, the value and the way out.

    A door prints the lines without a traceback and ends with `exit_code`.
    """

    def __init__(self, *lines: str, exit_code: int = ExitCode.CONFIG) -> None:
        super().__init__("\n".join(lines))
        self.lines = [" ".join(line.split()) for line in lines]
        self.exit_code = int(exit_code)


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """`; did you mean x?` for the known name nearest to `wrong`, or nothing."""
    close = get_close_matches(wrong, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def describe(root: type[Config], value: Mapping[str, Any], error: ValidationError) -> list[str]:
    """One line a mistake that `root.model_validate(value)` found, in the order of the keys.

    Keys are dotted and written as on the command line; the tags that pydantic adds for the members of a
    union are left out. Complaints about one key (from each member of a union) are one line.
    """
    places: dict[str, list[tuple[_Place, Mapping[str, Any]]]] = {}
    for detail in error.errors(include_url=False):
        place = _locate(root, value, detail["loc"])
        places.setdefault(place.key, []).append((place, detail))
    return [_line(found, value) for found in places.values()]


class _Place:
    """A point in the raw config beside the type that is expected there."""

    def __init__(self, annotation: Any, value: Any) -> None:
        self.annotation, self.value = annotation, value
        self.keys: list[str] = []
        self.owner: type[Config] | None = None
        """The config class that `keys[-1]` was looked up in."""

    @property
    def key(self) -> str:
        return ".".join(self.keys)

    def step(self, part: str | int) -> None:
        """Follows one part of pydantic's path: a key or index, or a union's tag, which is no key."""
        members = list(_members(self.annotation))
        chosen = [(tag, member) for tag, member in members if tag is not None and tag == part]
        if chosen:
            tag, member = chosen[0]
            self.annotation = _chosen(member, tag, self.value)
            return
        for _, member in members:
            inner, owner = _inside(member, part)
            if inner is not None:
                self._into(part, inner, owner)
                return

    def _into(self, part: str | int, annotation: Any, owner: type[Config] | None = None) -> None:
        self.keys.append(str(part))
        self.annotation, self.owner = annotation, owner
        try:
            self.value = self.value[part]
        except (KeyError, IndexError, TypeError):
            self.value = None


def _locate(root: type[Config], value: Mapping[str, Any], path: Sequence[str | int]) -> _Place:
    place = _Place(root, value)
    for part in path:
        place.step(part)
    return place


def _members(annotation: Any) -> Iterator[tuple[str | None, Any]]:
    """(tag, type) of each member of a union, or of the type itself."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        tags = [item.tag for item in metadata if isinstance(item, Tag)]
        for tag, member in _members(inner):
            yield tags[0] if tags else tag, member
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield None, annotation


def _chosen(member: type[Config], tag: str, value: Any) -> Any:
    """The class behind a tag; behind `_target_` it is the third party's, or Any if that cannot be had."""
    if tag != TARGET:
        return member
    try:
        return target_class(member, str(value[TARGET]))
    except (ValueError, KeyError, TypeError):
        return Any


def _inside(member: Any, part: str | int) -> tuple[Any, type[Config] | None]:
    """(type at `part`, the config class it belongs to) of a class, mapping or sequence; None for a scalar."""
    if isinstance(member, type) and issubclass(member, Config):
        field = member.model_fields.get(str(part))
        return (field.annotation if field else Any), member
    arguments = get_args(member)
    if get_origin(member) in (dict, Mapping):
        return arguments[1], None
    if get_origin(member) in (list, tuple, Sequence) and isinstance(part, int):
        return arguments[min(part, len(arguments) - 1)], None
    return None, None


def _line(found: list[tuple[_Place, Mapping[str, Any]]], root_value: Mapping[str, Any]) -> str:
    place, detail = found[0]
    match detail["type"]:
        case "extra_forbidden":
            return f"{_assignment(place)}: no such key{_nearest_key(place, root_value)}"
        case "missing":
            if place.owner is None:  # an item of a tuple
                return f"{'.'.join(place.keys[:-1])}: too short, item {place.keys[-1]} is missing"
            return f"{place.key}: missing, and it has no default: set {place.key}=..."
        case "union_tag_invalid":
            tags = _names(detail["ctx"]["expected_tags"])
            tag = detail["ctx"]["tag"]
            return f"{place.key}.kind={tag}: must be {_one_of(tags)}{did_you_mean(tag, tags)}"
        case "union_tag_not_found":
            tags = [tag for tag, _ in _members(place.annotation) if tag is not None]
            return f"{place.key}.kind: missing: set it to {_one_of(tags)}"
    names = [name for _, detail in found for name in _literals(detail)]
    allowed = list(dict.fromkeys(_allowed(detail) for _, detail in found if not _literals(detail)))
    allowed += [f"must be {_one_of(names)}"] if names else []
    if place.keys and _begins_with_a_key(place, allowed[0]):
        return f"{place.key}.{allowed[0]}"
    return f"{_assignment(place)}: {' or '.join(allowed)}{did_you_mean(str(place.value), names)}".lstrip(": ")


def _begins_with_a_key(place: _Place, message: str) -> bool:
    """Whether a validator speaks of one of the keys below it: `weight=3 is too much` of a source."""
    fields = getattr(place.annotation, "model_fields", {})
    return re.split(r"[.=: ]", message, maxsplit=1)[0] in fields


def _allowed(detail: Mapping[str, Any]) -> str:
    if detail["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a group of keys, not a single value"
    message = str(detail["msg"])
    for start in ("Value error, ", "Assertion failed, "):
        message = message.removeprefix(start)
    message = message.replace("Input should be", "must be").replace("Input should have", "must have")
    return re.sub(r", unable to .*", "", message)


def _literals(detail: Mapping[str, Any]) -> list[str]:
    return _names(detail["ctx"]["expected"]) if detail["type"] == "literal_error" else []


def _names(listed: str) -> list[str]:
    """The names in pydantic's `'a', 'b' or False`, as YAML has them."""
    return [YAML.get(name, name.strip("'")) for name in re.split(r", | or ", listed)]


def _one_of(names: Sequence[str]) -> str:
    names = [f"a class of yours ({name}: package.Class)" if name == TARGET else name for name in names]
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def _assignment(place: _Place) -> str:
    """`key=value` as one would type it; a mapping's value is left out."""
    if isinstance(place.value, Mapping) or not place.keys:
        return place.key
    value = redact(place.value, place.keys[-1])  # before it is cut: a part of a secret has no shape
    shown = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    return f"{place.key}={shown if len(shown) <= LONGEST_VALUE else shown[:LONGEST_VALUE] + '...'}"


def _nearest_key(place: _Place, root_value: Mapping[str, Any]) -> str:
    """What an unknown key may have meant: its name elsewhere, else a neighbour, else all neighbours."""
    *parents, wrong = place.keys
    known = list(place.owner.model_fields) if place.owner else []
    meant = [key for key in _dotted(root_value) if key.split(".")[-1] == wrong and key != place.key]
    meant = meant or [".".join([*parents, name]) for name in get_close_matches(wrong, known, n=1)]
    if meant:
        return f"; did you mean {meant[0]}?"
    return f"; {'.'.join(parents) or 'the top level'} has {', '.join(known)}" if known else ""


def _dotted(value: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, inner in value.items():
        yield f"{prefix}{key}"
        if isinstance(inner, Mapping):
            yield from _dotted(inner, f"{prefix}{key}.")
