"""Who hangs, where and since when, in one sentence, from the heartbeats of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.training.goodput import START

MOST_NAMED = 4
"""Ranks that a sentence names; of more it says how many."""

SAID = ("host", "phase", "step", "turn", "source", "waits", "collectives", "answers")
"""Of a heartbeat, what the verdict goes by."""


@dataclass(frozen=True)
class Vital:
    """What one rank says of itself, or was last heard to say."""

    rank: int
    host: str
    phase: str
    step: int
    turn: int
    """As in Beat."""
    source: str
    """Whose text it waits for; empty where it waits for none."""
    waits: bool
    """Whether it is in a collective: it waits for others."""
    collectives: int
    """How many it has begun: the same on every rank that has come equally far."""
    seconds: float
    """Since its training thread last beat."""
    answers: bool = True
    """Whether its watchdog lives."""

    @classmethod
    def of(cls, rank: int, heartbeat: Mapping[str, Any] | None, now: float) -> Vital:
        """From a heartbeat, which is None where the rank was never heard of; `now` on the wall clock."""
        if heartbeat is None:
            return cls(rank, "", "", 0, 0, "", False, 0, 0.0, answers=False)
        said = {name: heartbeat[name] for name in SAID}
        silence = 0.0 if said["answers"] else max(0.0, now - heartbeat["time"])
        return cls(rank, seconds=heartbeat["seconds"] + silence, **said)

    @property
    def place(self) -> str:
        of_source = f" of source {self.source}" if self.source else ""
        return f"{self.phase}{of_source}" + (f" of step {self.step}" if self.phase not in START else "")

    @property
    def progress(self) -> tuple[int, int, bool, bool, int]:
        """Orders ranks by how far they have come: at one place, those are ahead that wait for others.

        Of those that wait, those are behind that are in an earlier collective: the others have left it, as
        the root of a broadcast may, or never come to it.
        """
        return self.step, self.turn, not self.source, self.waits, self.collectives if self.waits else 0


def verdict(vitals: Sequence[Vital]) -> str:
    """Who is late, where and since when, and who waits for it.

    Late are ranks that do not answer, else those that have come least far; where all are at one place, all.
    Ranks in one and the same collective cannot be told apart: what each has sent there is the library's.
    """
    silent = [one for one in vitals if not one.answers]
    least = min((one.progress for one in vitals if one.answers), default=None)
    late = silent or [one for one in vitals if one.progress == least]
    others = [one for one in vitals if one not in late]
    said = [_silence(late) if silent else _lateness(late)]
    if others:
        said += [_waiting([one for one in others if one.place == place]) for place in _places(others)]
        if all(one.waits and one.answers for one in vitals):
            said.append(f"all are in collectives, {_named(late)} in an earlier one than the others")
    elif len(late) > 1:
        said.append("all ranks are there: what they do together, or what they read, does not come back")
    return "; ".join(said)


def _lateness(late: Sequence[Vital]) -> str:
    seconds = max(one.seconds for one in late)
    verb = "have" if len(late) > 1 else "has"
    return f"{_named(late, hosts=True)} {verb} been in {late[0].place} for {seconds:.0f} s"


def _silence(late: Sequence[Vital]) -> str:
    verb = "have" if len(late) > 1 else "has"
    known = [one for one in late if one.phase]
    if not known:
        return f"{_named(late)} {verb} never been heard of"
    where = (
        f"last in {known[0].place}" if len({one.place for one in known}) == 1 else "last at several places"
    )
    seconds = max(one.seconds for one in known)
    return f"{_named(late, hosts=True)} {verb} given no sign of life for {seconds:.0f} s, {where}"


def _waiting(ranks: Sequence[Vital]) -> str:
    return f"{_named(ranks)} wait{'' if len(ranks) > 1 else 's'} in {ranks[0].place}"


def _places(vitals: Sequence[Vital]) -> list[str]:
    return list(dict.fromkeys(one.place for one in sorted(vitals, key=lambda one: one.rank)))


def _named(ranks: Sequence[Vital], hosts: bool = False) -> str:
    """`rank 3 on host a`, `ranks 1, 2 and 500 others`."""
    few = [f"{one.rank}{f' on host {one.host}' if hosts and one.host else ''}" for one in ranks[:MOST_NAMED]]
    more = len(ranks) - len(few)
    parts = [*few, f"{more} others"] if more else few
    start = "rank" if len(ranks) == 1 else "ranks"
    return f"{start} {', '.join(parts[:-1])}{' and ' if len(parts) > 1 else ''}{parts[-1]}"
