"""Publication: durable before it is visible, one verdict for all ranks, and the right ones stay."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from llmtrain.config import UserError
from llmtrain.distributed import World
from llmtrain.training.checkpoint import Manifest, attempt, checkpoints, directory
from llmtrain.training.checkpoint.attempt import Attempt
from llmtrain.training.checkpoint.directory import abandon, publish, retained, sweep
from llmtrain.training.checkpoint.inspecting import prune
from llmtrain.training.checkpoint.manifest import RECORD, verify
from llmtrain.training.checkpoint.peers import Peer
from llmtrain.training.checkpoint.saving import MAX_FAILED
from llmtrain.training.checkpoint.tensors import write_tensors
from tests.training.checkpoint.small import Told, files, names, record, save, saver, state


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
    save(tmp_path, 7)
    final = tmp_path / "step_00000007"
    published = log.index(("rename", str(final)))
    synced = {path for what, path in log[:published] if what == "fsync"}
    (temporary,) = {Path(path) for path in synced if Path(path).name.startswith(".tmp-")}
    assert {temporary / name for name in names(final)} <= set(map(Path, synced))
    assert ("fsync", str(tmp_path)) in log[published:]
    assert ("fsync", str(tmp_path.parent)) in log[published:]


def test_a_name_that_the_disk_does_not_keep_is_taken_back(tmp_path, monkeypatch):
    """Else the step could not be saved again."""
    temporary = tmp_path / ".tmp-step_00000007-ab"
    temporary.mkdir()
    files = {RECORD: write_tensors(temporary / RECORD, {"a": torch.zeros(3)})}

    def refused(path):
        if path == tmp_path:
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(directory, "sync", refused)
        with pytest.raises(OSError, match="Input/output"):
            publish(temporary, 7, files)
    assert names(tmp_path) == [temporary.name]
    verify(publish(temporary, 7, files))


def parts(directory: Path, ranks: int, told: list[Path]) -> list[Attempt]:
    """One attempt a rank, as the ranks of one save have them."""
    return [
        Attempt(
            step=4,
            temporary=directory / ".tmp-step_00000004-x",
            world=World(rank, ranks),
            peers=[Peer.of_this_process()] * ranks,
            tensors={f"w:weight:{rank}": torch.full((1000,), float(rank))},
            record=record(4),
            published=lambda path, size: told.append(path),
        )
        for rank in range(ranks)
    ]


def test_ranks_meet_in_the_directory_alone(tmp_path):
    told: list[Path] = []
    ranks = parts(tmp_path, 3, told)
    for one in ranks:
        one.start()
    for one in ranks:
        one.wait(lambda: None)
        assert one.error is None
    assert told == [tmp_path / "step_00000004"]
    assert names(told[0]) == [
        "MANIFEST.json",
        "checkpoint.json",
        *(f"rank_0000{r}.safetensors" for r in range(3)),
    ]
    verify(told[0])


def test_a_rank_whose_disk_refuses_fails_the_save_and_gives_its_room_back(tmp_path, monkeypatch):
    refused = threading.Event()

    def write(file, tensors, tick):
        stamp = write_tensors(file, tensors, tick)
        if "00001" in file.name:
            refused.set()
            raise OSError(28, "No space left on device", str(file))
        return stamp

    monkeypatch.setattr(attempt, "write_tensors", write)
    ranks = parts(tmp_path, 2, [])
    for one in ranks:
        one.start()
    for one in ranks:
        one.wait(lambda: None)
    assert refused.is_set()
    assert "rank 1" in str(ranks[0].error)
    assert "No space left" in str(ranks[0].error)
    assert "No space left" in str(ranks[1].error)
    assert names(tmp_path) in ([], [".tmp-step_00000004-x"])  # rank 1 may be the last to leave it


def test_a_rank_that_never_comes_fails_the_save(tmp_path, monkeypatch):
    monkeypatch.setattr(attempt, "PATIENCE", 0.2)
    one, _ = parts(tmp_path, 2, [])
    one.run()
    assert "nothing came from rank 1" in str(one.error)
    assert names(tmp_path) == []


def test_a_rank_that_was_killed_is_not_waited_for(tmp_path):
    one, _ = parts(tmp_path, 2, [])
    here = Peer.of_this_process()
    child = subprocess.Popen(["sleep", "600"])
    killed = Peer(child.pid, here.place)
    assert not killed.is_gone()
    one.peers = [here, killed]
    one.start()
    child.kill()  # and nobody has asked for its exit code yet
    one.wait(lambda: None)
    assert "rank 1 ended" in str(one.error)
    assert names(tmp_path) == []
    child.wait()
    assert killed.is_gone()
    assert not Peer(child.pid, ("another boot", "pid:[1]")).is_gone()
    assert not Peer(child.pid, None).is_gone()


def test_a_run_that_ends_by_a_mistake_does_not_wait_long(tmp_path, monkeypatch):
    monkeypatch.setattr(attempt, "HURRY", 0.2)
    one, _ = parts(tmp_path, 2, [])
    one.start()
    one.hurry()
    assert "nothing came from rank 1" in str(one.error)


def test_in_the_background_the_same_bytes_are_written(tmp_path):
    for way in ("meanwhile", "at_once"):
        torch.manual_seed(3)
        told = Told([], [])
        one = saver(tmp_path / way, told=told, asynchronous=way == "meanwhile")
        for step in (1, 2):
            current = state(step, 100_000)
            one.save(current, record(step))
            if way == "meanwhile":
                current.pieces[0].tensors["weight"].zero_()  # the next step changes what was saved
        assert one.join()
        assert [saved.step for saved in told.saved] == [1, 2]
        for saved in told.saved:
            assert saved.bytes == Manifest.read(saved.path).size
            assert 0 < saved.stall_seconds <= saved.seconds
            assert (saved.stall_seconds < saved.seconds) == (way == "meanwhile")
    for step in ("step_00000001", "step_00000002"):
        assert files(tmp_path / "meanwhile" / step) == files(tmp_path / "at_once" / step)


def test_what_ends_the_thread_ends_the_run(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("not a matter of the disk")

    monkeypatch.setattr(attempt, "write_tensors", broken)
    one = saver(tmp_path, asynchronous=True)
    one.save(state(1), record(1))
    with pytest.raises(RuntimeError, match="not a matter of the disk"):
        one.join()


def test_failed_saves_leave_nothing_and_several_in_a_row_end_the_run(tmp_path, monkeypatch):
    told = Told([], [])
    one = saver(tmp_path, told=told)
    one.save(state(1), record(1))
    with monkeypatch.context() as patch:

        def full(file, tensors, tick):
            write_tensors(file, tensors, tick)
            raise OSError(28, "No space left on device", str(file))

        patch.setattr(attempt, "write_tensors", full)
        for step in (2, 3):
            one.save(state(step), record(step))
            assert names(tmp_path) == ["step_00000001"]
        assert not one.join()
    one.save(state(4), record(4))  # the count begins anew
    assert one.join()
    with monkeypatch.context() as patch:
        patch.setattr("llmtrain.training.checkpoint.saving.free_bytes", lambda _: 100)
        for step in range(5, 4 + MAX_FAILED):
            one.save(state(step), record(step))
        with pytest.raises(UserError) as ended:
            one.save(state(9), record(9))
    assert ended.value.exit_code == 1
    assert str(tmp_path) in str(ended.value)
    assert f"{told.failed[-1].needed:,} bytes needed, 100 free" in str(ended.value)
    assert told.failed[-1].needed > 60 * 6
    assert [failed.step for failed in told.failed] == [2, 3, 5, 6, 9]
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 4]


def test_a_checkpoint_that_stands_is_never_written_again(tmp_path):
    save(tmp_path, 4)
    before = files(tmp_path / "step_00000004")
    told = Told([], [])
    one = saver(tmp_path, told=told, verified={4})
    one.save(state(5), record(4))
    assert (told.saved, one.join(), files(tmp_path / "step_00000004")) == ([], True, before)
    unknown = saver(tmp_path, told=told)
    unknown.save(state(5), record(4))  # nobody said that it is whole, and yet it is left alone
    assert [failed.step for failed in told.failed] == [4]
    assert files(tmp_path / "step_00000004") == before


@pytest.mark.parametrize(
    ("steps", "verified", "keep", "keep_every", "stay"),
    [
        ([1, 2, 3], [1, 2, 3], 2, None, [2, 3]),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], 3, None, [3, 4, 5]),
        ([1, 2, 3, 4, 5, 6], range(7), 2, 3, [3, 5, 6]),
        ([1, 2, 3], [3], 2, None, [2, 3]),
        ([1, 2, 3, 4], [1, 2], 2, None, [1, 2, 3, 4]),  # never fewer than two that are known to be whole
        ([1, 2, 3, 4], [1, 4], 2, None, [1, 3, 4]),
        ([7], [], 2, 5, [7]),
    ],
)
def test_which_stay(steps, verified, keep, keep_every, stay):
    assert sorted(retained(steps, verified, keep, keep_every)) == stay


def test_older_ones_go_and_every_nth_stays(tmp_path):
    save(tmp_path, *range(1, 8), keep=3, keep_every=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 4, 5, 6, 7]


def test_what_was_passed_over_goes_with_the_next_checkpoint(tmp_path):
    save(tmp_path, 5, 10)
    abandon(tmp_path, after=5)
    assert [step for step, _ in checkpoints(tmp_path)] == [5]
    assert names(tmp_path) == [".abandoned-step_00000010", "step_00000005"]
    save(tmp_path, 10, verified={5})
    assert names(tmp_path) == ["step_00000005", "step_00000010"]


def test_leftovers_of_interrupted_saves_and_removals_are_swept(tmp_path):
    save(tmp_path, 1)
    for name in (".tmp-step_00000002-ab", ".trash-step_00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank_00000.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-file").touch()
    sweep(tmp_path)
    assert names(tmp_path) == ["step_00000001"]


def test_a_leftover_that_cannot_be_removed_ends_no_run(tmp_path, monkeypatch, caplog):
    """NFS keeps what a process of the job before still has open."""
    held, free = tmp_path / ".tmp-step_00000002-ab", tmp_path / ".tmp-step_00000002-cd"
    rmtree = shutil.rmtree

    def refused(path):
        if path == held:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        rmtree(path)

    held.mkdir()
    free.mkdir()
    monkeypatch.setattr(shutil, "rmtree", refused)
    sweep(tmp_path)
    assert names(tmp_path) == [held.name] and f"{held}" in caplog.text


def test_of_a_link_only_the_link_goes(tmp_path):
    somebodys, run = tmp_path / "somebodys", tmp_path / "run"
    somebodys.mkdir()
    save(run, 1)
    for remove in (lambda: save(run, 2), lambda: prune(run, [])):
        (run / ".abandoned-step_00000009").symlink_to(somebodys)
        remove()
        assert names(run) == ["step_00000001", "step_00000002"]
        assert somebodys.is_dir()
