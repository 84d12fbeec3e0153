from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmtrain.config import UserError
from llmtrain.data.mixture import (
    Mixture,
    continue_stages,
    temperature_weights,
    unimax_weights,
    weights_from_epochs,
    whole_weights,
)

NAMES = "abcdefg"
thousandths = st.integers(0, 1000).map(lambda i: i / 1000)
mixtures = st.dictionaries(st.sampled_from(NAMES), thousandths, min_size=1).filter(lambda w: any(w.values()))


def prefix_counts(mixture: Mixture, windows: int) -> np.ndarray:
    """[windows + 1, sources]: how often each source was picked in every prefix, by counting."""
    source, _ = mixture.picks(0, windows)
    one_hot = source[:, None] == np.arange(len(mixture.names))
    return np.concatenate((np.zeros((1, len(mixture.names)), int), one_hot.cumsum(axis=0)))


def assert_within_the_bound(counts: np.ndarray, whole: list[int]) -> None:
    """|picked_i(n) - n d_i / D| <= 1 - 1/(2m - 2), in whole numbers; 0 at multiples of D."""
    period, rivals = sum(whole), 2 * sum(d > 0 for d in whole) - 2
    n = np.arange(len(counts))[:, None]
    deviation = np.abs(period * counts - n * np.array(whole))
    assert (deviation * max(rivals, 1) <= max(rivals - 1, 0) * period).all()
    assert not deviation[::period].any()


@given(mixtures)
@settings(deadline=None)
def test_every_prefix_is_within_tijdemans_bound(weights: dict[str, float]) -> None:
    mixture = Mixture([(0, weights)])
    whole = whole_weights(weights)
    assume(sum(whole.values()) <= 5000)
    counts = prefix_counts(mixture, 2 * sum(whole.values()) + 3)
    assert_within_the_bound(counts, [whole.get(name, 0) for name in mixture.names])


@pytest.mark.parametrize("sources", [2, 3, 5, 40])
def test_the_bound_holds_for_rounded_weights(sources: int) -> None:
    weights = {f"s{i}": math.sqrt(2 + i) ** (1 + i % 4) for i in range(sources)}
    mixture, whole = Mixture([(0, weights)]), whole_weights(weights)
    assert_within_the_bound(prefix_counts(mixture, 65_536), [whole[name] for name in mixture.names])


@given(mixtures, st.integers(0, 10**6))
@settings(deadline=None)
def test_counts_and_source_of_agree_with_walking(weights: dict[str, float], start: int) -> None:
    mixture = Mixture([(0, weights)])
    counts = mixture.counts(start)
    for window in range(start, start + 20):
        source, k = mixture.source_of(window)
        assert mixture.counts(window) == counts
        assert k == counts[source]
        counts[source] += 1


def test_a_billion_steps_are_arithmetic() -> None:
    mixture = Mixture([(0, {"web": 0.5, "code": 0.3, "books": 0.2})])
    n = 10**15
    assert mixture.counts(n) == [n // 5, 3 * n // 10, n // 2]  # books, code, web
    source, k = mixture.source_of(n)
    assert k == mixture.counts(n)[source]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 5, "b": 3, "c": 2}),
        ({"a": 0.1, "b": 0.2}, {"a": 1, "b": 2}),
        ({"cc": 0.6, "web": 0.22, "b": 0.16, "wiki": 0.03}, {"cc": 60, "web": 22, "b": 16, "wiki": 3}),
        ({"a": 1e-4, "b": 0.9999}, {"a": 1, "b": 9999}),
        ({"a": Fraction(1, 3), "b": Fraction(2, 3)}, {"a": 1, "b": 2}),
        ({"a": np.float64(0.7), "b": np.float64(0.3), "off": 0.0}, {"a": 7, "b": 3}),
        ({"only": 0.123456789}, {"only": 1}),
        ({"a": 32768, "b": 32768.0}, {"a": 1, "b": 1}),
        ({"a": 1, "b": 65_535}, {"a": 1, "b": 65_535}),
    ],
)  # fmt: skip
def test_decimals_are_taken_as_written(weights: dict[str, float], expected: dict[str, int]) -> None:
    assert whole_weights(weights) == expected


@given(st.lists(st.floats(1e-2, 1e2), min_size=2, max_size=7))
@settings(deadline=None)
def test_rounded_shares_are_within_one_slot_and_stay_what_they_are(weights: list[float]) -> None:
    named = dict(zip(NAMES, weights, strict=False))
    whole = whole_weights(named)
    period = sum(whole.values())
    assert period <= 65_536
    for name, weight in named.items():
        share = Fraction(str(weight)) / sum(Fraction(str(weight)) for weight in weights)
        assert abs(Fraction(whole[name], period) - share) < Fraction(1, 65_536)
    assert whole_weights(whole) == whole


def test_the_order_of_the_sources_is_without_effect() -> None:
    weights = {"b": 0.5, "a": 0.3, "c": 0.2}
    one, other = Mixture([(0, weights)]), Mixture([(0, dict(sorted(weights.items())))])
    assert one.names == other.names
    assert np.array_equal(one.picks(0, 100), other.picks(0, 100))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"a": -0.1, "b": 1}, ["data.sources.a.weight=-0.1", "0 or above"]),
        ({"a": math.nan}, ["data.sources.a.weight=nan"]),
        ({"a": math.inf, "b": 1}, ["data.sources.a.weight=inf"]),
        ({"a": 0, "b": 0.0}, ["no source has a weight above 0", "a, b"]),
        ({"a": 1e-9, "b": 1}, ["data.sources.a", "1e-09", "1/65536"]),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights: dict[str, float], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        whole_weights(weights)
    assert all(word in str(error.value) for word in words)


@given(st.lists(mixtures, min_size=1, max_size=4), st.lists(st.integers(1, 40), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None)
def test_stages_carry_every_cursor_on(weights: list[dict[str, float]], lengths: list[int]) -> None:
    firsts = np.cumsum([0, *lengths]).tolist()
    mixture = Mixture(list(zip(firsts, weights, strict=False)))
    served = dict.fromkeys(range(len(mixture.names)), 0)
    sources, ks = mixture.picks(0, 200)
    for window, (source, k) in enumerate(zip(sources.tolist(), ks.tolist(), strict=True)):
        assert mixture.counts(window) == list(served.values())
        assert mixture.source_of(window) == (source, k)
        stage = max(i for i, first in enumerate(firsts[: len(weights)]) if first <= window)
        assert weights[stage].get(mixture.names[source], 0) > 0
        assert k == served[source]
        served[source] += 1


def test_a_stage_is_within_the_bound_from_its_first_window() -> None:
    mixture = Mixture([(0, {"a": 1, "b": 2}), (7, {"a": 0.5, "b": 0.2, "c": 0.3})])
    counts = np.array([mixture.counts(n) for n in range(7, 7 + 25)])
    assert_within_the_bound(counts - counts[0], [5, 2, 3])


def test_a_stage_with_equal_weights_is_no_stage() -> None:
    once = Mixture([(0, {"a": 0.5, "b": 0.3, "c": 0.2})])
    twice = Mixture([(0, {"a": 0.5, "b": 0.3, "c": 0.2}), (3, {"a": 5, "b": 3, "c": 2, "d": 0})])
    assert once.stages == twice.stages == [(0, {"a": 5, "b": 3, "c": 2})]
    assert np.array_equal(once.picks(0, 30), twice.picks(0, 30))


def test_stages_have_to_begin_at_0_and_ascend() -> None:
    for firsts in ([], [1], [0, 5, 5], [0, 5, 4]):
        with pytest.raises(UserError, match="must be 0 first, then ascending"):
            Mixture([(first, {"a": 1}) for first in firsts])


def test_continue_stages_keeps_the_past_and_takes_the_future_from_the_config() -> None:
    past = [(0, {"a": 1}), (10, {"b": 1}), (50, {"a": 1})]
    assert continue_stages(past, [(0, {"c": 1})], 20) == [*past[:2], (20, {"c": 1})]
    assert continue_stages(past, [(0, {"c": 1}), (20, {"d": 1})], 20) == [*past[:2], (20, {"d": 1})]
    assert continue_stages(past, [(0, {"c": 1}), (30, {"d": 1})], 0) == [(0, {"c": 1}), (30, {"d": 1})]
    assert Mixture(continue_stages(past, past, 20)).stages == Mixture(past).stages


def test_shares_are_those_of_the_stage() -> None:
    mixture = Mixture([(0, {"a": 1, "b": 3}), (8, {"b": 1, "c": 1})])
    assert mixture.shares(7) == {"a": 0.25, "b": 0.75, "c": 0.0}
    assert mixture.shares(8) == {"a": 0.0, "b": 0.5, "c": 0.5}


def test_epochs_become_token_shares() -> None:
    weights = weights_from_epochs({"small": 3, "large": 0.5}, {"small": 100, "large": 1000})
    assert weights == {"small": Fraction(3, 8), "large": Fraction(5, 8)}
    assert whole_weights(weights) == {"large": 5, "small": 3}
    with pytest.raises(UserError, match="epochs above 0"):
        weights_from_epochs({"a": 0}, {"a": 10})


@given(st.lists(mixtures, min_size=1, max_size=4), st.lists(st.integers(1, 60), min_size=3, max_size=3))
@settings(max_examples=40, deadline=None)
def test_every_stage_is_within_the_bound_of_its_own_weights(
    weights: list[dict[str, float]], lengths: list[int]
) -> None:
    """Counted from the stage's first window on; a stage with the weights of the one before it goes on."""
    firsts = np.cumsum([0, *lengths]).tolist()
    mixture = Mixture(list(zip(firsts, weights, strict=False)))
    counts = prefix_counts(mixture, 400)
    stages = mixture.stages
    for (first, whole), last in zip(stages, [*(first for first, _ in stages[1:]), 400], strict=True):
        of_stage = counts[first : last + 1] - counts[first]
        assert_within_the_bound(of_stage, [whole.get(name, 0) for name in mixture.names])


@given(st.lists(mixtures, min_size=1, max_size=4), st.lists(st.integers(1, 40), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None)
def test_window_of_is_the_inverse_of_source_of(weights: list[dict[str, float]], lengths: list[int]) -> None:
    mixture = Mixture(list(zip(np.cumsum([0, *lengths]).tolist(), weights, strict=False)))
    for start in (0, 10**9):
        sources, ks = mixture.picks(start, start + 200)
        for n, (source, k) in enumerate(zip(sources.tolist(), ks.tolist(), strict=True), start):
            assert mixture.window_of(source, k) == n
    for source, name in enumerate(mixture.names):
        if weights[min(len(weights), 4) - 1].get(name, 0) == 0:
            last = mixture.counts(sum(lengths))[source]
            assert mixture.window_of(source, last) is None
            assert last == 0 or mixture.window_of(source, last - 1) is not None


def test_temperature_bends_the_shares() -> None:
    tokens = {"en": 10_000, "de": 100, "sw": 1}
    assert temperature_weights(tokens, 1) == pytest.approx({n: t / 10_101 for n, t in tokens.items()})
    assert temperature_weights(tokens, 2) == pytest.approx({"en": 100 / 111, "de": 10 / 111, "sw": 1 / 111})
    assert temperature_weights(tokens, 1e9) == pytest.approx(dict.fromkeys(tokens, 1 / 3))
    # mT5's alpha of 0.3, and sizes whose powers would not fit a float.
    shares = temperature_weights({"a": 10**13, "b": 10**10}, 1 / 0.3)
    assert shares["a"] / shares["b"] == pytest.approx(1000**0.3)
    assert temperature_weights({"a": 10**13, "b": 10**10}, 0.001) == {"a": 1.0, "b": 0.0}
    with pytest.raises(UserError, match=r"temperature=0: must be above 0"):
        temperature_weights(tokens, 0)
    with pytest.raises(UserError, match=r"data\.sources\.b: no weight follows from its 0 tokens"):
        temperature_weights({"a": 1, "b": 0}, 1)


def test_unimax_is_the_papers_algorithm() -> None:
    """Worked by hand: 100 tokens' budget; `a` may give 4 x 5, the other two share the 80 that are left."""
    shares = unimax_weights({"c": 1000, "a": 5, "b": 300}, 100, 4)
    assert shares == pytest.approx({"a": 0.2, "b": 0.4, "c": 0.4})
    assert unimax_weights({"a": 1, "b": 3}, 1000, 2) == pytest.approx({"a": 0.25, "b": 0.75})
    with pytest.raises(UserError, match="max_epochs 0"):
        unimax_weights({"a": 1}, 10, 0)


@given(
    st.dictionaries(st.sampled_from(NAMES), st.integers(1, 10**13), min_size=1),
    st.integers(1, 10**14),
    st.floats(0.1, 16),
)
@settings(deadline=None)
def test_unimax_is_level_below_its_limit(tokens: dict[str, int], budget: int, limit: float) -> None:
    shares = unimax_weights(tokens, budget, limit)
    assert sum(shares.values()) == pytest.approx(1)
    if budget > limit * sum(tokens.values()):
        return
    epochs = {name: shares[name] * budget / tokens[name] for name in tokens}
    assert max(epochs.values()) <= limit * (1 + 1e-9)
    below = [shares[name] for name in tokens if epochs[name] < limit * (1 - 1e-9)]
    assert not below or min(below) == pytest.approx(max(below)) == pytest.approx(max(shares.values()))
