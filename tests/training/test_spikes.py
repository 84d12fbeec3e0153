"""Steps that are not like the others: judged, left out in every stage, their documents named."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.config import UserError
from llmtrain.data.dataset import Skip
from llmtrain.training.checkpoint import Manifest, best_step, checkpoints, read_record
from llmtrain.training.engine.guard import Limits
from llmtrain.training.engine.transfer import StepResult
from llmtrain.training.rewinds import (
    Rewind,
    choose_rewind,
    hide_stale,
    merged,
    read_rewinds,
    write_rewinds,
)
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.spikes import MIN_SCALE, SpikeConfig, SpikeDetector
from llmtrain.where import where
from tests.ranks import PATCH, RECORD, RankServer
from tests.training.checkpoint.small import record, scalars
from tests.training.faults import STEP
from tests.training.nonfinite_ranks import CASES
from tests.training.test_early_stop import BITS, PRESCRIBED
from tests.training.test_engine import batch, build
from tests.training.test_loggers import endings
from tests.training.test_resume import records
from tests.training.test_syncs import HostReads
from tests.training.wandb_files import offline_files

QUICK = [
    "adamw zero0 fp32",
    "adamw zero1 bf16",
    "lion zero2_offload bf16",
    "adamw zero3 bf16",
]


# The judgement, by itself


def detector(saved: Any = (), **keys: Any) -> SpikeDetector:
    few = {"window": 16, "warmup_steps": 20}
    rest = {"rewind_steps": 100, "skip_steps": 200, "max_rewinds": 3, "max_skipped": 3}
    thresholds = {"loss_threshold": 6.0, "grad_norm_threshold": 10.0}
    return SpikeDetector(SpikeConfig(**{"action": "log", **few, **rest, **thresholds, **keys}), saved)


def result(loss: float, norm: float, applied: bool = True) -> StepResult:
    rows = torch.tensor([loss * 8.0], dtype=torch.float64), torch.tensor([8.0], dtype=torch.float64)
    return StepResult(*rows, *rows, norm, applied, stop=False)


def series(steps: int) -> list[tuple[float, float]]:
    """Losses and norms that fall and scatter, with spikes of each kind, and a stretch without any noise."""
    noise = np.random.default_rng(0)
    loss = 3 + 2 * np.exp(-np.arange(steps) / 30) + noise.normal(0, 0.02, steps)
    norm = np.exp(noise.normal(0, 0.2, steps))
    loss[[40, 41]] *= 1.5
    norm[60] *= 50
    loss[80:] = 3.0
    return list(zip(loss.tolist(), norm.tolist(), strict=True))


def reference(past: list[float], value: float) -> float:
    """The robust z as its definition has it."""
    window = np.log(past[-16:])
    mad = np.median(np.abs(window - np.median(window)))
    return (np.log(value) - np.median(window)) / max(1.4826 * mad, MIN_SCALE)


def test_a_step_is_judged_by_the_window_before_it():
    judge, values, seen = detector(), series(110), {}
    for step, (loss, norm) in enumerate(values, start=1):
        seen[step] = judge.judge(step, result(loss, norm))
    losses, norms = zip(*values, strict=True)
    for step, verdict in seen.items():
        if step <= 20:
            assert verdict.loss_z is None
            continue
        expected = [reference(list(one[: step - 2]), one[step - 1]) for one in (losses, norms)]
        assert (verdict.loss_z, verdict.grad_norm_z) == pytest.approx(expected, rel=1e-9, abs=1e-9), step
    assert [step for step, verdict in seen.items() if verdict.kind == "spike"] == [41, 42, 61]


def test_a_judgement_goes_on_from_what_a_checkpoint_keeps():
    whole, values = detector(), series(110)[:70]
    for step, one in enumerate(values[:45], start=1):
        whole.judge(step, result(*one))
    resumed = detector(json.loads(json.dumps(whole.state())))
    for step, one in enumerate(values[45:], start=46):
        assert whole.judge(step, result(*one)) == resumed.judge(step, result(*one)), step


def test_what_is_left_out_is_no_measure_for_what_follows():
    judge = detector()
    for step in range(1, 41):
        spoilt = step > 30
        values = (math.nan, math.inf) if spoilt else (3.0, 1.0)
        verdict = judge.judge(step, result(*values, applied=not spoilt))
        assert verdict.kind == ("skip" if spoilt else ""), step
    assert judge.state()[-1][0] == 30
    assert judge.judge(41, result(3.0, 1.0)).loss_z == 0


@pytest.mark.parametrize("key", ["loss_threshold", "grad_norm_threshold"])
def test_the_limits_of_a_step_are_where_its_z_is_the_threshold(key):
    thresholds = {"loss_threshold": None, "grad_norm_threshold": None, key: 4.0}
    judge = detector(action="skip", **thresholds)
    for step, one in enumerate(series(110)[:30], start=1):
        judge.judge(step, result(*one))
        assert (judge.limits(step + 1) is None) == (step < 20), step
    limits = judge.limits(31)
    assert limits is not None
    at_the_limit = [limit if math.isfinite(limit) else 1.0 for limit in limits]
    verdict = judge.judge(31, result(*at_the_limit))
    z = verdict.loss_z if key == "loss_threshold" else verdict.grad_norm_z
    assert z == pytest.approx(4.0) and math.inf in limits
    assert detector().limits(31) is None


class Order:
    """The steps of a data order of which some are left out."""

    def __init__(self, stretches: Any) -> None:
        self.skip = Skip(stretches)
        self.data_step = self.skip.data_step


@pytest.mark.parametrize(
    ("commits", "start", "keys", "to", "skip"),
    [
        ([10, 20, 30], 0, (10, 1), 20, (21, 35)),  # the newest that is far enough; all data up to the spike
        ([10, 20, 30], 0, (16, 40), 10, (11, 50)),
        ([10, 20, 30], 0, (15, 25), 20, (21, 45)),  # exactly far enough
        ([20, 30], 0, (30, 1), 20, (21, 35)),  # none is: the oldest
        ([40], 7, (10, 1), 7, (8, 35)),  # none is before the spike: where the run began
        ([], 0, (10, 50), 0, (1, 50)),
    ],
)
def test_a_rewind_goes_to_a_commit_far_enough_back(commits, start, keys, to, skip):
    plain = Order([])
    rewind = choose_rewind(35, (9.0, None), commits, start, plain, *keys)
    assert rewind == Rewind(35, to, skip, 9.0, None)


def test_a_rewind_counts_data_in_steps_of_the_order():
    """Where steps were left out before, those of the training have other numbers."""
    before = Order([(5, 7), (32, 33)])
    rewind = choose_rewind(35, (9.0, None), [20, 30], 0, before, 10, 1)
    assert rewind.skip == (24, 40)
    after = Order(merged([*before.skip.stretches, rewind.skip]))
    assert [after.data_step(step) for step in (4, 5, 20, 21, 22)] == [4, 8, 23, 41, 42]


def test_stretches_are_merged():
    assert merged([(5, 7), (1, 2), (3, 3), (7, 9), (12, 12), (11, 14)]) == [(1, 3), (5, 9), (11, 14)]
    assert merged([(1, 9), (3, 4)]) == [(1, 9)] and merged([]) == []


def test_checkpoints_that_the_run_never_came_to_are_set_aside_and_no_others(tmp_path):
    known = {10: 0, 20: 0, 30: 0, 12: 1, 24: 1, 14: 2}
    for step, rewinds in known.items():
        path = tmp_path / f"step_{step:08d}"
        path.mkdir()
        known_by = {"rewinds": rewinds} if rewinds else {}
        rest = {"parameters": {}, "scalars": scalars(step), **known_by}
        content = json.dumps(record(step) | rest).encode()
        (path / "checkpoint.json").write_bytes(content)
        stamp = len(content), hashlib.sha256(content).hexdigest()
        Manifest(step, {"checkpoint.json": stamp, "rank_00000.safetensors": (0, "")}).write(path)
    history = [Rewind(33, 10, (11, 40), 9.0, None), Rewind(27, 12, (43, 60), 9.0, None)]
    for _ in range(2):  # a start that was killed is followed by another
        hide_stale(tmp_path, history)
        assert [step for step, _ in checkpoints(tmp_path)] == [10, 12, 14]
    hide_stale(tmp_path, [])
    assert len(checkpoints(tmp_path)) == 3


def test_what_is_no_list_of_rewinds_is_said(tmp_path):
    directory = RunDirectory(tmp_path)
    assert read_rewinds(directory) == []
    history = [Rewind(33, 10, (11, 40), 9.0, None)]
    write_rewinds(directory, history)
    assert read_rewinds(directory) == history
    for text in ("[1]", '[{"spike": 3}]', "{}}"):
        (tmp_path / "rewinds.json").write_text(text)
        with pytest.raises(UserError, match=r"not what llmtrain|not readable"):
            read_rewinds(directory)


# Left out, in every stage


def left_out(server: RankServer, directory: Path, cases: list[str]) -> dict[str, Any]:
    """What tests/training/nonfinite_ranks.py writes on two ranks."""
    file = directory / "found.json"
    server.run([str(file), *cases], 2, directory, door="tests.training.nonfinite_ranks", timeout=600)
    return json.loads(file.read_text())


def check_left_out(found: dict[str, Any]) -> None:
    for case, kinds in found.items():
        assert kinds.pop("good"), case
        assert set(kinds) == {"nan", "inf", "infinite loss", "loss", "norm"}
        for kind, what in kinds.items():
            finite = kind in ("loss", "norm")
            assert what == {"applied": False, "finite": finite, "same": True, "moved": True}, (case, kind)


def test_a_step_that_must_not_be_applied_moves_no_bit_of_weights_and_state(cpu_ranks, tmp_path):
    """Not finite on one rank only, or above a limit; the step after it is applied."""
    check_left_out(left_out(cpu_ranks, tmp_path, QUICK))


@pytest.mark.slow
def test_a_step_that_must_not_be_applied_moves_no_bit_in_any_stage_precision_and_optimizer(
    cpu_ranks, tmp_path
):
    check_left_out(left_out(cpu_ranks, tmp_path, [case for case in CASES if case not in QUICK]))


def test_limits_add_no_host_read_to_those_of_deepspeed(tiny):
    for stage, precision in [(0, "fp32"), (0, "bf16_autocast"), (1, "fp32"), (2, "bf16"), (3, "bf16")]:
        _, engine = build([*tiny, f"deepspeed=zero{stage}"], precision)
        counts = []
        for limits in (None, None, Limits(1e3, 1e3)):
            with HostReads() as reads:
                pending = engine.train_step(batch(8, 64), lr=1e-3, limits=limits)
            counts.append(reads.count)
            assert pending.result().applied
        engine.close()
        assert counts[1] == counts[2] and (counts[2] == 0 or stage > 0), (stage, precision)


# In a run


@pytest.fixture
def noisy(tiny, tmp_path) -> list[str]:
    """A run whose steps 21 and 22 are trained on noise, and judged by the eight before."""
    noise = np.random.default_rng(0)
    text = "".join(map(chr, noise.integers(0x4E00, 0x9FFF, 20_000).tolist()))
    (tmp_path / "noise.txt").write_text(text)
    shares = "{code: 0.7, prose: 0.3}"
    return [
        *tiny,
        f"+data.sources.noise.path={tmp_path}/noise.txt",
        "+data.sources.noise.format=text",
        "+data.sources.noise.weight=0",
        f"data.stages=[{{from_step: 21, weights: {{noise: 1}}}}, {{from_step: 23, weights: {shares}}}]",
        "max_steps=30",
        "checkpoint.every=6",
        "checkpoint.keep=3",
        "optimizer.lr=3e-3",
        "spikes.window=8",
        "spikes.warmup_steps=10",
        "spikes.rewind_steps=5",
        "spikes.skip_steps=10",
        "spikes.grad_norm_threshold=null",
    ]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


@pytest.mark.parametrize("action", ["log", "skip"])
def test_a_spike_is_named_with_its_documents(ranks, noisy, tmp_path, action):
    job = ranks.run([*noisy, f"spikes.action={action}", "deepspeed=zero2"], 2, tmp_path)
    run = tmp_path / "run"
    spikes = events(run, "spike")
    assert [spike["step"] for spike in spikes] == [21, 22]
    curve = records(run)
    for spike in spikes:
        assert spike["applied"] == (action == "log")
        assert spike["loss"] == curve[spike["step"]][0][0] and spike["loss_z"] > 6
        rows = spike["rows"]
        assert sorted(row["row"] for row in rows) == list(range(8))
        assert [row["loss"] for row in rows] == sorted((row["loss"] for row in rows), reverse=True)
        assert np.mean([row["loss"] for row in rows]) == pytest.approx(spike["loss"], rel=1e-3)
        assert {document["file"] for row in rows for document in row["documents"]} == {
            f"{tmp_path}/noise.txt"
        }
    assert "step 21 is a spike" in job.output()


def test_steps_that_are_not_finite_end_the_run_with_87(ranks, tiny, tmp_path):
    """Steps 4 and 5 are spoilt on rank 1 only, whose rows are the second half."""
    environment = {PATCH: "tests.training.faults:spoil", STEP: "3"}
    job = ranks.start([*tiny, "spikes.max_skipped=2", "checkpoint.every=3"], 2, tmp_path, environment)
    assert job.wait() == [87, 87], job.output()
    run = tmp_path / "run"
    skips = events(run, "skip")
    assert [(skip["step"], skip["applied"], skip["loss"]) for skip in skips] == [
        (4, False, None),
        (5, False, None),
    ]
    for skip in skips:
        assert (skip["applied"], skip["loss"]) == (False, None)
        assert [row["row"] for row in skip["rows"] if row["loss"] is None] == [4, 5, 6, 7]
        assert sorted(row["row"] for row in skip["rows"]) == list(range(8))
        for row in skip["rows"]:
            answer = next(where(run, {"step": str(skip["step"]), "row": str(row["row"])}))
            keys = ("file", "tokens", "first_token", "last_token")
            ours, theirs = (
                [[one[key] for key in keys] for one in named["documents"]] for named in (row, answer)
            )
            assert ours == theirs
    assert [step for step, _ in checkpoints(run / "checkpoints")] == [3, 5]
    assert "2 steps in a row were left out" in job.output()
    page = (run / "report.html").read_text()
    assert page.count('<span class="chip warn">not finite, left out</span>') == 2


def trained(run: Path) -> dict[int, tuple]:
    """The curve of the branch that counts: what was logged last of each step."""
    return {step: rows[-1] for step, rows in records(run).items()}


def tokens(directory: Path) -> list[np.ndarray]:
    """What rank 0 trained on, step after step."""
    with (directory / "rank0.npy").open("rb") as file:
        size, found = os.fstat(file.fileno()).st_size, []
        while file.tell() < size:
            found.append(np.load(file))
    return found


def test_a_rewind_is_replayed_bit_for_bit_also_when_it_is_killed(ranks, noisy, tmp_path):
    common = [*noisy, "spikes.action=rewind", "deepspeed=zero3"]
    job = ranks.start(common, 2, tmp_path)
    assert job.wait() == [89, 89], job.output()
    assert job.output().count("step 21 is a spike: back to step 12; past steps 13 to 22 of the data") == 1
    run, killed = tmp_path / "run", tmp_path / "killed"
    (rewind,) = json.loads((run / "rewinds.json").read_text())
    assert (rewind["spike"], rewind["to"], rewind["skip"]) == (21, 12, [13, 22])
    assert [step for step, _ in checkpoints(run / "checkpoints")] == [6, 12]
    shutil.copytree(run, killed)
    # As if it had been killed as soon as it was decided.
    stale = "checkpoints/.abandoned-step_00000018"
    (killed / stale).rename(killed / "checkpoints" / "step_00000018")

    ranks.run(common, 2, tmp_path, {RECORD: str(tmp_path)})
    whole = trained(run)
    assert sorted(whole) == list(range(1, 31)) and len(records(run)[13]) == 2
    assert not (run / stale).exists()
    ledger = json.loads((run / "data.json").read_text())["sources"]
    assert ledger["noise"]["trained"] == 0 and ledger["noise"]["skipped"] == 2 * 8 * 64

    for environment in ({PATCH: "tests.training.faults:die", STEP: "3"}, {}):
        job = ranks.start([*common, f"output_dir={killed}"], 2, tmp_path, environment)
        assert job.wait() == ([-9, -9] if environment else [0, 0]), job.output()
    assert trained(killed) == whole
    assert len(records(killed)[13]) == 3  # of the first branch, of the start that was killed, of the last

    ours, theirs = (read_record(place / "checkpoints" / "step_00000018") for place in (run, killed))
    assert (ours["rewinds"], ours["spikes"]) == (1, theirs["spikes"])
    assert [step for step, *_ in ours["spikes"]] == list(range(10, 19))  # those before the checkpoint, too

    page = (run / "report.html").read_text()
    assert "back to step 12; steps 13 to 22 of the data are left out" in page
    assert page.count(f"{tmp_path}/noise.txt byte") == 8  # its one document, in every row

    # `where` tells the steps that were trained, and that the noise never was.
    first = tokens(tmp_path)[0][0]
    answer = next(where(run, {"step": "13", "row": "0"}))
    assert answer["documents"][0]["text"].encode()[:20] in bytes(
        first[0].clip(0, 255).astype(np.uint8).tolist()
    )
    noise = list(where(run, {"document": f"{tmp_path}/noise.txt"}))
    assert noise and all(document["steps"] == [] for document in noise)


def test_a_rewind_takes_evaluations_back_and_a_run_stops_early_without_them(ranks, noisy, tmp_path):
    """The last evaluation of the branch that was left is the best of all."""
    run = tmp_path / "run"
    common = [
        *noisy, "spikes.action=rewind", "logger.wandb.mode=offline", "data.validation_fraction=0.3",
        "callbacks.evaluation.every=6", "callbacks.evaluation.documents=2", "callbacks.evaluation.patience=2",
    ]  # fmt: skip
    for last, code in ((3.0, 89), (4.4, 0)):
        bits = json.dumps({6: 4.0, 12: 4.5, 18: last})
        job = ranks.start(common, 1, tmp_path, {**PRESCRIBED, BITS: bits})
        assert job.wait() == [code], job.output()
    assert "2 evaluations were no better than 4.0000 bits per byte after step 6" in job.output()
    assert [event["step"] for event in events(run, "evaluation")] == [
        6,
        12,
        18,
        18,
        18,
    ]  # the last one with baselines
    assert events(run, "rewind")[0]["to"] == 12
    assert [step for step, _ in checkpoints(run / "checkpoints")] == [6, 12, 18]
    assert best_step(RunDirectory(run)) == 6
    assert [endings(file) for file in offline_files(run)] == [[89], [0]]


def test_a_spike_after_the_last_rewind_ends_the_run_with_87(ranks, noisy, tmp_path):
    job = ranks.start([*noisy, "spikes.action=rewind", "spikes.max_rewinds=0"], 1, tmp_path)
    assert job.wait() == [87], job.output()
    assert "spikes.max_rewinds=0" in job.output() and not (tmp_path / "run" / "rewinds.json").exists()
    assert f"{tmp_path}/noise.txt byte" in (tmp_path / "run" / "report.html").read_text()
    assert [step for step, _ in checkpoints(tmp_path / "run" / "checkpoints")] == [6, 12, 18]
