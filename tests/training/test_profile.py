"""A few steps are traced into the run, and the report shows where they went."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from llmtrain.training.callbacks.profile import kernel_times
from tests.ranks import PATCH


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
    assert names.count("aten::_fused_adamw_") == 3 * len(steps)  # matrices, the embedding and vectors

    found = json.loads((profile / "kernels.json").read_text())
    assert (found["first_step"], found["steps"], found["on"]) == (steps[0], len(steps), "processor")
    calls = {kernel["name"]: kernel["calls"] for kernel in found["kernels"]}
    assert calls["aten::mm"] == names.count("aten::mm") / len(steps)
    times = [kernel["ms"] for kernel in found["kernels"]]
    assert times == sorted(times, reverse=True) and 0 < sum(times) <= found["total_ms"] <= found["step_ms"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Profile</h2>" in report and "aten::mm" in report


def test_evaluation_samples_and_saves_are_no_part_of_a_profile(ranks, tiny, tmp_path: Path) -> None:
    """They come after steps 2 to 4 of a profile of 3 to 5: at its edges and within it."""
    common = [*tiny, "deepspeed=zero0", "max_steps=6", "log_every=100", "data.validation_fraction=0.1"]
    common += ["profile.steps=3", "profile.from_step=3"]
    often = ["callbacks.evaluation.every=1", "callbacks.sample.every=1", "checkpoint.every=1"]
    found = {}
    for name, keys in (("plain", []), ("often", often)):
        ranks.run([*common, *keys, f"output_dir={tmp_path}/{name}"], 1, tmp_path)
        found[name] = json.loads((tmp_path / name / "profile" / "kernels.json").read_text())
    calls = [{kernel["name"]: kernel["calls"] for kernel in profile["kernels"]} for profile in found.values()]
    assert calls[0]["aten::mm"] == calls[1]["aten::mm"]
    lines = [json.loads(line) for line in (tmp_path / "often" / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["perf/step_seconds"] for line in lines if 3 <= line["step"] <= 5]
    assert found["often"]["step_ms"] == pytest.approx(sum(seconds) / 3 * 1000)


def test_a_stop_within_a_profile_leaves_the_steps_so_far(ranks, tiny, tmp_path: Path) -> None:
    keys = ["deepspeed=zero0", "max_steps=4000", "profile.steps=3000", "profile.from_step=3"]
    job = ranks.start([*tiny, *keys], 1, tmp_path)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.05)
    os.kill(job.pids[0], signal.SIGTERM)
    assert job.wait() == [85], job.output()
    last = metrics.read_text().count("\n")
    found = json.loads((tmp_path / "run" / "profile" / "kernels.json").read_text())
    assert (found["first_step"], found["steps"]) == (3, last - 2)
    calls = {kernel["name"]: kernel["calls"] for kernel in found["kernels"]}
    assert calls["aten::mm"] == round(calls["aten::mm"])


def test_a_profile_that_the_disk_refuses_ends_no_run(ranks, tiny, tmp_path: Path) -> None:
    keys = ["deepspeed=zero0", "max_steps=4", "profile.steps=1", "profile.from_step=2"]
    job = ranks.run([*tiny, *keys], 1, tmp_path, {PATCH: "tests.training.faults:refuse_profile"})
    assert "No space left on device" in job.output() and (tmp_path / "run" / "DONE").exists()


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
            key=key, device_type=on, self_cpu_time_total=cpu, self_device_time_total=device,
            is_user_annotation=annotation,
        )  # fmt: skip

    operators = [event("aten::mm", DeviceType.CPU, 500.0, 3000.0), event("aten::add", DeviceType.CPU, 1.0, 0)]
    kernels = [
        event("norm", DeviceType.CUDA, 0.0, 1000.0),
        event("gemm", DeviceType.CUDA, 0.0, 3000.0),
        event("Optimizer.step", DeviceType.CUDA, 0.0, 9000.0, annotation=True),
    ]
    found = kernel_times([*operators, *kernels, *kernels, *kernels, *kernels], steps=2)
    assert (found["on"], found["total_ms"]) == ("device", 8.0)
    assert [tuple(kernel.values()) for kernel in found["kernels"]] == [
        ("gemm", 2.0, 6.0, 0.75),
        ("norm", 2.0, 2.0, 0.25),
    ]
    assert [kernel["name"] for kernel in kernel_times(operators, 2)["kernels"]] == ["aten::mm", "aten::add"]
