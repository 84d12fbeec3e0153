"""Whether a run's directories can be made, before anything is put there."""

from __future__ import annotations

import os
from pathlib import Path

from llmtrain.config import UserError


def existing(path: Path) -> Path:
    """`path`, or the nearest directory or file above it that is there."""
    absolute = path.expanduser().absolute()
    return next(place for place in (absolute, *absolute.parents) if place.exists())


def check_places(**paths: Path) -> None:
    """UserError, by the names of their keys, for directories that cannot be made or written."""
    lines = []
    for key, path in paths.items():
        place = existing(path)
        if not place.is_dir():
            lines.append(f"{key}={path}: {place} is a file, not a directory; name another place")
        elif not os.access(place, os.W_OK | os.X_OK):
            lines.append(f"{key}={path}: {place} cannot be written by this user; name another place")
    if lines:
        raise UserError(*lines)
