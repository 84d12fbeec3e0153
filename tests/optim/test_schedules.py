"""Schedules against their closed forms, at the edges and in between."""

import math

import pytest

from llmtrain.optim.schedules import ConstantConfig, CosineConfig, LinearConfig, WsdConfig


def test_warmup_is_a_line_that_ends_at_the_peak():
    factor = ConstantConfig(kind="constant", warmup_steps=4).build(10)
    assert [factor(step) for step in range(1, 7)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_cosine_halfway_and_at_the_end():
    factor = CosineConfig(kind="cosine", warmup_steps=0, min_lr_ratio=0.1).build(100)
    assert factor(50) == pytest.approx(0.55)
    assert factor(25) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert factor(100) == pytest.approx(0.1)


def test_linear_reaches_its_end_at_the_last_step():
    factor = LinearConfig(kind="linear", warmup_steps=10, min_lr_ratio=0.2).build(110)
    assert factor(10) == 1
    assert factor(60) == pytest.approx(0.6)
    assert factor(110) == pytest.approx(0.2)


def test_wsd_is_flat_then_a_line():
    factor = WsdConfig(kind="wsd", warmup_steps=0, decay_ratio=0.25, min_lr_ratio=0.0).build(100)
    assert factor(1) == factor(75) == 1
    assert factor(80) == pytest.approx(0.8)
    assert factor(100) == pytest.approx(0)


@pytest.mark.parametrize("max_steps", [1, 2, 5])
def test_a_warmup_longer_than_the_run_is_clipped_to_it(max_steps):
    factor = CosineConfig(kind="cosine", warmup_steps=1000, min_lr_ratio=0.1).build(max_steps)
    assert [factor(step) for step in range(1, max_steps + 1)] == [
        step / max_steps for step in range(1, max_steps + 1)
    ]


def test_wsd_without_decay_and_with_nothing_but_decay():
    assert WsdConfig(kind="wsd", warmup_steps=0, decay_ratio=0, min_lr_ratio=0).build(10)(10) == 1
    assert WsdConfig(kind="wsd", warmup_steps=0, decay_ratio=1, min_lr_ratio=0).build(10)(5) == 0.5
