"""What the README promises runs: its overrides compose, its doors answer, its files are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from llmtrain.cli import main as llmtrain
from llmtrain.config.hydra import compose
from llmtrain.training.config import TrainConfig

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
COMMANDS = [
    line.split("   #")[0].split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README.replace("\\\n", " "), re.S)
    for line in block.splitlines()
    if line.strip()
]
STARTS = [
    command
    for command in COMMANDS
    if re.search(r"launch/(quickstart|local|slurm)|llmtrain\.train|llmtrain check", command)
]
DOORS = [command for command in COMMANDS if command.startswith("llmtrain ") and command not in STARTS]


def test_every_command_is_tried_below():
    others = set(COMMANDS) - set(STARTS) - set(DOORS)
    assert others == {"bash launch/test.sh"}


@pytest.mark.parametrize("command", STARTS)
def test_the_overrides_compose(command):
    words = shlex.split(command)
    script = next((word for word in words if word.startswith("launch/")), None)
    assert script is None or (REPOSITORY / script).is_file()
    overrides = [word for word in words if "=" in word and not word.startswith("--")]
    if script == "launch/quickstart.sh":
        overrides.insert(0, "experiment=quickstart")
    assert isinstance(compose(TrainConfig, overrides), TrainConfig)


def test_the_doors_answer_and_the_files_are_there(ranks, tiny, tmp_path, monkeypatch, capsys):
    run = tmp_path / "runs" / "quickstart"
    overrides = [
        "max_steps=2",
        "data.validation_fraction=0.3",
        "callbacks.sample.max_new_tokens=3",
        f"output_dir={run}",
    ]
    ranks.run([*tiny, *overrides], 1, tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in DOORS:
        assert llmtrain(shlex.split(command)[1:]) == 0, command
    printed = capsys.readouterr().out
    assert "bits per byte" in printed
    assert (tmp_path / "exported" / "config.json").is_file()
    tree = re.search(r"runs/quickstart/\n(.*?)```", README, re.S)
    assert tree
    for name in re.findall(r"^  ((?:[\w.]+/? ?)+?)  ", tree[1], re.M):
        for part in name.split():
            assert (run / part).exists(), part


def test_every_file_that_is_named_exists():
    for path in re.findall(r"\[[^\]]+\]\(([^)#:]+)\)", README):
        assert (REPOSITORY / path).exists(), path


CHINESE = (REPOSITORY / "README.zh-CN.md").read_text()


def blocks(text: str) -> list[list[str]]:
    """The fenced blocks, their lines without comments and descriptions."""
    found = re.findall(r"^```(.*?)^```", text, re.S | re.M)
    return [[re.sub(r"(?<=\S) {2,}.*", "", line) for line in block.splitlines()] for block in found]


def test_the_chinese_readme_has_the_same_commands():
    assert blocks(CHINESE) == blocks(README)


def test_the_chinese_readme_has_the_same_parts_links_and_figures():
    for pattern in (
        r"^(#+) ",
        r"\]\(((?!README)[^)]+)\)",  # links, but for those of one to the other
        r"\b(tests/[\w./]+)",
        r"`(\w+(?:[./]\w+)*=[^`]*)`",  # overrides
    ):
        ours, theirs = (re.findall(pattern, text, re.M) for text in (README, CHINESE))
        assert ours, pattern
        assert sorted(theirs) == sorted(ours), pattern
    ours, theirs = (re.findall(r"\d[\d.]*(?:e-\d)?", text.split("\n## ")[-1]) for text in (README, CHINESE))
    assert sorted(theirs) == sorted(ours)
