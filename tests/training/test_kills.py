"""Ranks are killed, most of them in the middle of a save: nothing is lost and nothing differs.

The long form, with real launchers, is `python -m tests.soak kills`.
"""

from __future__ import annotations

import random

import pytest

from tests.soak.kills import MIDDLE, Soak
from tests.soak.lives import Kill


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_that_is_killed_is_bit_equal_to_one_that_is_not(ranks, tiny, tmp_path, stage):
    arguments = [*tiny, *MIDDLE, f"deepspeed=zero{stage}", "max_steps=25"]
    soak = Soak(ranks, tmp_path, arguments, random.Random(stage))
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
