"""Publication of a checkpoint: durable before it is visible, and whole whenever it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from llmtrain.config import UserError
from llmtrain.distributed import World
from llmtrain.training.checkpoint import checkpoints, find_checkpoint, save_checkpoint, sweep
from llmtrain.training.engine.weights import allow_state_classes, write_enums_by_value


class FakeEngine:
    """Writes one file where DeepSpeed would write many; what it stands for is tested in test_resume."""

    def __init__(self, error: OSError | None = None) -> None:
        self.error = error

    def save(self, directory: Path) -> None:
        (directory / "engine").mkdir()
        torch.save({"weight": torch.ones(3)}, directory / "engine" / "state.pt")
        if self.error:
            raise self.error


def save(directory: Path, step: int, keep: int = 2, error: OSError | None = None) -> Path:
    return save_checkpoint(directory, FakeEngine(error), World(), {"step": step}, keep)


def test_every_file_is_durable_before_the_rename(tmp_path, monkeypatch):
    log: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def logged_fsync(descriptor):
        log.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def logged_rename(self, target):
        log.append(("rename", str(target)))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    final = save(tmp_path, 7)
    published = log.index(("rename", str(final)))
    synced = {path for what, path in log[:published] if what == "fsync"}
    for file in [final, *final.rglob("*")]:
        assert str(file).replace(str(final), str(tmp_path / ".tmp-step_00000007")) in synced
    assert ("fsync", str(tmp_path)) in log[published:]


def test_a_failed_save_leaves_the_earlier_ones_and_nothing_else(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 2, error=OSError(28, "No space left on device"))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_the_newest_stay_and_the_one_just_written_always(tmp_path):
    for step in (5, 6, 7):
        save(tmp_path, step)
    assert [step for step, _ in checkpoints(tmp_path)] == [6, 7]
    save(tmp_path, 3, keep=1)
    assert [step for step, _ in checkpoints(tmp_path)] == [3, 7]


def test_a_kill_while_a_checkpoint_is_replaced_loses_none(tmp_path, monkeypatch):
    save(tmp_path, 4)
    rename = Path.rename

    def killed(self, target):
        if self.name.startswith(".tmp-"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        save(tmp_path, 4)
    assert checkpoints(tmp_path) == []
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


def test_what_resume_means(tmp_path):
    own, other = tmp_path / "own" / "checkpoints", tmp_path / "other" / "checkpoints"
    for step in (2, 5):
        save(other, step)
    assert find_checkpoint("auto", own) is None
    assert find_checkpoint(str(other / "step_00000002"), own) == other / "step_00000002"
    assert find_checkpoint(str(tmp_path / "other"), own) == other / "step_00000005"
    save(own, 3)
    # Requeued with the same command: the run goes on with what it has done since.
    assert find_checkpoint(str(other / "step_00000002"), own) == own / "step_00000003"
    assert find_checkpoint("never", own) is None
    with pytest.raises(UserError, match="would be lost"):
        find_checkpoint(str(other / "step_00000002"), other)
    with pytest.raises(UserError, match="nowhere"):
        find_checkpoint("nowhere", own)


def test_enums_are_written_as_data_by_every_python(tmp_path, monkeypatch):
    """Python before 3.11.4 pickles them as a call of getattr, which weights_only refuses."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    monkeypatch.setattr(
        ZeroStageEnum, "__reduce_ex__", lambda member, _: (getattr, (type(member), member.name))
    )
    write_enums_by_value()
    torch.save({"zero_stage": ZeroStageEnum(2)}, tmp_path / "state.pt")
    with allow_state_classes():
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["zero_stage"] is ZeroStageEnum(2)
