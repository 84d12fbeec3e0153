"""The tokenizer and the shards that training reads: complete, on their way, or behind a URL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llmtrain.config import UserError
from llmtrain.config.secrets import without_secrets
from llmtrain.data.growing import Crew, GrowingShards, Preparation
from llmtrain.data.readers.files import holds, is_url
from llmtrain.data.shards import INDEX, LocalShards, ShardedSource, Shards
from llmtrain.data.tokenizing import QUARANTINE, TRAIN, VALIDATION
from llmtrain.tokenizer import Tokenizer


@dataclass(frozen=True)
class PreparedSource:
    """Where a source's shards are, or will be: a local directory, or the URL of one."""

    train: Path | str
    validation: Path | str | None
    """None where no document is held out."""
    preparation: Preparation | None = field(default=None, compare=False)
    """What makes them, where they are made from text."""

    @cached_property
    def came(self) -> dict[str, Any] | None:
        """`Prepared.conservation` of complete shards, which are looked at once."""
        if isinstance(self.train, str):
            return None
        train, held_out = LocalShards(self.train).index, 0
        if isinstance(self.validation, Path):
            held_out = LocalShards(self.validation).index["documents"]
        if "input" not in train:
            return None
        return {**train["input"], "train": train["documents"], "held_out": held_out, "complete": True}

    def is_there(self) -> bool:
        """Whether all its shards are."""
        return all(place is None or is_prepared(place) for place in (self.train, self.validation))


@runtime_checkable
class Fetched(Protocol):
    """Shards that somebody fetches."""

    received: int
    """Bytes so far."""

    def close(self) -> None:
        """Fetch no more."""


@dataclass
class Prepared:
    """The tokenizer and the shards of every source, by name; some may still be on their way."""

    tokenizer: Tokenizer
    sources: dict[str, PreparedSource]
    cache_dir: Path | None
    """Where shards behind URLs are kept for a while."""
    remote_bytes: int
    """How much of them."""
    crew: Crew | None = None
    """The processes that make shards in the background, where they are this process's."""
    _opened: list[Shards] = field(default_factory=list, repr=False, compare=False)

    @property
    def complete(self) -> bool:
        """Whether every shard of every source is there."""
        preparations = [source.preparation for source in self.sources.values()]
        return all(preparation is None or preparation.complete for preparation in preparations)

    @property
    def error(self) -> UserError | None:
        """Why this process makes no more shards, where that is so."""
        return self.crew.error if self.crew else None

    @property
    def come(self) -> tuple[int, int, int]:
        """Differs from what it was where more text has come since, or is being made."""
        making = [source.preparation for source in self.sources.values() if source.preparation]
        shards = sum(len(one.done()) for one in making if not one.complete)
        received = sum(one.received for one in self._opened if isinstance(one, Fetched))
        return self.crew.heard if self.crew else 0, shards, received

    @property
    def is_remote(self) -> bool:
        """Whether some shards have to be fetched."""
        return any(isinstance(source.train, str) for source in self.sources.values())

    def complete_sources(self) -> Prepared:
        """Only those sources whose shards are all there."""
        there = {
            name: source
            for name, source in self.sources.items()
            if source.preparation is None or source.preparation.complete
        }
        return replace(self, sources=there, crew=None)

    def progress(self, name: str) -> str:
        """How many of a source's shards are there, for people."""
        preparation = self.sources[name].preparation
        if preparation is None or preparation.complete:
            return "complete"
        return f"{len(preparation.done()):,} of {len(preparation.parts):,} shards"

    def open(self) -> tuple[dict[str, ShardedSource], dict[str, ShardedSource]]:
        """The training text of every source, and the held-out text of those that have (or may get) some."""
        train, held_out = {}, {}
        for name, source in self.sources.items():
            train[name] = ShardedSource(self._shards(name, source, TRAIN))
            if source.validation is not None:
                validation = ShardedSource(self._shards(name, source, VALIDATION))
                if not validation.complete or validation.documents:
                    held_out[name] = validation
        return train, held_out

    def _shards(self, name: str, source: PreparedSource, split: str) -> Shards:
        making = source.preparation
        if making is not None and not making.complete:
            return GrowingShards(making, split, self.crew)
        where = source.train if split == TRAIN else source.validation
        assert where is not None
        shards = open_place(where, name, self.cache_dir, self.remote_bytes)
        self._opened.append(shards)
        return shards

    def schedule(self, order: Mapping[str, Sequence[int]], weights: Mapping[str, float]) -> None:
        """Have shards made in the order in which training comes to them.

        `order` holds each source's shards in that order, `weights` its share of the stream; only the process
        that makes shards in the background does something with it.
        """
        if self.crew is not None:
            self.crew.schedule(order, weights)

    def close(self) -> None:
        """Stop making shards, at once; what is there stays, and the rest is made by the next who asks."""
        if self.crew is not None:
            self.crew.close()
        for source in self.sources.values():
            if source.preparation is not None:
                source.preparation.closed.set()
        for shards in self._opened:
            if isinstance(shards, Fetched):
                shards.close()

    def rejected(self, name: str) -> dict[str, int]:
        """How many records of a source gave no document so far, by reason."""
        return dict((self.conservation(name) or {}).get("rejected", {}))

    def conservation(self, name: str) -> dict[str, Any] | None:
        """What came in of a source so far and where it went; None where shards do not say.

        {documents, tokens, text_bytes, rejected: {reason: documents}, train, held_out, complete}: documents =
        train + held_out + rejected, the first as they were read, the others as they stand in the shards.
        """
        source = self.sources[name]
        if source.preparation is not None and not source.preparation.complete:
            splits = {
                key: source.preparation.documents(split)
                for key, split in (("train", TRAIN), ("held_out", VALIDATION))
            }
            return {**source.preparation.came(), **splits, "complete": False}
        return source.came

    def quarantine(self, name: str) -> list[Path]:
        """The files with the bad records of a source, one a part that has some."""
        train = self.sources[name].train
        if isinstance(train, str):
            return []
        return sorted((train.parent / QUARANTINE).glob("shard-*.jsonl"))

    @classmethod
    def from_dict(
        cls,
        tokenizer: Tokenizer,
        paths: Mapping[str, Mapping[str, str | None]],
        cache_dir: Path | None,
        remote_bytes: int,
    ) -> Prepared:
        """The inverse of `as_dict`; whether the shards are still there is not looked at."""
        sources = {}
        for name, source in paths.items():
            train, validation = source[TRAIN], source[VALIDATION]
            assert train is not None
            sources[name] = PreparedSource(_place(train), _place(validation) if validation else None)
        return cls(tokenizer, sources, cache_dir, remote_bytes)

    def as_dict(self) -> dict[str, dict[str, str | None]]:
        """The absolute path (or URL) of each source's shards, as JSON."""
        return {
            name: {
                TRAIN: absolute(source.train),
                VALIDATION: absolute(source.validation) if source.validation else None,
            }
            for name, source in self.sources.items()
        }


def _place(text: str) -> Path | str:
    return text if is_url(text) else Path(text)


def absolute(place: Path | str) -> str:
    """A directory's absolute path, or a URL without what must not be written down."""
    return without_secrets(place) if isinstance(place, str) else str(place.resolve())


def is_prepared(place: Path | str) -> bool:
    """Whether complete shards are there."""
    return holds(place, INDEX) if isinstance(place, str) else (place / INDEX).is_file()


def open_place(place: Path | str, name: str, cache_dir: Path | None, remote_bytes: int) -> Shards:
    """Complete shards, in a local directory or behind a URL; `name` is the source's."""
    if isinstance(place, Path):
        return LocalShards(place)
    from llmtrain.data.remote import open_remote

    return open_remote(place, (cache_dir or Path("~/.cache/llmtrain")).expanduser(), remote_bytes, name)
