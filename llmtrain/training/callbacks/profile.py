"""A trace of a few steps and its kernels by time: where a step goes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch.autograd import DeviceType

from llmtrain.config import Config
from llmtrain.training.engine.transfer import Moment

if TYPE_CHECKING:
    from llmtrain.training.callbacks.base import Run

logger = logging.getLogger(__name__)

MOST_KERNELS = 30


class ProfileConfig(Config):
    """Which steps of a process are traced."""

    steps: Annotated[int, Field(ge=0)]
    from_step: Annotated[int, Field(gt=0)]


class ProfileCallback:
    """Rank 0's steps from_step .. from_step + steps - 1 of this process, as torch.profiler sees them.

    Writes profile/trace.json.gz, for chrome://tracing or ui.perfetto.dev, and profile/kernels.json. The
    tracer is made ready a step ahead, which on a GPU takes a second; every rank stops for it alike.
    """

    def __init__(self, config: ProfileConfig) -> None:
        self._steps, self._from_step = config.steps, config.from_step
        self._ready = self._started = self._ended = 0
        self._profiler: torch.profiler.profile | None = None
        self._began: Moment | None = None

    def on_start(self, run: Run) -> None:
        """Know the steps of this process after which there is something to do."""
        if not self._steps:
            return
        self._started = run.step + self._from_step - 1
        self._ready = max(self._started - 1, run.step)
        self._ended = min(self._started + self._steps, run.config.max_steps)
        if run.world.is_main and self._ended <= self._started:
            logger.warning(
                f"profile.from_step={self._from_step}: this process ends at its step "
                f"{run.config.max_steps - run.step}, so nothing will be traced"
            )
        self._at(run, run.step)

    def is_due(self, run: Run, step: int) -> bool:
        return self._started < self._ended and step in (self._ready, self._started, self._ended)

    def load(self, run: Run, step: int) -> None:
        """It reads no text."""

    def after_step(self, run: Run, line: dict[str, Any]) -> None:
        self._at(run, run.step)

    def _at(self, run: Run, step: int) -> None:
        if not (run.world.is_main and self.is_due(run, step)):
            return
        if step == self._ended:
            self._write(run)
            return
        if step == self._ready:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if run.engine.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities, acc_events=True)
            self._profiler.prepare_trace()
        if step == self._started:
            assert self._profiler is not None
            self._profiler.start_trace()
            self._began = Moment(run.engine.device)

    def _write(self, run: Run) -> None:
        profiler, began, steps = self._profiler, self._began, self._ended - self._started
        assert profiler is not None and began is not None
        ended = Moment(run.engine.device)
        ended.wait()
        profiler.stop_trace()
        self._profiler = None
        directory = run.directory.path / "profile"
        directory.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(directory / "trace.json.gz"))
        found = {
            "first_step": self._started + 1,
            "steps": steps,
            "step_ms": ended.seconds_since(began) * 1000 / steps,
            **kernel_times(profiler.key_averages(), steps),
        }
        run.directory.write_json("profile/kernels.json", found)
        logger.info("profile of steps %d to %d: %s", self._started + 1, self._ended, directory)


def kernel_times(events: Any, steps: int) -> dict[str, Any]:
    """What took the time: kernels by that of the device, operators by that of the processor if there is none.

    ms: a step, of the kernel or operator itself, without those it calls; share: of all of them.
    """
    kernels = [
        (event.self_device_time_total, event)
        for event in events
        if event.device_type != DeviceType.CPU and not event.is_user_annotation
    ]
    times = kernels or [(event.self_cpu_time_total, event) for event in events]
    total = sum(microseconds for microseconds, _ in times)
    times = sorted(times, key=lambda pair: pair[0], reverse=True)[:MOST_KERNELS]
    return {
        "on": "device" if kernels else "processor",
        "total_ms": total / steps / 1000,
        "kernels": [
            {
                "name": event.key,
                "calls": event.count / steps,
                "ms": microseconds / steps / 1000,
                "share": microseconds / total,
            }
            for microseconds, event in times
            if microseconds
        ],
    }
