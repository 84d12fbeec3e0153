"""Which documents were in a step, and which steps saw a document: arithmetic on a run's order, not a log.

Works on a finished run and on one that is running, without its weights.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from llmtrain.config import UserError
from llmtrain.config.errors import did_you_mean
from llmtrain.data.batch import IGNORED
from llmtrain.data.dataset import PackedDataset
from llmtrain.data.growing import NotMadeError
from llmtrain.data.prepared import Prepared
from llmtrain.data.provenance import DocumentSpan, row_of, steps_of
from llmtrain.data.shards import ShardedSource
from llmtrain.tokenizer import Tokenizer, load_tokenizer
from llmtrain.training.build import build_dataset
from llmtrain.training.checkpoint import checkpoints
from llmtrain.training.config import TrainConfig
from llmtrain.training.finished import FinishedRun, LocalModel, open_text, read_config
from llmtrain.training.rewinds import read_rewinds
from llmtrain.training.run_directory import RunDirectory

logger = logging.getLogger(__name__)

STEPS_SHOWN = 20
HINTS = 100
"""Shards of a source in whose files it is looked for the one that was meant."""
SHOWN = 300
"""Characters of a document that the readable form shows; format=json has all of it."""


@dataclass(frozen=True)
class RunData:
    """The text of a run in the order in which the run reads it."""

    path: Path
    config: TrainConfig
    tokenizer: Tokenizer
    prepared: Prepared
    sources: dict[str, ShardedSource]
    held_out: dict[str, ShardedSource]
    dataset: PackedDataset
    step: int
    """The last step that was trained."""


def open_data(path: Path) -> RunData:
    """The data of the run in `path`; UserError where it has not begun, or its shards are gone."""
    config, directory = read_config(path), RunDirectory(path)
    order = directory.read_json("data/order.json")
    if order is None:
        raise UserError(f"{path}: no data/order.json in it: the run has not begun yet")
    tokenizer = load_tokenizer(path / "tokenizer")
    prepared = open_text(path, config, tokenizer, waits=False)
    sources, held_out = prepared.open()
    dataset = build_dataset(config, sources, read_rewinds(directory)).resumed(order)
    logged = [line["step"] for line in directory.read_metrics()[-1:]]  # a rewind leaves later ones before it
    saved = [step for step, _ in checkpoints(directory.checkpoints)]
    return RunData(path, config, tokenizer, prepared, sources, held_out, dataset, max([0, *logged, *saved]))


# Steps -> documents


def rows_at(data: RunData, step: int, row: int | None = None) -> Iterator[dict[str, Any]]:
    """What each row of a step holds: source, pass, span, and its documents with file, position and text.

    UserError for a step below 1 or a row that the global batch does not have; and at the end, where a run
    that is at work has not made the text of some rows yet.
    """
    if step < 1:
        raise UserError(f"step={step}: steps count from 1")
    rows = data.config.global_batch_size
    if row is not None and not 0 <= row < rows:
        raise UserError(f"row={row}: a step has the rows 0 to {rows - 1}")
    missing: Counter[str] = Counter()
    for number in range(rows) if row is None else [row]:
        try:
            answer = _row(data, step, number)
        except NotMadeError as error:
            missing[error.source] += 1
        else:
            yield answer
    if missing:
        of = (
            f"{count} of its rows are of {name}, of which {data.prepared.progress(name)} are made"
            for name, count in missing.items()
        )
        raise UserError(
            f"step={step}: {'; '.join(of)}; the run makes them in the order of its training: ask again later"
        )


def _row(data: RunData, step: int, number: int) -> dict[str, Any]:
    origin = row_of(data.dataset, step, number)
    source = data.sources[origin.source]
    return {
        "step": step,
        "row": number,
        "trained": step <= data.step,
        "source": origin.source,
        "pass": origin.epoch,
        "span": origin.span,
        "window": origin.window,
        "served_before": origin.k,
        "documents": [_part(data.tokenizer, source, span) for span in origin.documents],
    }


def _part(tokenizer: Tokenizer, source: ShardedSource, span: DocumentSpan) -> dict[str, Any]:
    """What a row has of a document."""
    start = int(source.offsets(span.shard)[span.document])
    ids = source.read(span.shard, start + span.start, start + span.stop)
    return {
        **document_at(source, span.shard, span.document),
        "first_token": span.start,
        "last_token": span.stop - 1,
        "place": span.place,
        "text": tokenizer.decode(ids.tolist()),
    }


def document_at(source: ShardedSource, shard: int, document: int) -> dict[str, Any]:
    """Which document that is."""
    start, stop = source.offsets(shard)[document : document + 2].tolist()
    file, unit, position = source.origin(shard, document)
    return {"file": file, unit: position, "shard": shard, "document": document, "tokens": stop - start}


def with_losses(data: RunData, finished: FinishedRun, row: dict[str, Any]) -> dict[str, Any]:
    """A row of `rows_at` with the mean loss of each of its documents, in nats a target, by the run's model.

    None for a document without a target in this row.
    """
    batch = data.dataset.rows(row["step"], row["row"], row["row"] + 1)
    model = LocalModel(finished.model)
    documents = []
    for document in row["documents"]:
        first = document["place"]
        last = first + document["last_token"] - document["first_token"]
        labels = torch.full_like(batch.labels, IGNORED)
        # The token at a place is the label of the place before it.
        mine = slice(max(first - 1, 0), last)
        labels[:, mine] = batch.labels[:, mine]
        targets = int((labels != IGNORED).sum())
        loss = model.loss(replace(batch, labels=labels)).sum().item() / targets if targets else None
        documents.append({**document, "loss": loss, "loss_at_step": finished.step})
    return {**row, "documents": documents}


# Documents -> steps


def steps_with(
    data: RunData, documents: Iterator[tuple[str, int, int]], until: int
) -> Iterator[dict[str, Any]]:
    """For each (source, shard, document): where it is from, and every (step, row) up to `until` with it.

    UserError where a run that is at work has not made the text of so many steps yet.
    """
    for name, shard, document in documents:
        source = data.sources[name]
        start, stop = source.offsets(shard)[document : document + 2].tolist()
        try:
            seen = steps_of(data.dataset, name, shard, start, stop, until)
        except NotMadeError as error:
            raise UserError(
                f"until={until}: {data.prepared.progress(name)} of {name} are made, and it needs others; the"
                f" run is at step {data.step}: lower until=, or ask again later"
            ) from error
        yield {
            "source": name,
            **document_at(source, shard, document),
            "until_step": until,
            "steps": [{"step": step, "row": row} for step, row in seen],
        }


def _to_search(data: RunData) -> dict[str, Sequence[int]]:
    """The shards of each source in which to look: beside a run that is at work those that it has made."""
    running = RunDirectory(data.path).is_locked()
    found: dict[str, Sequence[int]] = {}
    for name, source in data.sources.items():
        preparation = data.prepared.sources[name].preparation
        if preparation is None or preparation.complete or not running:
            found[name] = range(source.shards)
            continue
        found[name] = sorted(preparation.done())
        logger.info(
            "%s: %d of %d shards are made; the rest is not searched", name, len(found[name]), source.shards
        )
    return found


def _so_far(data: RunData, shards: Mapping[str, Sequence[int]]) -> str:
    """What a message adds where not everything was searched."""
    searched_all = all(len(shards[name]) == source.shards for name, source in data.sources.items())
    return "" if searched_all else " in the shards that the run has made so far; ask again later"


class _Stretch(NamedTuple):
    """Documents first .. last - 1 of a shard, which are of one file."""

    source: str
    shard: int
    first: int
    last: int
    file: str


def find_document(data: RunData, name: str) -> Iterator[tuple[str, int, int]]:
    """The documents of `file`, or the one of `file:position`, as (source, shard, document)."""
    file, _, place = name.rpartition(":")
    shards = _to_search(data)
    position = int(place) if place.isdecimal() else None
    found = _documents_of(data.sources, shards, name, file, position)
    if not found:
        raise UserError(f"document={name}: {_why_not(data, shards, name, file, position)}")
    return iter(found)


def _documents_of(
    sources: Mapping[str, ShardedSource],
    shards: Mapping[str, Sequence[int]],
    name: str,
    file: str,
    position: int | None,
) -> list[tuple[str, int, int]]:
    """The documents of the file `name`, or where there is none the one of `file` at a position."""
    stretches = list(_stretches(sources, shards, {name, file}))
    whole = [stretch for stretch in stretches if stretch.file == name]
    if whole or position is None:
        return [(at.source, at.shard, document) for at in whole for document in range(at.first, at.last)]
    return [
        (at.source, at.shard, at.first + int(document))
        for at in stretches
        for document in np.flatnonzero(_positions(sources, at) == position)
    ]


def _stretches(
    sources: Mapping[str, ShardedSource], shards: Mapping[str, Sequence[int]], files: set[str]
) -> Iterator[_Stretch]:
    for name, source in sources.items():
        for shard in shards[name]:
            first = 0
            for one in source.inputs(shard):
                last = first + one["documents"]
                if one["file"] in files:
                    yield _Stretch(name, shard, first, last, one["file"])
                first = last


def _positions(sources: Mapping[str, ShardedSource], at: _Stretch) -> np.ndarray:
    """Where in their file the documents are, int64 [documents]."""
    return sources[at.source].positions(at.shard)[at.first : at.last]


def _why_not(
    data: RunData, shards: Mapping[str, Sequence[int]], name: str, file: str, position: int | None
) -> str:
    """Why no step has a document: held out, rejected, or not there; then what could have been meant."""
    if _documents_of(data.held_out, shards, name, file, position):
        return "is held out, so no step has it"
    if position is not None and (reason := _rejected(data, file, position)):
        return f"is a bad record ({reason}), so no step has it"
    so_far = _so_far(data, shards)
    stretches = list(_stretches(data.sources, shards, {file}))
    if position is None or not stretches:
        hint = did_you_mean(file or name, _some_files(data.sources, shards))
        return f"no training document is of that file{so_far}{hint}"
    positions = np.sort(np.concatenate([_positions(data.sources, at) for at in stretches]))
    after = int(positions.searchsorted(position))
    nearest = " and ".join(f"{file}:{other}" for other in positions[max(after - 1, 0) : after + 1])
    return f"no training document of {file} begins there{so_far}; the nearest are {nearest}"


def _rejected(data: RunData, file: str, position: int) -> str | None:
    """Why the record at a position of a file was set aside; None where it was not."""
    wanted = json.dumps(file).encode()
    for name in data.sources:
        for path in data.prepared.quarantine(name):
            with path.open("rb") as lines:
                for line in lines:
                    if wanted in line:
                        record = json.loads(line)
                        if (record["file"], record["position"]) == (file, position):
                            return f"{record['reason']}, see {path}"
    return None


def _some_files(sources: Mapping[str, ShardedSource], shards: Mapping[str, Sequence[int]]) -> list[str]:
    """Files that could have been meant."""
    some = ((source, shard) for name, source in sources.items() for shard in shards[name][:HINTS])
    return sorted({entry["file"] for source, shard in some for entry in source.inputs(shard)})


def find_text(data: RunData, text: str, most: int) -> Iterator[tuple[str, int, int]]:
    """The first `most` training documents that contain `text`; all are decoded, which takes its time."""
    if not text:
        raise UserError("text= is empty: give a piece of the text to look for")
    shards, left = _to_search(data), most
    for name, source in data.sources.items():
        for shard in shards[name]:
            for document in _documents_with(source, shard, text, data.tokenizer):
                yield name, shard, document
                left -= 1
                if not left:
                    logger.info("stopped after %d documents; raise most= for more", most)
                    return
    if left == most:
        so_far = _so_far(data, shards)
        raise UserError(
            f"text={text!r}: no training document contains it{so_far} (held-out ones are not searched)"
        )


def _documents_with(source: ShardedSource, shard: int, text: str, tokenizer: Tokenizer) -> Iterator[int]:
    offsets = source.offsets(shard).tolist()
    for document, (start, stop) in enumerate(pairwise(offsets)):
        if text in tokenizer.decode(source.read(shard, start, stop).tolist()):
            yield document


# For people


def readable(answer: dict[str, Any]) -> str:
    """An answer for people."""
    if "steps" in answer:
        steps = [f"{place['step']} (row {place['row']})" for place in answer["steps"]]
        at = ", ".join(steps[:STEPS_SHOWN]) or "none"
        more = f", and {len(steps) - STEPS_SHOWN} more" if len(steps) > STEPS_SHOWN else ""
        what = f"{_origin(answer)}, {answer['source']}, {answer['tokens']} tokens"
        return f"{what}; steps until {answer['until_step']}: {at}{more}"
    place = f"{answer['source']}, pass {answer['pass']}, span {answer['span']}"
    if not answer["trained"]:
        place += " (not trained yet)"
    head = f"step {answer['step']} row {answer['row']}: {place}"
    return "\n".join([head, *(_shown(document) for document in answer["documents"])])


def _shown(document: dict[str, Any]) -> str:
    part = f"tokens {document['first_token']}-{document['last_token']} of {document['tokens']}"
    loss = "" if document.get("loss") is None else f", loss {document['loss']:.4f}"
    text = " ".join(document["text"][:SHOWN].split())
    return f"  {_origin(document)}, {part}{loss}\n    {text}"


def _origin(answer: dict[str, Any]) -> str:
    unit = "byte" if "byte" in answer else "row"
    return f"{answer['file']} {unit} {answer[unit]}"
