"""The console script `llmtrain`: lists the doors, and opens one."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from llmtrain import __version__
from llmtrain.importing import signals_end_it


def main(argv: Sequence[str] | None = None) -> int:
    """`llmtrain <door> ...` is `python -m llmtrain.<door> ...`; returns the door's exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    with signals_end_it():
        known = doors()
        if not words or words[0] in ("-h", "--help", "help"):
            sys.stdout.write(_listing(known))
            return 0
        if words[0] == "--version":
            sys.stdout.write(f"llmtrain {__version__}\n")
            return 0
        name, *rest = words
        if name not in known:
            from llmtrain.config.errors import ExitCode, did_you_mean

            listed = f"there are {', '.join(known)}"
            sys.stderr.write(f"error: {name}: no such door; {listed}{did_you_mean(name, known)}\n")
            return ExitCode.CONFIG
        door = importlib.import_module(f"llmtrain.{name}")
    return int(door.main(rest))


def doors() -> dict[str, str]:
    """{name: the first sentence of its docstring} of every module here that is run; none is imported."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if "main" in functions and file.stem != Path(__file__).stem:
            found[file.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def _listing(known: dict[str, str]) -> str:
    width = max(map(len, known), default=0)
    lines = [f"  {name:<{width}}  {sentence}" for name, sentence in known.items()]
    return "\n".join(["Usage: llmtrain <door> [arguments]; `llmtrain <door> --help` says more\n", *lines, ""])


if __name__ == "__main__":
    raise SystemExit(main())
