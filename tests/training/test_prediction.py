"""After 20 steps a run tells once what was predicted of it and what it measured."""

from __future__ import annotations

import json

import pytest
import torch

from llmtrain.config.hydra import compose
from llmtrain.training.config import TrainConfig
from llmtrain.training.sizing.memory import Layout, memory
from llmtrain.training.sizing.model import Model


def test_predicted_beside_measured(ranks, tiny, tmp_path):
    """On any device that has rates: here those of an H100, which no CPU keeps up with."""
    arguments = [*tiny, "max_steps=22", "hardware=h100_80gb", "precision=bf16_autocast", "deepspeed=zero0"]
    between = ["callbacks.evaluation.every=2", "data.validation_fraction=0.1", "checkpoint.every=5"]
    job = ranks.run([*arguments, *between, "callbacks.sample.prompts=[]"], 2, tmp_path)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "prediction"]
    assert event["step"] == 20
    config = compose(TrainConfig, arguments)
    expected = memory(Model.of(config, 258), Layout.of(config, 2, "bf16_autocast"))
    assert event["predicted_memory"] == expected.total
    assert event["measured_memory"] is None or event["measured_memory"] > 0
    assert 0 < event["predicted_seconds"] < event["measured_seconds"] < 60
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["perf/step_seconds"] for line in lines if 10 < line["step"] <= 20]
    assert len(seconds) == 10
    assert event["measured_seconds"] == pytest.approx(sum(seconds) / 10)  # no evaluation, no save
    assert event["measured_tokens_per_second"] == 8 * 64 / event["measured_seconds"]
    assert job.output().count("tokens/s predicted") == 1
    assert ("GiB at the peak predicted" in job.output()) == torch.cuda.is_available()
