"""The run directory: a public contract of plain files that outlives the process which writes it."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from llmtrain.config import Config, UserError
from llmtrain.config.secrets import redact
from llmtrain.files import sync
from llmtrain.training.run_lock import RunLock, time_now

logger = logging.getLogger(__name__)

HEARTBEATS, STARTING, CRASHES = "heartbeats", ".starting", "crashes"
NEWEST_BYTES = 4 * 2**20
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
"""What a disk says that is full, failing, or mounted read-only for that; or a server's that is away."""


class RunDirectory:
    """The files of one run; making the object touches nothing, `lock` creates the directory.

    One process writes (rank 0, under the lock); anybody may read at any time.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._late: dict[Path, bytes] = {}
        self._writing = threading.Lock()
        self._lock = RunLock(self.path)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def data(self) -> Path:
        return self.path / "data.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def samples_of(self, step: int) -> Path:
        """The file of what the model wrote after a step."""
        return self.samples / f"step_{step:08d}.txt"

    @property
    def eval(self) -> Path:
        return self.path / "eval"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def heartbeats(self) -> Path:
        return self.path / HEARTBEATS

    @property
    def starting(self) -> Path:
        """Heartbeats of a job that has not begun; gone when it begins, or ends by a mistake."""
        return self.path / STARTING

    @property
    def stacks(self) -> Path:
        return self.path / "stacks"

    @property
    def done(self) -> Path:
        return self.path / "DONE"

    # The lock.

    def lock(self) -> None:
        """Take the directory for this process, until `unlock` or the process's end; see RunLock."""
        self._lock.take()

    def unlock(self) -> None:
        """Give the directory back; without a lock this does nothing."""
        self._lock.release()

    def refuse_others(self) -> None:
        """UserError with exit code 73 where another process is at work here; touches nothing."""
        self._lock.refuse_others()

    def is_locked(self) -> bool:
        """Whether some process is at work in this directory."""
        return self._lock.is_taken()

    def owner(self) -> dict[str, Any] | None:
        """Who is at work in this directory, or None; see RunLock."""
        return self._lock.owner()

    def set_aside(self) -> Path | None:
        """Rename an older run to the next free `<name>.1`, `<name>.2`, ... so that nothing of it is lost.

        Returns the new place, or None where there was nothing but the lock and
        heartbeats. A lock that is held stays held.
        """
        held = self._lock.is_held
        if not held:
            self.lock()
        place = None
        if any(entry.name not in (".lock", HEARTBEATS, STARTING) for entry in self.path.iterdir()):
            place = self._next_free()
            self.path.rename(place)
            self.unlock()
            self.lock()
            logger.info("%s held an older run: it is now %s", self.path, place)
        if not held:
            self.unlock()
        return place

    def _next_free(self) -> Path:
        number = 1
        while (place := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        return place

    def owns(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is one of this run."""
        return checkpoint.resolve().parent == self.checkpoints.resolve()

    # Writing.

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl in one write: floats in full precision, not-finite ones as null."""
        self._append(self.metrics, line)

    def append_event(self, kind: str, **fields: Any) -> None:
        """Add one line {time, event, ...fields} to events.jsonl."""
        self._append(self.events, redact({"time": time_now(), "event": kind, **fields}))

    def _append(self, file: Path, line: Mapping[str, Any]) -> None:
        """In one write; what the disk refuses is kept, and written before the next line."""
        with self._writing:
            late = self._late.pop(file, b"")
            data = late + json.dumps(_finite(line), ensure_ascii=False, allow_nan=False).encode() + b"\n"
            try:
                _append(file, data)
            except OSError as error:
                if error.errno not in REFUSALS:
                    raise
                if not late:
                    logger.warning("%s: %s; its lines are kept until there is room", file, error.strerror)
                self._late[file] = data

    def cut_unterminated(self) -> None:
        """Cut an unterminated last line from metrics.jsonl and events.jsonl: its write was interrupted."""
        for file in (self.metrics, self.events):
            if cut := _cut(file):
                logger.warning("%s: cut an unfinished last line of %d bytes", file, cut)

    def sync(self) -> None:
        """Make metrics and events durable, so that a checkpoint never outlives the lines before it."""
        for file in (self.metrics, self.events):
            if file.exists():
                sync(file)

    def write_config(self, config: Config) -> None:
        """Write config.yaml from the typed config, secrets left out."""
        text = yaml.safe_dump(
            redact(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True, width=110
        )
        write_atomically(self.config, text)

    def write_json(self, name: str, value: Any) -> Path:
        """Write `name`, a path inside the run directory, atomically, without secrets.

        What is not finite becomes null.
        """
        text = json.dumps(_finite(redact(value)), indent=2, ensure_ascii=False, allow_nan=False)
        return write_atomically(self.path / name, text + "\n")

    def keep(self, file: Path, name: str) -> None:
        """Keep a file that does not change as `name` in the run directory, unless it is there already."""
        place = self.path / name
        if place.exists():
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        aside = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            os.link(file, aside)
        except OSError:  # another file system
            shutil.copyfile(file, aside)
        aside.replace(place)

    def clear_done(self) -> None:
        """Take DONE away: the run goes on."""
        self.done.unlink(missing_ok=True)

    def mark_done(self) -> None:
        """Write DONE, the last file of a run, and only of one that succeeded.

        What earlier processes of it failed of does not stay beside DONE: it goes into crashes/.
        """
        for file in self.path.glob("crash-rank*.json"):
            (self.path / CRASHES).mkdir(exist_ok=True)
            file.replace(self.path / CRASHES / file.name)
        write_atomically(self.done, time_now() + "\n")

    # Reading.

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every complete line of metrics.jsonl in file order; a resumed run has replayed steps twice."""
        return _read_lines(self.metrics)

    def newest_metrics(self) -> list[dict[str, Any]]:
        """The last of them, some thousand, read in no time however long the run is."""
        return _read_lines(self.metrics, last=NEWEST_BYTES)

    def count_metrics(self) -> int:
        """How many lines metrics.jsonl has."""
        if not self.metrics.exists():
            return 0
        with self.metrics.open("rb") as stream:
            return sum(block.count(b"\n") for block in iter(partial(stream.read, 2**20), b""))

    def read_events(self) -> list[dict[str, Any]]:
        """Every complete line of events.jsonl in file order."""
        return _read_lines(self.events)

    def read_config(self) -> dict[str, Any]:
        """config.yaml as plain values; a missing or broken file is a UserError."""
        try:
            value = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.config}: no such file; is {self.path} the directory of a run?") from None
        except OSError as error:
            raise UserError(
                f"{self.config} cannot be read: {error.strerror}; is {self.path} the directory of a run?"
            ) from None
        except yaml.YAMLError as error:
            raise UserError(f"{self.config}: not readable as YAML: {error}") from error
        if not isinstance(value, dict):
            raise UserError(f"{self.config}: expected keys and values")
        return value

    def read_json(self, name: str) -> Any:
        """The content of a JSON file in the run directory, or None where there is none."""
        file = self.path / name
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{file}: not readable as JSON: {error}") from error


def write_atomically(file: Path, text: str, durable: bool = False) -> Path:
    """Write a text file so that a reader sees the old content or the new, never a part; makes its folder.

    `durable`: on return it survives a crash of the machine.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        if durable:
            sync(aside)
        aside.replace(file)
        if durable:
            sync(file.parent)
    finally:
        aside.unlink(missing_ok=True)
    return file


def _finite(value: Any) -> Any:
    """Plain JSON values: numpy and torch scalars as Python numbers, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, str | int | float | bool | None) and hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append(file: Path, data: bytes) -> None:
    """All of it or nothing."""
    with file.open("ab", buffering=0) as stream:  # O_APPEND and unbuffered: one line is one write
        size = os.fstat(stream.fileno()).st_size
        if stream.write(data) != len(data):
            stream.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


@contextlib.contextmanager
def disk_may_refuse() -> Iterator[None]:
    """What a disk that is full or failing refuses here is told, and ends nothing."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        logger.warning("%s", error)


def _cut(file: Path) -> int:
    """Cut everything after the last newline; returns the number of bytes cut."""
    if not file.exists():
        return 0
    with file.open("r+b") as stream:
        size = stream.seek(0, os.SEEK_END)
        keep = size
        while keep > 0:
            start = max(0, keep - 65536)
            stream.seek(start)
            newline = stream.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        stream.truncate(keep)
    return size - keep


def _read_lines(file: Path, last: int | None = None) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; a broken line is a UserError with its number.

    `last`: only those that lie wholly in so many bytes at its end.
    """
    if not file.exists():
        return []
    with file.open("rb") as stream:
        begin = max(0, stream.seek(0, os.SEEK_END) - last) if last else 0
        stream.seek(max(0, begin - 1))
        if begin:
            stream.readline()  # what is left of a line, or the newline before the first whole one
        begin = stream.tell()
        *lines, rest = stream.read().split(b"\n")
    if rest:
        logger.warning("%s: the last line is not finished and not read", file)
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            number += file.read_bytes()[:begin].count(b"\n")
            raise UserError(f"{file}:{number}: not a JSON object; mend or remove that line")
        objects.append(value)
    return objects
