"""List every key of the config, with its type, default and meaning: docs/config.md is what it prints.

llmtrain keys > docs/config.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llmtrain.config.door import Parser, plain_door
from llmtrain.importing import signals_end_it

INTRODUCTION = """\
# Every key

`key=value` on the command line changes one, `group=option` chooses a file of conf/ for many; the option in
use unless you choose is bold. A default is that of this option, or where it lacks the key, of another one.
`llmtrain keys` prints this page, `llmtrain train --cfg job` the keys of a run as it would use them.
"""


def page() -> str:
    """The whole page."""
    from llmtrain.config.hydra import config_directory
    from llmtrain.config.reference import reference
    from llmtrain.training.config import PrepareConfig, TrainConfig
    from llmtrain.training.planning import PlanConfig

    conf = config_directory()
    return "\n".join(
        [
            INTRODUCTION,
            reference(TrainConfig, conf),
            "# What `llmtrain prepare` has beside them\n",
            reference(PrepareConfig, conf, "prepare", known=TrainConfig),
            "# What `llmtrain plan` has beside them\n",
            reference(PlanConfig, conf, "plan", known=TrainConfig).rstrip("\n"),
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the page."""
    parser = Parser(
        prog="llmtrain keys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)

    def run() -> None:
        with signals_end_it():
            text = page()
        sys.stdout.write(text)

    return plain_door(run)


if __name__ == "__main__":
    raise SystemExit(main())
