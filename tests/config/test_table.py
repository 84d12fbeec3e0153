"""Tables of the doors on terminals and pipes: every number whole."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = "a-source-with-[red]-in-its-name"
PATH = "/a/path/longer/than/narrow/terminals/without/any/place/to/break/it/and-a-shard-directory"
NUMBERS = [f"{number:,}" for number in (123_456_789, 10**12, 2**50, 99_999, 7_654_321, 31)]
PRINT = f"""
from llmtrain.config.table import print_lines, print_table
rows = [["{NAME}", *{NUMBERS}, "*"], ["other", *"123456", ""]]
print_table("ten thousand ids", ["source", *"abcdef", ""], rows)
print_lines("{NAME}: {PATH}", "  rejected: " + ", ".join(number + " empty" for number in {NUMBERS}))
"""


def on_a_pipe() -> str:
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    command = [sys.executable, "-c", PRINT]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True, timeout=60
    ).stdout


def on_a_terminal(columns: int) -> list[str]:
    """The rows that a terminal of so many columns shows, broken where the program breaks them."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "vt100", "NO_COLOR": "1"}
    command = [sys.executable, "-c", PRINT]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, cwd=ROOT, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # a terminal that nobody has any more
            break
    os.close(ours)
    assert process.wait(timeout=120) == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).splitlines()


def test_a_pipe_gets_whole_lines() -> None:
    lines = on_a_pipe().splitlines()
    row, other = [line for line in lines if line.startswith("│")]
    assert [cell.strip() for cell in row[1:-1].split("│")] == [NAME, *NUMBERS, "*"]
    assert [cell.strip() for cell in other[1:-1].split("│")] == ["other", *"123456", ""]
    assert len(row) > 80
    assert lines[-2:] == [
        f"{NAME}: {PATH}",
        "  rejected: " + ", ".join(f"{number} empty" for number in NUMBERS),
    ]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_terminal_breaks_no_number(columns: int) -> None:
    lines = on_a_terminal(columns)
    words = [word.strip(",") for line in lines for word in line.split()]
    assert [word for word in words if word in NUMBERS] == 2 * NUMBERS
    assert "…" not in "".join(lines)
    assert any(line.startswith("│") for line in lines) == (columns == 200)
    assert all(len(line) <= columns or PATH in line for line in lines)
    assert PATH in words
    if columns < 200:
        assert f"{NAME} *" in lines and "other" in lines
        assert not any(line.strip().startswith(":") for line in lines)
