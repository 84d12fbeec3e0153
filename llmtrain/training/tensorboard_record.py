"""The run in TensorBoard: event files below the run directory, an extra of the package."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llmtrain.config.secrets import redact
from llmtrain.training.report_samples import read_samples
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.run_tables import Table, mixture_table

LAYOUT = {
    "sources": {
        title: ["Multiline", [f"^{key}/.+"]]
        for title, key in {
            "loss": "train/loss",
            "share of the tokens": "data/share",
            "epochs": "data/epochs",
            "tokens": "data/tokens",
        }.items()
    }
}
"""Charts of all sources together, of TensorBoard's custom scalars."""

RULE = "\n\n---\n\n"


class TensorboardRecord:
    """The lines of metrics.jsonl as scalars over steps, in full precision, with samples and mixture as text.

    Every start of the run writes a file of its own. It says from which step on the files before it are not
    valid any more, so that TensorBoard shows steps that are trained again once.
    """

    name = "tensorboard"

    def __init__(self, directory: RunDirectory, run_config: Mapping[str, Any], step: int) -> None:
        """The run goes on after `step`."""
        self._directory, self._run_config, self._step = directory, redact(run_config), step
        self._writer: Any = None

    def start(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = self._directory.path / "tensorboard"
        self._writer = SummaryWriter(str(place), purge_step=self._step + 1)
        self._writer.add_custom_scalars(LAYOUT)
        config = json.dumps(self._run_config, indent=2, ensure_ascii=False)
        self._writer.add_text("config", _block(config), self._step)

    def log(self, line: Mapping[str, Any]) -> None:
        self._step = line["step"]
        for key, value in line.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(key, value, self._step, new_style=True, double_precision=True)
        file = self._directory.samples_of(self._step)
        if file.exists():
            texts = [_block(prompt + text) for prompt, text in read_samples(file)]
            self._writer.add_text("samples", RULE.join(texts), self._step)
        self._writer.flush()

    def finish(self, exit_code: int) -> None:
        if mixture := mixture_table(self._directory):
            self._writer.add_text("mixture", _markdown(mixture), self._step)
        self._writer.close()

    def leave(self) -> None:
        """Nothing runs beside."""


def _block(text: str) -> str:
    """A text as Markdown that shows it as it is: indented, which no character of it can end."""
    return re.sub(r"^", "    ", text, flags=re.MULTILINE)


def _markdown(table: Table) -> str:
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)
