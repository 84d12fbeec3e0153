"""Which source a window comes from: exact token shares at every step, without state or randomness.

n       number of a window in the run, from 0
d_i, D  whole-number weight of source i, and their sum: the length of one period
m       number of sources with d_i > 0
k       how many windows of the same source were picked before
"""

from __future__ import annotations

import heapq
import logging
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np

from llmtrain.config import UserError

logger = logging.getLogger(__name__)

Weight = float | Fraction
Stage = tuple[int, Mapping[str, Weight]]
"""The first window of a mixture and the weight of each source from there on."""

LONGEST_PERIOD = 65_536


def whole_weights(weights: Mapping[str, Weight]) -> dict[str, int]:
    """The weights as the smallest whole numbers in the same proportion; sources of weight 0 are left out.

    Decimals are taken as written (0.3 is 3/10). Where that needs a period above LONGEST_PERIOD, shares are
    rounded to 1/LONGEST_PERIOD of the stream by largest remainder. UserError for a weight that is negative,
    not finite, or too small to get any share, and where no weight is above 0.
    """
    asked = {name: _fraction(name, weights[name]) for name in sorted(weights)}
    asked = {name: weight for name, weight in asked.items() if weight}
    if not asked:
        raise UserError(f"data.sources: no source has a weight above 0: {', '.join(weights) or 'none given'}")
    total = sum(asked.values())
    shares = {name: weight / total for name, weight in asked.items()}
    period = math.lcm(*(share.denominator for share in shares.values()))
    if period > LONGEST_PERIOD:
        return _largest_remainder(shares)
    return {name: int(share * period) for name, share in shares.items()}


def _fraction(name: str, weight: Weight) -> Fraction:
    try:
        fraction = Fraction(str(weight))
    except ValueError:
        fraction = Fraction(-1)
    if fraction < 0:
        raise UserError(f"data.sources.{name}.weight={weight}: must be a finite number, 0 or above")
    return fraction


def _largest_remainder(shares: Mapping[str, Fraction]) -> dict[str, int]:
    whole = {name: int(share * LONGEST_PERIOD) for name, share in shares.items()}
    missing = LONGEST_PERIOD - sum(whole.values())
    by_remainder = sorted(shares, key=lambda name: whole[name] - shares[name] * LONGEST_PERIOD)
    for name in by_remainder[:missing]:
        whole[name] += 1
    for name, count in whole.items():
        if count == 0:
            raise UserError(
                f"data.sources.{name}: its share {float(shares[name]):.2g} is below 1/{LONGEST_PERIOD} of "
                f"the stream, so it would never be read; raise it, set it to 0, or join it to another source"
            )
    logger.info(
        "mixture: weights rounded to 1/%d of the stream: %s",
        LONGEST_PERIOD, ", ".join(f"{name} {count / LONGEST_PERIOD:.6f}" for name, count in whole.items()),
    )  # fmt: skip
    divisor = math.gcd(*whole.values())
    return {name: count // divisor for name, count in whole.items()}


def weights_from_epochs(epochs: Mapping[str, Weight], tokens: Mapping[str, int]) -> dict[str, Fraction]:
    """Token shares, exact and summing to 1, that pass over each source `epochs` times in the same run."""
    served = {name: _fraction(name, epochs[name]) * tokens[name] for name in epochs}
    total = sum(served.values())
    if not total:
        raise UserError(f"data.sources: no source has epochs above 0: {', '.join(epochs) or 'none given'}")
    return {name: count / total for name, count in served.items()}


def temperature_weights(tokens: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Token shares, summing to 1, in proportion to tokens^(1 / temperature).

    1 keeps the sources' own proportions; the higher it is, the more equal they become. UserError for a
    temperature that is not above 0. Source: multilingual BERT; Conneau and Lample 2019 (XLM, section 3.1);
    Xue et al. 2021 (mT5, section 3.2), where alpha = 1 / temperature is 0.3.
    """
    if not temperature > 0:
        raise UserError(f"temperature={temperature}: must be above 0; 1 keeps the sources' proportions")
    _check_sizes(tokens)
    largest = max(tokens.values())  # ratios, so that no power of a large number overflows
    powers = {name: (count / largest) ** (1 / temperature) for name, count in tokens.items()}
    total = sum(powers.values())
    return {name: power / total for name, power in powers.items()}


def unimax_weights(tokens: Mapping[str, int], budget: float, max_epochs: float) -> dict[str, float]:
    """Token shares, summing to 1, as equal as they can be with no source read above `max_epochs` times.

    `budget` is what the run trains on, in tokens. Where it is more than `max_epochs` passes over everything,
    there is no such mixture: shares are then in proportion to the tokens. UserError for a limit or a budget
    that is not above 0. Source: Chung et al. 2023, "UniMax", algorithm 1, with tokens for its characters.
    """
    if not (budget > 0 and max_epochs > 0):
        raise UserError(f"unimax: budget is {budget} and max_epochs {max_epochs}; both must be above 0")
    _check_sizes(tokens)
    left, served = Fraction(budget), {}
    ascending = sorted(tokens, key=lambda name: (tokens[name], name))
    for place, name in enumerate(ascending):
        served[name] = min(tokens[name] * Fraction(max_epochs), left / (len(ascending) - place))
        left -= served[name]
    total = sum(served.values())
    return {name: float(served[name] / total) for name in tokens}


def _check_sizes(tokens: Mapping[str, int]) -> None:
    for name, count in tokens.items():
        if count <= 0:
            raise UserError(f"data.sources.{name}: no weight follows from its {count} tokens; remove it")


def chairman(whole: Sequence[int]) -> np.ndarray:
    """One period of Tijdeman's chairman assignment: the source of each of D = sum(whole) windows, int64 [D].

    After any n windows source i has been picked n d_i / D times, to within 1 - 1/(2m - 2), the least that
    is possible for every choice of weights. Pick c of source i may be made from window
    ceil((D + (2m - 2) D c) / ((2m - 2) d_i)) on, counted from 1; among the open picks the one with the
    nearest deadline is made, and the source that comes first when deadlines are equal.
    Source: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980), 323-330.
    """
    assert min(whole) > 0
    period, span = sum(whole), 2 * len(whole) - 2
    if span == 0:
        return np.zeros(period, np.int64)
    picks: list[tuple[int, int, int]] = []
    for source, share in enumerate(whole):
        start = period * span * np.arange(share, dtype=np.int64)
        opens = -(-(start + period) // (span * share))
        closes = (start + period * (span - 1)) // (span * share)
        picks += zip(opens.tolist(), closes.tolist(), [source] * share, strict=True)
    picks.sort(reverse=True)
    order = np.empty(period, np.int64)
    open_picks: list[tuple[int, int]] = []
    for window in range(1, period + 1):
        while picks and picks[-1][0] <= window:
            _, deadline, source = picks.pop()
            heapq.heappush(open_picks, (deadline, source))
        _, order[window - 1] = heapq.heappop(open_picks)
    return order


class _Period:
    """The lookup tables of one stage: memory in O(D), whatever the number of sources."""

    def __init__(
        self, first: int, names: Sequence[str], whole: Mapping[str, int], base: Sequence[int]
    ) -> None:
        self.first, self.length = first, sum(whole.values())
        self.base = np.array(base, np.int64)
        """Windows of each source that earlier stages picked."""
        self.whole = np.array([whole.get(name, 0) for name in names], np.int64)
        here = np.flatnonzero(self.whole)
        self.source = here[chairman(self.whole[here].tolist())]
        by_source = self.source.argsort(kind="stable")
        ends = self.whole.cumsum()
        self.ordinal = np.empty_like(by_source)
        self.ordinal[by_source] = np.arange(self.length) - np.repeat(ends - self.whole, self.whole)
        self.places = np.split(by_source, ends[:-1])
        """For each source, where in the period it is picked, ascending."""

    def counts(self, window: int) -> list[int]:
        periods, rest = divmod(window - self.first, self.length)
        in_period = [int(places.searchsorted(rest)) for places in self.places]
        return (self.base + periods * self.whole + in_period).tolist()

    def picks(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        periods, place = np.divmod(np.arange(first - self.first, last - self.first), self.length)
        source = self.source[place]
        return source, self.base[source] + periods * self.whole[source] + self.ordinal[place]

    def window_of(self, source: int, k: int) -> int | None:
        places = self.places[source]
        if not len(places):
            return None
        periods, ordinal = divmod(k - int(self.base[source]), len(places))
        return self.first + periods * self.length + int(places[ordinal])


class Mixture:
    """The source of every window of a run: a list of stages, each going on where the one before stopped.

    Sources are numbered in the order of their sorted names, so the order in which they are given is
    without effect. A stage with the weights of the one before it is no stage: the period runs on.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        firsts = [first for first, _ in stages]
        if firsts[:1] != [0] or any(later <= earlier for earlier, later in pairwise(firsts)):
            raise UserError(f"mixture stages begin at windows {firsts}: must be 0 first, then ascending")
        self.names = sorted({name for _, weights in stages for name in weights})
        self._stages: list[tuple[int, dict[str, int]]] = []
        self._periods: list[_Period] = []
        base = [0] * len(self.names)
        for first, weights in stages:
            whole = whole_weights(weights)
            if self._stages and self._stages[-1][1] == whole:
                continue
            if self._periods:
                base = self._periods[-1].counts(first)
            self._stages.append((first, whole))
            self._periods.append(_Period(first, self.names, whole, base))

    @property
    def stages(self) -> list[tuple[int, dict[str, int]]]:
        """(first window, whole-number weights): what gives the same mixture again, and is JSON."""
        return [(first, dict(whole)) for first, whole in self._stages]

    def shares(self, window: int) -> dict[str, float]:
        """The share of each source that the mixture steers to at a window: the weights after rounding."""
        period = self._period(window)
        return dict(zip(self.names, (period.whole / period.length).tolist(), strict=True))

    def source_of(self, window: int) -> tuple[int, int]:
        """(source, k): the number of the window's source, and of the window among those of this source."""
        source, k = self.picks(window, window + 1)
        return int(source[0]), int(k[0])

    def picks(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """`source_of` the windows first..last - 1: two int64 arrays [last - first]."""
        edges = [first, *(period.first for period in self._periods if first < period.first < last), last]
        parts = [self._period(start).picks(start, stop) for start, stop in pairwise(edges)]
        sources, ks = zip(*parts, strict=True)
        return np.concatenate(sources), np.concatenate(ks)

    def window_of(self, source: int, k: int) -> int | None:
        """The window for which a source is picked when k of its windows were before; None if it never is."""
        assert k >= 0
        stage = bisect_right(self._periods, k, key=lambda period: int(period.base[source])) - 1
        return self._periods[stage].window_of(source, k)

    def counts(self, window: int) -> list[int]:
        """How many of the windows before this one each source has, by source number."""
        return self._period(window).counts(window)

    def _period(self, window: int) -> _Period:
        assert window >= 0
        return self._periods[bisect_right(self._periods, window, key=lambda period: period.first) - 1]


def continue_stages(past: Sequence[Stage], configured: Sequence[Stage], window: int) -> list[Stage]:
    """The stages of `past` before a window and those of `configured` from there on."""
    history = [stage for stage in past if stage[0] < window]
    current = [weights for first, weights in configured if first <= window][-1]
    return [*history, (window, current), *(stage for stage in configured if stage[0] > window)]
