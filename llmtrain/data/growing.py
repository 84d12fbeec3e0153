"""Sources whose shards are being made: what makes them, how far they are, and how one waits for a shard."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmtrain.config import UserError
from llmtrain.config.secrets import without_secrets
from llmtrain.data import readers
from llmtrain.data.artefacts import Tick, artefact_key, computing, locked, no_tick, touching, write_whole
from llmtrain.data.config import DataConfig, SourceConfig
from llmtrain.data.records import Part
from llmtrain.data.shard_format import load_manifest
from llmtrain.data.shards import INDEX, MAX_OPEN, Header, LocalShards, shard_path, write_index
from llmtrain.data.tokenizing import (
    TRAIN,
    VALIDATION,
    FileCount,
    Report,
    Rules,
    Task,
    check_bad,
    clear_dead,
    quarantine_path,
)

logger = logging.getLogger(__name__)

VERSION = 2
"""Part of every key: raise it when the same input would give other shards."""
ERROR = "error.json"
FIRST_POLL, SLOWEST_POLL = 0.005, 0.2
"""Seconds between two looks for a shard."""
SPEAK, REMIND = 5.0, 30.0
"""Seconds of waiting after which it is said, and said again."""


class Preparation:
    """One source of text on its way into shards, all of it in one directory of the cache."""

    def __init__(
        self, name: str, source: SourceConfig, data: DataConfig, header: Header, cache_dir: Path
    ) -> None:
        self.name, self.source, self.header, self.rules = name, source, header, Rules.of(data)
        self._made_from = {
            "version": VERSION,
            "tokenizer": header.tokenizer,
            "boundary": header.boundary,
            "validation_fraction": data.validation_fraction,
            "max_document_bytes": data.max_document_bytes,
            "input": readers.fingerprint(source),
        }
        self.fingerprint = artefact_key(self._made_from)
        self.directory = cache_dir.expanduser() / "shards" / self.fingerprint
        self._reports: dict[int, Report] = {}
        self.closed = threading.Event()
        """Set when nobody in this process wants shards any more: who waits for one is sent home."""
        self._documents: dict[tuple[str, int], int] = {}

    @cached_property
    def parts(self) -> list[Part]:
        """The parts of the input; as many shards."""
        return readers.parts(self.source)

    @cached_property
    def _stretches(self) -> Counter[str]:
        """In how many slices each file is read."""
        return Counter(without_secrets(piece.file) for part in self.parts for piece in part.slices)

    @property
    def complete(self) -> bool:
        """Whether every shard is there and indexed."""
        return (self.directory / TRAIN / INDEX).is_file()

    def begin(self) -> None:
        """Make the directory, with a note of what it is made from; clear what dead processes left."""
        for split in (TRAIN, VALIDATION):
            (self.directory / split).mkdir(parents=True, exist_ok=True)
        note = {
            **self._made_from,
            "path": without_secrets(self.source.location),
            "format": readers.resolve_format(self.source),
        }
        note |= {"parts": len(self.parts), "vocab_size": self.header.vocab_size}
        if not (self.directory / "source.json").exists():
            write_whole(self.directory / "source.json", json.dumps(note, indent=1))
        clear_dead(self.directory)

    def task(self, number: int) -> Task:
        """What a process has to know to make one part."""
        part = self.parts[number]
        cut = frozenset(
            piece.file for piece in part.slices if self._stretches[without_secrets(piece.file)] > 1
        )
        return Task(self.name, self.source, self.rules, self.header, self.directory, number, part, cut)

    def done(self) -> set[int]:
        """The parts whose shards are there."""
        try:
            names = [entry.name for entry in os.scandir(self.directory / TRAIN)]
        except FileNotFoundError:
            return set()
        return {int(name.removeprefix("shard-")) for name in names if name.startswith("shard-")}

    def report(self, number: int) -> Report:
        """What a part that is done held."""
        if number not in self._reports:
            self._reports[number] = Report.load(self.directory, number)
        return self._reports[number]

    def check(self, numbers: Iterable[int]) -> None:
        """Hold the present rules against parts that may have been made under others."""
        numbers = sorted(numbers)
        for number in numbers:
            for count in self.report(number).files:
                check_bad(self.name, self.source, self.rules, count, self._stretches[count.file] > 1)
        self._say_not_kept(self._not_kept(numbers))

    def finish(self, tick: Tick = no_tick) -> bool:
        """Index both splits if every part is done; whether that is so. `tick` as somebody gets on with it.

        UserError where a file turns out to have too many bad records, or nothing is left to train on.
        """
        if self.complete:
            return True
        if len(self.done()) < len(self.parts):
            return False
        lock = self.directory / ".index.lock"
        with locked(lock, f"source {self.name}", tick), computing(touching(lock, tick)):
            if not self.complete:
                self._index()
        return True

    def _index(self) -> None:
        numbers = range(len(self.parts))
        reports = [self.report(number) for number in numbers]
        worst = self._worst(reports)
        if worst:
            check_bad(self.name, self.source, self.rules, worst)
        came = self.came()
        extra: dict[str, Any] = {"input": came, "worst_file": worst and worst.as_dict()}
        extra |= {"not_kept": self._not_kept(numbers), "fingerprint": self.fingerprint}
        held_out = write_index(
            self.directory / VALIDATION,
            self.header,
            len(numbers),
            fingerprint=f"{self.fingerprint} {VALIDATION}",
        )
        train = self._sums(len(numbers))
        self._check_conservation(came, train, held_out)
        if not train["documents"]:
            raise UserError(self._nothing_to_train(came, held_out["documents"]))
        write_index(self.directory / TRAIN, self.header, len(numbers), **extra)
        clear_dead(self.directory)
        (self.directory / ERROR).unlink(missing_ok=True)

    def _sums(self, count: int) -> dict[str, int]:
        """What the training shards say of themselves."""
        sums = Counter[str]()
        for number in range(count):
            path = shard_path(self.directory / TRAIN, number) / "manifest.json"
            manifest = json.loads(path.read_text(encoding="utf-8"))
            sums.update({key: manifest[key] for key in ("documents", "tokens", "text_bytes")})
        return dict(sums)

    def _check_conservation(
        self, came: dict[str, Any], train: dict[str, int], held_out: dict[str, Any]
    ) -> None:
        """What came in went somewhere: say where, for every source."""
        rejected = sum(came["rejected"].values())
        for key, lost in (("documents", rejected), ("tokens", 0), ("text_bytes", 0)):
            assert came[key] == train[key] + held_out[key] + lost, f"{key} were lost: {came}"
        reasons = "".join(f", {number:,} {reason}" for reason, number in sorted(came["rejected"].items()))
        logger.info(
            "prepared %s: %d documents = %d train + %d held out + %d rejected%s;"
            " %d tokens = %d train + %d held out",
            self.name, came["documents"], train["documents"], held_out["documents"], rejected,
            f" ({reasons[2:]})" if reasons else "", came["tokens"], train["tokens"], held_out["tokens"],
        )  # fmt: skip

    def _worst(self, reports: Sequence[Report]) -> FileCount | None:
        """The file with the largest share of bad records, all its stretches together."""
        files: dict[str, FileCount] = {}
        for report in reports:
            for count in report.files:
                files.setdefault(count.file, FileCount(count.file)).add(count)
        bad = [count for count in files.values() if count.bad]
        return max(bad, key=lambda count: count.bad / count.records, default=None)

    def _nothing_to_train(self, came: dict[str, Any], held_out: int) -> str:
        start = f"data.sources.{self.name} ({self.source.path}): of {came['documents']} documents"
        if held_out:
            rejected = sum(came["rejected"].values())
            others = f" ({rejected} are rejected)" if rejected else ""
            return (
                f"{start} {held_out} are held out and none is left to train on{others}:"
                " lower data.validation_fraction"
            )
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(came["rejected"].items()))
        return f"{start} none has text to train on ({reasons or 'there are none'}): check the source's keys"

    def check_complete(self) -> None:
        """Hold the present rules against a source that was completed under others."""
        index = LocalShards(self.directory / TRAIN).index
        if worst := index["worst_file"]:
            check_bad(self.name, self.source, self.rules, FileCount.from_dict(worst))
        self._say_not_kept(index.get("not_kept", 0))

    def _not_kept(self, numbers: Iterable[int]) -> int:
        """Bad records of these parts that no file keeps: other rules made them."""
        unkept = (number for number in numbers if not quarantine_path(self.directory, number).exists())
        return sum(self.report(number).bad for number in unkept)

    def _say_not_kept(self, count: int) -> None:
        if count and self.rules.bad_records == "quarantine":
            logger.info(
                "source %s: %d bad records are not kept, for its shards were made with another"
                " data.bad_records: to keep them, delete %s and prepare again",
                self.name, count, self.directory,
            )  # fmt: skip

    def came(self) -> dict[str, Any]:
        """What the parts that are done held: documents, tokens, text_bytes, rejected by reason."""
        reports = [self.report(number) for number in sorted(self.done())]
        return {
            "documents": sum(report.records for report in reports),
            "tokens": sum(report.tokens for report in reports),
            "text_bytes": sum(report.text_bytes for report in reports),
            "rejected": dict(sum((report.rejected for report in reports), Counter[str]())),
        }

    def documents(self, split: str) -> int:
        """Documents in the shards of a split that are done."""
        for number in self.done():
            if (split, number) not in self._documents:
                manifest = shard_path(self.directory / split, number) / "manifest.json"
                self._documents[split, number] = json.loads(manifest.read_text(encoding="utf-8"))["documents"]
        return sum(count for (name, _), count in self._documents.items() if name == split)

    def fail(self, error: UserError) -> None:
        """Tell everybody who waits for a shard that it will not come."""
        lines = [without_secrets(line) for line in error.lines]
        said = {"lines": lines, "exit_code": error.exit_code, "rules": repr(self.rules)}
        write_whole(self.directory / ERROR, json.dumps(said))

    def forget_failure(self) -> None:
        """An error of an earlier attempt means nothing for this one."""
        (self.directory / ERROR).unlink(missing_ok=True)

    def raise_failure(self) -> None:
        """Raise what `fail` was told, here or in another process that has the same rules."""
        try:
            error = json.loads((self.directory / ERROR).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        if error.get("rules") == repr(self.rules):
            raise UserError(*error["lines"], exit_code=error["exit_code"])


class NotMadeError(UserError):
    """A shard that is wanted now is not there, and the one who wants it does not wait."""

    def __init__(self, source: str) -> None:
        self.source = source
        super().__init__(
            f"data.sources.{source}: text that this needs is not tokenised yet; the run tokenises it in the"
            " order of its training: ask again later"
        )


class Crew(Protocol):
    """Whoever makes the parts, as far as one who waits cares."""

    @property
    def error(self) -> UserError | None:
        """Why no more parts are made, where that is so."""

    @property
    def heard(self) -> int:
        """Grows as long as parts are being made."""

    def schedule(self, order: Mapping[str, Sequence[int]], weights: Mapping[str, float]) -> None:
        """Make parts in the order in which training comes to them: each source's `order`, and its share."""

    def close(self) -> None:
        """Make no more."""

    def want(self, preparation: Preparation, numbers: Sequence[int]) -> None:
        """These parts come first from now on, in this order."""

    def need(self, preparation: Preparation, number: int) -> None:
        """This part is waited for; UserError where it must not be."""

    def check(self) -> None:
        """Raise if no more parts will be made."""


class GrowingShards:
    """The shards of one split while they are made, by this process or others, and afterwards (a `Shards`)."""

    max_open = MAX_OPEN

    def __init__(self, preparation: Preparation, split: str, crew: Crew | None = None) -> None:
        self.directory = preparation.directory / split
        self.count, self.header = len(preparation.parts), preparation.header
        self.fingerprint = preparation.fingerprint + ("" if split == TRAIN else f" {split}")
        self._preparation, self._split, self._crew = preparation, split, crew
        self._local: LocalShards | None = None

    @property
    def complete(self) -> bool:
        """Whether there is an index over all shards."""
        if self._local is None and self._preparation.complete:  # the training split's index is written last
            self._local = LocalShards(self.directory)
        return self._local is not None

    @property
    def index(self) -> dict[str, Any]:
        """index.json, when complete."""
        return self._local.index if self.complete and self._local else {}

    def table(self) -> NDArray[np.void] | None:
        """The index, when complete."""
        return self._local.table() if self.complete and self._local else None

    def want(self, shards: Sequence[int]) -> None:
        """Have these made first, where this process is the one that makes them."""
        if self._crew is not None and self._local is None:
            self._crew.want(self._preparation, shards)

    def path(self, shard: int) -> Path:
        """The directory of a shard; waits until it is made. UserError where it will not come, or not soon."""
        path = shard_path(self.directory, shard)
        if self._local is not None or path.is_dir():
            return path
        if self._crew is not None:
            self._crew.need(self._preparation, shard)
        began = spoke = time.monotonic()
        pause, patience = FIRST_POLL, SPEAK
        while not path.is_dir():
            self._preparation.raise_failure()
            if self._crew is not None:
                self._crew.check()
            if self._preparation.closed.wait(pause):
                raise RuntimeError("the preparation was closed while its shards were still wanted")
            pause = min(SLOWEST_POLL, 2 * pause)
            if time.monotonic() - spoke > patience:
                spoke, patience = time.monotonic(), REMIND
                logger.info(
                    "waiting for %s: %sshard %d of %d is being tokenised (%d of %d done; %.0f s)",
                    self._preparation.name, "" if self._split == TRAIN else "held-out ", shard + 1,
                    self.count, len(self._preparation.done()), self.count, spoke - began,
                )  # fmt: skip
        return path

    def manifest(self, shard: int) -> dict[str, Any]:
        """The checked manifest of a shard; waits as `path` does."""
        return load_manifest(self.path(shard), self.header)
