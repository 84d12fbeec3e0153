"""`llmtrain checkpoints`: what there is, whether it is whole, and what may go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llmtrain.checkpoints import main
from llmtrain.config.hydra import compose
from llmtrain.training.checkpoint import damages, inspecting
from llmtrain.training.checkpoint.directory import remove
from llmtrain.training.checkpoint.reading import rank_file
from llmtrain.training.config import TrainConfig
from llmtrain.training.run_directory import RunDirectory
from tests.training.checkpoint.small import names, save
from tests.training.checkpoint.test_choosing import flip


@pytest.fixture
def run(tmp_path) -> Path:
    """Steps 1 to 5 of a run that keeps two, and every third for ever."""
    directory = RunDirectory(tmp_path / "run")
    save(directory.checkpoints, 1, 2, 3, 4, 5, keep=5)
    config = compose(TrainConfig, ["checkpoint.keep_every=3"])
    directory.write_config(config)
    assert yaml.safe_load(directory.config.read_text())["checkpoint"]["keep"] == 2
    return directory.path


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_list_and_verify(run, capsys):
    assert main(["list", str(run)]) == 0
    table = capsys.readouterr().out
    assert "complete" in table
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out == table.replace("complete", "verified")
    flip(run / "checkpoints" / "step_00000002" / rank_file(0))
    (run / "checkpoints" / "step_00000004" / rank_file(0)).unlink()
    assert main(["list", str(run), "--json"]) == 0
    found = lines(capsys)
    assert [(row["step"], bool(row["damage"])) for row in found] == [
        (1, False), (2, False), (3, False), (4, True), (5, False),
    ]  # fmt: skip
    assert found[0]["bytes"] == sum(
        file.stat().st_size for file in (run / "checkpoints" / "step_00000001").iterdir()
    )
    assert found[0]["ranks"] == 1
    assert main(["verify", str(run), "--json"]) == 1
    assert [bool(row["damage"]) for row in lines(capsys)] == [False, True, False, True, False]
    assert main(["verify", str(run)]) == 1
    assert "rank_00000.safetensors: its SHA-256 is not that of the manifest" in capsys.readouterr().out


def test_a_checkpoint_that_the_run_removes_meanwhile_is_not_damaged(run, capsys, monkeypatch):
    def slowly(path: Path, *arguments: object, **options: bool) -> list:
        if path.name == "step_00000002":
            remove(path)
        return damages(path, *arguments, **options)

    monkeypatch.setattr(inspecting, "damages", slowly)
    assert main(["verify", str(run), "--json"]) == 0
    assert [(row["step"], row["damage"]) for row in lines(capsys)] == [(step, "") for step in (1, 3, 4, 5)]


def test_prune_keeps_what_the_config_says_and_never_fewer_than_two(run, capsys):
    flip(run / "checkpoints" / "step_00000005" / rank_file(0))
    (run / "checkpoints" / ".tmp-step_00000006-ab").mkdir()
    everything = names(run / "checkpoints")
    assert main(["prune", str(run), "--dry-run", "--json"]) == 0
    assert [row["step"] for row in lines(capsys)] == [1, 2, 5]
    assert names(run / "checkpoints") == everything
    assert main(["prune", str(run), "--keep", "3"]) == 0
    assert "removed" in capsys.readouterr().out
    assert names(run / "checkpoints") == ["step_00000002", "step_00000003", "step_00000004"]
    assert main(["prune", str(run)]) == 0
    assert names(run / "checkpoints") == ["step_00000003", "step_00000004"]
    flip(run / "checkpoints" / "step_00000004" / rank_file(0))
    assert main(["prune", str(run)]) == 78
    assert "1 of 2 checkpoints are whole" in capsys.readouterr().err
    assert names(run / "checkpoints") == ["step_00000003", "step_00000004"]


def test_a_run_that_is_at_work_is_not_pruned(run, capsys):
    at_work = RunDirectory(run)
    at_work.lock()
    assert main(["prune", str(run)]) == 73
    assert len(names(run / "checkpoints")) == 5
    assert main(["verify", str(run)]) == 0
    at_work.unlock()
    assert main(["prune", str(run)]) == 0


def test_mistakes_are_one_line(tmp_path, run, capsys):
    assert main(["list", str(tmp_path / "nowhere")]) == 78
    assert "no checkpoint in it" in capsys.readouterr().err
    for keep in ("1", "two"):
        with pytest.raises(SystemExit):
            main(["prune", str(run), "--keep", keep])
        assert f"{keep}: must be a number, 2 or more" in capsys.readouterr().err
