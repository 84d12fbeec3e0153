"""Ranks are killed, most of them in the middle of a save: nothing is lost and nothing differs.

Checkpoints are damaged: none is loaded. The long forms, with real launchers, are `python -m tests.soak`.
"""

from __future__ import annotations

import random

import pytest

from llmtrain.training.checkpoint import checkpoints
from tests.soak.__main__ import arguments as read_arguments
from tests.soak.damage import DAMAGES, detect
from tests.soak.kills import MIDDLE, Soak
from tests.soak.lives import Kill


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_that_is_killed_is_bit_equal_to_one_that_is_not(ranks, tiny, tmp_path, stage):
    arguments = [*tiny, *MIDDLE, f"deepspeed=zero{stage}", "max_steps=25"]
    soak = Soak(ranks, tmp_path, arguments, random.Random(stage), patch="tests.soak.kills:slow_disk")
    kills = [
        Kill("all", "save", launcher=False),
        Kill("rank", "save" if stage == 1 else "step", launcher=False),
    ]
    tally = soak.survive(kills, "checkpoint.every=2")
    assert tally.differences == []
    assert (tally.lost_steps, tally.orphans) == (0, 0)
    assert sum(tally.kills.values()) == 2
    assert tally.mid_save >= 1
    assert tally.steps >= 25
    assert tally.batches >= 25 * 2 * 2


def test_no_damaged_checkpoint_is_loaded(ranks, tiny, tmp_path):
    ranks.run([*tiny, "deepspeed=zero2", "max_steps=4", "checkpoint.every=2"], 2, tmp_path)
    (_, older), (_, newer) = checkpoints(tmp_path / "run" / "checkpoints")
    found = detect(older, newer, tmp_path, 42, random.Random(0))
    assert found["loaded"] == []
    assert (found["detected"], found["tried"]) == (42, 42)
    assert found["kinds"] == dict.fromkeys(DAMAGES, 7)


def test_overrides_of_a_soak_follow_its_options():
    for words in (["--kills", "5", "--", "seed=1", "a=b"], ["--kills", "5", "seed=1", "a=b"]):
        found = read_arguments(["kills", *words])
        assert (found.proof, found.kills, found.overrides) == ("kills", 5, ["seed=1", "a=b"])
