"""A wrong bit in a rank's memory or arithmetic ends the run at the next check, and is named."""

from __future__ import annotations

import json
import re
import socket

import pytest
import torch

from llmtrain.training.corruption import Answer, compare, odd_ones
from llmtrain.training.engine.replicas import checksum
from tests.ranks import PATCH
from tests.training import faults
from tests.training.test_resume import records

THEIRS, MATRIX = "blocks.0.feed_forward.down.weight", "blocks.1.feed_forward.down.weight"
NORM = "blocks.1.attention_norm.weight"
SPLIT = "deepspeed.zero_optimization.stage3_param_persistence_threshold=100"
"""Matrices are partitioned, norms are not."""
FLIPS = [
    (0, "fp32", f"optimizer {MATRIX}", [0, 1]),
    pytest.param(0, "bf16_autocast", MATRIX, [0, 1], marks=pytest.mark.slow),
    pytest.param(1, "fp32", MATRIX, [1], marks=pytest.mark.slow),
    (1, "bf16", THEIRS, [0, 1]),
    (2, "bf16", MATRIX, [1]),
    pytest.param(2, "bf16", THEIRS, [0, 1], marks=pytest.mark.slow),
    (3, "bf16", NORM, [0, 1]),
    (3, "bf16", MATRIX, [1]),
    pytest.param(3, "fp32", MATRIX, [1], marks=pytest.mark.slow),
]
"""Stage, precision, what is hit on rank 1, who is named: both ranks, or the one whose own part it is.

Under stages 1 and 2 the first block is in rank 0's part, the second one in rank 1's.

Every one of these runs saves at step 2 and is corrupt after step 3.
"""


def start(ranks, tiny, tmp_path, fault: str, *overrides: str, where: str = ""):
    common = [*tiny, "max_steps=5", "checkpoint.every=2", "corruption_check.every=1", *overrides]
    hook = {PATCH: f"tests.training.faults:{fault}", faults.STEP: "3", faults.WHERE: where}
    return ranks.start(common, 2, tmp_path, hook)


def ended(job, run) -> tuple[str, dict]:
    """The line that the run ended with and its event, after what every such end has was looked at."""
    assert job.wait() == [88, 88], job.output()
    (line,) = [line for line in job.output().splitlines() if line.startswith("error: ")]
    event = json.loads((run / "events.jsonl").read_text().splitlines()[-1])
    assert event["event"] == "corruption" and event["step"] == 3
    assert '<span class="chip warn">corruption</span>' in (run / "report.html").read_text()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]
    assert not (run / "DONE").exists()
    assert set(event["hosts"]) == {socket.gethostname()} and socket.gethostname() in line
    return line, event


@pytest.mark.parametrize(("stage", "precision", "where", "named"), FLIPS)
def test_a_flipped_bit_ends_the_run(ranks, tiny, tmp_path, stage, precision, where, named):
    options = [f"deepspeed=zero{stage}", f"precision={precision}", SPLIT]
    job = start(ranks, tiny, tmp_path, "flip_a_bit", *options, where=where)
    line, event = ended(job, tmp_path / "run")
    name = where.split()[-1] + (": exp_avg" if "optimizer" in where else "")
    assert (event["ranks"], event["tensors"]) == (named, [name])
    assert f"({name})" in line and ("one of rank 0 on" in line) == (named == [0, 1])


def test_a_rank_that_computes_unsteadily_is_named(ranks, tiny, tmp_path):
    line, event = ended(start(ranks, tiny, tmp_path, "compute_unsteadily"), tmp_path / "run")
    assert event["ranks"] == [1]
    assert "after step 3: rank 1 on" in line and "computes a micro-batch again" in line


def test_a_rank_that_computes_wrongly_differs_from_the_others(ranks, tiny, tmp_path):
    line, event = ended(start(ranks, tiny, tmp_path, "compute_wrongly", "deepspeed=zero3"), tmp_path / "run")
    assert event["ranks"] == [0, 1]
    assert "another loss of the same micro-batch" in line


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        pytest.param(0, "fp32", marks=pytest.mark.slow),
        pytest.param(1, "bf16", marks=pytest.mark.slow),
        (3, "bf16"),
    ],
)
def test_the_check_changes_no_step_and_is_not_made_unless_asked_for(ranks, tiny, tmp_path, stage, precision):
    options = [f"deepspeed=zero{stage}", f"precision={precision}"]
    off = [*options, "corruption_check.every=0", f"output_dir={tmp_path}/without"]
    assert start(ranks, tiny, tmp_path, "compute_unsteadily", *off).wait() == [0, 0], "nothing is looked at"
    on = ["max_steps=5", "checkpoint.every=2", "corruption_check.every=1", f"output_dir={tmp_path}/with"]
    ranks.run([*tiny, *options, *on], 2, tmp_path)
    assert records(tmp_path / "with") == records(tmp_path / "without")


def test_corruption_between_checks_is_found_before_a_save(ranks, tiny, tmp_path):
    """Under stage 0 nothing mends a replica: what is corrupt after step 3 still is at the save of step 4."""
    rare = ["deepspeed=zero0", "corruption_check.every=100"]
    job = start(ranks, tiny, tmp_path, "flip_a_bit", *rare, where=MATRIX)
    assert job.wait() == [88, 88], job.output()
    assert "silent corruption after step 4" in job.output()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_every_single_bit_changes_the_checksum(dtype):
    values = torch.arange(1, 14).to(dtype)
    before = checksum(values).item()
    width = 8 * values.element_size()
    sums = set()
    for element in range(len(values)):
        for bit in range(width):
            data = bytearray(values.view(torch.uint8).numpy().tobytes())
            data[(element * width + bit) // 8] ^= 1 << (bit % 8)
            sums.add(checksum(torch.frombuffer(data, dtype=dtype)).item())
    assert before not in sums
    swapped = values.clone()
    swapped[[2, 9]] = values[[9, 2]]
    assert checksum(swapped).item() != before


def test_a_checksum_does_not_depend_on_how_it_is_cut(monkeypatch):
    values = torch.randn(1001, dtype=torch.float32)
    whole = checksum(values)
    monkeypatch.setattr("llmtrain.training.engine.replicas.CHUNK", 64)
    assert checksum(values) == whole
    assert checksum(values.view(7, 143).t().contiguous().t()) == whole, "also of a strided view"


def answer(checksums=(1, 2), losses=(5,), again=None, strays=()) -> Answer:
    return Answer("host", checksums, strays, (losses, again or losses))


@pytest.mark.parametrize(
    ("answers", "ranks", "tensors", "what"),
    [
        ([answer()] * 4, None, (), ""),
        ([answer()], None, (), ""),
        ([answer(), answer((1, 3)), answer(), answer()], [1], ["b"], "hold"),
        ([answer((0, 0)), answer(), answer(), answer((1, 3)), answer()], [0, 3], ["a", "b"], "hold"),
        ([answer(), answer((1, 3))], [0, 1], ["b"], "hold"),
        ([answer(), answer(), answer((1, 3)), answer((1, 3))], [0, 1, 2, 3], ["b"], "hold"),
        ([answer(), answer(), answer(losses=(6,))], [2], (), "than the other ranks"),
        ([answer(), answer(losses=(5,), again=(6,)), answer((1, 3))], [1], (), "again"),
        ([answer(losses=(5,), again=(6,))], [0], (), "again"),
        ([answer(strays=["b"]), answer(), answer((1, 3), strays=["a", "b"])], [0, 2], ["b", "a"], "masters"),
        ([answer((), ()), answer((), ())], None, (), ""),
    ],
)
def test_the_majority_is_right(answers, ranks, tensors, what):
    found = compare(["a", "b"], answers)
    if ranks is None:
        assert found is None
    else:
        assert found is not None
        assert (list(found.ranks), list(found.tensors)) == (ranks, list(tensors))
        assert re.search(what, found.what)


def test_odd_ones_of_nothing_in_common():
    assert odd_ones([1, 2, 3]) == [0, 1, 2]
