"""What doors print for people: nothing is cut, and no number is broken in the middle."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

UNBOUNDED = 100_000
"""Columns, for measuring."""


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table, its first column to the left; a block of lines a row where a terminal is too narrow.

    A column without a heading is one of marks: in a block they stand behind the name.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    rows = list(rows)
    for row in rows:
        table.add_row(*map(Text, row))
    terminal = Console()
    width = terminal.measure(table, options=terminal.options.update(max_width=UNBOUNDED)).maximum
    if not terminal.is_terminal or width <= terminal.width:
        Console(width=width).print(table)
        return
    print_lines(title)
    for name, *cells in rows:
        filled = [pair for pair in zip(headings[1:], cells, strict=True) if pair[1]]
        marks = (cell for heading, cell in filled if not heading)
        print_lines(
            " ".join([name, *marks]), *(f"  {heading}: {cell}" for heading, cell in filled if heading)
        )


def print_lines(*lines: str) -> None:
    """Print lines as they are; on a terminal those that are too long break between words, never in one."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else UNBOUNDED
    wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    for line in lines:
        sys.stdout.write(wrapper.fill(line) + "\n")
