"""A run goes on with other ranks, another ZeRO stage, other micro-batches: the same tokens, the same loss.

A chain is a run in legs, each by a new job that goes on from the checkpoint of the one before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from llmtrain.training.checkpoint import seed_random_states
from tests.ranks import RECORD, RankServer
from tests.training.test_provenance import recorded
from tests.training.test_resume import records

LEG = 3
"""Steps of a leg."""
NOISE = {"fp32": 1e-6, "bf16": 1e-3, "bf16_autocast": 1e-3}
"""How far losses of an uninterrupted run move when its ranks are 1 instead of 2, at most."""


@dataclass(frozen=True)
class Leg:
    """A job of a chain."""

    ranks: int
    stage: int
    options: tuple[str, ...] = ()


FOURS = ("micro_batch_size=4",)
TWO_ONE_TWO = {
    f"{stage} {precision}": (precision, [Leg(2, stage), Leg(1, stage, FOURS), Leg(2, stage)])
    for stage in (1, 2, 3)
    for precision in ("fp32", "bf16")
}
OTHER_STAGES = {
    "1 3 2 fp32": ("fp32", [Leg(2, 1), Leg(2, 3), Leg(2, 2)]),
    "1 3 2 bf16": ("bf16", [Leg(2, 1), Leg(2, 3), Leg(2, 2)]),
    "0 2 fp32": ("fp32", [Leg(2, 0), Leg(2, 2)]),
    "3 0 autocast": ("bf16_autocast", [Leg(2, 3), Leg(2, 0)]),
}
BOTH = {
    "1 3 2 on 2 1 2 ranks bf16": ("bf16", [Leg(2, 1), Leg(1, 3, FOURS), Leg(2, 2)]),
    "0 1 on 1 2 ranks fp32": ("fp32", [Leg(1, 0), Leg(2, 1)]),
}
ALL = TWO_ONE_TWO | OTHER_STAGES
CHAINS = [*BOTH.items(), *(pytest.param(*chain, marks=pytest.mark.slow) for chain in ALL.items())]


@pytest.mark.parametrize(("name", "chain"), CHAINS)
def test_a_chain_trains_what_an_uninterrupted_run_does(
    ranks: RankServer, tiny: list[str], tmp_path: Path, name: str, chain: tuple[str, list[Leg]]
) -> None:
    precision, legs = chain
    steady = [
        "scheduler=constant",
        "scheduler.warmup_steps=2",
        "checkpoint.every=100",
    ]  # in legs of any length
    common = [*tiny, f"precision={precision}", *steady]
    last = LEG * len(legs)
    whole = train(ranks, common, [legs[0]], last, tmp_path / "whole")
    pieces = train(ranks, common, legs, LEG, tmp_path / "pieces")
    np.testing.assert_array_equal(pieces, whole)

    expected, found = (records(tmp_path / run / "run") for run in ("whole", "pieces"))
    assert sorted(found) == sorted(expected) == list(range(1, last + 1))
    differences = [abs(found[step][0][0] - expected[step][0][0]) for step in expected]
    print(f"{name}: largest difference of a loss {max(differences):.1e}")
    assert max(differences) <= NOISE[precision]
    assert [rows[0][2] for rows in found.values()] == [rows[0][2] for rows in expected.values()]


def train(ranks: RankServer, common: list[str], legs: list[Leg], steps: int, directory: Path) -> np.ndarray:
    """Train so many steps a leg, one after the other; the tokens of every step [steps, rows, L + 1]."""
    tokens = []
    for number, leg in enumerate(legs, 1):
        record = directory / f"tokens{number}"
        record.mkdir(parents=True)
        layout = [f"deepspeed=zero{leg.stage}", *leg.options]
        options = [*common, *layout, f"max_steps={number * steps}", f"output_dir={directory}/run"]
        ranks.run(options, leg.ranks, directory, {RECORD: str(record)})
        tokens.append(recorded(record, leg.ranks))
    return np.concatenate(tokens)


def test_random_numbers_of_other_ranks_follow_from_seed_step_and_rank() -> None:
    def drawn(*where: int) -> float:
        seed_random_states(*where)
        return torch.rand(1, dtype=torch.float64).item()

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 11, 1), (0, 1, 11)]
    numbers = [drawn(*place) for place in places]
    assert len(set(numbers)) == len(places)
    assert [drawn(*place) for place in places] == numbers
