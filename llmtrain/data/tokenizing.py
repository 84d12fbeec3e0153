"""One part of a source to one shard pair: what training reads, what is held out, and what was unusable.

    <source>/quarantine/shard-00017.jsonl    the unusable records, where there are some
             validation/shard-00017/         the held-out documents
             train/shard-00017/              all others; its presence says that the part is done
                               input.json    what was read, file by file where it matters (a `Report`)

A part is a pure function of its text: who makes it, when, and beside what others, changes no byte of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO, get_args

import numpy as np

from llmtrain.config import UserError
from llmtrain.config.secrets import without_secrets
from llmtrain.data import readers
from llmtrain.data.artefacts import claimed, kernel, no_tick, publish, take_flock, touched_at, touching
from llmtrain.data.config import Boundary, DataConfig, SourceConfig
from llmtrain.data.records import EMPTY, Document, Part, Record, Rejected, Slice, TokenDocument
from llmtrain.data.shards import Header, ShardWriter, shard_path
from llmtrain.files import sync
from llmtrain.tokenizer.backends import REFERENCE, OtherIdsError
from llmtrain.tokenizer.base import Ids, Tokenizer
from llmtrain.tokenizer.huggingface import HuggingFaceTokenizer

logger = logging.getLogger(__name__)

TRAIN, VALIDATION, QUARANTINE = "train", "validation", "quarantine"
REPORT = "input.json"
BATCH_BYTES = 1_000_000
"""Text encoded at a time: enough to keep every core busy."""
CHECK_EVERY = 2048
"""Of so many documents one is encoded by the tokenizer's reference too: about 2 % of all the work."""
ALLOWANCE = 10
"""Bad records beyond its share that a stretch of a file may have, for it is the whole file that counts."""
TELL_RECORDS = 4096
"""Records after which it is told that reading gets on, also where none of them has text."""
HOPELESS = (1000, 10)
"""Reading stops early where, of so many records, so many times the allowed share is bad."""

Tell = Callable[[int, int, int, int], None]
"""Told after each batch how much more there is: bytes of input, documents, bytes of text, tokens.

Less than nothing where a part is made again; nothing where the work only gets on.
"""


@dataclass(frozen=True)
class Rules:
    """What is held out, and what becomes of bad records."""

    validation_fraction: float
    bad_records: str
    max_bad_fraction: float
    max_document_bytes: int

    @classmethod
    def of(cls, data: DataConfig) -> Rules:
        """The rules of a config."""
        return cls(data.validation_fraction, data.bad_records, data.max_bad_fraction, data.max_document_bytes)


@dataclass(frozen=True)
class Task:
    """One part, and everything that its shards depend on but the tokenizer itself."""

    name: str
    """The source's, for messages."""
    source: SourceConfig
    rules: Rules
    header: Header
    directory: Path
    number: int
    part: Part
    cut: frozenset[str]
    """Those of the part's files of which other parts have stretches."""

    @property
    def done(self) -> bool:
        """Whether its shards are there."""
        return shard_path(self.directory / TRAIN, self.number).is_dir()


@dataclass
class FileCount:
    """The records of a file, or of a stretch of one, and what was wrong with some."""

    file: str
    records: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    first: str = ""
    """The first bad one, for people."""

    @property
    def bad(self) -> int:
        """Records that are mistakes; an empty one is none."""
        return sum(self.rejected.values()) - self.rejected[EMPTY]

    def as_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`, as JSON."""
        return {**vars(self), "rejected": dict(self.rejected)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> FileCount:
        """What `as_dict` made."""
        return cls(value["file"], value["records"], Counter(value["rejected"]), value["first"])

    def add(self, other: FileCount) -> None:
        """Another stretch of the same file."""
        self.records += other.records
        self.rejected.update(other.rejected)
        self.first = self.first or other.first


@dataclass
class Report:
    """What a part held: stored beside its training shard, so that rules can be held against it later."""

    records: int = 0
    tokens: int = 0
    text_bytes: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    files: list[FileCount] = field(default_factory=list)
    """Those with bad records, and those that other parts have stretches of."""
    encoder: str = ""
    """The library that made the ids, and its version: whom to ask, should ids ever differ."""

    @property
    def bad(self) -> int:
        """Records that are mistakes; an empty one is none."""
        return sum(self.rejected.values()) - self.rejected[EMPTY]

    def save(self, path: Path) -> None:
        """Write it to disk for good."""
        files = [count.as_dict() for count in self.files]
        text = json.dumps({**vars(self), "rejected": dict(self.rejected), "files": files})
        path.write_text(text, encoding="utf-8")
        sync(path)

    @classmethod
    def load(cls, task_directory: Path, number: int) -> Report:
        """The report of a part that is done; UserError where it is damaged."""
        path = shard_path(task_directory / TRAIN, number) / REPORT
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            files = [FileCount.from_dict(count) for count in value["files"]]
            return cls(**(value | {"rejected": Counter(value["rejected"]), "files": files}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read ({error!r}): delete the directory {task_directory}, prepare again"
            ) from error


def make(task: Task, tokenizer: Tokenizer, tell: Tell) -> bool:
    """Have the part's shards there; False where another process is at work on them.

    Any number of processes may be asked for the same part; `worked_at` shows them that the one who makes it
    gets on. UserError for text that cannot be used.
    """
    if task.done:
        return True
    claim = _claim(task.directory, task.number)
    claim.parent.mkdir(exist_ok=True)
    touch = touching(claim, no_tick)

    def tell_all(*more: int) -> None:
        touch()
        tell(*more)

    with claimed(claim) as mine:
        if not mine:
            return False
        if not task.done:
            _make_aside(task, tokenizer, tell_all)
    return True


def worked_at(directory: Path, number: int) -> int:
    """Differs from what it was if the process that makes a part has got on since, or left it."""
    return touched_at(_claim(directory, number))


def _make_aside(task: Task, tokenizer: Tokenizer, tell: Tell) -> None:
    aside = task.directory / f".tmp-{task.number:05d}-{kernel()}-{uuid.uuid4().hex}"
    try:
        _fill(task, tokenizer, aside, tell)
        quarantine = aside / f"{QUARANTINE}.jsonl"
        if quarantine.exists():
            sync(quarantine)
            publish(quarantine, quarantine_path(task.directory, task.number))
        for split in (VALIDATION, TRAIN):
            publish(aside / split, shard_path(task.directory / split, task.number))
    except OSError:
        if not task.done:  # where locks mean nothing, the one who was first has cleared up
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fill(task: Task, tokenizer: Tokenizer, aside: Path, tell: Tell) -> None:
    """Write the part's shards; once more, from the start, where the tokenizer's backend gave wrong ids."""
    told = [0, 0, 0, 0]

    def count(*more: int) -> None:
        told[:] = map(sum, zip(told, more, strict=True))
        tell(*more)

    try:
        _Tokenizing(task, tokenizer, aside, count).run()
    except OtherIdsError as error:
        logger.warning(
            "data.sources.%s: %s; part %d is made again without it; shards that it made before stay: to have"
            " none of its ids, delete %s, set tokenizer.backend=%s and prepare again",
            task.name, error, task.number, task.directory, REFERENCE,
        )  # fmt: skip
        shutil.rmtree(aside)
        tell(*(-number for number in told))
        _Tokenizing(task, tokenizer, aside, tell).run()


def clear_dead(directory: Path) -> None:
    """Remove what processes left that are no more: nobody works on those parts.

    Locks may be known to one machine only, so what another one left stays until the part is done.
    """
    for left in directory.glob(".tmp-*"):
        number = int(left.name.split("-")[1])
        ours = left.name.startswith(f".tmp-{number:05d}-{kernel()}-")
        if shard_path(directory / TRAIN, number).is_dir():
            shutil.rmtree(left, ignore_errors=True)
        elif ours:
            with suppress(FileNotFoundError), _claim(directory, number).open("a") as claim:
                if take_flock(claim.fileno(), without=False):
                    shutil.rmtree(left, ignore_errors=True)


def quarantine_path(directory: Path, number: int) -> Path:
    """The file that keeps the bad records of a part, if it has some and the rules said so."""
    return shard_path(directory / QUARANTINE, number).with_suffix(".jsonl")


def _claim(directory: Path, number: int) -> Path:
    """The file whose lock is held by the process that makes a part."""
    return directory / ".claims" / f"{number:05d}.lock"


class _Tokenizing:
    """Encodes the documents of one part into its two shards and counts what becomes of each record."""

    def __init__(self, task: Task, tokenizer: Tokenizer, aside: Path, tell: Tell) -> None:
        self._task, self._tokenizer, self._aside, self._tell = task, tokenizer, aside, tell
        ends = boundary_ids(task.header.boundary, tokenizer)
        self._before, self._after = (np.array(ids, np.int32) for ids in ends)
        self._writers = {split: ShardWriter(aside / split, task.header) for split in (TRAIN, VALIDATION)}
        self._report = Report()
        self._unchecked = 619 * task.number % CHECK_EVERY  # other places in other parts
        self._quarantine: TextIO | None = None
        self._files = ExitStack()

    def run(self) -> None:
        """Read everything and finish both shards; UserError for a file with too many bad records."""
        with self._files:
            for piece in self._task.part.slices:
                self._read(piece)
        manifests = {split: writer.finish() for split, writer in self._writers.items()}
        report = self._report
        for key, there in (("tokens", report.tokens), ("text_bytes", report.text_bytes)):
            assert there == sum(manifest[key] for manifest in manifests.values()), (
                f"{key} were lost: {report}"
            )
        documents = sum(manifest["documents"] for manifest in manifests.values())
        assert report.records == documents + sum(report.rejected.values()), f"documents were lost: {report}"
        report.encoder = _encoder(self._tokenizer)
        report.save(self._aside / TRAIN / REPORT)
        sync(self._aside / TRAIN)

    def _read(self, piece: Slice) -> None:
        for writer in self._writers.values():
            writer.begin(without_secrets(piece.file), piece.unit)
        count, told = FileCount(without_secrets(piece.file)), 0
        for batch in batches(self._usable(self._records(piece), piece, count), BATCH_BYTES):
            documents, text_bytes, tokens = self._add(batch, piece, count)
            consumed = max(0, min(text_bytes, (piece.size or 0) - told))  # unpacked text may be longer
            told += consumed
            self._tell(consumed, documents, text_bytes, tokens)
        self._tell((piece.size or 0) - told, 0, 0, 0)
        self._report.records += count.records
        self._report.rejected.update(count.rejected)
        is_cut = piece.file in self._task.cut
        check_bad(self._task.name, self._task.source, self._task.rules, count, is_cut)
        if is_cut or count.bad:
            self._keep(count)

    def _records(self, piece: Slice) -> Iterator[Record]:
        """What the readers give; what they cannot read is said with the name of the source."""
        try:
            yield from readers.read(
                self._task.source,
                piece,
                self._task.rules.max_document_bytes,
                eos_id=self._tokenizer.eos_id,
                vocab_size=self._tokenizer.vocab_size,
            )
        except UserError as error:
            lines = (f"data.sources.{self._task.name}: {line}" for line in error.lines)
            raise UserError(*lines, exit_code=error.exit_code) from error

    def _keep(self, count: FileCount) -> None:
        """Remember the count; slices of a file that follow each other are one stretch of it."""
        files = self._report.files
        if files and files[-1].file == count.file:
            files[-1].add(count)
        else:
            files.append(count)

    def _usable(
        self, records: Iterable[Record], piece: Slice, count: FileCount
    ) -> Iterator[Document | TokenDocument]:
        for record in records:
            count.records += 1
            if count.records % TELL_RECORDS == 0:
                self._tell(0, 0, 0, 0)
            if isinstance(record, Rejected):
                self._reject(record, piece, count)
            else:
                yield record

    def _reject(self, record: Rejected, piece: Slice, count: FileCount) -> None:
        self._writers[TRAIN].reject(record.reason)
        count.rejected[record.reason] += 1
        if record.reason == EMPTY:
            return  # nothing is wrong, and there is nothing to keep
        count.first = count.first or _describe(record, piece)
        rules = self._task.rules
        if rules.bad_records == "quarantine":
            self._set_aside(record, piece)
        enough, times = HOPELESS
        hopeless = times * rules.max_bad_fraction * count.records
        if rules.bad_records == "raise" or (count.records >= enough and count.bad > max(times, hopeless)):
            raise too_many_bad(self._task.name, self._task.source, rules, count)

    def _set_aside(self, record: Rejected, piece: Slice) -> None:
        if self._quarantine is None:
            path = self._aside / f"{QUARANTINE}.jsonl"
            self._quarantine = self._files.enter_context(path.open("w", encoding="utf-8"))
        text = record.record.decode(errors="backslashreplace")
        line = {"file": without_secrets(piece.file), "position": record.position, "unit": piece.unit}
        line |= {"reason": record.reason, "detail": record.detail, "size": record.size, "record": text}
        self._quarantine.write(json.dumps(line, ensure_ascii=True) + "\n")

    def _add(
        self, batch: list[Document | TokenDocument], piece: Slice, count: FileCount
    ) -> tuple[int, int, int]:
        """Encode documents and append them to the split they belong to: how many, bytes of text, tokens."""
        texts = [document.text for document in batch if isinstance(document, Document)]
        encoded = iter(self._encode(texts) if texts else ())
        splits: dict[str, tuple[list[Ids], list[int], list[int]]] = {s: ([], [], []) for s in self._writers}
        tokens = text_bytes = 0
        for document in batch:
            if isinstance(document, Document):
                content = document.text.encode()
                size, body = len(content), next(encoded)
                ids = np.concatenate((self._before, body, self._after))
            else:
                ids = body = np.ascontiguousarray(document.ids, "<i4")
                content = body.tobytes()
                size = len(self._tokenizer.decode(body.tolist()).encode())
            if not len(body):  # visible text that the tokenizer makes nothing of
                self._reject(Rejected(EMPTY, document.position, b"", 0), piece, count)
                continue
            held_out = is_held_out(content, self._task.rules.validation_fraction)
            column = splits[VALIDATION if held_out else TRAIN]
            for values, value in zip(column, (ids, size, document.position), strict=True):
                values.append(value)  # type: ignore[attr-defined]
            tokens += len(ids)
            text_bytes += size
        for split, (ids_of, sizes, positions) in splits.items():
            self._writers[split].add_batch(ids_of, sizes, positions)
        self._report.tokens += tokens
        self._report.text_bytes += text_bytes
        return len(batch), text_bytes, tokens

    def _encode(self, texts: list[str]) -> list[Ids]:
        """Their ids; OtherIdsError where those of one text in CHECK_EVERY turn out to be wrong."""
        ids = self._tokenizer.encode_batch(texts)
        if isinstance(self._tokenizer, HuggingFaceTokenizer):
            sample = slice(self._unchecked, None, CHECK_EVERY)
            self._unchecked = (self._unchecked - len(texts)) % CHECK_EVERY
            self._tokenizer.check(texts[sample], ids[sample])
        return ids


def _encoder(tokenizer: Tokenizer) -> str:
    name = str(getattr(tokenizer, "backend_name", type(tokenizer).__module__.rpartition(".")[2]))
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return name


def batches(
    documents: Iterable[Document | TokenDocument], size: int
) -> Iterator[list[Document | TokenDocument]]:
    """Consecutive documents, in lists of about `size` characters of text (or a quarter as many tokens)."""
    batch: list[Document | TokenDocument] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document.text) if isinstance(document, Document) else 4 * len(document.ids)
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def is_held_out(text: bytes, fraction: float) -> bool:
    """Whether a document is in the validation split: by its content, so that duplicates stay together."""
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    return number < fraction * 2**64


def boundary_ids(boundary: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids before and after each document; UserError where the tokenizer lacks one of them."""
    have = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    for name, token in have.items():
        if name in boundary and token is None:
            possible = [policy for policy in get_args(Boundary) if _can_serve(policy, have)]
            raise UserError(
                f"data.boundary={boundary}: the tokenizer has no {name} id; set data.boundary to"
                f" {' or '.join(possible)}"
            )
    before, after = (
        [token] if name in boundary and token is not None else [] for name, token in have.items()
    )
    return before, after


def _can_serve(boundary: str, have: Mapping[str, int | None]) -> bool:
    return all(have[name] is not None for name in ("bos", "eos") if name in boundary)


# Bad records


def check_bad(name: str, source: SourceConfig, rules: Rules, count: FileCount, is_cut: bool = False) -> None:
    """UserError where more of a file's records are bad than the rules allow.

    A stretch of a file (`is_cut`) is given ALLOWANCE, so that one bad line in a short rest is not held
    against it; the whole file is looked at once all of it was read.
    """
    if rules.bad_records == "raise":
        allowed = 0.0
    else:
        allowance = ALLOWANCE if is_cut and rules.max_bad_fraction else 0
        allowed = rules.max_bad_fraction * count.records + allowance
    if count.bad > allowed:
        raise too_many_bad(name, source, rules, count)


def too_many_bad(name: str, source: SourceConfig, rules: Rules, count: FileCount) -> UserError:
    """The error that names the file, what is wrong with its records, and the ways out."""
    key = f"data.sources.{name}.path={source.path}"
    if rules.bad_records == "raise":
        return UserError(
            f"{key}: {count.first}; data.bad_records=raise stops here: mend the record, or set"
            " data.bad_records to quarantine"
        )
    reasons = ", ".join(
        f"{number:,} {reason}" for reason, number in count.rejected.most_common() if reason != EMPTY
    )
    return UserError(
        f"{key}: of {count.records:,} records of {count.file} that were read, {count.bad:,} are bad"
        f" ({reasons}), more than data.max_bad_fraction={rules.max_bad_fraction:g} allows; the first is"
        f" {count.first}; check the keys of the source, mend the file, or raise data.max_bad_fraction"
    )


def _describe(record: Rejected, piece: Slice) -> str:
    what = record.detail if record.detail.startswith(record.reason) else f"{record.reason}: {record.detail}"
    return f"{without_secrets(piece.file)} at {piece.unit} {record.position}: {what.removesuffix(': ')}"
