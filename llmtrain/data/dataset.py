"""The rows of every step of a run, as a pure function of sources, mixture, seed and step.

G      global_batch_size in rows, the only batch quantity that enters the order
order  the rows of all steps as they are where nothing is skipped; its steps count from 1
n      (step of the order - 1) * G + row, the number of a window: rows and windows count from 0
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from itertools import accumulate, pairwise
from typing import Any, Literal

from llmtrain.config import UserError
from llmtrain.data.asked import Asked
from llmtrain.data.batch import Batch
from llmtrain.data.held import Tally
from llmtrain.data.mixture import Mixture, Stage, Weight, continue_stages
from llmtrain.data.packing import Documents, Row, pack
from llmtrain.data.stream import Stream
from llmtrain.data.windows import BestFit, Cut, Cutting, TokenSource

Packing = Literal["cut", "best_fit"]
Stretches = list[tuple[int, int]]
"""Windows of a source by the order of their service: from the first of each pair to before the second."""

Counts = tuple[int, int, int]
"""Of a source: its tokens that were trained, padding that was trained, its tokens that were skipped."""

STATE_VERSION = 2
STEPS_AHEAD = 2
"""Steps that are read before they are asked for."""
HASH_DIGITS = 16
"""So much of a hash is kept in a state: 64 bits, enough to tell two texts of one source apart."""


class Skip:
    """Stretches [first, last] of the order, ascending and apart, that training leaves out."""

    def __init__(self, stretches: Sequence[Sequence[int]]) -> None:
        self.stretches = [(int(first), int(last)) for first, last in stretches]
        self._firsts = [first for first, _ in self.stretches]
        self._left_out = list(accumulate((last - first + 1 for first, last in self.stretches), initial=0))
        """Steps in the first i stretches."""
        self._reached = [first - before for first, before in zip(self._firsts, self._left_out, strict=False)]
        """The step of training that would have met each stretch."""

    def data_step(self, step: int) -> int:
        """The step of the order that a step of training trains."""
        return step + self._left_out[bisect_right(self._reached, step)]

    def training_step(self, data_step: int) -> int | None:
        """The step of training that trains a step of the order; None where it is left out."""
        number = bisect_right(self._firsts, data_step)
        if number and data_step <= self.stretches[number - 1][1]:
            return None
        return data_step - self._left_out[number]

    def before(self, data_step: int) -> list[tuple[int, int]]:
        """The stretches that lie before a step of the order."""
        return [stretch for stretch in self.stretches if stretch[1] < data_step]

    def after(self, data_step: int) -> list[tuple[int, int]]:
        """The stretches, or what is left of them, that lie after a step of the order."""
        return [(max(first, data_step + 1), last) for first, last in self.stretches if last > data_step]


class Batches:
    """The batches of step after step, read STEPS_AHEAD steps ahead by a thread.

    What goes wrong in the thread is raised by `next`. The thread ends when this is closed or dropped; one
    that waits for text ends when its source is closed.
    """

    def __init__(self, load: Callable[[int], Batch], start_step: int) -> None:
        self._load, self._step = load, start_step
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="llmtrain-data")
        self._ahead = deque(self._submit() for _ in range(STEPS_AHEAD))

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        try:
            batch = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        self._ahead.append(self._submit())
        return batch

    @property
    def upcoming(self) -> Future[Batch]:
        """What `next` will return."""
        return self._ahead[0]

    def close(self) -> None:
        """Read nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def __del__(self) -> None:
        self.close()

    def _submit(self) -> Future[Batch]:
        self._step += 1
        return self._thread.submit(self._load, self._step - 1)


class PackedDataset:
    """Packed rows from a mixture of sources; nothing in it moves when rows are read.

    `weights` are shares of the tokens of the final stream, or a list of (first window, shares) where they
    change on the way. `source_ids` of the batches index `names`. `packing`, with `max_padding` for best_fit:
    how windows are made. `curriculum`: (length of a segment at step 1, first step with whole documents).
    `skip`: stretches [first, last] of the order's steps that are left out. `boundary_targets` (None: where
    documents attend to each other) as in `pack`.
    """

    def __init__(
        self,
        sources: Mapping[str, TokenSource],
        weights: Mapping[str, Weight] | Sequence[Stage],
        *,
        seq_len: int,
        global_batch_size: int,
        seed: int,
        documents: Documents,
        shuffle_span: int,
        boundary_targets: bool | None = None,
        packing: Packing = "cut",
        max_padding: float = 0.01,
        curriculum: tuple[int, int] | None = None,
        skip: Sequence[Sequence[int]] = (),
    ) -> None:
        self.names = sorted(sources)
        """The sources by number."""
        self.global_batch_size = global_batch_size
        self._seq_len, self._documents, self._curriculum = seq_len, documents, curriculum
        self._boundary_targets = documents == "attend" if boundary_targets is None else boundary_targets
        self._stages = _stages_of(weights, sources)
        self.mixture = Mixture(self._stages)
        self.skip = Skip(skip)

        def cutting(source: TokenSource) -> Cutting:
            if packing == "cut":
                return Cut(source, seq_len)
            return BestFit(source, seq_len, max_padding, keep=2 * shuffle_span)

        cuttings = {name: cutting(sources[name]) for name in self.names}
        self.streams = {name: Stream(cuttings[name], name, seed, shuffle_span) for name in self.names}
        self.asked = Asked()
        """The source whose text the newest rows are made of, or wait for."""
        self._readers = [self.asked.noting(name, sources[name]) for name in self.names]
        self._tallies = {
            name: Tally(self.streams[name], one) for name, one in cuttings.items() if isinstance(one, BestFit)
        }
        self._order: dict[str, Any] = {
            "seed": seed,
            "seq_len": seq_len,
            "global_batch_size": global_batch_size,
            "shuffle_span": shuffle_span,
            "documents": documents,
            "boundary_targets": self._boundary_targets,
            "packing": packing,
            "max_padding": None if packing == "cut" else max_padding,
        }
        self._earlier: dict[str, dict[str, Any]] = {}
        """What a resumed state said of its sources."""
        self._resumed_at = 0
        """The window at which that state stands."""

    def data_step(self, step: int) -> int:
        """The step of the order that a step of training trains: `skip` is a remap of step numbers."""
        return self.skip.data_step(step)

    def rows(self, step: int, first: int, last: int) -> Batch:
        """Rows first .. last - 1 of the global batch of a step; waits for text that is still on its way."""
        assert step >= 1 and 0 <= first < last <= self.global_batch_size, (step, first, last)
        window = (self.data_step(step) - 1) * self.global_batch_size
        sources, ks = self.mixture.picks(window + first, window + last)
        return pack(
            [self._row(source, k) for source, k in zip(sources.tolist(), ks.tolist(), strict=True)],
            self._seq_len,
            self._documents,
            boundary_targets=self._boundary_targets,
            segment_length=self.segment_length(step),
        )

    def weights(self, steps_done: int) -> dict[str, float]:
        """The share of each source that the mixture steers to in the last of so many steps."""
        return self.mixture.shares(max(self._order_done(steps_done) * self.global_batch_size - 1, 0))

    def needs(self, steps_done: int) -> tuple[dict[str, list[int]], dict[str, float]]:
        """Each source's shards in the order in which its first pass reads them, and its share from now on."""
        orders = {name: stream.first_order for name, stream in self.streams.items()}
        shares = self.mixture.shares(self._order_done(steps_done) * self.global_batch_size)
        return orders, {name: shares.get(name, 0.0) for name in orders}

    def shards_read(self, steps_done: int) -> dict[str, list[int]]:
        """Each source's shards that so many steps come to in its first pass, in its order; waits."""
        served = self.mixture.counts(self._order_done(steps_done) * self.global_batch_size)
        counts = dict(zip(self.mixture.names, served, strict=True))
        return {name: stream.first_shards(counts.get(name, 0)) for name, stream in self.streams.items()}

    def segment_length(self, step: int) -> int | None:
        """How long a segment may be at a step: it grows linearly; None once documents are whole."""
        if self._curriculum is None or step >= self._curriculum[1]:
            return None
        shortest, until_step = self._curriculum
        return shortest + (self._seq_len - shortest) * (step - 1) // (until_step - 1)

    def batches(self, start_step: int, rank: int, world_size: int, pin_memory: bool = False) -> Batches:
        """This rank's rows of step after step, without end: rank r of R has rG/R .. (r+1)G/R - 1.

        What the ledger of a step counts is counted before its batch is there, so that it waits for nothing.
        """
        first, last = (r * self.global_batch_size // world_size for r in (rank, rank + 1))

        def load(step: int) -> Batch:
            batch = self.rows(step, first, last)
            if self._tallies:
                self._held(self._served(step))
            return batch.pin_memory() if pin_memory else batch

        return Batches(load, start_step)

    def state(self, steps_done: int) -> dict[str, Any]:
        """Where the order stands after so many steps and what it depends on: a few hundred bytes of JSON."""
        done, content = self._order_done(steps_done), self._content()
        for name, held in self._held(self._served(steps_done)).items():
            if name in self._tallies and held:  # once the source is removed, nobody can count it
                content[name]["held"] = held
        return {
            "version": STATE_VERSION,
            "windows": done * self.global_batch_size,
            **self._order,
            "stages": self.mixture.stages,
            "skip": self.skip.before(done),
            "sources": content,
        }

    def check_state(self, state: Mapping[str, Any]) -> int:
        """The first window after `state`; UserError naming what differs if the order would not go on.

        Other weights, an added or a removed source go on (see `resumed`), and so do other numbers of ranks,
        micro-batches and accumulation steps, which the order does not know.
        """
        for field, ours in {"version": STATE_VERSION, **self._order}.items():
            saved = state.get(field)
            _check_same(field, saved, ours, f"set {field}={saved} again")
        content = self._content()
        for name in sorted(self.streams.keys() & state["sources"].keys()):
            ours, saved = content[name], state["sources"][name]
            field = "manifest_hash" if _are_both_complete(ours, saved) else "fingerprint"
            way_out = "restore its text, tokenizer and boundary, give the new text a new source name"
            _check_same(f"{field} of data.sources.{name}", saved[field], ours[field], way_out)
        return int(state["windows"])

    def resumed(self, state: Mapping[str, Any]) -> PackedDataset:
        """The dataset that goes on from `state`; where the weights differ a new stage begins at its window.

        Every source goes on at its own cursor: nothing is repeated, nothing is skipped, but for what is yet
        to come of `skip`. What was skipped before `state` stays skipped, and nothing else does.
        """
        window = self.check_state(state)
        resumed = copy(self)
        resumed.mixture = Mixture(continue_stages(state["stages"], self._stages, window))
        resumed.skip = Skip([*state["skip"], *self.skip.after(window // self.global_batch_size)])
        resumed._earlier, resumed._resumed_at = dict(state["sources"]), window
        return resumed

    def epochs(self, steps: int) -> dict[str, float | None]:
        """Passes over each source that so many steps make, those to come included; waits for nothing.

        Padding is taken for tokens, as nobody knows it beforehand. None where the size is not known yet.
        """
        sizes = {name: self._known(name)["tokens"] for name in self.mixture.names}
        windows = {name: _count(trained) for name, (trained, _) in self._served(steps).items()}
        return {name: size and windows[name] * self._seq_len / size for name, size in sizes.items()}

    def ledger(self, steps_done: int) -> dict[str, dict[str, Any]]:
        """What each source has served in so many steps, all of them trained: by arithmetic, and exact.

        weight: the share the mixture steers to now; share: of all windows trained, this source's part;
        tokens, padding: inputs of these windows that hold a token, and that hold none; total_tokens: T;
        trained, skipped: tokens of the source that are at home in windows trained, and in those that `skip`
        left out (where the stream is cut, trained is tokens); epochs: trained / T; to_come: tokens that are
        not served yet of the pass that is under way. epochs, T and to_come are None while T is not known.
        `steps_done` is not before a state that was resumed.
        """
        weights, served = self.weights(steps_done), self._served(steps_done)
        held = self._held(served)
        whole = max(steps_done * self.global_batch_size, 1)
        rows = {}
        for name, (trained, _) in served.items():
            windows, total = _count(trained), self._known(name)["tokens"]
            rows[name] = {
                "weight": weights[name],
                "share": windows / whole,
                "total_tokens": total,
                **_account(windows * self._seq_len, total, held[name]),
            }
        return rows

    def _order_done(self, steps_done: int) -> int:
        """The last step of the order that was trained."""
        return self.data_step(steps_done) if steps_done else 0

    def _served(self, steps_done: int) -> dict[str, tuple[Stretches, Stretches]]:
        """The windows of each source that were trained, and those that were skipped on the way."""
        done = self._order_done(steps_done)
        edges = [0, *(step for first, last in self.skip.before(done) for step in (first - 1, last)), done]
        counts = zip(*(self.mixture.counts(step * self.global_batch_size) for step in edges), strict=True)
        stretches = (list(pairwise(ks)) for ks in counts)
        return {
            name: (some[::2], some[1::2]) for name, some in zip(self.mixture.names, stretches, strict=True)
        }

    def _held(self, served: dict[str, tuple[Stretches, Stretches]]) -> dict[str, Counts | None]:
        """What was counted of each source in the windows that were served.

        None of a source that was removed, and of which its checkpoint does not say it.
        """
        resumed = dict(zip(self.mixture.names, self.mixture.counts(self._resumed_at), strict=True))
        return {
            name: self._counts(name, trained, skipped, resumed[name])
            for name, (trained, skipped) in served.items()
        }

    def _counts(self, name: str, trained: Stretches, skipped: Stretches, resumed: int) -> Counts | None:
        """`_held` of a source that had served `resumed` windows in the state that was resumed."""
        if self._order["packing"] == "cut":
            return _count(trained) * self._seq_len, 0, _count(skipped) * self._seq_len
        saved = self._earlier.get(name, {}).get("held")
        if saved is None:
            if name not in self._tallies:
                return None
            saved, resumed = (0, 0, 0), 0
        since, left_out = (
            [self._tallies[name].between(max(first, resumed), last) for first, last in some if last > resumed]
            for some in (trained, skipped)
        )
        return (
            saved[0] + sum(held.tokens for held in since),
            saved[1] + sum(held.padding for held in since),
            saved[2] + sum(held.tokens for held in left_out),
        )

    def _content(self) -> dict[str, dict[str, Any]]:
        """What is known of each source by now, those of earlier mixtures included."""
        return {name: self._known(name) for name in self._earlier | self.streams}

    def _known(self, name: str) -> dict[str, Any]:
        earlier = self._earlier.get(name, {})
        if name not in self.streams:
            return earlier
        ours = _content_of(self.streams[name].source)
        # Text that is being prepared once more may have been complete before.
        return ours if ours["manifest_hash"] else {**ours, **earlier}

    def stream(self, source: int) -> Stream:
        """The stream of a source of the mixture, by its number there."""
        name = self.mixture.names[source]
        if name not in self.streams:
            raise UserError(f"data.sources has no {name}, which served windows before the run was resumed")
        return self.streams[name]

    def _row(self, source: int, k: int) -> Row:
        stream = self.stream(source)
        self.asked.name = stream.name
        source_id = self.names.index(stream.name)
        return Row(source_id, self._readers[source_id], stream.serve(k))


def _stages_of(
    weights: Mapping[str, Weight] | Sequence[Stage], sources: Mapping[str, TokenSource]
) -> list[Stage]:
    """The stages of a mixture, each with a weight, if only 0, for every source."""
    stages = [(0, weights)] if isinstance(weights, Mapping) else weights
    for name in sorted({name for _, shares in stages for name in shares}.difference(sources)):
        raise UserError(f"mixture: {name} has a weight and is not in data.sources ({', '.join(sources)})")
    for name, source in sources.items():
        if source.tokens == 0:
            raise UserError(f"data.sources.{name}: there is no token in it; remove it, or give it text")
    return [(first, {**dict.fromkeys(sources, 0), **shares}) for first, shares in stages]


def _count(windows: Stretches) -> int:
    return sum(last - first for first, last in windows)


def _account(inputs: int, total: int | None, counts: Counts | None) -> dict[str, float | None]:
    """What a source's ledger counts in tokens, of so many inputs trained."""
    if counts is None:
        return dict.fromkeys(("tokens", "padding", "trained", "skipped", "epochs", "to_come"))
    trained, padding, skipped = counts
    served = trained + skipped
    return {
        "tokens": inputs - padding,
        "padding": padding,
        "trained": trained,
        "skipped": skipped,
        "epochs": trained / total if total else None,
        "to_come": max(-(-served // total), 1) * total - served if total else None,
    }


def is_same_text(source: TokenSource, saved: Mapping[str, Any]) -> bool:
    """Whether a source is the one that a state speaks of."""
    ours = _content_of(source)
    field = "manifest_hash" if _are_both_complete(ours, saved) else "fingerprint"
    return bool(ours[field] == saved[field])


def _content_of(source: TokenSource) -> dict[str, Any]:
    complete = source.manifest_hash is not None and source.tokens is not None
    return {
        "manifest_hash": str(source.manifest_hash)[:HASH_DIGITS] if complete else None,
        "tokens": int(source.tokens or 0) if complete else None,
        "fingerprint": source.fingerprint[:HASH_DIGITS],
    }


def _are_both_complete(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Text that is still being prepared can be told by its input only."""
    return bool(one["manifest_hash"] and other["manifest_hash"])


def _check_same(field: str, saved: Any, ours: Any, way_out: str) -> None:
    if saved != ours:
        raise UserError(
            f"resume: {field} was {saved} in the checkpoint and is {ours} now, which would change the order "
            f"of the data; {way_out}, or start anew with resume=never"
        )
