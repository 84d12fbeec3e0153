"""Which checkpoint is gone on from: the newest that is whole, said aloud, and never silently none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmtrain.config import UserError
from llmtrain.distributed import World
from llmtrain.training.checkpoint import choose, find_checkpoint, newest_verified, verified_checkpoint
from llmtrain.training.checkpoint.manifest import MANIFEST, RECORD
from llmtrain.training.checkpoint.reading import rank_file
from llmtrain.training.run_directory import RunDirectory
from tests.training.checkpoint.small import save


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.fixture
def own(tmp_path) -> Path:
    """Steps 2, 4 and 6."""
    directory = tmp_path / "own" / "checkpoints"
    save(directory, 2, 4, 6, keep=3)
    return directory


def test_what_resume_means(own, tmp_path):
    new = tmp_path / "new" / "checkpoints"
    assert find_checkpoint("auto", new) is None
    assert find_checkpoint("never", own) is None
    assert find_checkpoint("auto", own) == own / "step_00000006"
    assert find_checkpoint(str(own / "step_00000002"), new) == own / "step_00000002"
    assert find_checkpoint(str(tmp_path / "own"), new) == own / "step_00000006"
    save(new, 3)  # a job that was requeued with the same words goes on with its own
    assert find_checkpoint(str(own / "step_00000002"), new) == new / "step_00000003"
    with pytest.raises(UserError, match="would be lost"):
        find_checkpoint(str(own / "step_00000002"), own)
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        find_checkpoint("nowhere", tmp_path / "empty")
    with pytest.raises(UserError, match="there are step_00000006, step_00000004, step_00000002;"):
        find_checkpoint(str(own / "step_00000005"), tmp_path / "empty")


@pytest.mark.parametrize("file", [rank_file(0), RECORD, MANIFEST])
def test_the_newest_that_is_whole_and_what_was_passed_over(own, caplog, file):
    flip(own / "step_00000006" / file)
    (own / "step_00000004" / rank_file(0)).unlink()
    chosen = choose("auto", own, World())
    assert chosen is not None
    assert (chosen.path, chosen.record["step"]) == (own / "step_00000002", 2)
    assert [error.as_dict()["path"] for error in chosen.rejected] == ["step_00000006", "step_00000004"]
    assert chosen.rejected[0].file == file
    assert "step_00000006 is damaged and passed over" in caplog.text
    assert newest_verified(own) == chosen.path
    assert find_checkpoint("auto", own) == own / f"step_0000000{4 if file != rank_file(0) else 6}"


def test_none_is_whole(own):
    for step in (2, 4, 6):
        flip(own / f"step_0000000{step}" / MANIFEST)
    for look in (find_checkpoint, lambda resume, directory: choose(resume, directory, World())):
        with pytest.raises(UserError) as refused:
            look("auto", own)
        assert len(refused.value.lines) == 4  # a reason for each, and the way out
        assert "resume=never" in refused.value.lines[-1]
    with pytest.raises(UserError):
        newest_verified(own)
    assert choose("never", own, World()) is None


def test_a_checkpoint_that_is_named_is_not_replaced_by_another(own, tmp_path):
    flip(own / "step_00000006" / rank_file(0))
    with pytest.raises(UserError, match="SHA-256"):
        choose(str(own / "step_00000006"), tmp_path / "new" / "checkpoints", World())
    with pytest.raises(UserError, match="SHA-256"):
        verified_checkpoint(own / "step_00000006")


def test_files_of_an_older_version_are_refused_in_one_line(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step_00000010"
    (checkpoint / "engine").mkdir(parents=True)
    (checkpoint / "engine" / "mp_rank_00_model_states.pt").write_bytes(b"")
    (checkpoint / RECORD).write_text("{}")
    for resume in ("auto", str(checkpoint)):
        with pytest.raises(UserError, match="engine/ is of an older llmtrain") as refused:
            choose(resume, tmp_path / "checkpoints", World())
        assert len(refused.value.lines) == 2


@pytest.mark.parametrize(
    ("steps", "events", "begins"),
    [
        (0, [], True),
        (7, ["start"], True),  # it was killed before its first save
        (7, ["start", "save"], False),
        (7, None, False),
    ],
)
def test_a_trained_run_whose_checkpoints_are_gone_does_not_begin_anew(own, tmp_path, steps, events, begins):
    """Neither from nothing, nor where `resume` says that it began."""
    run, other = RunDirectory(own.parent), tmp_path / "other" / "checkpoints"
    save(other, 3)
    for step in range(1, steps + 1):
        run.append_metrics({"step": step})
    for event in events or ():
        run.append_event(event)
    shutil.rmtree(own)
    assert choose("never", own, World()) is None
    if begins:
        assert choose("auto", own, World()) is None
        assert find_checkpoint(str(other.parent), own) == other / "step_00000003"
        return
    with pytest.raises(UserError, match=r"trained to step 7.*resume=never"):
        choose("auto", own, World())
    with pytest.raises(UserError, match=r"trained to step 7.*another output_dir"):
        find_checkpoint(str(other.parent), own)


def test_a_damaged_run_directory_says_so_through_the_door(ranks, tiny, tmp_path):
    """End to end: fall back, announce, pass the damaged step anew, bit-equal; then nothing whole is left."""
    common = [*tiny, "max_steps=6", "checkpoint.every=2", "checkpoint.keep=3"]
    ranks.run(common, 2, tmp_path)
    run, directory = tmp_path / "run", tmp_path / "run" / "checkpoints"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    whole = {line["step"]: line["train/loss"] for line in map(json.loads, lines)}
    flip(directory / "step_00000006" / rank_file(1))
    (directory / "step_00000004" / rank_file(0)).write_bytes(b"")

    (run / "DONE").unlink()
    job = ranks.run(common, 2, tmp_path)
    assert "step_00000006 is damaged and passed over: rank_00001.safetensors" in job.output()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "rejected"]
    assert [one["path"] for one in event["rejected"]] == ["step_00000006", "step_00000004"]
    assert [one["file"] for one in event["rejected"]] == [rank_file(1), rank_file(0)]
    again = (run / "metrics.jsonl").read_text().splitlines()[len(lines) :]
    assert [json.loads(line)["step"] for line in again] == [3, 4, 5, 6]
    assert all(json.loads(line)["train/loss"] == whole[json.loads(line)["step"]] for line in again)
    assert sorted(path.name for path in directory.iterdir()) == [f"step_0000000{step}" for step in (2, 4, 6)]
    saves = [event for event in events if event["event"] == "save"]
    assert all(save["bytes"] > 0 and save["stall_seconds"] == save["seconds"] > 0 for save in saves)

    for path in directory.iterdir():
        flip(path / rank_file(0))
    job = ranks.start([*common, "max_steps=8"], 2, tmp_path)
    assert job.wait() == [78, 78]
    for words in ("none of its checkpoints can be gone on from", "resume=never", "step_00000004"):
        assert words in job.output()
    assert (run / "DONE").exists()  # a refused start changes nothing
    shutil.rmtree(directory)
    job = ranks.start([*common, "max_steps=8"], 2, tmp_path)
    assert job.wait() == [78, 78]
    assert "the run was trained to step 6 and saved" in job.output()
