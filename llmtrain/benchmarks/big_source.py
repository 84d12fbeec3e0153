"""A complete source of any size whose index is real and of whose shards only a few are on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.data.shard_format import BLOCK, ENTRY, Digests, Header, entry_of, shard_path
from llmtrain.data.shard_writer import write_manifest, write_table

HEADER = Header("big", 50_257, "eos")


def write_big_source(
    directory: Path,
    shards: int = 100_000,
    tokens_per_shard: int = 100_000_000,
    documents_per_shard: int = 100_000,
    materialised: Sequence[int] = (0,),
    header: Header = HEADER,
) -> dict[str, Any]:
    """Write `shards` equal shards; return index.json. Only those in `materialised` (not none) can be read.

    All ids are 0, so that tokens.bin is sparse: a shard takes 24 bytes a document on disk. Documents are of
    equal length, but for the last, and of 4 bytes of text a token; document d of shard s is row d of the file
    part-<s>.
    """
    assert materialised and tokens_per_shard >= documents_per_shard > 0
    size = tokens_per_shard * np.dtype(header.dtype).itemsize
    offsets = np.arange(documents_per_shard + 1) * (tokens_per_shard // documents_per_shard)
    offsets[-1] = tokens_per_shard
    tables = {
        "offsets": offsets,
        "text_bytes": 4 * np.diff(offsets),
        "origins": np.arange(documents_per_shard),
    }
    digests = Digests()
    zeros = memoryview(bytes(BLOCK))
    for start in range(0, size, BLOCK):
        digests.update(zeros[: size - start])
    digests.finish()  # once: it is the same for all shards
    for shard in materialised:
        path = shard_path(directory, shard)
        path.mkdir(parents=True)
        with (path / "tokens.bin").open("wb") as file:
            file.truncate(size)
        inputs = [{"file": f"part-{shard:05d}", "unit": "row", "documents": documents_per_shard}]
        manifest = write_manifest(path, header, tables, digests, (0, 0), inputs, {})
    table = np.empty(shards, ENTRY)
    table[:] = entry_of(manifest)
    return write_table(directory, header, table)
