"""A few steps are traced into the run, and the report shows where they went."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from llmtrain.training.callbacks.profile import kernel_times


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        (["profile.steps=3", "profile.from_step=4"], [4, 5, 6]),
        (["profile.steps=1", "profile.from_step=1"], [1]),
        (["profile.steps=9", "profile.from_step=2"], [2, 3, 4, 5, 6, 7, 8]),  # the run ends at 8
    ],
)
def test_the_steps_of_a_profile_are_traced(ranks, tiny, tmp_path: Path, keys, steps) -> None:
    ranks.run([*tiny, "deepspeed=zero0", "max_steps=8", "log_every=100", *keys], 2, tmp_path)
    profile = tmp_path / "run" / "profile"
    assert sorted(path.name for path in profile.iterdir()) == ["kernels.json", "trace.json.gz"]
    with gzip.open(profile / "trace.json.gz", "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("cat") == "cpu_op"]
    names = [event["name"] for event in events]
    assert names.count("aten::_fused_adamw_") == 2 * len(steps)  # parameters that decay, and others

    found = json.loads((profile / "kernels.json").read_text())
    assert (found["first_step"], found["steps"], found["on"]) == (steps[0], len(steps), "processor")
    calls = {kernel["name"]: kernel["calls"] for kernel in found["kernels"]}
    assert calls["aten::mm"] == names.count("aten::mm") / len(steps)
    times = [kernel["ms"] for kernel in found["kernels"]]
    assert times == sorted(times, reverse=True) and 0 < sum(times) <= found["total_ms"] <= found["step_ms"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Profile</h2>" in report and "aten::mm" in report


def test_without_profile_steps_nothing_is_traced(ranks, tiny, tmp_path: Path) -> None:
    ranks.run([*tiny, "max_steps=3", "profile.from_step=2"], 1, tmp_path)
    assert not (tmp_path / "run" / "profile").exists()
    assert "<h2>Profile</h2>" not in (tmp_path / "run" / "report.html").read_text()


def test_a_profile_that_never_comes_is_told(ranks, tiny, tmp_path: Path) -> None:
    job = ranks.run([*tiny, "max_steps=3", "profile.steps=1", "profile.from_step=4"], 1, tmp_path)
    assert "profile.from_step=4" in job.output()
    assert not (tmp_path / "run" / "profile").exists()


def test_kernels_are_those_of_the_device_where_there_is_one() -> None:
    def event(key: str, on: DeviceType, cpu: float, device: float, annotation: bool = False):
        return SimpleNamespace(
            key=key, device_type=on, count=4, self_cpu_time_total=cpu, self_device_time_total=device,
            is_user_annotation=annotation,
        )  # fmt: skip

    operators = [event("aten::mm", DeviceType.CPU, 500.0, 3000.0), event("aten::add", DeviceType.CPU, 1.0, 0)]
    kernels = [
        event("norm", DeviceType.CUDA, 0.0, 1000.0),
        event("gemm", DeviceType.CUDA, 0.0, 3000.0),
        event("Optimizer.step", DeviceType.CUDA, 0.0, 9000.0, annotation=True),
    ]
    found = kernel_times([*operators, *kernels], steps=2)
    assert (found["on"], found["total_ms"]) == ("device", 2.0)
    assert [tuple(kernel.values()) for kernel in found["kernels"]] == [
        ("gemm", 2.0, 1.5, 0.75),
        ("norm", 2.0, 0.5, 0.25),
    ]
    assert [kernel["name"] for kernel in kernel_times(operators, 2)["kernels"]] == ["aten::mm", "aten::add"]
