"""checkpoint.json of somebody who can write a manifest: one line, and the checkpoint before it is taken."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config import UserError
from llmtrain.distributed import World
from llmtrain.training.checkpoint import CheckpointTensors, choose, newest_verified, verified_checkpoint
from llmtrain.training.checkpoint.inspecting import inspect
from llmtrain.training.checkpoint.manifest import RECORD, Manifest
from tests.training.checkpoint.small import save

HUGE = 10**30
HOSTILE: dict[str, tuple[list[str | int], Any]] = {
    "world_size=": (["world_size"], HUGE),
    "world_size=0": (["world_size"], 0),
    "world_size='2'": (["world_size"], "2"),
    "world_size=True": (["world_size"], True),
    "step=7": (["step"], 7),
    "step=-2": (["step"], -2),
    "stage=9": (["stage"], 9),
    "precision=None": (["precision"], None),
    "tokenizer": (["tokenizer"], ["a"]),
    "config.tokenizer=3": (["config", "tokenizer"], 3),
    "config": (["config"], []),
    "data.windows=1.5": (["data", "windows"], 1.5),
    "data.skip.0.0=-1": (["data", "skip"], [[-1, 2]]),
    "data.stages": (["data", "stages"], []),
    "data.sources.a.fingerprint=5": (["data", "sources", "a", "fingerprint"], 5),
    "spikes.0": (["spikes"], [[1]]),
    "rewinds=-1": (["rewinds"], -1),
    "parameters.w.0=-6": (["parameters", "w"], [-6, -10]),
    "parameters.w=[1000000": (["parameters", "w"], [HUGE, HUGE]),
    "parameters.w.1=10.0": (["parameters", "w"], [6, 10.0]),
    "parameters.w": (["parameters", "w"], [1] * 1000),
    "scalars.optimizer.matrices.step='2'": (["scalars", "optimizer", "matrices", "step"], "2"),
    "scalars.counters.global_steps": (["scalars", "counters"], {}),
}
TEXTS = {
    "Invalid JSON": b"{",
    "must be an object": b"3",
    "Invalid JSON: recursion": b"[" * 100_000,
}


def rewrite(checkpoint: Path, content: bytes) -> None:
    """Replace the record, and sign it."""
    (checkpoint / RECORD).write_bytes(content)
    manifest = Manifest.read(checkpoint)
    stamp = len(content), hashlib.sha256(content).hexdigest()
    replace(manifest, files={**manifest.files, RECORD: stamp}).write(checkpoint)


def spoil(checkpoint: Path, keys: list[str | int], value: Any) -> None:
    """Give one key of the record another value."""
    record = json.loads((checkpoint / RECORD).read_bytes())
    inner = record
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    rewrite(checkpoint, json.dumps(record).encode())


@pytest.fixture
def own(tmp_path) -> Path:
    """Two checkpoints that are whole."""
    save(tmp_path / "checkpoints", 1, 2)
    return tmp_path / "checkpoints"


def check_passed_over(own: Path, says: str) -> None:
    """By every reader, with one line that names file and key."""
    first, second = own / "step_00000001", own / "step_00000002"
    chosen = choose("auto", own, World())
    assert chosen is not None and chosen.path == first
    (rejected,) = chosen.rejected
    assert str(rejected).startswith(f"{second / RECORD}: {says}")
    assert len(str(rejected).splitlines()) == 1 and len(rejected.reason) < 200
    assert newest_verified(own) == first
    assert [bool(row.damage) for row in inspect(own, content=True)] == [False, True]
    with pytest.raises(UserError, match="choose another checkpoint"):
        verified_checkpoint(second)


@pytest.mark.parametrize("says", HOSTILE)
def test_a_value_of_another_kind_is_a_damage(own, says):
    spoil(own / "step_00000002", *HOSTILE[says])
    check_passed_over(own, says)


@pytest.mark.parametrize("says", TEXTS)
def test_what_is_no_record_at_all_is_a_damage(own, says):
    rewrite(own / "step_00000002", TEXTS[says])
    check_passed_over(own, says)


def test_a_key_that_is_missing_is_a_damage(own):
    record = json.loads((own / "step_00000002" / RECORD).read_bytes())
    for key in ("world_size", "config", "data", "parameters", "scalars"):
        rest = {name: value for name, value in record.items() if name != key}
        rewrite(own / "step_00000002", json.dumps(rest).encode())
        check_passed_over(own, f"{key}: Field required")


def test_shapes_that_are_not_those_of_the_files_are_one_line(own):
    spoil(own / "step_00000002", ["parameters", "w"], [5, 10])
    with pytest.raises(UserError, match=r"parameters\.w=\[5, 10\]: the files have 60 elements"):
        CheckpointTensors(own / "step_00000002")


def test_a_run_goes_on_from_the_checkpoint_before(ranks, tiny, tmp_path):
    words = [*tiny, "max_steps=3", "checkpoint.every=1"]
    ranks.run(words, 1, tmp_path)
    spoil(tmp_path / "run" / "checkpoints" / "step_00000003", ["world_size"], HUGE)
    job = ranks.run([*words, "max_steps=4"], 1, tmp_path)
    assert "resumed after step 2" in job.output() and "Traceback" not in job.output()
