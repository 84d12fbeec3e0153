"""The bytes of a checkpoint: others read them, digests hold, and any run of elements comes back."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from llmtrain.distributed import World
from llmtrain.training.checkpoint import CheckpointTensors, CheckpointWeights, DamagedError, Manifest, tensors
from llmtrain.training.checkpoint.manifest import MANIFEST, damages, share, verify
from llmtrain.training.checkpoint.reading import RANDOM, rank_file
from llmtrain.training.checkpoint.tensors import NAMES, map_tensors, write_tensors
from tests.training.checkpoint.small import SHAPE, record, save, saver, state


def test_safetensors_reads_what_is_written(tmp_path, monkeypatch):
    """Every type, an odd number of small elements before larger ones, more than a chunk, and nothing."""
    monkeypatch.setattr(tensors, "CHUNK", 64)
    written = {f"t:{name}": torch.arange(37).to(dtype) for dtype, name in NAMES.items()}
    written["empty"] = torch.empty(0)
    size, digest = write_tensors(tmp_path / "file", written)
    content = (tmp_path / "file").read_bytes()
    assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
    mapped = map_tensors(tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as theirs:
        assert set(theirs.keys()) == mapped.keys() == written.keys()
        for name, tensor in written.items():
            for found in (theirs.get_tensor(name), mapped[name]):
                assert found.dtype == tensor.dtype
                assert torch.equal(found, tensor)
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in mapped.values())


def test_a_mapped_tensor_that_changes_leaves_the_file_alone(tmp_path):
    write_tensors(tmp_path / "file", {"a": torch.zeros(4)})
    before = (tmp_path / "file").read_bytes()
    map_tensors(tmp_path / "file")["a"].fill_(1)
    assert (tmp_path / "file").read_bytes() == before


def test_any_run_of_elements_comes_back(tmp_path):
    save(tmp_path, 3)
    checkpoint = tmp_path / "step_00000003"
    found, whole = CheckpointTensors(checkpoint), torch.arange(60.0) + 3
    for start in range(60):
        for count in (0, 1, 17, 60 - start):
            if start + count <= 60:
                assert torch.equal(found.read("w", "weight", start, count), whole[start : start + count])
    assert torch.equal(found.read("w", "exp_avg", 25, 10), (whole / 2).to(torch.bfloat16)[25:35])
    for start, count in ((59, 2), (60, 1), (-1, 2)):
        with pytest.raises(AssertionError, match="has no element"):
            found.read("w", "weight", start, count)
    with pytest.raises(KeyError):
        found.read("w", "momentum", 0, 1)
    weights = CheckpointWeights(checkpoint)
    assert torch.equal(weights["w"], whole.view(SHAPE))
    assert (list(weights), weights.shapes()) == (["w"], [torch.Size(SHAPE)])


def test_a_gap_between_pieces_is_no_tensor(tmp_path):
    whole = state(0)
    first, second = whole.pieces
    saver(tmp_path).save(replace(whole, pieces=[first, replace(second, start=31)]), record(1))
    with pytest.raises(AssertionError, match="has no element 30"):
        CheckpointTensors(tmp_path / "step_00000001").read("w", "weight", 0, 60)


def test_random_states_are_saved_with_the_rank(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    save(tmp_path, 1)
    found = CheckpointTensors(tmp_path / "step_00000001")
    assert torch.equal(found.random_states(0)["cpu"], before)
    assert found.random_states(1) == {}
    with safe_open(tmp_path / "step_00000001" / rank_file(0), "pt") as theirs:
        assert f"{RANDOM}:cpu" in theirs.keys()  # noqa: SIM118


def test_every_byte_of_a_manifest_is_held(tmp_path):
    save(tmp_path, 7)
    checkpoint = tmp_path / "step_00000007"
    content = (checkpoint / MANIFEST).read_bytes()
    verify(checkpoint)
    for place in range(len(content)):
        for bit in (1, 16):
            damaged = bytearray(content)
            damaged[place] ^= bit
            (checkpoint / MANIFEST).write_bytes(damaged)
            with pytest.raises(DamagedError, match="digest does not hold"):
                Manifest.read(checkpoint)
    for damaged in (content[:-1], content + b"\n", b"", b"[" * 100_000, b'{"step": Infinity, "files": {}}'):
        (checkpoint / MANIFEST).write_bytes(damaged)
        with pytest.raises(DamagedError, match="digest does not hold"):
            Manifest.read(checkpoint)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".hidden", "a\0b", ""])
def test_a_manifest_leads_nowhere_else(tmp_path, name):
    checkpoint = tmp_path / "step_00000001"
    checkpoint.mkdir()
    stamp = (0, hashlib.sha256().hexdigest())
    Manifest(1, {"checkpoint.json": stamp}).write(checkpoint)
    Manifest.read(checkpoint)
    Manifest(1, {"checkpoint.json": stamp, name: stamp}).write(checkpoint)
    with pytest.raises(DamagedError):
        Manifest.read(checkpoint)


def test_a_directory_of_another_step_or_without_a_manifest(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000002")
    with pytest.raises(DamagedError, match="is that of step 1"):
        verify(tmp_path / "step_00000002")
    (tmp_path / "step_00000002" / MANIFEST).unlink()
    with pytest.raises(DamagedError, match=r"MANIFEST.json: missing$"):
        verify(tmp_path / "step_00000002")
    (tmp_path / "step_00000002" / "engine").mkdir()
    with pytest.raises(DamagedError, match="engine/ is of an older llmtrain"):
        verify(tmp_path / "step_00000002")


def test_what_is_not_a_plain_file_is_not_opened(tmp_path):
    save(tmp_path, 1)
    checkpoint = tmp_path / "step_00000001"
    (checkpoint / rank_file(0)).unlink()
    os.mkfifo(checkpoint / rank_file(0))  # opening it would wait for ever
    with pytest.raises(DamagedError, match="not a plain file"):
        verify(checkpoint)


def test_ranks_share_the_reading_by_bytes(tmp_path):
    stamps = {f"f{number}": (size, "") for number, size in enumerate([10, 9, 8, 1, 1, 1, 5, 5])}
    shares = [share(stamps, rank, 3) for rank in range(3)]
    assert sorted(name for mine in shares for name in mine) == sorted(stamps)
    loads = [sum(size for size, _ in mine.values()) for mine in shares]
    assert max(loads) - min(loads) <= 1
    assert share(stamps, World().rank, World().world_size) == stamps
    save(tmp_path, 1)
    manifest = Manifest.read(tmp_path / "step_00000001")
    assert damages(tmp_path / "step_00000001", manifest.files) == []
