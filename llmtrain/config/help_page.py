"""The `--help` page of a door, read off the config directories, so that it is never stale."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

WIDTH = 100
SHARED = "base"
"""The file that a group's options begin with; it is none of them."""

USAGE = """\
Usage: llmtrain {door} [group=option ...] [key=value ...]

  group=option      choose a file of a group below            {example}
  key=value         change one value                          max_steps=200
  --cfg job         show every key as it would be used, and stop
  --config-dir DIR  more options for the groups, from your own directory
  --multirun        one run after another, over lists         seed=1,2,3
  --info TOPIC      where values come from (defaults-tree, searchpath, ...)
"""


def config_groups(directories: Sequence[Path]) -> dict[str, list[str]]:
    """{group: its options}, both sorted, of all `directories` together; a nested group is `outer/inner`."""
    found: dict[str, set[str]] = {}
    for directory in directories:
        for file in directory.rglob("*.yaml"):
            group = file.parent.relative_to(directory).as_posix()
            if group != "." and group.split("/")[0] != "hydra" and file.stem != SHARED:
                found.setdefault(group, set()).add(file.stem)
    return {group: sorted(found[group]) for group in sorted(found)}


def help_page(
    doc: str, door: str, groups: Mapping[str, Sequence[str]], chosen: Mapping[str, str | None]
) -> str:
    """The door's docstring, how it is used, and every group with its options; `*` marks the chosen one."""
    width = max((len(group) for group in groups), default=0) + 2
    lines = [doc.strip(), "", USAGE.format(door=door, example=_example(groups, chosen))]
    lines.append("Groups and their options (* is used unless you choose):\n")
    for group, options in groups.items():
        marked = " ".join(f"{option}*" if chosen.get(group) == option else option for option in options)
        indent = " " * (width + 2)
        start = f"  {group:<{width}}"
        lines.append(textwrap.fill(marked, WIDTH, initial_indent=start, subsequent_indent=indent))
    return "\n".join(lines) + "\n"


def _example(groups: Mapping[str, Sequence[str]], chosen: Mapping[str, str | None]) -> str:
    """A choice that changes something: the first option that is not used already."""
    others = (
        f"{group}={name}" for group, names in groups.items() for name in names if chosen.get(group) != name
    )
    return next(others, "")
