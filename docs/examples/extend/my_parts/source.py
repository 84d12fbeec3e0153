"""A source: the rows of an SQLite table."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from llmtrain.config import UserError
from llmtrain.data.config import CustomSourceConfig

ROWS = 100_000
"""Rows of a part."""


class SqliteConfig(CustomSourceConfig):
    """`path` is the database; every row of `table` is a document, in the order of its rowid."""

    table: str
    column: str

    def parts(self) -> dict[str, int]:
        """Stretches of rowids, by the first of each."""
        if not Path(self.location).is_file():
            raise UserError(f"{self.location}: no such database")
        with closing(sqlite3.connect(self.location)) as database:
            (last,) = database.execute(f"SELECT max(rowid) FROM {self.table}").fetchone()
        firsts = range(1, (last or 0) + 1, ROWS)
        size = Path(self.location).stat().st_size
        return {f"{self.location}:{first}": size // len(firsts) for first in firsts}

    def documents(self, part: str) -> Iterator[str]:
        """The texts from the part's first rowid on."""
        first = int(part.rpartition(":")[2])
        where = f"rowid >= {first} AND rowid < {first + ROWS} ORDER BY rowid"
        with closing(sqlite3.connect(self.location)) as database:
            for (text,) in database.execute(f"SELECT {self.column} FROM {self.table} WHERE {where}"):
                yield text

    def version(self) -> str:
        """Size and time of the file."""
        found = Path(self.location).stat()
        return f"{found.st_size} {found.st_mtime_ns}"
