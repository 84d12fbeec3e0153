"""One rank's part in one save: its file, its word that the file is there, and on rank 0 the publication."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llmtrain.distributed import World
from llmtrain.files import sync
from llmtrain.training.checkpoint.directory import publish
from llmtrain.training.checkpoint.manifest import RECORD, Stamp
from llmtrain.training.checkpoint.peers import Peer
from llmtrain.training.checkpoint.reading import rank_file
from llmtrain.training.checkpoint.tensors import write_tensors
from llmtrain.training.run_directory import write_atomically

PATIENCE = 300.0
"""Seconds without a new byte after which rank 0 waits no longer for other ranks' files."""
HURRY = 8.0
"""The same where the run ends because something went wrong."""
SHORTEST_POLL, LONGEST_POLL = 0.01, 0.5


@dataclass
class Attempt:
    """Writes this rank's part of a checkpoint into `temporary`, which all ranks share.

    Ranks tell each other by files alone (`rank_00000.json` says bytes and digest, or what went wrong): a
    thread must not use the collectives of a run that goes on training.
    """

    step: int
    temporary: Path
    world: World
    peers: Sequence[Peer]
    """The processes of all ranks."""
    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]
    published: Callable[[Path, int], None]
    """Called on rank 0 with the checkpoint and its bytes."""
    error: str | None = None
    """What the disk refused."""
    _crash: BaseException | None = None
    _thread: threading.Thread | None = None
    _progress: int = 0
    """Grows with what is written, here or by a rank that is waited for."""
    _written: threading.Event = field(default_factory=threading.Event)
    _done: threading.Event = field(default_factory=threading.Event)
    _hurry: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Run in a thread."""
        self._thread = threading.Thread(target=self._keep_crash, name="llmtrain-save", daemon=True)
        self._thread.start()

    def wait_written(self, tick: Callable[[], None]) -> None:
        """Until this rank's file is there, or is not to be; `tick` is called as long as that gets on."""
        self._wait(self._written, tick)

    def wait(self, tick: Callable[[], None]) -> None:
        """Until the thread is done, with `tick` as above; raises what ended it."""
        if self._thread is not None:
            self._wait(self._done, tick)
        if self._crash is not None:
            raise self._crash

    def _wait(self, event: threading.Event, tick: Callable[[], None]) -> None:
        seen = -1
        while not event.wait(LONGEST_POLL):
            if self._progress != seen:
                seen = self._progress
                tick()

    def hurry(self) -> None:
        """Until the thread is done, which waits not long now for ranks that may be gone."""
        self._hurry.set()
        self.wait(lambda: None)

    def run(self) -> None:
        """Write, say so, and on rank 0 publish. What the disk refuses becomes `error`, and is said too."""
        mine = self.temporary / rank_file(self.world.rank)
        try:
            self.temporary.mkdir(parents=True, exist_ok=True)
            stamp = write_tensors(mine, self.tensors, self._get_on)
            if not self.world.is_main:
                self._say(stamp=stamp)
                return
            self._written.set()
            files = {mine.name: stamp} | self._await_others() | self._write_record()
            path = publish(self.temporary, self.step, files)
        except OSError as error:
            self.error = f"rank {self.world.rank}: {error}"
            self._withdraw(mine)
            return
        self.published(path, sum(size for size, _ in files.values()))

    def _keep_crash(self) -> None:
        try:
            self.run()
        except BaseException as error:  # raised again in the thread that waits
            self._crash = error
        finally:
            self._written.set()
            self._done.set()

    def _get_on(self) -> None:
        self._progress += 1

    def _withdraw(self, mine: Path) -> None:
        """Give the room back, and let nobody wait; where that cannot be said, patience ends the wait."""
        if self.world.is_main:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        with suppress(OSError):
            mine.unlink(missing_ok=True)
            self._say(error=self.error)

    def _say(self, **said: Any) -> None:
        write_atomically(self._word(self.world.rank), json.dumps(said))

    def _word(self, rank: int) -> Path:
        return self.temporary / f"rank_{rank:05d}.json"

    def _write_record(self) -> dict[str, Stamp]:
        content = json.dumps(self.record, indent=1).encode()
        (self.temporary / RECORD).write_bytes(content)
        sync(self.temporary / RECORD)
        return {RECORD: (len(content), hashlib.sha256(content).hexdigest())}

    def _await_others(self) -> dict[str, Stamp]:
        """The files of the other ranks, as they say; OSError where one failed, or nothing comes any more.

        Directories on NFS show a new file late: it is looked for again and again.
        """
        stamps: dict[int, Stamp] = {}
        missing = set(range(1, self.world.world_size))
        since, seen, pause = time.monotonic(), -1, SHORTEST_POLL
        while missing:
            sizes = self._sizes()
            for rank in [rank for rank in missing if self._word(rank).name in sizes]:
                stamps[rank] = self._hear(rank)
                missing.remove(rank)
            if gone := [rank for rank in missing if self.peers[rank].is_gone()]:
                raise ProcessLookupError(f"rank {gone[0]} ended before its file was there")
            now = time.monotonic()
            if (written := sum(sizes.values())) != seen:
                since, seen, pause = now, written, SHORTEST_POLL
                self._get_on()
            elif now - since > (HURRY if self._hurry.is_set() else PATIENCE):
                ranks = ", ".join(map(str, sorted(missing)))
                raise TimeoutError(
                    f"nothing came from rank {ranks} for {now - since:.0f} s; "
                    f"is {self.temporary.parent} the same directory on every machine?"
                )
            time.sleep(pause)
            pause = min(LONGEST_POLL, 1.5 * pause)
        for rank in stamps:
            self._word(rank).unlink()
        return {rank_file(rank): stamp for rank, stamp in sorted(stamps.items())}

    def _sizes(self) -> dict[str, int]:
        """Of what is in the directory; a file may be given its name at this moment."""
        sizes = {}
        for entry in os.scandir(self.temporary):
            with suppress(FileNotFoundError):
                sizes[entry.name] = entry.stat().st_size
        return sizes

    def _hear(self, rank: int) -> Stamp:
        said = json.loads(self._word(rank).read_bytes())
        if "error" in said:
            raise OSError(said["error"])
        size, digest = said["stamp"]
        return size, digest
