"""`llmtrain bench model` on a tiny model: all loops train the same, and what is told is counted right."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.bench import main
from llmtrain.benchmarks import model
from llmtrain.benchmarks.model import FLOOR, SMALL, candidates_of, models_table, sizes_here
from llmtrain.benchmarks.model_turns import EVERY, WARM_UP, Task
from llmtrain.benchmarks.options import PEERS
from llmtrain.config import ExitCode, UserError

NANOGPT = '''
from dataclasses import dataclass

import torch


@dataclass
class GPTConfig:
    """As in nanoGPT, with a model of one table."""

    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool


class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, idx, targets):
        logits = self.table(idx) @ self.table.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
'''


def test_every_loop_trains_the_same_model_on_the_same_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trainer, a loop of torch, and transformers under DeepSpeed have one curve of losses."""
    output, gpt = tmp_path / "model.json", tmp_path / "gpt.py"
    gpt.write_text(NANOGPT)
    words = ["--vocab-size", "512", "--seq-len", "32", "--micro-batch-size", "2", "--global-batch-size", "4"]
    words += ["--steps", "5", "--rounds", "1", "--stages", "1", "--candidates", *PEERS]
    words += ["--nanogpt", str(gpt), "--directory", str(tmp_path), "--output", str(output)]
    assert main(["model", *words]) == 0
    report = json.loads(output.read_text())
    found = report["candidates"]
    same = [FLOOR, "llmtrain, ZeRO 1", "Hugging Face, DeepSpeed's stage 2"]
    for name in same:
        losses = found[name]["losses"]
        assert len(losses) == (WARM_UP + 5) // EVERY
        assert losses[0] > 6 > losses[-1]  # ln 512 is 6.2
        assert found[name]["loss_difference"] < 1e-3
        assert found[name]["parameters"] == found[FLOOR]["parameters"]
        assert found[name]["precision"] == found[FLOOR]["precision"]
    for name in (*same, "nanoGPT"):
        result = found[name]
        assert len(result["seconds"]) == 1 and result["ms"] == pytest.approx(result["seconds"][0] * 1e3)
        assert result["tokens_s"] == pytest.approx(4 * 32 / result["seconds"][0])
        assert 100 < result["peak_mb"] < 5000
    assert found["nanoGPT"]["parameters"] == 512 * 128 and "loss_difference" not in found["nanoGPT"]
    assert models_table(report) in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt.py", "model.json"]


def test_operations_are_counted_three_ways() -> None:
    sizes = replace(SMALL, seq_len=10, global_batch_size=3)
    here = {"attention_width": 7, "peak_flops": 1e6}
    speeds = model._speeds({"ms": 500.0, "parameters": 100}, sizes, here)
    assert speeds["tokens_s"] == 60
    for name, flops in (("6N", 600), ("6N_6LdS", 600 + 6 * 70), ("6N_12LdS", 600 + 12 * 70)):
        assert speeds[f"tflops_{name}"] == pytest.approx(60 * flops / 1e12)
        assert speeds[f"mfu_{name}"] == pytest.approx(60 * flops / 1e6)
    assert not [
        key
        for key in model._speeds({"ms": 1.0, "parameters": 1}, sizes, {**here, "peak_flops": None})
        if "mfu" in key
    ]


def test_the_count_in_full_is_the_one_that_the_trainer_reports(tmp_path: Path) -> None:
    config = Task(model.overrides(SMALL, str(tmp_path)), str(tmp_path), 5, None).config(stage=0)
    shape = config.model
    decoder = shape.assemble(vocab_size=SMALL.vocab_size, seq_len=SMALL.seq_len)
    width = shape.n_layers * shape.n_heads * shape.d_head
    result = {"ms": 1000.0, "parameters": decoder.parameter_count}
    speeds = model._speeds(result, SMALL, {"attention_width": width, "peak_flops": 1.0})
    assert speeds["mfu_6N_12LdS"] == pytest.approx(
        decoder.flops_per_token(SMALL.seq_len) * speeds["tokens_s"]
    )


def test_losses_are_compared_with_the_first_that_was_measured() -> None:
    results: dict[str, dict[str, Any]] = {
        "a": {"error": "broken"},
        "b": {"losses": [4.0, 2.0]},
        "c": {"losses": [4.1, 2.2]},
    }
    model._compare_losses(results)
    assert "loss_difference" not in results["a"]
    assert [results[name]["loss_difference"] for name in "bc"] == pytest.approx([0, 0.1])


def test_what_is_not_here_is_named_and_not_started() -> None:
    known = candidates_of(["nanogpt", "litgpt"], range(4))
    assert list(known) == ["nanoGPT", "litgpt"]
    task = Task([], "", 5, None)
    with pytest.raises(model.NotInstalledError, match="--nanogpt"):
        model._turn("nanoGPT", known["nanoGPT"], task)
    absent = replace(known["litgpt"], needs=("no_such_library",))
    with pytest.raises(model.NotInstalledError, match="no_such_library"):
        model._turn("litgpt", absent, task)
    report = {"candidates": {"litgpt": {"missing": "litgpt"}, "b": {"error": "out of memory"}}}
    table = models_table(report)
    assert "- litgpt: litgpt" in table and "- b: out of memory" in table
    assert "not here" in table and "failed" in table


def test_the_stages_are_candidates_of_their_own() -> None:
    assert list(candidates_of(["llmtrain", "torch"], [0, 3])) == [
        "llmtrain, ZeRO 0",
        "llmtrain, ZeRO 3",
        FLOOR,
    ]


def test_sizes_that_do_not_fit_are_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert asdict(sizes_here(steps=None)) == asdict(SMALL)
    assert sizes_here(micro_batch_size=3).global_batch_size == 3
    with pytest.raises(UserError, match="--steps 7 is not a multiple of 5"):
        sizes_here(steps=7)
    assert main(["model", "--model", "wonder"]) == ExitCode.CONFIG
    assert "wonder" in capsys.readouterr().err
