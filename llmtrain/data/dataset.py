"""The rows of every step of a run, as a pure function of sources, mixture, seed and step.

G  global_batch_size in rows, the only batch quantity that enters the order
n  (step - 1) * G + row, the number of a window: steps count from 1, rows and windows from 0
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from itertools import count
from typing import Any

from llmtrain.config import UserError
from llmtrain.data.batch import Batch
from llmtrain.data.mixture import Mixture, Stage, Weight, continue_stages
from llmtrain.data.packing import Documents, Row, pack
from llmtrain.data.stream import Stream, TokenSource

logger = logging.getLogger(__name__)

STATE_VERSION = 1
STEPS_AHEAD = 2
"""Steps that are read before they are asked for."""


class PackedDataset:
    """Packed rows from a mixture of prepared sources; nothing in it moves when rows are read.

    `weights` are shares of the tokens of the final stream, or a list of (first window, shares) where they
    change on the way. `source_ids` of the batches index `names`.
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
    ) -> None:
        self.names = sorted(sources)
        """The sources by number."""
        self._seq_len, self._global_batch_size, self._documents = seq_len, global_batch_size, documents
        self._stages = _stages_of(weights, sources)
        self.mixture = Mixture(self._stages)
        self._streams = {
            name: Stream(sources[name], name, seed, seq_len, shuffle_span) for name in self.names
        }
        self._order = {
            "seed": seed,
            "seq_len": seq_len,
            "global_batch_size": global_batch_size,
            "shuffle_span": shuffle_span,
            "documents": documents,
        }
        self._content: dict[str, dict[str, Any]] = {
            name: {"manifest_hash": sources[name].manifest_hash, "tokens": int(sources[name].tokens)}
            for name in self.names
        }

    def rows(self, step: int, first: int, last: int) -> Batch:
        """Rows first .. last - 1 of the global batch of a step."""
        assert step >= 1 and 0 <= first < last <= self._global_batch_size, (step, first, last)
        window = (step - 1) * self._global_batch_size
        sources, ks = self.mixture.picks(window + first, window + last)
        rows = [self._row(source, k) for source, k in zip(sources.tolist(), ks.tolist(), strict=True)]
        return pack(rows, self._seq_len, self._documents)

    def batches(
        self, start_step: int, rank: int, world_size: int, pin_memory: bool = False
    ) -> Generator[Batch, None, None]:
        """This rank's rows of step after step, without end, read STEPS_AHEAD steps ahead by a thread.

        Rank r of R has the rows rG/R .. (r+1)G/R - 1. What goes wrong in the thread is raised here, and the
        thread ends when the iterator is closed or dropped.
        """
        first, last = (r * self._global_batch_size // world_size for r in (rank, rank + 1))

        def load(step: int) -> Batch:
            batch = self.rows(step, first, last)
            return batch.pin_memory() if pin_memory else batch

        thread = ThreadPoolExecutor(1, thread_name_prefix="llmtrain-data")
        try:
            ahead = deque(thread.submit(load, start_step + i) for i in range(STEPS_AHEAD))
            for step in count(start_step + STEPS_AHEAD):
                batch = ahead.popleft().result()
                ahead.append(thread.submit(load, step))
                yield batch
        finally:
            thread.shutdown(cancel_futures=True)

    def state(self, steps_done: int) -> dict[str, Any]:
        """Where the order stands after so many steps and what it depends on: a few hundred bytes of JSON."""
        return {
            "version": STATE_VERSION,
            "windows": steps_done * self._global_batch_size,
            **self._order,
            "stages": self.mixture.stages,
            "sources": self._content,
        }

    def check_state(self, state: Mapping[str, Any]) -> int:
        """The first window after `state`; UserError naming what differs if the order would not go on.

        Other weights, an added or a removed source go on (see `resumed`), and so do other numbers of ranks,
        micro-batches and accumulation steps, which the order does not know.
        """
        for field, ours in {"version": STATE_VERSION, **self._order}.items():
            saved = state.get(field)
            _check_same(field, saved, ours, f"set {field}={saved} again")
        for name in sorted(self._content.keys() & state["sources"].keys()):
            for field, ours in self._content[name].items():
                way_out = "restore its text, tokenizer and boundary, give the new text a new source name"
                _check_same(f"{field} of data.sources.{name}", state["sources"][name][field], ours, way_out)
        return int(state["windows"])

    def resumed(self, state: Mapping[str, Any]) -> PackedDataset:
        """The dataset that goes on from `state`; where the weights differ a new stage begins at its window.

        Every source goes on at its own cursor: nothing is repeated, nothing is skipped.
        """
        window = self.check_state(state)
        resumed = copy(self)
        resumed.mixture = Mixture(continue_stages(state["stages"], self._stages, window))
        resumed._content = {**state["sources"], **self._content}
        if resumed.mixture.stages[-1][0] == window > 0:
            logger.info("mixture: new weights from window %d on: %s", *resumed.mixture.stages[-1])
        return resumed

    def ledger(self, steps_done: int) -> dict[str, dict[str, float]]:
        """What each source has served after so many steps, by arithmetic.

        weight: the share the mixture steers to now; share: of all tokens served, this source's part;
        tokens: served; total_tokens: T; epochs: tokens / T.
        """
        windows = steps_done * self._global_batch_size
        weights = self.mixture.shares(max(windows - 1, 0))
        ledger = {}
        for name, served in zip(self.mixture.names, self.mixture.counts(windows), strict=True):
            tokens, total = served * self._seq_len, self._content[name]["tokens"]
            ledger[name] = {
                "weight": weights[name],
                "share": served / max(windows, 1),
                "tokens": tokens,
                "total_tokens": total,
                "epochs": tokens / total,
            }
        return ledger

    def _row(self, source: int, k: int) -> Row:
        name = self.mixture.names[source]
        if name not in self._streams:
            raise UserError(f"data.sources has no {name}, which served windows before the run was resumed")
        stream = self._streams[name]
        return Row(self.names.index(name), stream.source, stream.pieces(stream.window(k)))


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


def _check_same(field: str, saved: Any, ours: Any, way_out: str) -> None:
    if saved != ours:
        raise UserError(
            f"resume: {field} was {saved} in the checkpoint and is {ours} now, which would change the order "
            f"of the data; {way_out}, or start anew with resume=never"
        )
