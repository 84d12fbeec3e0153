"""One line a mistake: key, value, what is allowed, nearest match."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from llmtrain.config import Config, ExitCode, UserError, describe
from tests.config.small import SmallConfig

GOOD: dict[str, Any] = {
    "name": "a",
    "output_dir": "runs/a",
    "max_steps": 10,
    "precision": "auto",
    "betas": [0.9, 0.95],
    "sources": {"web": {"path": "a", "weight": 1.0}},
    "model": {"d_model": 8, "n_layers": 1, "n_heads": 2, "position": {"kind": "rope", "theta": 1.0}},
}
THEIRS = "tests.config.small.TheirConfig"


def lines(**changes: Any) -> list[str]:
    """What is said about GOOD with `a__b=value` changes; `...` removes a key."""
    raw = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = raw
        for parent in parents:
            place = place[parent]
        place.pop(last, None) if value is ... else place.__setitem__(last, value)
    with pytest.raises(ValidationError) as caught:
        SmallConfig.model_validate(raw)
    return describe(SmallConfig, raw, caught.value)


CASES: list[tuple[dict[str, Any], str]] = [
    ({"max_stpes": 3}, "max_stpes=3: no such key; did you mean max_steps?"),
    ({"model__d_modle": 3}, "model.d_modle=3: no such key; did you mean model.d_model?"),
    ({"d_model": 3}, "d_model=3: no such key; did you mean model.d_model?"),
    (
        {"model__zzz": 3},
        "model.zzz=3: no such key; model has d_model, n_layers, n_heads, position",
    ),
    (
        {"model__position__theat": 3},
        "model.position.theat=3: no such key; did you mean model.position.theta?",
    ),
    (
        {"sources__web__wieght": 3},
        "sources.web.wieght=3: no such key; did you mean sources.web.weight?",
    ),
    ({"modle": {"a": 1}}, "modle: no such key; did you mean model?"),
    ({"max_steps": "abc"}, "max_steps=abc: must be a valid integer"),
    (
        {"max_steps": 1.5},
        "max_steps=1.5: must be a valid integer, got a number with a fractional part",
    ),
    ({"max_steps": True}, "max_steps=true: must be a number"),
    ({"max_steps": None}, "max_steps=null: must be a valid integer"),
    ({"max_steps": ...}, "max_steps: missing, and it has no default: set max_steps=..."),
    ({"model__n_layers": 0}, "model.n_layers=0: must be greater than 0"),
    (
        {"precision": "bf17"},
        "precision=bf17: must be one of auto, fp32, bf16; did you mean bf16?",
    ),
    ({"precision": "zzz"}, "precision=zzz: must be one of auto, fp32, bf16"),
    ({"betas": [0.9]}, "betas: too short, item 1 is missing"),
    ({"betas": [0.9, "x"]}, "betas.1=x: must be a valid number"),
    (
        {"betas": [1, 2, 3]},
        "betas=[1, 2, 3]: Tuple should have at most 2 items after validation, not 3",
    ),
    (
        {"sources__web__weight": "much"},
        "sources.web.weight=much: must be a valid number or must be auto",
    ),
    (
        {"model__position__kind": "ropes"},
        "model.position.kind=ropes: must be one of rope, none, "
        "a class of yours (_target_: package.Class); did you mean rope?",
    ),
    (
        {"model__position__kind": ...},
        "model.position.kind: missing: set it to one of rope, none, "
        "a class of yours (_target_: package.Class)",
    ),
    ({"model__position__theta": -1}, "model.position.theta=-1: must be greater than 0"),
    ({"model": 3}, "model=3: must be a group of keys, not a single value"),
    ({"sources": 3}, "sources=3: must be a group of keys, not a single value"),
    ({"model__n_heads": 3}, "model.d_model=8 is not a multiple of n_heads=3"),
    ({"name": ["x" * 100]}, "name=['" + "x" * 58 + "...: must be a valid string"),
    (
        {"model__position": {"_target_": THEIRS, "base": 1, "inner": {"depth": "x"}}},
        "model.position.inner.depth=x: must be a valid integer",
    ),
    (
        {"model__position": {"_target_": THEIRS, "base": 1, "inner": {"depth": 1, "dept": 2}}},
        "model.position.inner.dept=2: no such key; did you mean model.position.inner.depth?",
    ),
    (
        {"model__position": {"_target_": "os.getcwd"}},
        "model.position: _target_ 'os.getcwd' is not the name of a config class: package.module.Class",
    ),
]


@pytest.mark.parametrize(("change", "expected"), CASES, ids=[expected[:40] for _, expected in CASES])
def test_one_line_with_the_full_key(change: dict[str, Any], expected: str) -> None:
    assert lines(**change) == [expected]


def test_words_of_several_types_are_one_list_as_yaml_has_them() -> None:
    class Recipe(Config):
        fp8: Literal[False] | Literal["tensorwise", "rowwise"]

    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"fp8": True})
    assert describe(Recipe, {"fp8": True}, caught.value) == [
        "fp8=true: must be one of false, tensorwise, rowwise"
    ]


def test_every_mistake_is_told_at_once() -> None:
    told = lines(max_steps="x", precision="y", model__n_layers=-1, model__position__theta=...)
    assert [line.partition(":")[0] for line in told] == [
        "max_steps=x",
        "precision=y",
        "model.n_layers=-1",
        "model.position.theta",
    ]


def test_user_error_lines_are_single_lines() -> None:
    error = UserError("first\n   of two", "second", exit_code=ExitCode.LOCKED)
    assert error.lines == ["first of two", "second"]
    assert error.exit_code == 73
    assert UserError("x").exit_code == 78
