"""What a mixture will read: GPT-3's table 2.2 for one's own sources, before any GPU is paid for.

plan.json holds the table in full precision:

version, llmtrain  of this format, and of the package that wrote it
config             the keys that the plan follows from, secrets left out
run                seq_len, global_batch_size, steps, windows, tokens, tokens_per_step, skipped_windows
sources.<name>     size: tokens it holds, null where nobody knows; exact: false where a sample was measured;
                   how: where the size comes from; weight: as given, of the first stage; share: of the tokens
                   served; windows and tokens: served; skipped: tokens that `data.skip` leaves out; epochs;
                   unread: tokens that no window reaches; warnings
stages             [{from_step, weights, shares}]; shares are the weights as the mixture rounds them
total              size, exact and unread of all sources together; null where a source's size is unknown
notes              what is to be said about the whole

Sources: Brown et al., Language models are few-shot learners, 2020, table 2.2. Muennighoff et al., Scaling
data-constrained language models, 2023: up to 4 epochs repeated text is worth nearly as much as new text,
above 16 more of it changes next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

from llmtrain.config import UserError
from llmtrain.data.config import DataConfig
from llmtrain.data.mixture import (
    LONGEST_PERIOD,
    Mixture,
    Stage,
    Weight,
    temperature_weights,
    unimax_weights,
    weights_from_epochs,
    whole_weights,
)

VERSION = 1
MANY_EPOCHS, TOO_MANY_EPOCHS = 4.0, 16.0
HAIR = 0.05
"""So many epochs above a threshold are still at it: a mixture that was made for 4 epochs is not warned of."""

Kind = Literal["given", "proportional", "temperature", "unimax"]


@dataclass(frozen=True)
class Size:
    """How many tokens a source holds."""

    tokens: int | None
    """None where nobody knows before reading all of it."""
    exact: bool
    how: str
    """Where the number comes from: `prepared`, `declared`, or what was sampled."""


@dataclass(frozen=True)
class RunLength:
    """How long the run is; tokens are those of the inputs."""

    seq_len: int
    global_batch_size: int
    steps: int

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.global_batch_size

    @property
    def windows(self) -> int:
        return self.steps * self.global_batch_size

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step


@dataclass(frozen=True)
class PlannedSource:
    """One row of the table; the module's docstring says what each number is."""

    size: int | None
    exact: bool
    how: str
    weight: float
    share: float
    windows: int
    tokens: int
    skipped: int
    epochs: float | None
    unread: int | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class PlannedStage:
    """The weights from a step on, and the shares that the mixture makes of them."""

    from_step: int
    weights: dict[str, Weight]
    shares: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "weights": {name: float(weight) for name, weight in self.weights.items()}}


@dataclass(frozen=True)
class Plan:
    """The whole table."""

    run: RunLength
    skipped_windows: int
    sources: dict[str, PlannedSource]
    stages: list[PlannedStage]
    notes: list[str]

    @property
    def total(self) -> dict[str, Any]:
        """Size, exact and unread of all sources together."""
        sizes = [source.size for source in self.sources.values()]
        unread = [source.unread for source in self.sources.values()]
        return {
            "size": None if None in sizes else sum(size or 0 for size in sizes),
            "exact": all(source.exact for source in self.sources.values()),
            "unread": None if None in unread else sum(rest or 0 for rest in unread),
        }

    def as_dict(self) -> dict[str, Any]:
        """plan.json without `llmtrain` and `config`."""
        length = {key: getattr(self.run, key) for key in ("windows", "tokens", "tokens_per_step")}
        return {
            "version": VERSION,
            "run": {**asdict(self.run), **length, "skipped_windows": self.skipped_windows},
            "sources": {name: asdict(source) for name, source in self.sources.items()},
            "stages": [stage.as_dict() for stage in self.stages],
            "total": self.total,
            "notes": self.notes,
        }


def make_plan(
    data: DataConfig, sizes: Mapping[str, Size], run: RunLength, weights: Mapping[str, Weight] | None = None
) -> Plan:
    """The table for a run; `weights` stand in for those of the sources, and stages stay as they are."""
    weights = given_weights(data, sizes) if weights is None else weights
    stages: list[Stage] = [(1, weights), *((stage.from_step, stage.weights) for stage in data.stages)]
    mixable, dropped = _mixable(stages)
    mixture = Mixture([((step - 1) * run.global_batch_size, served) for step, served in mixable])
    trained, skipped = _windows(data, run, mixture)
    return Plan(
        run=run,
        skipped_windows=sum(skipped.values()),
        sources={
            name: _planned(
                sizes[name],
                float(weights.get(name, 0)),
                trained.get(name, 0),
                skipped.get(name, 0),
                run,
                dropped.get(name),
            )
            for name in data.sources
        },
        stages=_describe_stages(data, stages, run, mixture),
        notes=_notes(data, sizes, run, weights),
    )


def given_weights(data: DataConfig, sizes: Mapping[str, Size]) -> dict[str, Weight]:
    """The weight of each source, as given or from its epochs; UserError for epochs of an unknown size."""
    epochs = {name: source.epochs for name, source in data.sources.items() if source.epochs is not None}
    if epochs:
        return dict(weights_from_epochs(epochs, known_tokens(sizes, "epochs follow")))
    return {name: source.weight for name, source in data.sources.items() if source.weight is not None}


def known_tokens(sizes: Mapping[str, Size], why: str) -> dict[str, int]:
    """Tokens by source; UserError, saying what follows from them, where one is unknown."""
    unknown = [name for name, size in sizes.items() if not size.tokens]
    if unknown:
        raise UserError(
            *(
                f"data.sources.{name}: its size is not known ({sizes[name].how}) and {why} from it: run "
                "`llmtrain prepare` first, or give every source a weight"
                for name in unknown
            )
        )
    return {name: size.tokens for name, size in sizes.items() if size.tokens}


def helper_weights(
    kind: Kind, sizes: Mapping[str, Size], budget: int, *, temperature: float, max_epochs: float
) -> dict[str, float]:
    """Plain weights, ready to copy: `proportional` to the sizes, by `temperature`, or by `unimax`."""
    assert kind != "given"
    tokens = known_tokens(sizes, f"weights={kind} follows")
    if kind == "proportional":
        return plain_weights(tokens)
    if kind == "temperature":
        return plain_weights(temperature_weights(tokens, temperature))
    return plain_weights(unimax_weights(tokens, budget, max_epochs))


def plain_weights(weights: Mapping[str, Weight]) -> dict[str, float]:
    """The same proportions as decimals that sum to 1: four places, or six where a share is below 1 %.

    Rounded by largest remainder; a source that would vanish gets one unit of the last place.
    """
    exact = {name: Fraction(weight) for name, weight in weights.items()}
    total = sum(exact.values())
    unit = 10**4 if min(exact.values()) * 100 >= total else 10**6
    units = {name: max(1, int(weight * unit / total)) for name, weight in exact.items()}
    by_remainder = sorted(units, key=lambda name: units[name] - exact[name] * unit / total)
    for number in range(unit - sum(units.values())):
        units[by_remainder[number]] += 1
    while (over := sum(units.values()) - unit) > 0:
        units[max(units, key=lambda name: units[name])] -= over
    return {name: count / unit for name, count in units.items()}


def weights_yaml(weights: Mapping[str, float], data: DataConfig) -> str:
    """The weights as the YAML of `data.sources`, to be copied into a config."""
    lines = ["data:", "  sources:"]
    for name, weight in weights.items():
        lines += [f"    {name}:", f"      weight: {weight}"]
        lines += ["      epochs: null"] if data.sources[name].epochs is not None else []
    return "\n".join(lines) + "\n"


# Windows


def kept_steps(skip: Sequence[tuple[int, int]], steps: int) -> list[tuple[int, int]]:
    """The steps of the order that a run trains: stretches [first, last), from 0; together `steps` of them."""
    kept, at, left = list[tuple[int, int]](), 0, steps
    for first, last in skip:
        length = min(left, first - 1 - at)
        if length:
            kept.append((at, at + length))
        left -= length
        if not left:
            return kept
        at = last
    return [*kept, (at, at + left)]


def _windows(data: DataConfig, run: RunLength, mixture: Mixture) -> tuple[dict[str, int], dict[str, int]]:
    """Windows of each source that the run trains, and that it leaves out on the way."""
    rows = run.global_batch_size
    kept = kept_steps(data.skip, run.steps)
    trained = [0] * len(mixture.names)
    for first, stop in kept:
        before, after = mixture.counts(first * rows), mixture.counts(stop * rows)
        trained = [sum(counts) for counts in zip(trained, after, (-n for n in before), strict=True)]
    passed = mixture.counts(kept[-1][1] * rows)
    skipped = [n - m for n, m in zip(passed, trained, strict=True)]
    return dict(zip(mixture.names, trained, strict=True)), dict(zip(mixture.names, skipped, strict=True))


def _mixable(stages: Sequence[Stage]) -> tuple[list[Stage], dict[str, str]]:
    """The stages without the sources that the mixture refuses there, and a warning for each of these."""
    mixable, warnings = list[Stage](), dict[str, str]()
    for step, asked in stages:
        served = dict(asked)
        while name := _never_read(served):
            share = float(_fraction(served[name]) / sum(map(_fraction, asked.values())))
            warnings[name] = (
                f"share {share:.2g} from step {step} on is below 1/{LONGEST_PERIOD:,} of the stream: training"
                " refuses it; raise it, set it to 0, or join it to another source"
            )
            served[name] = 0
        mixable.append((step, served))
    return mixable, warnings


def _never_read(weights: Mapping[str, Weight]) -> str | None:
    """The source with the smallest share, if the mixture refuses it for being too small."""
    try:
        whole_weights(weights)
    except UserError:
        used = {name: _fraction(weight) for name, weight in weights.items() if weight}
        smallest = min(sorted(used), key=lambda name: used[name], default="")
        if smallest and used[smallest] * LONGEST_PERIOD < sum(used.values()):
            return smallest
        raise
    return None


def _fraction(weight: Weight) -> Fraction:
    return Fraction(str(weight))  # decimals as they are written


# Words


def _planned(
    size: Size, weight: float, windows: int, skipped: int, run: RunLength, dropped: str | None
) -> PlannedSource:
    tokens = windows * run.seq_len
    epochs = tokens / size.tokens if size.tokens else None
    unused = [] if windows or dropped else [NEVER_USED]
    warnings = [*([dropped] if dropped else unused), *_epoch_warnings(epochs)]
    return PlannedSource(
        size=size.tokens,
        exact=size.exact,
        how=size.how,
        weight=weight,
        share=windows / run.windows,
        windows=windows,
        tokens=tokens,
        skipped=skipped * run.seq_len,
        epochs=epochs,
        unread=None if size.tokens is None else max(0, size.tokens - tokens),
        warnings=tuple(warnings),
    )


NEVER_USED = "never used: the run ends before the mixture comes to it; train longer or raise its weight"


def _epoch_warnings(epochs: float | None) -> list[str]:
    if epochs is None or epochs <= MANY_EPOCHS + HAIR:
        return []
    if epochs <= TOO_MANY_EPOCHS + HAIR:
        return [
            f"{epochs:.1f} epochs, above {MANY_EPOCHS:g}: repeated text is worth less than new text"
            " (Muennighoff et al. 2023)"
        ]
    return [
        f"{epochs:.1f} epochs, far above {TOO_MANY_EPOCHS:g}: more of it teaches next to nothing (Muennighoff"
        " et al. 2023); lower its weight, or find more text"
    ]


def _describe_stages(
    data: DataConfig, stages: Sequence[Stage], run: RunLength, mixture: Mixture
) -> list[PlannedStage]:
    described = []
    for step, asked in stages:
        shares = mixture.shares((step - 1) * run.global_batch_size)
        described.append(
            PlannedStage(
                from_step=step,
                weights={name: asked.get(name, 0) for name in data.sources},
                shares={name: shares.get(name, 0.0) for name in data.sources},
            )
        )
    return described


def _notes(
    data: DataConfig, sizes: Mapping[str, Size], run: RunLength, weights: Mapping[str, Weight]
) -> list[str]:
    notes = []
    total = math.fsum(map(float, weights.values()))
    if not data.stages and 0.9 < total < 1.1 and not math.isclose(total, 1, abs_tol=1e-6):
        plain = {
            name: float(weight) * run.tokens / size
            for name, weight in weights.items()
            if (size := sizes[name].tokens)
        }
        told = ", ".join(f"{name} {epochs:.2f}" for name, epochs in plain.items())
        notes.append(
            f"the weights sum to {total:.6g}, and a share is weight / {total:.6g}; taken as fractions of the"
            f" run without that division they would give, in epochs: {told}"
        )
    beyond = [stage.from_step for stage in data.stages if stage.from_step > _last_step(data, run)]
    notes += [f"the stage from step {step} on begins after the end of the run" for step in beyond]
    if data.packing == "best_fit":
        notes.append(
            f"packing=best_fit: windows are counted whole; up to {data.max_padding:.1%} of each may be empty"
        )
    return notes


def _last_step(data: DataConfig, run: RunLength) -> int:
    return kept_steps(data.skip, run.steps)[-1][1]
