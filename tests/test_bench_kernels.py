"""`llmtrain bench kernels` on tiny shapes: errors against float64, operations counted, the door."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmtrain.bench import main
from llmtrain.benchmarks.kernels import MASKS, SMALL, Sizes, errors, kernels_table, problem, sizes_here
from llmtrain.config import UserError
from llmtrain.model.kernels import Kernel
from llmtrain.model.kernels.choose import BACKENDS, load

CPU = torch.device("cpu")
TINY = Sizes(rows=2, length=24, heads=4, kv_heads=2, head_dim=16, documents=3, dtype="fp32")


def test_operations_are_those_of_the_pairs_that_meet() -> None:
    for mask in MASKS:
        given = problem(TINY, mask, CPU)
        pairs = given.prepared(load("eager"), torch.float32).isfinite()  # -inf where no key is seen
        pairs = pairs.expand(2, 4, 24, 24).sum().item()
        assert given.flops == 2 * 2 * TINY.head_dim * pairs
        assert len(given.starts) == (7 if mask in ("documents", "both") else 3)


def test_errors_are_relative_and_see_what_is_wrong() -> None:
    eager = load("eager")
    fine = errors(eager, TINY, "both", CPU, backward=True)
    assert set(fine) == {"out_error", "dq_error", "dk_error", "dv_error"}
    assert max(fine.values()) < 1e-6
    louder = Kernel("louder", eager.prepare, lambda q, k, v, bias: 1.5 * eager.attend(q, k, v, bias))
    found = errors(louder, TINY, "both", CPU, backward=True)
    assert list(found.values()) == pytest.approx([0.5] * 4, abs=1e-5)
    half = errors(eager, Sizes(**{**vars(TINY), "dtype": "bf16"}), "causal", CPU, backward=True)
    assert 1e-4 < half["out_error"] < 2e-2


def test_sizes_that_do_not_fit_are_mistakes() -> None:
    if not torch.cuda.is_available():
        assert sizes_here(rows=None, heads=8) == Sizes(**{**vars(SMALL), "heads": 8})
    with pytest.raises(UserError, match="--kv-heads 3 does not divide --heads 4"):
        sizes_here(heads=4, kv_heads=3)
    with pytest.raises(UserError, match="--documents 65: a row of --length 64"):
        sizes_here(length=64, documents=65)


def test_the_door_measures_all_and_names_what_is_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "kernels.json"
    shape = ["--rows", "2", "--length", "24", "--heads", "4", "--head-dim", "16", "--documents", "3"]
    assert main(["kernels", *shape, "--seconds", "0.001", "--rounds", "2", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    printed, told = capsys.readouterr()
    assert "Warning" not in told
    assert kernels_table(report) in printed
    assert list(report["masks"]) == list(MASKS)
    for found in report["masks"].values():
        assert set(found) == set(BACKENDS)
        for backend in ("eager", "sdpa"):
            result = found[backend]
            assert len(result["rounds"]) == 2
            expected = 3.5 * result["flops"] / (result["both_ms"] * 1e-3) / 1e12
            assert result["both_tflops"] == pytest.approx(expected)
            assert min(result["forward_ms"], result["both_ms"]) > 0
    if not torch.cuda.is_available():
        assert "- causal, flash: needs an NVIDIA GPU" in printed
        assert printed.count("- flex is not fused on a CPU") == 1
        assert "out_error" in report["masks"]["both"]["flex"]
        assert "both_ms" not in report["masks"]["both"]["flex"]
