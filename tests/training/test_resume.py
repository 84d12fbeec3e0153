"""Save, new process, load, continue: bit-equal to the run that was never interrupted."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.ranks import PATCH
from tests.training.pauses import PLACE

CASES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


def records(run: Path) -> dict[int, list[tuple]]:
    """What metrics.jsonl says of each step, replays included: (loss, gradient norm, learning rate)."""
    found: dict[int, list[tuple]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["step"], []).append((row["train/loss"], row["train/grad_norm"], row["train/lr"]))
    return found


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_resumed_run_is_bit_equal(ranks, tiny, tmp_path, stage, precision):
    common = [*tiny, f"deepspeed=zero{stage}", f"precision={precision}", "max_steps=8", "checkpoint.every=5"]
    ranks.run([*common, f"output_dir={tmp_path}/whole"], 2, tmp_path)
    whole = records(tmp_path / "whole")
    assert sorted(whole) == list(range(1, 9))

    source = tmp_path / "whole" / "checkpoints" / "step_00000005"
    ranks.run([*common, f"output_dir={tmp_path}/resumed", f"resume={source}"], 2, tmp_path)
    resumed = records(tmp_path / "resumed")
    assert sorted(resumed) == [6, 7, 8]
    assert all(resumed[step] == whole[step] for step in resumed)


def test_auto_resume_after_sigterm_goes_on_where_it_stopped(ranks, tiny, tmp_path):
    common = [*tiny, "max_steps=100000", "checkpoint.every=100000", "callbacks.evaluation.every=0"]
    job = ranks.start(common, 2, tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 5):
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.05)
    os.kill(job.pids[1], signal.SIGTERM)  # one rank is told; all stop at the same step
    assert job.wait() == [85, 85], job.output()
    (saved,) = steps(tmp_path / "run")
    stopped = int(saved.removeprefix("step_"))
    assert sorted(records(tmp_path / "run")) == list(range(1, stopped + 1))
    assert not (tmp_path / "run" / "DONE").exists()

    ranks.run([*common, f"max_steps={stopped + 3}"], 2, tmp_path)
    assert sorted(records(tmp_path / "run")) == list(range(1, stopped + 4))
    assert (tmp_path / "run" / "DONE").exists()


def test_a_killed_run_loses_nothing_after_its_checkpoint(ranks, tiny, tmp_path):
    common = [*tiny, "max_steps=40", "checkpoint.every=4"]
    ranks.run([*common, f"output_dir={tmp_path}/whole"], 2, tmp_path)
    job = ranks.start(common, 2, tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "step_00000008").exists():
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.01)
    job.kill(signal.SIGKILL)
    job.wait()
    ranks.run(common, 2, tmp_path)
    whole, run = records(tmp_path / "whole"), records(tmp_path / "run")
    assert sorted(run) == list(range(1, 41))
    for step, rows in run.items():
        assert rows == [whole[step][0]] * len(rows), step


def test_keep_and_every(ranks, tiny, tmp_path):
    ranks.run([*tiny, "max_steps=7", "checkpoint.every=2", "checkpoint.keep=3"], 1, tmp_path)
    assert steps(tmp_path / "run") == ["step_00000004", "step_00000006", "step_00000007"]


def test_a_changed_run_is_refused_by_name(ranks, tiny, tmp_path):
    """Every rule: tests/training/test_changes.py."""
    common = [*tiny, "max_steps=2"]
    ranks.run(common, 1, tmp_path)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    refused = {
        "model.d_ff=192": "model.d_ff=192",
        "seed=1": "seed=1",
        "seq_len=32": "seq_len=32",
        "global_batch_size=16": "global_batch_size=16",
        "precision=bf16": "'resume_changes=[precision]'",
        "optimizer=lion": "optimizer.kind=lion",
        "data.shuffle_span=5": "data.shuffle_span=5",
    }
    for override, named in refused.items():
        job = ranks.start([*common, "max_steps=4", override], 1, tmp_path)
        assert job.wait() == [78], job.output()
        assert named in job.output()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_resume_never_sets_the_older_run_aside(ranks, tiny, tmp_path):
    ranks.run([*tiny, "max_steps=2"], 1, tmp_path)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    ranks.run([*tiny, "max_steps=3", "resume=never"], 1, tmp_path)
    assert (tmp_path / "run.1" / "metrics.jsonl").read_text() == before
    assert sorted(records(tmp_path / "run")) == [1, 2, 3]


def test_a_finished_run_is_left_alone_and_goes_on_when_max_steps_rises(ranks, tiny, tmp_path):
    ranks.run([*tiny, "max_steps=2"], 1, tmp_path)
    job = ranks.run([*tiny, "max_steps=2"], 1, tmp_path)
    assert "already trained to step 2" in job.output()
    assert sorted(records(tmp_path / "run")) == [1, 2]
    ranks.run([*tiny, "max_steps=4"], 1, tmp_path)
    assert sorted(records(tmp_path / "run")) == [1, 2, 3, 4]


def test_max_steps_below_the_checkpoint_is_said(ranks, tiny, tmp_path):
    """After a stop: the run has not finished."""
    ranks.run([*tiny, "max_steps=3"], 1, tmp_path)
    (tmp_path / "run" / "DONE").unlink()
    for steps in (2, 3):
        job = ranks.run([*tiny, f"max_steps={steps}"], 1, tmp_path)
        line = "nothing to train: the checkpoint is at step 3; raise max_steps to go on"
        assert job.output().splitlines().count(line) == 1
        (tmp_path / "run" / "DONE").unlink()
    job = ranks.run([*tiny, "max_steps=4"], 1, tmp_path)
    assert "nothing to train" not in job.output()
    assert sorted(records(tmp_path / "run")) == [1, 2, 3, 4]
    job = ranks.run([*tiny, "max_steps=2"], 1, tmp_path)
    assert "already trained to step 4, max_steps=2" in job.output()


def test_a_branch_that_is_requeued_ends_as_it_should(ranks, tiny, tmp_path):
    """`resume` names where it began: a mistake only if there is nothing to train from there."""
    ranks.run([*tiny, "max_steps=2", f"output_dir={tmp_path}/before"], 1, tmp_path)
    branch = [*tiny, f"resume={tmp_path}/before"]
    job = ranks.start([*branch, "max_steps=2"], 1, tmp_path)
    assert job.wait() == [78]
    assert "step_00000002 is at step 2; raise max_steps" in job.output()
    for said in ("resumed after step 2", "already trained to step 3", "nothing to train"):
        job = ranks.run([*branch, "max_steps=3"], 1, tmp_path)
        assert said in job.output() and (tmp_path / "run" / "DONE").exists()
        if said.startswith("already"):  # as if it had been killed between its last save and DONE
            (tmp_path / "run" / "DONE").unlink()
    assert sorted(records(tmp_path / "run")) == [3]


@pytest.mark.parametrize("windows", [-1, 1])
def test_a_ledger_of_another_step_says_nothing_of_a_source_that_is_removed(ranks, tiny, tmp_path, windows):
    """A kill between a checkpoint and its ledger leaves an older one, a checkpoint put back a newer one."""
    ranks.run([*tiny, "max_steps=2"], 1, tmp_path)
    run = tmp_path / "run"
    ledger = json.loads((run / "data.json").read_text())
    trained = ledger["sources"]["prose"]["tokens"]
    ledger["sources"]["prose"]["tokens"] += windows * 64
    (run / "data.json").write_text(json.dumps(ledger))
    ranks.run([*tiny, "max_steps=3", "~data.sources.prose"], 1, tmp_path)
    prose = json.loads((run / "data.json").read_text())["sources"]["prose"]
    assert prose["tokens"] == trained
    assert prose.get("input") is None


def test_changed_settings_of_the_optimizer_hold_after_a_resume(ranks, tiny, tmp_path):
    for stage, precision in [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")]:
        common = [*tiny, f"deepspeed=zero{stage}", f"precision={precision}", "checkpoint.every=2"]
        source = tmp_path / f"first{stage}"
        ranks.run([*common, "max_steps=2", f"output_dir={source}"], 2, tmp_path)
        losses = set()
        for key in ("weight_decay=0.1", "weight_decay=50", "betas=[0.1,0.2]", "eps=1"):
            run = tmp_path / f"{stage}-{key.replace('[', '').replace(']', '')}"
            arguments = [f"output_dir='{run}'", f"resume={source}", f"optimizer.{key}", "max_steps=4"]
            arguments.append("resume_changes=[optimizer]")
            ranks.run([*common, *arguments], 2, tmp_path)
            losses.add(records(run)[4][0])
        assert len(losses) == 4, stage


def test_another_mixture_and_another_source_after_a_resume(ranks, tiny, tmp_path, corpus):
    """With a tokenizer that was trained on the first sources: it stays the run's."""
    common = [*tiny, "tokenizer=sentencepiece", "tokenizer.vocab_size=400"]
    ranks.run([*common, "max_steps=4"], 1, tmp_path)
    more = [f"+data.sources.more.path={corpus}/code/heapq.py", "+data.sources.more.format=text"]
    more += ["+data.sources.more.weight=1.0", "data.sources.code.weight=1.0", "data.sources.prose.weight=2.0"]
    ranks.run([*common, *more, "max_steps=8"], 1, tmp_path)
    ledger = json.loads((tmp_path / "run" / "data.json").read_text())["sources"]
    tokens = {name: row["tokens"] / 64 for name, row in ledger.items()}  # windows
    assert sum(tokens.values()) == 8 * 8
    # 32 windows at 0.7 / 0.3, then 32 at 1 / 2 / 1, each within a window of its share.
    for name, expected in {"code": 22.4 + 8, "prose": 9.6 + 16, "more": 8}.items():
        assert abs(tokens[name] - expected) < 2


def test_another_tokenizer_is_refused(ranks, tiny, tmp_path):
    ranks.run([*tiny, "max_steps=2"], 1, tmp_path)
    other = ["tokenizer=sentencepiece", "tokenizer.vocab_size=400", "max_steps=4"]
    job = ranks.start([*tiny, *other], 1, tmp_path)
    assert job.wait() == [78]
    assert "tokenizer" in job.output()
    assert (tmp_path / "run" / "DONE").exists()  # a refused start changes nothing


def test_an_older_checkpoint_of_the_same_run_is_refused(ranks, tiny, tmp_path):
    ranks.run([*tiny, "max_steps=4", "checkpoint.every=2"], 1, tmp_path)
    older = tmp_path / "run" / "checkpoints" / "step_00000002"
    job = ranks.start([*tiny, "max_steps=6", f"resume={older}"], 1, tmp_path)
    assert job.wait() == [78]
    assert "would be lost" in job.output()
    assert steps(tmp_path / "run") == ["step_00000002", "step_00000004"]


def tree(directory: Path) -> dict[str, int]:
    """When each file and directory changed, but for the lock and the heartbeats of its owner."""
    still = [path for path in directory.rglob("*") if not {".lock", ".starting"} & {*path.parts}]
    return {str(path): path.stat().st_mtime_ns for path in still}


def test_a_second_job_in_the_same_directory_ends_with_73_and_touches_nothing(ranks, tiny, tmp_path):
    """Every rank of it, and before any text is prepared; a directory whose owner was killed is taken over."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    ranks.run([*tiny, "max_steps=1"], 1, tmp_path)
    common = [*tiny, "max_steps=3", f"cache_dir={cache}", f"resume={run}"]
    hook = {PATCH: "tests.training.pauses:before_prepare", PLACE: str(tmp_path)}
    job = ranks.start(common, 2, tmp_path, hook)
    deadline = time.monotonic() + 240
    while not all((tmp_path / f"at-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.05)
    before, owner = tree(run), (run / ".lock").read_text()
    assert json.loads(owner)["pid"] == job.pids[0]
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-second")
    for other in ([], ["global_batch_size=6"], [f"resume={tmp_path}/nowhere"]):  # mistakes, but by the way
        second = ranks.start([*common, *other], 2, elsewhere)
        assert second.wait() == [73, 73], second.output()
        (line,) = [line for line in second.output().splitlines() if line.startswith("error: ")]
        assert f"process {job.pids[0]} on" in line
    assert (tree(run), (run / ".lock").read_text()) == (before, owner)
    assert not cache.exists()

    job.kill(signal.SIGKILL)
    job.wait()
    ranks.run(common, 2, elsewhere)
    assert sorted(records(run)) == [1, 2, 3]
    assert (run / ".lock").read_text() == ""
