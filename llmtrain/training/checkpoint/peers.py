"""Whether a rank of this machine has ended: a save need not wait for what it would have written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from llmtrain.training.run_lock import boot_id


@dataclass(frozen=True)
class Peer:
    """The process of a rank, by its id and by where that id holds: a boot, and a container of it."""

    pid: int
    place: tuple[str | None, str] | None
    """None where it cannot be told."""

    @classmethod
    def of_this_process(cls) -> Peer:
        """For the other ranks to know."""
        namespace = Path("/proc/self/ns/pid")
        place = (boot_id(), str(namespace.readlink())) if namespace.exists() else None
        return cls(os.getpid(), place)

    def is_gone(self) -> bool:
        """Whether it is known to have ended; False of another machine's."""
        if self.place is None or self.place != Peer.of_this_process().place:
            return False
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
