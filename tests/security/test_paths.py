"""Names that come from outside, in configs, manifests and indices, lead nowhere but where they belong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from llmtrain.config import UserError
from llmtrain.config.hydra import quoted
from llmtrain.train import main as train
from llmtrain.training.checkpoint.directory import checkpoints, sweep
from llmtrain.training.checkpoint.manifest import DamagedError, Manifest, verify
from tests.model import huggingface_models as theirs

AWAY = ["../x", "/abs", "a/../../x", "a/b", "..", ".", "", "a\0b", "a\\..\\b\n", "~/x", "x\n", "https://x"]


def write_checkpoint(directory: Path, step: int = 1) -> Path:
    """A checkpoint of two small files that verifies."""
    path = directory / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "checkpoint.json").write_text("{}")
    (path / "data").write_text("data")
    files = {file.name: stamp(file) for file in path.iterdir()}
    Manifest(step, files).write(path)
    return path


def stamp(file: Path) -> tuple[int, str]:
    return file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", AWAY)
def test_a_manifest_names_plain_files(tmp_path, name):
    path = write_checkpoint(tmp_path)
    verify(path)
    manifest = Manifest.read(path)
    Manifest(1, {**manifest.files, name: stamp(path / "data")}).write(path)
    with pytest.raises(DamagedError, match="its own digest"):
        Manifest.read(path)


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "loop", "dangling"])
def test_a_file_of_a_checkpoint_is_a_plain_one(tmp_path, kind):
    """A pipe would be waited for, a device read for ever."""
    path = write_checkpoint(tmp_path)
    file = path / "data"
    file.unlink()
    match kind:
        case "pipe":
            os.mkfifo(file)
        case "directory":
            file.mkdir()
        case "device":
            file.symlink_to("/dev/zero")
        case "loop":
            file.symlink_to(file)
        case "dangling":
            file.symlink_to(tmp_path / "gone")
    with pytest.raises(DamagedError, match="data"):
        verify(path)


def test_only_names_of_checkpoints_are_checkpoints(tmp_path):
    kept = write_checkpoint(tmp_path)
    for name in (
        "step_1",
        "step_00000002.bak",
        "step_0000000x",
        "-step_00000003",
        "step_00000004 ",
        "latest",
    ):
        shutil.copytree(kept, tmp_path / name)
    assert checkpoints(tmp_path) == [(1, kept)]


def test_nothing_outside_is_removed_with_rubbish(tmp_path):
    """A planted link among the rubbish of an interrupted save: what it leads to stays."""
    outside, run = tmp_path / "outside", tmp_path / "checkpoints"
    outside.mkdir()
    run.mkdir()
    (outside / "precious").write_text("x")
    (run / ".trash-step_00000001").symlink_to(outside)
    (run / ".tmp-step_00000002").mkdir()
    (run / ".tmp-step_00000002" / "link").symlink_to(outside)
    sweep(run)
    assert (outside / "precious").read_text() == "x"
    assert not list(run.iterdir())


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.bin", "..", "", 7, None])
def test_an_index_of_weights_names_files_beside_it(tmp_path, file):
    directory = theirs.save(theirs.build("Llama GQA"), tmp_path / "model")
    (directory / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": file}}))
    with pytest.raises(UserError, match=r"not a file beside it|not there"):
        theirs.ours(directory)


@pytest.mark.parametrize("name", ["../../x", "..", "/abs", "a/../../x", "", "~/x", "a\nb", "a\0b"])
def test_a_run_s_name_stays_below_its_directory(name, tmp_path, monkeypatch, capfd):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert train([f"name={quoted(name)}"]) == 78
    assert "error: name=" in capfd.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


@pytest.mark.parametrize("name", ["../x", "/abs", "a/b", ".x", "a b", "x" * 201, "a\0b"])
def test_a_source_s_name_is_that_of_a_directory(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    source = "data.sources={" + quoted(name) + ": {path: x, weight: 1}}"
    assert train(["data=base", f"+{source}"]) == 78
    assert not list(tmp_path.iterdir())
