"""The whole trainer learns: a small decoder knows rows of 64 tokens by heart within 300 steps."""

from __future__ import annotations

import json
import pydoc_data.topics

import pytest


@pytest.mark.parametrize("rows", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_rows_of_64_tokens_are_learnt_in_300_steps(ranks, tiny, tmp_path, rows):
    text = "".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")[: rows * 64]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "rows.txt").write_bytes(text)
    ranks.run(
        [
            *tiny,
            "~data.sources.prose",
            f"data.sources.code.path={tmp_path}/text/rows.txt",
            "data.boundary=none",
            "data.documents=attend",
            "data.validation_fraction=0",
            "callbacks.sample.prompts=[]",
            f"global_batch_size={rows}",
            f"micro_batch_size={rows}",
            "max_steps=300",
            "log_every=10",
            "checkpoint.every=300",
            "model.d_model=128",
            "model.d_ff=256",
            "optimizer.lr=5e-3",
            "optimizer.weight_decay=0",
            "scheduler.warmup_steps=20",
        ],
        1,
        tmp_path,
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 300
    assert lines[-1]["data/epochs/code"] == 300
    assert lines[-1]["train/loss"] < 0.1
