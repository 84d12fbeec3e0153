"""A logger: the loss as a file of comma-separated values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain.training.config import TrainConfig
from llmtrain.training.loggers import CustomLoggerConfig
from llmtrain.training.run_directory import RunDirectory


class CsvConfig(CustomLoggerConfig):
    """`logger=csv`."""

    keys: list[str]

    def build(self, directory: RunDirectory, config: TrainConfig, step: int) -> Csv:
        """On rank 0, for a run that goes on after `step`."""
        return Csv(directory, self.keys)


class Csv:
    """Writes a line a logged step; a run that goes on appends."""

    def __init__(self, directory: RunDirectory, keys: list[str]) -> None:
        self._keys = keys
        self._file = (directory.path / "losses.csv").open("a", encoding="utf-8")

    def log(self, line: Mapping[str, Any]) -> None:
        """The keys of metrics.jsonl."""
        self._file.write(",".join(str(line.get(key, "")) for key in self._keys) + "\n")

    def close(self, exit_code: int) -> None:
        """After the last step of this process, also where an error ends it."""
        self._file.close()
