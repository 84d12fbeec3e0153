"""docs/ runs: its commands are tried, its YAML composes, its keys are keys."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from llmtrain.cli import main as llmtrain
from llmtrain.config.hydra import compose
from llmtrain.training.config import TrainConfig
from tests.training.test_keys import keys

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {page: (DOCS / f"{page}.md").read_text() for page in ("data", "model", "reliability", "slurm")}
YAML = re.findall(r"```yaml\n(.*?)```", PAGES["data"], re.S)


def commands(page: str) -> list[str]:
    """The lines of a page's bash blocks, without their comments."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", PAGES[page].replace("\\\n", ""), re.S)).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def test_every_command_about_data_answers(ranks, tiny, tmp_path, corpus, monkeypatch):
    ranks.run([*tiny, "max_steps=2", f"output_dir={tmp_path}/runs/quickstart"], 1, tmp_path)
    shutil.copytree(corpus, tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    for command in commands("data"):
        if "<key>" in command:
            (prepared,) = Path(".cache/llmtrain/shards").glob("*/train")
            command = command.replace(".cache/llmtrain/shards/<key>/train", str(prepared))
        words = shlex.split(command)
        assert words[0] == "llmtrain"
        small = ["tokenizer=bytes"] if words[1] == "prepare" else []
        assert llmtrain([*words[1:], *small]) == 0, command
    assert (tmp_path / "megatron/text.idx").is_file()


def test_every_command_about_the_model_answers(ranks, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranks.run([*tiny, "max_steps=2", "output_dir=runs/run"], 1, tmp_path)
    for command in commands("model"):
        name, *words = shlex.split(command)[1:]
        if name == "train":
            ranks.run([*tiny, "output_dir=runs/${name}", *words], 1, tmp_path)
        else:
            assert llmtrain([name, *words]) == 0, command
    profile = json.loads((tmp_path / "runs/run/profile/kernels.json").read_text())
    assert profile["steps"] == 3
    assert (tmp_path / "runs/continued/DONE").is_file()


def test_every_command_about_reliability_answers(ranks, tiny, tmp_path, monkeypatch):
    """Those of llmtrain; scripts have tests of their own."""
    monkeypatch.chdir(tmp_path)
    ranks.run([*tiny, "max_steps=2", "output_dir=runs/quickstart"], 1, tmp_path)
    for command in commands("reliability"):
        program, name, *words = shlex.split(command)
        if program == "llmtrain" and name == "train":
            ranks.run([*tiny, "max_steps=2", "output_dir=runs/${name}", *words], 1, tmp_path)
        elif program == "llmtrain":
            assert llmtrain([name, *words]) == 0, command


def test_every_command_about_slurm_composes_and_the_job_names_its_run(monkeypatch):
    """tests/launch/test_slurm.py hands them to sbatch."""
    monkeypatch.setenv("SLURM_JOB_NAME", "job")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    names = []
    for _, *words in map(shlex.split, commands("slurm")):
        overrides = [word for word in words if "=" in word and not word.startswith("--")]
        config = compose(TrainConfig, overrides)
        if "hardware=slurm" in overrides:
            names.append(config.name)
            assert config.hardware.gpus_per_node == 4
    assert names == ["mine", "job"]


def test_the_yaml_composes(tmp_path):
    sources, stages = YAML
    (tmp_path / "data").mkdir()
    (tmp_path / "data/corpus.yaml").write_text(f"{sources}{stages}")
    config = compose(TrainConfig, ["data=corpus"], config_dir=tmp_path)
    assert set(config.data.sources) == {"web", "wudao", "questions"}
    assert config.data.stages[0].weights == {"web": 0.3, "wudao": 0.3, "questions": 0.4}
    assert yaml.safe_load(sources)["sources"]["wudao"]["template"] == "{title}\n{content}"


@pytest.mark.parametrize("key", sorted(set(re.findall(r"`(data\.[a-z_.]+)", PAGES["data"]))))
def test_every_key_that_is_named_exists(key):
    fields = set(keys(TrainConfig))
    if key != "data.json":
        assert key in fields or any(field.startswith(f"{key}.") for field in fields)
