"""The state of an engine: whole, bit-equal after it is put back, and at home under any other layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.training.state_ranks import LAYOUTS
from tests.training.test_optimizers import run_ranks

QUICK = ["adamw zero1 bf16", "adamw zero0 fp32", "muon zero1 fp32", "lion zero3 fp32"]
NOISE = {"fp32": 1e-6, "bf16": 1e-3, "autocast": 1e-3}


@pytest.fixture(scope="module", params=["quick", pytest.param("all", marks=pytest.mark.slow)])
def found(request, tmp_path_factory) -> dict[str, Any]:
    """What tests/training/state_ranks.py writes on two ranks."""
    file = tmp_path_factory.mktemp("state") / "found.pt"
    run_ranks("tests.training.state_ranks", 2, str(file), *(QUICK if request.param == "quick" else LAYOUTS))
    return torch.load(file, weights_only=False)


def test_every_element_is_in_one_piece(found):
    for layout, case in found.items():
        begin = case["begin"]
        assert {name for name, _ in begin.written} == set(begin.shapes), layout
        assert all(bool((times == 1).all()) for times in begin.written.values()), layout


def test_the_same_layout_goes_on_bit_equal(found):
    for layout, case in found.items():
        whole, again = case["whole"], case["moves"][layout]
        assert again["curve"] == whole["curve"], layout
        assert again["end"].scalars == whole["end"].scalars, layout
        assert set(again["end"].whole) == set(whole["end"].whole), layout
        for key, expected in whole["end"].whole.items():
            assert torch.equal(again["end"].whole[key], expected), (layout, key)


def test_another_layout_goes_on_within_its_rounding(found):
    for layout, case in found.items():
        for other, moved in case["moves"].items():
            noise = max(NOISE[name.split()[2]] for name in (layout, other))
            assert moved["end"].scalars == case["whole"]["end"].scalars, (layout, other)
            for (loss, _), (expected, _) in zip(moved["curve"], case["whole"]["curve"], strict=True):
                assert abs(loss - expected) <= noise, (layout, other)
