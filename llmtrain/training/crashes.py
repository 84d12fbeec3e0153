"""What a rank failed of: in a file of its own, and, of the rank that failed first, in events.jsonl."""

from __future__ import annotations

import json
import logging
import socket
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtrain.config import ExitCode, UserError
from llmtrain.config.secrets import without_secrets
from llmtrain.distributed import World
from llmtrain.training.heartbeat import Beat
from llmtrain.training.report import write_last_report
from llmtrain.training.run_directory import STARTING, RunDirectory
from llmtrain.training.run_lock import time_now

logger = logging.getLogger(__name__)

FILES = "crash-rank*.json"
TOLD = "told-"
"""Beside the heartbeats, with the job after it: one of its ranks has told of the crash."""


class AnotherRankError(UserError):
    """This rank ends because another one does, which says of what."""


class Crashes:
    """The crash files of one start of a job, as one of its ranks writes and reads them."""

    def __init__(self, directory: RunDirectory, world: World, job: str) -> None:
        self._directory, self._rank, self._job = directory, world.rank, job

    def keep(self, error: Exception, last: Beat, *, secondary: bool, begun: bool) -> None:
        """Write crash-rank<r>.json; `secondary`: the error follows from another rank's.

        Before the run has begun a mistake of the user's, and what follows from it, is kept in .starting/,
        where the other ranks read it until they leave. The rank that failed first appends the event; of one
        that is gone without a word the rank that noticed first.
        """
        crash = {
            "time": time_now(),
            "job": self._job,
            "host": socket.gethostname(),
            "rank": self._rank,
            "step": last.step,
            "phase": last.phase,
            "secondary": secondary,
            "type": type(error).__name__,
            "message": str(error),
            "traceback": without_secrets("".join(traceback.format_exception(error))).splitlines(),
        }
        passes = not begun and (secondary or isinstance(error, UserError))
        name = FILES.replace("*", str(self._rank))
        try:
            self._directory.write_json(f"{STARTING}/{name}" if passes else name, crash)
            if not (passes or secondary or _has_an_event(error)):
                told = {key: crash[key] for key in ("rank", "step", "type")}
                self._tell(begun, **told, message=_first_line(crash), file=name)
            elif begun and secondary and not isinstance(error, UserError) and self._first() is None:
                self._tell(begun, rank=None, step=last.step, message=self.first(error))
        except OSError as cause:
            logger.warning("%s: no crash can be kept: %s", self._directory.path, cause)

    def first(self, error: Exception) -> str:
        """What the rank failed of that failed first, as far as it could say it; `error` is this rank's."""
        found = self._first()
        if found is None:
            return f"it is gone without a word, killed or with its node; this rank noticed by: {error}"
        file, crash = found
        see = f"; see {file}" if file.parent == self._directory.path else ""
        return f"rank {crash['rank']} on host {crash['host']}: {crash['type']}: {_first_line(crash)}{see}"

    def _tell(self, begun: bool, **told: Any) -> None:
        """The event, and the report that shows it, unless a rank of this job has told one before."""
        beats = self._directory.heartbeats if begun else self._directory.starting
        try:
            (beats / f"{TOLD}{self._job}").touch(exist_ok=False)
        except FileExistsError:
            return
        self._directory.append_event("crash", **told)
        write_last_report(self._directory.path)

    def _first(self) -> tuple[Path, dict[str, Any]] | None:
        """The earliest crash of this job that follows from no other, and its file."""
        places = (self._directory.path, self._directory.starting)
        read = [(file, _read(file)) for place in places for file in place.glob(FILES)]
        crashes = [(file, crash) for file, crash in read if crash.get("job") == self._job]
        first_hand = [(file, crash) for file, crash in crashes if not crash["secondary"]]
        return min(first_hand, key=lambda one: (one[1]["time"], one[1]["rank"]), default=None)


def _first_line(crash: Mapping[str, Any]) -> str:
    return str(crash["message"]).partition("\n")[0]


def _has_an_event(error: Exception) -> bool:
    """Whether events.jsonl tells of it under another name."""
    told = (ExitCode.NON_FINITE, ExitCode.CORRUPTION)
    return isinstance(error, UserError) and error.exit_code in told


def _read(file: Path) -> dict[str, Any]:
    """A crash file; empty where it is gone meanwhile, or is none."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
