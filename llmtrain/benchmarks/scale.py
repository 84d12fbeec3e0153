"""A source of ten trillion tokens without the disks: how long opening, any row and any provenance take.

One shard on the disk stands for all of them. Index, manifests, maps, digests and offsets are read as in
a run; the ids are zeros in a sparse file.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from llmtrain.benchmarks.big_source import write_big_source
from llmtrain.benchmarks.measure import Result, Station, markdown, memory, number
from llmtrain.data.dataset import PackedDataset
from llmtrain.data.provenance import row_of, steps_of
from llmtrain.data.shards import LocalShards, ShardedSource, shard_path

SHARDS, TOKENS, DOCUMENTS = 100_000, 100_000_000, 100_000
RANKS, SEQ_LEN = 10_000, 2048
"""Each rank has one row a step."""
DRAWS = 500


class OneForAll(LocalShards):
    """A source whose shards are all the one that is there."""

    def path(self, shard: int) -> Path:
        """The directory of the first one."""
        return shard_path(self.directory, 0)


def compare_scale(directory: Path, shards: int = SHARDS) -> Result:
    """Write the source and measure it in a process of its own."""
    write_big_source(directory, shards, TOKENS, DOCUMENTS)
    with Station(__name__) as station:
        return station.call("measure", str(directory))


def scale_table(result: Result) -> str:
    """What was measured as a Markdown table."""
    rows = [[name.replace("_", " "), number(value)] for name, value in result.items()]
    return markdown(("a source of 10T tokens", "measured"), rows)


def measure(directory: str) -> Result:
    """Open the source, read random rows of random steps of the first pass, ask where they are from."""
    before, begin = memory()["rss"], time.perf_counter()
    source = ShardedSource(OneForAll(Path(directory)))
    opened, held = time.perf_counter() - begin, memory()["rss"] - before
    assert source.tokens is not None
    dataset = PackedDataset(
        {"text": source}, {"text": 1}, seq_len=SEQ_LEN, global_batch_size=RANKS, seed=1, documents="separate",
        shuffle_span=65_536,
    )  # fmt: skip
    last = source.tokens // (RANKS * SEQ_LEN)
    draw = random.Random(0)
    places = [(draw.randrange(1, last), draw.randrange(RANKS)) for _ in range(DRAWS)]
    first = _milliseconds(partial(dataset.rows, 1, 0, 1))
    order = [_milliseconds(partial(row_of, dataset, *place)) for place in places]
    cold = [_milliseconds(partial(dataset.rows, step, row, row + 1)) for step, row in places]
    warm = [_milliseconds(partial(dataset.rows, step, row, row + 1)) for step, row in places[-50:]]
    inverse = [_milliseconds(_inverse_of(dataset, place, last)) for place in places]
    return {
        "shards": float(source.shards),
        "open,_s": opened,
        "open,_MB": held,
        "first_row_and_layout_of_the_pass,_ms": first,
        "any_row_of_any_rank,_shard_read_before,_ms": median(warm),
        "any_row_of_any_rank,_shard_never_read,_ms": median(cold),
        "where_of_any_row,_ms": median(order),
        "steps_of_any_document,_ms": median(inverse),
        "sparse_shards_read_from,_GB": DRAWS * TOKENS * 2 / 1e9,
        "memory_after_all_of_it,_MB": memory()["rss"],
    }


def _inverse_of(dataset: PackedDataset, place: tuple[int, int], last: int) -> Callable[[], object]:
    document = row_of(dataset, *place).documents[0]
    tokens = TOKENS // DOCUMENTS
    start = document.document * tokens

    def ask() -> None:
        found = steps_of(dataset, "text", document.shard, start, start + tokens, last)
        assert place in found or document.place + document.stop - document.start == 1

    return ask


def _milliseconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - begin)
