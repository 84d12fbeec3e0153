"""Which documents were in a step, and which steps saw a document: arithmetic on a run's order, not a log.

Works on a finished run and on one that is running, without its weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmtrain.config import UserError
from llmtrain.config.errors import did_you_mean
from llmtrain.data.batch import IGNORED
from llmtrain.data.dataset import PackedDataset
from llmtrain.data.provenance import DocumentSpan, WindowOrigin, row_of, steps_of
from llmtrain.data.shards import ShardedSource
from llmtrain.tokenizer import Tokenizer, load_tokenizer
from llmtrain.training.build import build_dataset
from llmtrain.training.checkpoint import checkpoints
from llmtrain.training.config import TrainConfig
from llmtrain.training.finished import FinishedRun, LocalModel, open_sources, read_config
from llmtrain.training.run_directory import RunDirectory

logger = logging.getLogger(__name__)

STEPS_SHOWN = 20
SHOWN = 300
"""Characters of a document that the readable form shows; format=json has all of it."""


@dataclass(frozen=True)
class RunData:
    """The text of a run in the order in which the run reads it."""

    path: Path
    config: TrainConfig
    tokenizer: Tokenizer
    sources: dict[str, ShardedSource]
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
    sources, _ = open_sources(path, config, tokenizer)
    dataset = build_dataset(config, sources).resumed(order)
    logged = [line["step"] for line in directory.read_metrics()]
    saved = [step for step, _ in checkpoints(directory.checkpoints)]
    return RunData(path, config, tokenizer, sources, dataset, max([0, *logged, *saved]))


# Steps -> documents


def rows_at(data: RunData, step: int, row: int | None = None) -> Iterator[dict[str, Any]]:
    """What each row of a step holds: source, pass, span, and its documents with file, position and text.

    UserError for a step below 1 or a row that the global batch does not have.
    """
    if step < 1:
        raise UserError(f"step={step}: steps count from 1")
    rows = data.config.global_batch_size
    if row is not None and not 0 <= row < rows:
        raise UserError(f"row={row}: a step has the rows 0 to {rows - 1}")
    for number in range(rows) if row is None else [row]:
        origin = row_of(data.dataset, step, number)
        yield {
            "step": step,
            "row": number,
            "trained": step <= data.step,
            "source": origin.source,
            "pass": origin.epoch,
            "span": origin.span,
            "window": origin.window,
            "served_before": origin.k,
            "documents": [_document(data, origin, span) for span in origin.documents],
        }


def _document(data: RunData, origin: WindowOrigin, span: DocumentSpan) -> dict[str, Any]:
    source = data.sources[origin.source]
    start, stop = (int(offset) for offset in source.offsets(span.shard)[span.document : span.document + 2])
    file, unit, position = source.origin(span.shard, span.document)
    ids = source.read(span.shard, start + span.start, start + span.stop)
    return {
        "file": file,
        unit: position,
        "shard": span.shard,
        "document": span.document,
        "tokens": stop - start,
        "first_token": span.start,
        "last_token": span.stop - 1,
        "place": span.place,
        "text": data.tokenizer.decode(ids.tolist()),
    }


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
    """For each (source, shard, document): where it is from, and every (step, row) up to `until` with it."""
    for name, shard, document in documents:
        source = data.sources[name]
        start, stop = (int(offset) for offset in source.offsets(shard)[document : document + 2])
        file, unit, position = source.origin(shard, document)
        seen = steps_of(data.dataset, name, shard, start, stop, until)
        yield {
            "source": name,
            "file": file,
            unit: position,
            "shard": shard,
            "document": document,
            "tokens": stop - start,
            "until_step": until,
            "steps": [{"step": step, "row": row} for step, row in seen],
        }


def find_document(data: RunData, name: str) -> Iterator[tuple[str, int, int]]:
    """The documents of `file`, or the one of `file:position`, as (source, shard, document)."""
    file, _, place = name.rpartition(":")
    found = list(_documents_of(data, name, None))
    if not found and place.isdigit():
        found = list(_documents_of(data, file, int(place)))
    if not found:
        raise UserError(
            f"document={name}: no training document of that file and position; it may be held out, or a bad "
            f"record{did_you_mean(file or name, _some_files(data))}"
        )
    return iter(found)


def _documents_of(data: RunData, file: str, position: int | None) -> Iterator[tuple[str, int, int]]:
    for name, source in data.sources.items():
        for shard in source.find(file):
            for document in range(len(source.offsets(shard)) - 1):
                origin = source.origin(shard, document)
                if origin.file == file and position in (None, origin.position):
                    yield name, shard, document


def _some_files(data: RunData) -> list[str]:
    """Files that could have been meant."""
    shards = ((source, shard) for source in data.sources.values() for shard in range(min(source.shards, 100)))
    return sorted({entry["file"] for source, shard in shards for entry in source.inputs(shard)})


def find_text(data: RunData, text: str, most: int) -> Iterator[tuple[str, int, int]]:
    """The first `most` training documents that contain `text`; all are decoded, which takes its time."""
    if not text:
        raise UserError("text= is empty: give a piece of the text to look for")
    left = most
    for name, source in data.sources.items():
        for shard in range(source.shards):
            offsets = source.offsets(shard)
            for document in range(len(offsets) - 1):
                ids = source.read(shard, int(offsets[document]), int(offsets[document + 1]))
                if text in data.tokenizer.decode(ids.tolist()):
                    yield name, shard, document
                    left -= 1
                    if not left:
                        logger.info("stopped after %d documents; raise most= for more", most)
                        return
    if left == most:
        raise UserError(f"text={text!r}: no training document contains it (held-out ones are not searched)")


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
