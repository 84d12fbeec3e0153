"""The best checkpoint is marked and stays; a run ends where held-out text gets no better, killed or not."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoints import main as checkpoints_door
from llmtrain.config import UserError
from llmtrain.config.hydra import compose
from llmtrain.evaluate import main as evaluate_door
from llmtrain.training.changes import changes, other_text
from llmtrain.training.checkpoint import best_step, checkpoints, hide, mark_best
from llmtrain.training.config import TrainConfig
from llmtrain.training.early_stop import EarlyStop
from llmtrain.training.finished import open_finished
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.status import status_of
from tests.ranks import PATCH
from tests.training.faults import STEP
from tests.training.test_changes import record
from tests.training.test_resume import records

SCORES = {2: 5.0, 4: 4.0, 6: 4.5, 8: 4.4, 10: 4.3, 12: 3.0}
"""Bits per byte that `prescribed_scores` gives to the evaluations."""

PATIENT = [
    "max_steps=12",
    "data.validation_fraction=0.3",
    "checkpoint.every=2",
    "callbacks.evaluation.every=2",
    "callbacks.evaluation.documents=2",
    "callbacks.evaluation.patience=3",
]
PRESCRIBED = {PATCH: "tests.training.test_early_stop:prescribed_scores"}
BITS = "LLMTRAIN_TEST_BITS"
"""JSON of what other evaluations than SCORES are given, by step."""
STOPPED_ONCE = {PATCH: "tests.training.test_early_stop:asked_to_stop_while_it_evaluates"}
KILLED = {PATCH: "tests.training.test_early_stop:killed_before_the_mark"}
"""After which step, STEP says."""


def prescribed_scores() -> None:
    """Each evaluation is done as ever; then SCORES and BITS say what came of it."""
    import os

    from llmtrain.training.callbacks import evaluation

    measure, before = evaluation.evaluate_model, evaluation.EvaluationCallback.after_step
    step, given = 0, {int(at): bits for at, bits in json.loads(os.environ.get(BITS, "{}")).items()}

    def after_step(self: Any, run: Any, line: dict[str, Any]) -> None:
        nonlocal step
        step = run.step
        before(self, run, line)

    def evaluate(*args: Any, **more: Any) -> dict[str, Any]:
        results = measure(*args, **more)
        return {**results, "all": {**results["all"], "bits_per_byte": (SCORES | given)[step]}}

    evaluation.EvaluationCallback.after_step = after_step
    evaluation.evaluate_model = evaluate


def asked_to_stop_while_it_evaluates() -> None:
    """SIGTERM comes when the evaluation after a step begins."""
    import os

    from llmtrain.training.callbacks import evaluation

    prescribed_scores()
    before = evaluation.EvaluationCallback.after_step

    def after_step(self: Any, run: Any, line: dict[str, Any]) -> None:
        if run.step == int(os.environ[STEP]):
            os.kill(os.getpid(), signal.SIGTERM)
        before(self, run, line)

    evaluation.EvaluationCallback.after_step = after_step


def killed_before_the_mark() -> None:
    """SIGKILL comes when the checkpoint of a step is there, and the best one has not been marked since."""
    import os

    from llmtrain.training import saver

    prescribed_scores()
    mark = saver.mark_best

    def mark_best(directory: RunDirectory, scores: Any) -> None:
        if checkpoints(directory.checkpoints)[-1][0] == int(os.environ[STEP]):
            os.kill(os.getpid(), signal.SIGKILL)
        mark(directory, scores)

    saver.mark_best = mark_best


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    found = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event for event in found if event["event"] == kind]


def best(run: Path) -> dict[str, Any]:
    return json.loads((run / "best.json").read_text())


def saved(run: Path) -> list[int]:
    return [step for step, _ in checkpoints(run / "checkpoints")]


def test_patience_counts_what_is_no_better() -> None:
    scores = [(2, 5.0), (4, 4.0), (6, 4.0), (8, 3.95), (10, None), (12, math.nan)]

    def due(patience: int | None, min_delta: float) -> list[int]:
        stop = EarlyStop(patience, min_delta)
        found = []
        for step, value in scores:
            stop.add(step, value)
            stop.add(step, 0.0)  # a second evaluation of a step is none
            found += [step] if stop.is_due else []
        return found

    assert due(None, 0.0) == []
    assert due(1, 0.0) == [6, 10, 12]
    assert due(2, 0.0) == [12]
    assert due(2, 0.1) == [8, 10, 12]
    resumed = EarlyStop(2, 0.1, json.loads(json.dumps(scores[:3])))
    assert (resumed.is_due, resumed.best) == (False, (4, 4.0))
    resumed.add(8, 3.95)
    assert resumed.is_due


def test_evaluations_of_other_text_do_not_count(tiny: list[str]) -> None:
    def differs(*overrides: str) -> bool:
        return other_text(changes(record(tiny), record([*tiny, *overrides])))

    assert differs("callbacks.evaluation.documents=3")
    assert differs("~data.sources.code")
    assert not differs("data.sources.code.weight=0.1", "callbacks.evaluation.every=3", "max_steps=20")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["callbacks.evaluation.every=0"], "every=0"),
        (["checkpoint.every=3"], "checkpoint.every=3"),
        (["data.validation_fraction=0"], "data.validation_fraction=0"),
    ],
)
def test_patience_without_evaluations_that_are_saved_is_refused(
    tiny: list[str], overrides: list[str], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        compose(TrainConfig, [*tiny, *PATIENT, *overrides])


def test_the_mark_follows_the_checkpoints_that_are_there(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in (2, 4, 6):
        (run.checkpoints / f"step_{step:08d}").mkdir(parents=True)
    scores = [(2, 5.0), (3, 1.0), (4, 4.0), (6, 3.0), (8, None)]
    mark_best(run, scores)
    assert best_step(run) == 6
    hide(run.checkpoints / "step_00000006")  # as a rewind does, and the count goes back with it
    assert best_step(run) is None, "what is marked is gone"
    mark_best(run, scores[:3])
    assert (best_step(run), best(tmp_path)["value"]) == (4, 4.0)
    mark_best(run, [])
    assert not (tmp_path / "best.json").exists()


@pytest.fixture(scope="module")
def stopped(ranks, corpus, tmp_path_factory) -> Path:
    """A run of two ranks that stopped early."""
    from tests.tiny import tiny_run

    directory = tmp_path_factory.mktemp("stopped")
    cache = tmp_path_factory.getbasetemp() / "cache"
    job = ranks.run(
        [*tiny_run(corpus, cache, directory / "run"), *PATIENT, "deepspeed=zero2"], 2, directory, PRESCRIBED
    )
    assert "the run ends after step 10" in job.output()
    return directory / "run"


def test_a_run_ends_where_held_out_text_gets_no_better(stopped: Path) -> None:
    assert sorted(records(stopped)) == [2 * half + odd for half in range(5) for odd in (1, 2)]
    assert status_of(stopped).state == "finished"
    (event,) = events(stopped, "early_stop")
    assert (event["step"], event["best_step"], event["bits_per_byte"]) == (10, 4, 4.0)
    assert events(stopped, "end")[-1]["step"] == 10
    held_out = json.loads((stopped / "eval" / "heldout.json").read_text())
    assert held_out["step"] == 10
    assert held_out["all"]["unigram_bits_per_byte"] > 0  # what is due after the last step was done
    assert (stopped / "samples" / "step_00000010.txt").exists()


def test_the_best_checkpoint_is_marked_and_stays(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert saved(stopped) == [4, 8, 10]
    assert best(stopped) == {
        "step": 4,
        "path": "checkpoints/step_00000004",
        "measure": "eval/bits_per_byte",
        "value": 4.0,
    }
    assert open_finished(stopped, "best").step == 4
    assert open_finished(stopped).step == 10
    assert checkpoints_door(["list", str(stopped), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["step"]: row["best"] for row in rows} == {4: True, 8: False, 10: False}
    assert checkpoints_door(["prune", str(stopped), "--dry-run", "--json"]) == 0
    assert capsys.readouterr().out == ""
    assert checkpoints_door(["list", str(stopped)]) == 0
    assert "complete, best" in capsys.readouterr().out


def test_a_run_without_a_mark_has_no_best(stopped: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    assert evaluate_door([str(run), "--step", "best"]) == 78
    (run / "best.json").write_text("[]")
    with pytest.raises(UserError, match=r"best\.json"):
        open_finished(run, "best")


def test_a_run_that_stopped_early_is_left_alone(ranks, tiny, stopped, tmp_path) -> None:
    import shutil

    shutil.copytree(stopped, tmp_path / "run")
    job = ranks.run([*tiny, *PATIENT], 1, tmp_path, PRESCRIBED)
    assert "already trained to step 10" in job.output()
    assert "callbacks.evaluation.patience" in job.output()


@pytest.mark.parametrize(("key", "evaluated"), [("patience=9", [12]), ("documents=3", [10, 12])])
def test_it_goes_on_with_more_patience_or_other_held_out_text(
    ranks, tiny, stopped, tmp_path, key, evaluated
) -> None:
    """Of other text every evaluation is one anew, that of the checkpoint first."""
    import shutil

    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    bits = {BITS: json.dumps({"10": 4.3, "12": 4.2})}
    job = ranks.run([*tiny, *PATIENT, f"callbacks.evaluation.{key}"], 1, tmp_path, {**PRESCRIBED, **bits})
    assert max(records(run)) == 12
    assert [event["step"] for event in events(run, "evaluation")] == [2, 4, 6, 8, 10, 10, *evaluated]
    anew = "documents" in key
    assert [event.get("evaluations") for event in events(run, "resume")] == ["anew" if anew else None]
    assert ("evaluations and the best checkpoint are counted anew" in job.output()) == anew
    assert best(run)["step"] == (12 if anew else 4), "that of step 4 was measured on other text"


def test_a_killed_run_stops_after_the_same_step(ranks, tiny, tmp_path, stopped) -> None:
    run, arguments = tmp_path / "run", [*tiny, *PATIENT, "deepspeed=zero2"]
    job = ranks.start(arguments, 2, tmp_path, {**KILLED, STEP: "4"})
    assert job.wait()[0] == -signal.SIGKILL, job.output()
    assert saved(run) == [2, 4]
    assert open_finished(run, "best").step == 2, "the mark is late, and no lie"
    ranks.run(arguments, 2, tmp_path, PRESCRIBED)
    assert max(records(run)) == 10
    assert best(run) == best(stopped)
    assert saved(run) == saved(stopped)


@pytest.mark.parametrize("step", [8, 10])
def test_an_evaluation_that_a_stop_cut_short_is_made_up_for(ranks, tiny, tmp_path, stopped, step) -> None:
    run, arguments = tmp_path / "run", [*tiny, *PATIENT]
    job = ranks.start(arguments, 1, tmp_path, {**STOPPED_ONCE, STEP: str(step)})
    assert job.wait() == [85], job.output()
    assert [event["step"] for event in events(run, "evaluation")] == list(range(2, step, 2))
    ranks.run(arguments, 1, tmp_path, PRESCRIBED)
    assert [event["step"] for event in events(run, "evaluation")] == [2, 4, 6, 8, 10, 10]
    assert max(records(run)) == 10
    assert best(run) == best(stopped)
    job = ranks.run(arguments, 1, tmp_path, PRESCRIBED)
    assert "already trained to step 10" in job.output(), "the end is known, also if no checkpoint has it"


def test_the_last_evaluation_is_made_up_for_once(ranks, tiny, tmp_path) -> None:
    arguments = [*tiny, *PATIENT, "max_steps=4"]
    job = ranks.start(arguments, 1, tmp_path, {**STOPPED_ONCE, STEP: "4"})
    assert job.wait() == [85], job.output()
    ranks.run(arguments, 1, tmp_path, PRESCRIBED)
    assert [event["step"] for event in events(tmp_path / "run", "evaluation")] == [2, 4]
