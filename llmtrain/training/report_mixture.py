"""The mixture in report.html: what was asked for, what was served, and where everything that came in went."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from llmtrain.data.records import EMPTY
from llmtrain.training.report_page import Chart, Trace, number, table
from llmtrain.training.words import short

MOST_CHANGES = 12
"""Of more changes of the mixture than these, the newest are shown."""

QUARANTINE = "data/quarantine"
"""Where in the run directory the bad records of each source are."""

Entry = Mapping[str, Any]
Term = tuple[float | None, str]
"""What is added up, and what it is."""
Stage = tuple[int, Mapping[str, float]]
"""The first step of a mixture, and the weight of each source from there on."""


def mixture_section(
    data: Mapping[str, Any],
    stages: Sequence[Stage],
    kept: Collection[str],
    dot: Callable[[str], str],
    draw: Callable[[Chart], str],
    curves: Sequence[Chart] = (),
) -> str:
    """The section as HTML; empty where data.json (`data`) names no source.

    `stages` are those of `stage_steps`; `kept` are the sources with records in quarantine; `dot` gives a
    source's name in its colour as HTML, `draw` the card of a chart.
    """
    sources: Mapping[str, Entry] = data.get("sources") or {}
    if not sources:
        return ""
    step = data.get("step")
    begun = [stage for stage in stages if step is None or stage[0] <= step]
    whole = sum(entry["weight"] for entry in sources.values()) or 1
    asked = {name: entry["weight"] / whole for name, entry in sources.items()}
    realised = [100 * entry["share"] for entry in sources.values()]
    so_far = {name: asked_by([step], name, begun)[0] for name in sources} if step and begun else asked
    bars = [
        Trace("asked", list(sources), [100 * share for share in so_far.values()], "soft", "bar", faint=True),
        Trace("realised", list(sources), realised, "accent", "bar"),
    ]
    head = ["source", "asked now" if len(begun) > 1 else "asked", *HEAD]
    shares = table(head, [_shares(dot(name), asked[name], entry) for name, entry in sources.items()])
    sums = [
        f"<div class=sums><div>{dot(name)}</div>{_documents(entry)}{_tokens(entry, _left(name, begun))}"
        f"{_inputs(entry, data)}</div>"
        for name, entry in sources.items()
    ]
    cards = [
        draw(Chart("Share of the training tokens", "percent", bars, wide=True, zero=True)),
        *(draw(chart) for chart in curves if chart.traces),
        f'<div class="card wide">{shares}<p class=soft>{LOSS}</p></div>',
        f'<div class="card wide"><h3>Where everything went</h3>{"".join(sums)}</div>',
        _bad_records(sources, kept, dot),
    ]
    notes = ([f"After step {step:,}."] if step is not None else []) + _changes(
        begun[1:], stages[max(len(begun), 1) :]
    )
    note = f"<p class=soft>{escape(' '.join(notes))}</p>" if notes else ""
    return f"<h2>Mixture</h2>{note}<div class=cards>{''.join(cards)}</div>"


HEAD = ["realised", "tokens trained", "epochs", "loss", "skipped", "tokens in source"]
LOSS = "Loss: the mean over the steps since the ledger before, in nats a token."


def _shares(name: str, asked: float, entry: Entry) -> list[str]:
    return [
        name,
        f"{100 * asked:.2f} %",
        f"{100 * entry['share']:.2f} %",
        number(entry.get("trained"), short),
        number(entry.get("epochs"), "{:.3f}".format),
        number(entry.get("loss"), "{:.4f}".format),
        number(entry.get("skipped"), short),
        number(entry.get("total_tokens"), short),
    ]


def _documents(entry: Entry) -> str:
    """Documents in = to train on + held out + left out; one that is not held out is trained on, some time."""
    came: Mapping[str, Any] = entry.get("input") or {}
    rejected: Mapping[str, int] = came.get("rejected") or {}
    left_out = sum(rejected.values()) if came else None
    usable: list[Term] = [(came.get("train"), "to train on"), (came.get("held_out"), "held out")]
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in _by_count(rejected))
    so_far = "" if came.get("complete", True) else " so far"
    terms = [*usable, (left_out, f"left out ({reasons})" if reasons else "left out")]
    return _sum((came.get("documents"), f"documents in{so_far}"), terms)


def _left(name: str, begun: Sequence[Stage]) -> int | None:
    """The step from which on a source is in the mixture no more; None where it is, or never was."""
    last = max((number for number, (_, weights) in enumerate(begun) if name in weights), default=len(begun))
    return next((first for first, _ in begun[last + 1 :]), None)


def _tokens(entry: Entry, left: int | None) -> str:
    """Tokens of the passes that have begun = trained + skipped + still to come."""
    trained, skipped, to_come = entry.get("trained"), entry.get("skipped"), entry.get("to_come")
    size, passes = entry.get("total_tokens"), 1
    if size and trained is not None:
        passes = max(-(-(trained + (skipped or 0)) // size), 1)
    of = "the pass under way" if passes == 1 else f"{passes:,} passes, the last under way"
    rest = "still to come" if left is None else f"unread: out of the mixture since step {left:,}"
    terms = [(trained, "trained"), (skipped, "skipped"), (to_come, rest)]
    return _sum((size and passes * size, f"tokens of {of}"), terms)


def _inputs(entry: Entry, data: Mapping[str, Any]) -> str:
    """Inputs of the windows trained = those with a token + padding; empty where there is no padding."""
    padding = entry.get("padding")
    if not padding:
        return ""
    windows = round(entry["share"] * data["step"] * data["global_batch_size"])
    return _sum(
        (windows * data["seq_len"], "inputs trained"),
        [(entry["tokens"], "with a token"), (padding, "padding")],
    )


def _sum(whole: Term, terms: Sequence[Term]) -> str:
    """`10 in = 7 good + 3 bad` as HTML, with a warning where all is known and does not add up."""
    values = [value for value, _ in terms]
    known = [value for value in values if value is not None]
    wrong = whole[0] is not None and len(known) == len(values) and sum(known) != whole[0]
    signs = ["", " =&nbsp;", *[" +&nbsp;"] * (len(terms) - 1)]
    parts = [
        f"{sign}<b>{number(value, '{:,}'.format)}</b> {escape(what)}"
        for sign, (value, what) in zip(signs, [whole, *terms], strict=True)
    ]
    chip = f' <span class="chip warn">does not add up: {sum(known):,}</span>' if wrong else ""
    return f"<p>{''.join(parts)}{chip}</p>"


def _bad_records(sources: Mapping[str, Entry], kept: Collection[str], dot: Callable[[str], str]) -> str:
    """A card with the records that gave no document, by reason; none where there are none."""
    left_out = {name: (entry.get("input") or {}).get("rejected") or {} for name, entry in sources.items()}
    rows = [
        [dot(name), escape(reason), f"{count:,}"]
        for name, rejected in left_out.items()
        for reason, count in _by_count(rejected)
    ]
    if not rows:
        return ""
    bad = [name for name, rejected in left_out.items() if rejected.keys() - {EMPTY}]
    there, gone = [name for name in bad if name in kept], [name for name in bad if name not in kept]
    hints = []
    if there:
        places = ", ".join(f"{QUARANTINE}/{name}/" for name in there)
        hints.append(f"Kept, each with its file, position and reason, in {places}.")
    if gone:
        hints.append(f"Not kept of {', '.join(gone)}: data.bad_records=quarantine does that.")
    if any(EMPTY in rejected for rejected in left_out.values()):
        hints.append(f"Those that are {EMPTY} are no mistakes, and never kept.")
    hint = f"<p class=soft>{escape(' '.join(hints))}</p>"
    head = ["source", "reason", "records"]
    return f'<div class="card wide"><h3>Bad records</h3>{table(head, rows, words=head[:2])}{hint}</div>'


def _by_count(rejected: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(rejected.items(), key=lambda pair: (-pair[1], pair[0]))


def _changes(past: Sequence[Stage], ahead: Sequence[Stage]) -> list[str]:
    """What to say of the mixtures that followed the first one, and of the next."""
    shown = past[-MOST_CHANGES:]
    newest = f" (the newest {len(shown)} of {len(past)} times)" if len(past) > len(shown) else ""
    said = [f"The mixture changed{newest} at {', '.join(map(_stage, shown))}."] if shown else []
    return said + [f"It will change at {_stage(stage)}." for stage in ahead[:1]]


def _stage(stage: Stage) -> str:
    """`step 501 (code 60 %, prose 40 %)`."""
    first, weights = stage
    whole = sum(weights.values()) or 1
    shares = (f"{name} {100 * weight / whole:.4g} %" for name, weight in weights.items())
    return f"step {first:,} ({', '.join(shares)})"


def stage_steps(order: Mapping[str, Any], skip: Iterable[Sequence[int]]) -> list[Stage]:
    """The first step that trains each mixture of data/order.json (`order`), and its weights.

    `skip` are stretches [first, last] of the order's steps that training was told to leave out from the
    window on at which `order` was written; those before are in `order`.
    """
    rows = order.get("global_batch_size")
    if not rows:
        return []
    done = order.get("windows", 0) // rows
    ahead = [(max(first, done + 1), last) for first, last in skip]
    left_out = [*order.get("skip", ()), *ahead]
    steps = []
    for window, weights in order.get("stages", ()):
        place = window // rows + 1
        before = sum(max(min(last + 1, place) - first, 0) for first, last in left_out)
        steps.append((place - before, weights))
    return steps


def asked_by(steps: Iterable[float], name: str, stages: Sequence[Stage]) -> list[float]:
    """The share of a source of all tokens up to each step, as the `stages` (of `stage_steps`) ask for it."""
    shares = []
    for step in steps:
        asked, after = 0.0, step
        for first, weights in reversed(stages):
            length = max(0.0, after - (first - 1))
            asked += length * weights.get(name, 0) / (sum(weights.values()) or 1)
            after = min(after, first - 1)
        shares.append(asked / step)
    return shares
