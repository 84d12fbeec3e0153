"""Print how many ranks `train` should be started with on this machine.

It takes the keys of `train`, so that a launch script can ask before it starts anything:

    deepspeed --num_gpus $(llmtrain ranks experiment=quickstart) --module llmtrain.train experiment=quickstart

The number goes to standard output and the reason to standard error. A mistake in the keys ends here, with
exit code 78.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmtrain.config.hydra import hydra_door
from llmtrain.distributed import choose_ranks, visible_accelerators
from llmtrain.training import train_config

if TYPE_CHECKING:
    from llmtrain.training.config import TrainConfig

logger = logging.getLogger(__name__)


def ranks(config: TrainConfig) -> None:
    """Write the number of ranks that share the config's global batch over this machine's GPUs."""
    gpus = visible_accelerators()
    count = choose_ranks(gpus, config.global_batch_size, config.micro_batch_size)
    logger.info(_reason(gpus, count, config.global_batch_size, config.micro_batch_size))
    sys.stdout.write(f"{count}\n")


def _reason(gpus: int, count: int, global_batch_size: int, micro_batch_size: int) -> str:
    if gpus == 0:
        return "no GPU is visible: one rank on the CPU"
    if count == gpus:
        return f"{count} rank(s), one for each visible GPU"
    most = choose_ranks(gpus, global_batch_size)
    more = f"; {most} with micro_batch_size={global_batch_size // most}" if most > count else ""
    return (
        f"{count} of {gpus} visible GPUs: the most that share global_batch_size={global_batch_size} "
        f"in whole micro batches of {micro_batch_size}{more}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the door; returns the exit code."""
    return hydra_door(train_config, ranks, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
