"""The run in wandb: one run there however often it is resumed, its curves over tokens."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from llmtrain.config import Config, ExitCode
from llmtrain.config.secrets import redact
from llmtrain.training.run_directory import RunDirectory, write_atomically
from llmtrain.training.run_tables import mixture_table, samples_table
from llmtrain.training.words import one_line

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
"""Time that wandb has to reach its server before the run is recorded offline."""

ASIDE_SECONDS = 4.0
"""Time that tables and files have at the end of the run."""

SEND_SECONDS = 9.0
"""Time to send what is still to be sent at the end."""

FLUSH_SECONDS = 1.0
"""Time between writes of wandb's file, which a kill may cost."""

AXIS = "train/tokens"
"""What wandb draws curves over."""


class WandbConfig(Config):
    """Whether and where wandb records the run."""

    mode: Literal["disabled", "offline", "online"]
    project: str = Field(min_length=1)


class WandbRecord:
    """The lines of metrics.jsonl as a run of wandb, with its samples, mixture and, online, the report.

    If the server cannot be reached or refuses, there is one warning and the run is recorded offline below the
    run directory (`wandb sync` sends it later). The run's id is kept in the run directory, so that a resumed
    run continues the same wandb run.

    wandb drops a line whose step is not above the last one, so a step of wandb is the number of the line in
    metrics.jsonl, from 0: steps that are trained again after a kill or a rewind are there twice, as in
    metrics.jsonl. The step of training is the metric `step`.
    """

    name = "wandb"

    def __init__(
        self, directory: RunDirectory, config: WandbConfig, name: str, run_config: Mapping[str, Any]
    ) -> None:
        self._directory, self._config, self._title = directory, config, name
        self._run_config = redact(run_config)
        self._number = directory.count_metrics()
        self._run: Any = None
        self._aside = threading.Thread()

    def start(self) -> None:
        """A running wandb run, online if asked for and possible, else offline."""
        # What wandb reports about itself it sends at the end of Python, and waits 20 s for a dead server.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # Tables wait here for `wandb sync`, not in a home that may be gone by then.
        os.environ.setdefault("WANDB_DATA_DIR", str(self._place))
        os.environ.setdefault("WANDB_CACHE_DIR", str(self._place / "cache"))
        import wandb

        # Silent also means that wandb never asks for a key on the terminal: a thread could not be answered.
        wandb.setup(wandb.Settings(silent=True))
        self._run = self._online() if self._config.mode == "online" else self._init("offline")
        self._run.define_metric(AXIS)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric=AXIS, step_sync=False)

    def log(self, line: Mapping[str, Any]) -> None:
        self._run.log(line, step=self._number, commit=True)  # else it is held until the next one
        self._number += 1
        if not self._aside.is_alive() and self._directory.samples_of(line["step"]).exists():
            self._start_aside(self._send_tables)

    def finish(self, exit_code: int) -> None:
        if self._aside.is_alive():
            self._aside.join(ASIDE_SECONDS / 2)
        self._start_aside(self._send_all)
        self._aside.join(ASIDE_SECONDS / 2)
        if exit_code == ExitCode.PREEMPTED:
            self._run.mark_preempting()  # else wandb would call it failed
        self._run.finish(exit_code)

    def leave(self) -> None:
        import wandb

        wandb.teardown()  # here, because at the end of Python everything would wait for it

    @property
    def _place(self) -> Path:
        return self._directory.path.resolve() / "wandb"

    # Of tables and artifacts wandb asks its server before it records them, and waits long for an answer.

    def _start_aside(self, send: Callable[[], None]) -> None:
        self._aside = threading.Thread(target=self._try, args=[send], name="wandb-aside", daemon=True)
        self._aside.start()

    def _try(self, send: Callable[[], None]) -> None:
        try:
            send()
        except Exception as error:  # the lines go on
            logger.warning("wandb lacks tables or report.html, the run has them: %s", one_line(error))

    def _send_all(self) -> None:
        self._send_tables()
        if not self._run.offline:
            self._send_files()

    def _send_tables(self) -> None:
        import wandb

        found = {"samples": samples_table(self._directory), "mixture": mixture_table(self._directory)}
        for name, table in found.items():
            if table is not None:
                self._run.summary[name] = wandb.Table(columns=list(table.columns), data=table.rows)

    def _send_files(self) -> None:
        """report.html and the events as an artifact, a version each time that the run ends."""
        import wandb

        artifact = wandb.Artifact(f"report-{self._run.id}", type="report")
        for file in (self._directory.report, self._directory.events):
            if file.exists():
                artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def _online(self) -> Any:
        import wandb

        try:
            run = self._init("online")
        except Exception as error:
            logger.warning(
                "wandb records offline (`wandb sync %s/wandb/offline-run-*` sends it later): %s",
                self._directory.path,
                one_line(error),
            )
            wandb.teardown()  # the failed attempt still owns the run's id
            wandb.setup(wandb.Settings(silent=True))
            return self._init("offline")
        logger.info("wandb: %s", run.url)
        return run

    def _init(self, mode: Literal["offline", "online"]) -> Any:
        import wandb

        return wandb.init(
            project=self._config.project,
            name=self._title,
            id=self._run_id(),
            resume="allow",
            mode=mode,
            dir=self._directory.path,
            config=self._run_config,
            settings=wandb.Settings(
                init_timeout=CONNECT_SECONDS,
                finish_timeout=SEND_SECONDS,
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_transaction_log_flush_interval=FLUSH_SECONDS,
                x_disable_meta=True,  # it would record the command line, with any secret in an override
            ),
        )

    def _run_id(self) -> str:
        file = self._place / "id"
        if not file.exists():
            write_atomically(file, secrets.token_hex(4) + "\n")
        return file.read_text(encoding="ascii").strip()
