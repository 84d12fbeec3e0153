"""Writes posts.db, a small SQLite database of real text, for docs/extending.md."""

import sqlite3
from pydoc_data.topics import topics

with sqlite3.connect("posts.db") as database:
    database.execute("CREATE TABLE IF NOT EXISTS posts (text TEXT)")
    database.executemany("INSERT INTO posts VALUES (?)", [(text,) for text in topics.values()])
