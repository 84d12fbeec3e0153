"""A trace of a few steps and its kernels by time: where a step goes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch.autograd import DeviceType

from llmtrain.config import Config
from llmtrain.training.callbacks.base import Callback
from llmtrain.training.clock import Laps
from llmtrain.training.run_directory import disk_may_refuse

if TYPE_CHECKING:
    from llmtrain.training.callbacks.base import Run

logger = logging.getLogger(__name__)

MOST_KERNELS = 30

BETWEEN = "between steps"
"""The range of a trace that holds callbacks' work or a save."""


class ProfileConfig(Config):
    """Which steps of a process are traced."""

    steps: Annotated[int, Field(ge=0)]
    from_step: Annotated[int, Field(gt=0)]


class ProfileCallback(Callback):
    """Rank 0's steps from_step .. from_step + steps - 1 of this process, as torch.profiler sees them.

    Writes profile/trace.json.gz, for chrome://tracing or ui.perfetto.dev, and profile/kernels.json. The
    tracer is made ready a step ahead, which on a GPU takes a second; every rank stops for it alike. What lies
    between two steps is in the trace as `between steps`, and in no number. A run that ends before has the
    profile of the steps so far.
    """

    def __init__(self, config: ProfileConfig) -> None:
        self._steps, self._from_step = config.steps, config.from_step
        self._ready = self._started = self._ended = 0
        self._profiler: torch.profiler.profile | None = None
        self._between: torch.profiler.record_function | None = None
        self._before: Laps | None = None

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
        self._prepare(run)

    def is_due(self, run: Run, step: int) -> bool:
        return self._started < self._ended and step in (self._ready, self._started, self._ended)

    def after_step(self, run: Run, line: dict[str, Any]) -> None:
        self._prepare(run)

    def on_pause(self, run: Run) -> None:
        if self._before is None:
            return
        if run.step == self._ended:
            self._write(run)
        else:
            self._between = torch.profiler.record_function(BETWEEN)
            self._between.__enter__()

    def on_go(self, run: Run) -> None:
        if self._between is not None:
            self._between.__exit__(None, None, None)
            self._between = None
        elif self._profiler is not None and run.step == self._started:
            self._profiler.start_trace()
            self._before = run.clock.total

    def on_end(self, run: Run) -> None:
        if self._before is not None:
            self._write(run)

    def _prepare(self, run: Run) -> None:
        if not (run.world.is_main and self.is_due(run, run.step) and run.step == self._ready):
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if run.engine.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, acc_events=True)
        self._profiler.prepare_trace()

    def _write(self, run: Run) -> None:
        profiler, before, laps = self._profiler, self._before, run.clock.total
        assert profiler is not None and before is not None
        self._profiler = self._before = None
        if self._between is not None:
            self._between.__exit__(None, None, None)
        profiler.stop_trace()
        steps = laps.steps - before.steps
        if not steps:
            return
        directory = run.directory.path / "profile"
        found = {
            "first_step": self._started + 1,
            "steps": steps,
            "step_ms": laps.step_since(before) * 1000,
            **kernel_times(of_steps(profiler.events()), steps),
        }
        with disk_may_refuse():
            directory.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(directory / "trace.json.gz"))
            run.directory.write_json("profile/kernels.json", found)
            logger.info("profile of steps %d to %d: %s", self._started + 1, self._started + steps, directory)


def of_steps(events: Any) -> list[Any]:
    """The events that do not lie between steps."""
    asides = [event.time_range for event in events if event.key == BETWEEN]
    return [
        event
        for event in events
        if not any(aside.start <= event.time_range.start <= aside.end for aside in asides)
    ]


def kernel_times(events: Any, steps: int) -> dict[str, Any]:
    """What took the time: kernels by that of the device, operators by that of the processor if there is none.

    ms: a step, of the kernel or operator itself, without those it calls; share: of all of them.
    """
    kernels = [
        (event.key, event.self_device_time_total)
        for event in events
        if event.device_type != DeviceType.CPU and not event.is_user_annotation
    ]
    times: dict[str, list[float]] = {}
    for key, microseconds in kernels or [(event.key, event.self_cpu_time_total) for event in events]:
        times.setdefault(key, []).append(microseconds)
    total = sum(map(sum, times.values()))
    longest = sorted(times.items(), key=lambda pair: sum(pair[1]), reverse=True)[:MOST_KERNELS]
    return {
        "on": "device" if kernels else "processor",
        "total_ms": total / steps / 1000,
        "kernels": [
            {
                "name": key,
                "calls": len(calls) / steps,
                "ms": sum(calls) / steps / 1000,
                "share": sum(calls) / total,
            }
            for key, calls in longest
            if sum(calls)
        ],
    }
