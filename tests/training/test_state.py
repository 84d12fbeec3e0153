"""The state of an engine: whole, bit-equal after it is put back, and at home under any other layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmtrain.training.engine.state import _cut
from tests.training.state_ranks import LAYOUTS, Store
from tests.training.test_engine import batch, build

QUICK = ["adamw zero1 bf16", "adamw zero0 fp32", "muon zero1 fp32", "lion zero3 fp32"]
NOISE = {"fp32": 1e-6, "bf16": 1e-3, "autocast": 1e-3}


@pytest.fixture(scope="module", params=["quick", pytest.param("all", marks=pytest.mark.slow)])
def found(request, cpu_ranks, tmp_path_factory) -> dict[str, Any]:
    """What tests/training/state_ranks.py writes on two ranks."""
    file = tmp_path_factory.mktemp("state") / "found.pt"
    arguments = [str(file), *(QUICK if request.param == "quick" else LAYOUTS)]
    cpu_ranks.run(arguments, 2, file.parent, door="tests.training.state_ranks", timeout=900)
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


def test_an_engine_goes_back_to_what_it_was(tiny):
    """Also to before its first step, and stage 3, which DeepSpeed itself cannot load in the same process."""
    for stage, precision in ((0, "fp32"), (1, "bf16"), (3, "bf16")):
        _, engine = build([*tiny, f"deepspeed=zero{stage}"], precision)
        stores = [Store.of(engine)]
        for _ in range(2):
            engine.train_step(batch(8, 64), 1e-3)
            stores.append(Store.of(engine))
        for number in (1, 0, 1):
            engine.restore(stores[number].read, stores[number].scalars)
            engine.train_step(batch(8, 64), 1e-3)
            again, expected = Store.of(engine), stores[number + 1]
            assert again.scalars == expected.scalars, (stage, number)
            assert all(torch.equal(again.whole[key], expected.whole[key]) for key in expected.whole), stage
        engine.close()


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", [[5], [12, 4, 1, 30], [1, 1, 1], [64, 2, 2, 100, 7]])
def test_parts_of_a_group_make_every_parameter_whole(ranks, sizes):
    """On more ranks than there are here, some without any element."""
    offsets = [sum(sizes[:number]) for number in range(len(sizes))]
    members = [(str(number), offsets[number], size) for number, size in enumerate(sizes)]
    part = -(-sum(sizes) // ranks)
    found = {str(number): [0] * size for number, size in enumerate(sizes)}
    for rank in range(ranks):
        slices = _cut(members, rank * part, part, whole=True)
        for piece in slices:
            place = offsets[int(piece.name)] + piece.start
            assert rank * part + piece.offset == place
            for element in range(piece.start, piece.start + piece.count):
                found[piece.name][element] += 1
        sizes_here = [sizes[int(piece.name)] for piece in slices]
        assert [piece.whole for piece in slices] == [
            (sum(sizes_here[:number]), size) for number, size in enumerate(sizes_here)
        ]
    assert all(times == 1 for counts in found.values() for times in counts)
