"""metrics.jsonl is a contract: every key of every line, recomputed from the data and the schedule."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmtrain.config.hydra import compose
from llmtrain.data.prepare import prepare
from llmtrain.evaluate import main as evaluate_main
from llmtrain.training.build import build_dataset
from llmtrain.training.config import TrainConfig
from llmtrain.training.goodput import PARTS

KEYS = {
    *("step", "train/loss", "train/grad_norm", "train/lr", "train/tokens"),
    *(
        f"{key}/{name}"
        for key in ("train/loss", "data/tokens", "data/share", "data/epochs")
        for name in ("code", "prose")
    ),
    *("perf/tokens_per_second", "perf/step_seconds", "perf/mfu", "perf/memory_bytes", "goodput/share"),
    *(f"goodput/{part}_seconds" for part in PARTS),
}


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_key_of_every_line(ranks, tiny, tmp_path):
    overrides = [*tiny, "max_steps=7", "log_every=5", "callbacks.evaluation.every=3"]
    overrides += ["data.validation_fraction=0.3", "callbacks.sample.prompts=[]"]
    ranks.run(overrides, 2, tmp_path)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [3, 5, 6, 7]  # evaluations, every fifth step, the last one
    assert ["eval/loss" in line for line in lines] == [True, False, True, True]

    config = compose(TrainConfig, overrides)
    train, held_out = prepare(config.data, config.tokenizer, config.cache_dir).open()
    dataset = build_dataset(config, train)
    assert dataset.names == ["code", "prose"]
    served = dict.fromkeys(dataset.names, 0)
    by_step = {line["step"]: line for line in lines}
    for step in range(1, 8):
        batch = dataset.rows(step, 0, 8)
        for number, name in enumerate(dataset.names):
            served[name] += int((batch.source_ids == number).sum()) * 64
        if step not in by_step:
            continue
        line = by_step[step]
        assert set(line) >= KEYS
        assert 2**27 < line["perf/memory_bytes"] < 2**34  # of a process that has imported torch
        assert line["train/tokens"] == step * 8 * 64
        assert line["train/lr"] == pytest.approx(config.optimizer.lr * config.scheduler.build(7)(step))
        assert line["perf/tokens_per_second"] == pytest.approx(8 * 64 / line["perf/step_seconds"])
        targets, mean = {}, 0.0
        for number, name in enumerate(dataset.names):
            assert line[f"data/tokens/{name}"] == served[name]
            assert line[f"data/share/{name}"] == pytest.approx(served[name] / (step * 8 * 64))
            assert line[f"data/epochs/{name}"] == pytest.approx(served[name] / train[name].tokens)
            rows = batch.labels[batch.source_ids == number]
            targets[name] = int((rows != -100).sum())
            mean += targets[name] * (line[f"train/loss/{name}"] or 0.0)
        assert line["train/loss"] == pytest.approx(mean / sum(targets.values()))

    # Held-out text is text that was not trained on, every byte of it, and the door finds the same scores.
    stored = json.loads((tmp_path / "run" / "eval" / "heldout.json").read_text())
    for name, source in held_out.items():
        assert stored["sources"][name]["bytes"] == source.index["text_bytes"]
        assert source.manifest_hash != train[name].manifest_hash
    assert evaluate_main([str(tmp_path / "run")]) == 0
    again = json.loads((tmp_path / "run" / "eval" / "heldout.json").read_text())
    for key in ("loss", "bits_per_byte", "unigram_bits_per_byte", "shuffled_bits_per_byte"):
        assert again["all"][key] == pytest.approx(stored["all"][key], rel=1e-5), key


def test_a_run_whose_gradients_explode_ends_with_87_and_a_checkpoint(ranks, tiny, tmp_path):
    command = [*tiny, "optimizer.lr=1e30", "optimizer.gradient_clipping=0", "checkpoint.every=1"]
    job = ranks.start(command, 2, tmp_path)
    assert job.wait() == [87, 87], job.output()
    run = tmp_path / "run"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    skipped = [event["step"] for event in events if event["event"] == "skip"]
    assert len(skipped) == 3
    assert metrics(run)[-1]["step"] == skipped[-1]
    assert metrics(run)[-1]["train/grad_norm"] is None
    assert (run / "checkpoints" / f"step_{skipped[-1]:08d}" / "checkpoint.json").exists()
    assert not (run / "DONE").exists()
    assert "optimizer.lr" in job.output()
    shutil.rmtree(run / "checkpoints" / f"step_{skipped[-1]:08d}")  # as if killed before it
    job = ranks.start(command, 2, tmp_path)
    assert job.wait() == [87, 87], job.output()
    assert metrics(run)[-1]["step"] == metrics(run)[-2]["step"] == skipped[-1]
