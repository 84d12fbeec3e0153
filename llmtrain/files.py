"""What the rest asks of the file system: durable files, and enough of them open."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path


def allow_open_files() -> None:
    """Raise this process's limit of open files to what the system allows: the usual 1024 are soon used up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # some systems say a limit that they do not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def sync(path: Path) -> None:
    """Make a file's content, or the names in a directory, durable before returning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
