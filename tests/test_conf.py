"""conf/ is the reference: every key has a field, every field a key, every option composes and validates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.config.base import Config
from llmtrain.config.hydra import compose, config_directory
from llmtrain.training.config import PrepareConfig, TrainConfig
from llmtrain.training.planning import PlanConfig
from tests.training.test_keys import keys

CONF = config_directory()
NEEDED = {
    "model=base": [
        "+model.d_model=64",
        "+model.n_layers=1",
        "+model.n_heads=2",
        "+model.n_kv_heads=1",
        "+model.d_ff=64",
    ],
    "deepspeed=base": ["+deepspeed.zero_optimization.stage=1"],
    "optimizer=base": ["+optimizer.kind=lion", "+optimizer.lr=1", "+optimizer.betas=[0.9,0.99]"],
    "data=base": ["+data.sources.text.path=x", "+data.sources.text.weight=1"],
    "data=files": ["data.sources.text.path=x"],
    "tokenizer=huggingface": ["tokenizer.path=x"],
}

ROOTS: dict[str | None, type[Config]] = {None: TrainConfig, "prepare": PrepareConfig, "plan": PlanConfig}

OPTIONS = [
    f"{path.parent.relative_to(CONF)}={path.stem}"
    for path in sorted(CONF.rglob("*.yaml"))
    if path.parent != CONF
]


def leaves(value: Any, prefix: str = "") -> set[str]:
    if not isinstance(value, Mapping) or not value:
        return {prefix[:-1]}
    return {leaf for key, inner in value.items() for leaf in leaves(inner, f"{prefix}{key}.")}


def yaml_keys(door: str | None) -> set[str]:
    """Dotted keys of every file that a door composes from, as they stand in the composed config."""
    found = set()
    for path in CONF.rglob("*.yaml"):
        text = path.read_text()
        values = yaml.safe_load(text)
        values.pop("defaults", None)
        group = path.relative_to(CONF).parent.as_posix()
        if group == "." and path.stem not in ("config", door):
            continue
        is_global = group == "." or text.startswith("# @package _global_")
        found |= leaves(values, "" if is_global else group.replace("/", ".") + ".")
    return {re.sub(r"^(data\.sources)\.[^.]+", r"\1", key) for key in found}


def test_every_file_at_the_top_is_a_door_s():
    assert {path.stem for path in CONF.glob("*.yaml")} == {"config", *filter(None, ROOTS)}


@pytest.mark.parametrize("door", ROOTS)
def test_every_key_has_a_field_and_every_field_a_key(door):
    """A key whose value is null or empty stands for the fields below it."""
    fields, ours = set(keys(ROOTS[door])), yaml_keys(door)
    beginnings = {field.rpartition(".")[0] for field in fields}
    assert ours - fields - beginnings == set()
    assert {field for field in fields - ours if field.rpartition(".")[0] not in ours} == set()


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_validates(option):
    assert isinstance(compose(TrainConfig, [option, *NEEDED.get(option, [])]), TrainConfig)


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_has_a_comment(path: Path):
    """Once per name and group: a second option of a group need not explain the keys of the first again."""
    siblings = "\n".join(other.read_text() for other in path.parent.glob("*.yaml"))
    for line in path.read_text().split("# @package _global_")[-1].splitlines():
        match = re.match(r"\s*(\w+): +[^#\s]", line)
        if match and path.parent.name != "experiment" and match[1] != "kind":
            assert re.search(rf"^\s*{match[1]}:[^\n]*#", siblings, re.M) or "override" in line, line
