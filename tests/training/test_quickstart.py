"""The quickstart as configured: any number of GPUs starts, and the report has what the README says."""

from __future__ import annotations

import pytest

from llmtrain.config.hydra import compose
from llmtrain.distributed import World, choose_ranks
from llmtrain.training.build import check_start
from llmtrain.training.config import TrainConfig


@pytest.mark.parametrize("gpus", range(9))
def test_every_number_of_visible_gpus_starts(gpus):
    config = compose(TrainConfig, ["experiment=quickstart"])
    ranks = choose_ranks(gpus, config.global_batch_size, config.micro_batch_size)
    assert 1 <= ranks <= max(1, gpus)
    check_start(config, World(0, ranks, 0, ranks))  # raises where the batch does not divide


@pytest.mark.parametrize("max_steps", [1, 2, 5000])
def test_max_steps_alone_may_change(max_steps):
    config = compose(TrainConfig, ["experiment=quickstart", f"max_steps={max_steps}"])
    schedule = config.scheduler.build(config.max_steps)
    assert schedule(max_steps) >= 0
