"""The base config class, and the choice between kinds."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from llmtrain.config import Config, choice
from tests.config.small import (
    InnerConfig,
    ModelConfig,
    NoPositionConfig,
    PositionConfig,
    RopeConfig,
    TheirConfig,
)

THEIRS = {"_target_": "tests.config.small.TheirConfig", "base": 2.0, "inner": {"depth": 3}}


def model(position: Any) -> ModelConfig:
    return ModelConfig.model_validate({"d_model": 8, "n_layers": 1, "n_heads": 2, "position": position})


class Outer:
    class Nested(PositionConfig):
        """A class inside another is named by its full path too."""

        width: int


@pytest.mark.parametrize(
    ("raw", "cls"),
    [
        ({"kind": "rope", "theta": 5.0}, RopeConfig),
        ({"kind": "none"}, NoPositionConfig),
        (THEIRS, TheirConfig),
        ({"_target_": "tests.config.test_base.Outer.Nested", "width": 4}, Outer.Nested),
    ],
)
@pytest.mark.parametrize("mode", ["json", "python"])
def test_a_choice_survives_dump_yaml_validate(raw: dict[str, Any], cls: type[Config], mode: Any) -> None:
    first = model(raw)
    assert type(first.position) is cls
    dumped = first.model_dump(mode=mode)
    assert dumped["position"] == raw
    again = ModelConfig.model_validate(yaml.safe_load(yaml.safe_dump(dumped)))
    assert again == first
    assert type(again.position) is cls


class Extensible(Config):
    """Fields that hold one class of ours or theirs, and theirs alone."""

    ours: choice(PositionConfig, InnerConfig)  # type: ignore[valid-type]
    theirs: dict[str, choice(PositionConfig)]  # type: ignore[valid-type]


def test_a_class_without_a_kind_takes_what_has_no_target() -> None:
    raw = {"ours": {"depth": 1}, "theirs": {"x": THEIRS}}
    first = Extensible.model_validate(raw)
    assert (type(first.ours), type(first.theirs["x"])) == (InnerConfig, TheirConfig)
    assert first.model_dump() == raw
    swapped = Extensible.model_validate({"ours": THEIRS, "theirs": {}})
    assert swapped.model_dump() == {"ours": THEIRS, "theirs": {}}


def test_where_we_have_no_class_a_target_is_needed() -> None:
    with pytest.raises(ValidationError, match="must be a class of yours"):
        Extensible.model_validate({"ours": {"depth": 1}, "theirs": {"x": {"base": 2.0}}})


def test_a_built_object_is_accepted_as_it_is() -> None:
    for position in (
        RopeConfig(kind="rope", theta=1.0),
        TheirConfig.model_validate({"base": 1, "inner": {"depth": 1}}),
    ):
        assert model(position).position == position


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("tests.config.small.SmallConfig", "is not a subclass"),
        ("pydantic.BaseModel", "is not a subclass"),
        ("os.getcwd", "is not the name of a config class"),
        ("no_such_package.Thing", "cannot be imported"),
        ("tests.config.small.Nope", "cannot be imported"),
        ("", "is not the name of a config class"),
    ],
)
def test_a_target_must_be_a_subclass_of_the_base(target: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        model({"_target_": target})


def test_a_target_is_not_called_before_it_is_known_to_be_a_config(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "evil.py").write_text("def run(**_):\n    raise SystemExit('called')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValidationError, match="is not a subclass"):
        model({"_target_": "evil.run"})


class Numbers(Config):
    count: int
    ratio: float | None
    flag: bool
    either: int | bool
    text: str


def test_truth_values_are_no_numbers_but_numbers_are_text() -> None:
    good = {"count": 1, "ratio": None, "flag": True, "either": True, "text": 7}
    assert Numbers.model_validate(good).text == "7"
    for key in ("count", "ratio"):
        with pytest.raises(ValidationError, match="must be a number"):
            Numbers.model_validate({**good, key: True})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        RopeConfig(kind="rope", theta=value)


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        NoPositionConfig(kind="none").kind = "none"
