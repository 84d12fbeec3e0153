"""Put runs beside each other: llmtrain compare runs/one runs/other.

llmtrain compare runs/one runs/other                  settings that differ, figures, and compare.html: curves
llmtrain compare runs/one runs/other runs/third --page three.html
llmtrain compare runs/one runs/other --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.config.door import Parser, plain_door
from llmtrain.config.table import print_lines, print_table

if TYPE_CHECKING:
    from llmtrain.training.comparing import Compared


def compare(paths: Sequence[Path], page: Path, *, as_json: bool) -> None:
    """Print the tables and write the page."""
    from llmtrain.training.changes import shown
    from llmtrain.training.comparing import comparison_page, figures, open_runs, settings
    from llmtrain.training.run_directory import write_atomically

    runs = open_runs(paths)
    write_atomically(page, comparison_page(runs))
    if as_json:
        sys.stdout.write(json.dumps(as_dict(runs, page), ensure_ascii=False) + "\n")
        return
    labels = [run.label for run in runs]
    differing = [[key, *map(shown, values)] for key, values in settings(runs).items()]
    if differing:
        print_table("settings that differ", ["key", *labels], differing)
    else:
        print_lines("no settings differ")
    print_table("what came of them", ["", *labels], [[one.name, *one.cells] for one in figures(runs)])
    print_lines(f"{page}: the same with all curves, in a browser")


def as_dict(runs: Sequence[Compared], page: Path) -> dict[str, Any]:
    """For JSON; values are in the order of `runs`."""
    from llmtrain.training.comparing import figures, settings

    return {
        "runs": [str(run.path) for run in runs],
        "settings": settings(runs),
        "figures": {one.name: one.values for one in figures(runs)},
        "page": str(page),
    }


def main(argv: list[str] | None = None) -> int:
    """The door of `llmtrain compare`."""
    parser = Parser(
        prog="llmtrain compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory, finished or running")
    parser.add_argument("others", type=Path, nargs="+", metavar="run", help="runs to compare it with")
    parser.add_argument("--page", type=Path, default=Path("compare.html"), help="where the page goes")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the tables")
    a = parser.parse_args(argv)
    return plain_door(lambda: compare([a.run, *a.others], a.page, as_json=a.json))


if __name__ == "__main__":
    raise SystemExit(main())
