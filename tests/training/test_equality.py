"""Losses of real runs against the plain loop of reference.py: ranks, stages and precisions change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.reference import Curve, reference_curve


def curve(run: Path) -> Curve:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return Curve([line["train/loss"] for line in lines], [line["train/grad_norm"] for line in lines])


_references: dict[str, Curve] = {}


@pytest.fixture
def reference(tiny):
    """The reference curve of a precision, computed once."""

    def of(precision: str) -> Curve:
        if precision not in _references:
            _references[precision] = reference_curve(tiny, precision)
        return _references[precision]

    return of


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_in_fp32_equal_the_plain_loop(ranks, tiny, tmp_path, reference, stage):
    ranks.run([*tiny, f"deepspeed=zero{stage}"], 2, tmp_path)
    ours, expected = curve(tmp_path / "run"), reference("fp32")
    assert len(ours.losses) == 12
    assert ours.losses == pytest.approx(expected.losses, abs=1e-4)
    assert ours.losses[0] == pytest.approx(expected.losses[0], abs=1e-6)
    assert ours.grad_norms == pytest.approx(expected.grad_norms, rel=1e-3)


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "bf16_autocast"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_two_ranks_in_bf16_equal_the_plain_loop(ranks, tiny, tmp_path, reference, stage, precision):
    ranks.run([*tiny, f"deepspeed=zero{stage}", f"precision={precision}"], 2, tmp_path)
    assert curve(tmp_path / "run").losses == pytest.approx(reference("bf16").losses, abs=5e-3)


def test_the_same_run_twice_is_bit_equal(ranks, tiny, tmp_path):
    for name in ("a", "b"):
        ranks.run([*tiny, "deepspeed=zero2", f"output_dir={tmp_path}/{name}"], 2, tmp_path)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_micro_batches_do_not_change_the_losses(ranks, tiny, tmp_path, reference, micro_batch_size):
    ranks.run([*tiny, f"micro_batch_size={micro_batch_size}", "deepspeed=zero0"], 1, tmp_path)
    assert curve(tmp_path / "run").losses == pytest.approx(reference("fp32").losses, abs=1e-5)
