"""docs/ runs: its commands are tried, its YAML composes, its keys are keys."""

from __future__ import annotations

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
DATA = (DOCS / "data.md").read_text()
COMMANDS = [
    line.split("   #")[0].split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", DATA, re.S)
    for line in block.splitlines()
    if line.strip()
]
YAML = re.findall(r"```yaml\n(.*?)```", DATA, re.S)


def test_every_command_answers(ranks, tiny, tmp_path, corpus, monkeypatch):
    ranks.run([*tiny, "max_steps=2", f"output_dir={tmp_path}/runs/quickstart"], 1, tmp_path)
    shutil.copytree(corpus, tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        if "<key>" in command:
            (prepared,) = Path(".cache/llmtrain/shards").glob("*/train")
            command = command.replace(".cache/llmtrain/shards/<key>/train", str(prepared))
        words = shlex.split(command)
        assert words[0] == "llmtrain"
        small = ["tokenizer=bytes"] if words[1] == "prepare" else []
        assert llmtrain([*words[1:], *small]) == 0, command
    assert (tmp_path / "megatron/text.idx").is_file()


def test_the_yaml_composes(tmp_path):
    sources, stages = YAML
    (tmp_path / "data").mkdir()
    (tmp_path / "data/corpus.yaml").write_text(f"{sources}{stages}")
    config = compose(TrainConfig, ["data=corpus"], config_dir=tmp_path)
    assert set(config.data.sources) == {"web", "wudao", "questions"}
    assert config.data.stages[0].weights == {"web": 0.3, "wudao": 0.3, "questions": 0.4}
    assert yaml.safe_load(sources)["sources"]["wudao"]["template"] == "{title}\n{content}"


@pytest.mark.parametrize("key", sorted(set(re.findall(r"`(data\.[a-z_.]+)", DATA))))
def test_every_key_that_is_named_exists(key):
    fields = set(keys(TrainConfig))
    if key != "data.json":
        assert key in fields or any(field.startswith(f"{key}.") for field in fields)
