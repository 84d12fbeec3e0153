"""MANIFEST.json: size and SHA-256 of every file of a checkpoint, and of the manifest itself."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from llmtrain.distributed import usable_cores
from llmtrain.training.checkpoint.record import parse_record

MANIFEST = "MANIFEST.json"
RECORD = "checkpoint.json"
FORMAT = 2
CHUNK = 1 << 20
"""Bytes that are read at a time."""

Stamp = tuple[int, str]
"""A file's size in bytes, and its SHA-256 in hexadecimal."""

RANK_FILE = re.compile(r"rank_\d{5,}\.safetensors", re.ASCII)
PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


class DamagedError(Exception):
    """A checkpoint is not what was written, or not what a run writes."""

    def __init__(self, path: Path, file: str, reason: str) -> None:
        super().__init__(path, file, reason)  # all of them, so that it can be sent to other ranks
        self.path, self.file, self.reason = path, file, reason

    def __str__(self) -> str:
        return f"{self.path / self.file}: {self.reason}"

    def __reduce__(self) -> tuple[type[Self], tuple[Path, str, str]]:
        """Ranks tell each other."""
        return type(self), (self.path, self.file, self.reason)

    def as_dict(self) -> dict[str, str]:
        """What events.jsonl says of it."""
        return {"path": self.path.name, "file": self.file, "reason": self.reason}


@dataclass(frozen=True)
class Manifest:
    """The files of the checkpoint of `step`."""

    step: int
    files: Mapping[str, Stamp]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(size for size, _ in self.files.values())

    def render(self) -> bytes:
        """The file's content: of one manifest there is one spelling, so that any other byte shows."""
        value: dict[str, Any] = {"format": FORMAT, "step": self.step, "files": self.files}
        digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        return json.dumps({**value, "sha256": digest}, sort_keys=True, indent=1).encode() + b"\n"

    @classmethod
    def read(cls, checkpoint: Path) -> Manifest:
        """The manifest of a checkpoint; DamagedError where it is not one, or another checkpoint's."""
        try:
            raw = (checkpoint / MANIFEST).read_bytes()
        except FileNotFoundError:
            old = "; engine/ is of an older llmtrain, which this one cannot read"
            reason = "missing" + old * (checkpoint / "engine").is_dir()
            raise DamagedError(checkpoint, MANIFEST, reason) from None
        except OSError as error:
            raise DamagedError(checkpoint, MANIFEST, f"cannot be read: {error.strerror}") from error
        manifest = cls._parse(raw)
        if manifest is None:
            raise DamagedError(checkpoint, MANIFEST, "its own digest does not hold")
        if checkpoint.name != directory_name(manifest.step):
            raise DamagedError(checkpoint, MANIFEST, f"is that of step {manifest.step}")
        return manifest

    @classmethod
    def _parse(cls, raw: bytes) -> Manifest | None:
        """None for what `render` did not write, and for names that lead elsewhere."""
        try:
            value = json.loads(raw)
            files = {name: (int(size), str(digest)) for name, (size, digest) in value["files"].items()}
            manifest = cls(int(value["step"]), files)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            return None
        genuine = manifest.render() == raw and RECORD in files
        return manifest if genuine and all(map(PLAIN_NAME.fullmatch, files)) else None

    def write(self, directory: Path) -> None:
        """As a new file of `directory`; the caller makes it durable."""
        (directory / MANIFEST).write_bytes(self.render())


def directory_name(step: int) -> str:
    """`step_00000100`"""
    return f"step_{step:08d}"


def check(
    checkpoint: Path,
    name: str,
    stamp: Stamp,
    *,
    content: bool = True,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """DamagedError unless the file has this size and, with `content`, this digest; a `tick` a chunk read."""
    file = checkpoint / name
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise DamagedError(checkpoint, name, "not a plain file")
        if found.st_size != stamp[0]:
            raise DamagedError(checkpoint, name, f"{found.st_size:,} bytes instead of {stamp[0]:,}")
        if content:
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while chunk := stream.read(CHUNK):
                    digest.update(chunk)
                    tick()
            if digest.hexdigest() != stamp[1]:
                raise DamagedError(checkpoint, name, "its SHA-256 is not that of the manifest")
    except FileNotFoundError:
        raise DamagedError(checkpoint, name, "missing") from None
    except OSError as error:
        raise DamagedError(checkpoint, name, f"cannot be read: {error.strerror}") from error


def damages(
    checkpoint: Path,
    files: Mapping[str, Stamp],
    *,
    content: bool = True,
    tick: Callable[[], None] = lambda: None,
) -> list[DamagedError]:
    """What is wrong with these files; several are read at a time, and `tick` is called as they are."""
    read = seen = 0

    def count() -> None:
        nonlocal read
        read += 1

    def one(item: tuple[str, Stamp]) -> DamagedError | None:
        try:
            check(checkpoint, *item, content=content, tick=count)
        except DamagedError as error:
            return error
        return None

    with ThreadPoolExecutor(min(8, usable_cores())) as pool:
        reading = [pool.submit(one, item) for item in files.items()]
        while wait(reading, timeout=1).not_done:
            if read != seen:
                seen = read
                tick()
    return [found for file in reading if (found := file.result())]


def share(files: Mapping[str, Stamp], rank: int, ranks: int) -> dict[str, Stamp]:
    """The files that this rank reads when all ranks read one checkpoint: to each about as many bytes."""
    loads = [0] * ranks
    mine = {}
    for name, stamp in sorted(files.items(), key=lambda item: (-item[1][0], item[0])):
        lightest = loads.index(min(loads))
        loads[lightest] += stamp[0]
        if lightest == rank:
            mine[name] = stamp
    return mine


def verify(checkpoint: Path) -> Manifest:
    """Read every byte of a checkpoint, in this process; DamagedError with the first thing that is wrong."""
    manifest = Manifest.read(checkpoint)
    raise_first(damages(checkpoint, manifest.files))
    return manifest


def read_record(checkpoint: Path) -> dict[str, Any]:
    """What checkpoint.json says, once its digest holds; nothing else is read.

    DamagedError where it does not, or where that is no record of this checkpoint.
    """
    manifest = Manifest.read(checkpoint)
    check(checkpoint, RECORD, manifest.files[RECORD])
    ranks = sum(map(bool, map(RANK_FILE.fullmatch, manifest.files)))
    try:
        raw = (checkpoint / RECORD).read_bytes()
        return parse_record(raw, step=manifest.step, ranks=ranks, size=manifest.size)
    except ValueError as error:
        raise DamagedError(checkpoint, RECORD, str(error)) from None


def raise_first(found: Iterable[DamagedError]) -> None:
    """Raise the first, if there is one."""
    for error in found:
        raise error
