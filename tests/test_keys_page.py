"""docs/config.md is what `llmtrain keys` prints, and has every key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmtrain.cli import main as llmtrain
from llmtrain.config.reference import type_text
from llmtrain.config.yaml_comments import entries
from llmtrain.training.config import PrepareConfig, TrainConfig
from llmtrain.training.planning import PlanConfig
from tests.training.test_keys import keys

PAGE = Path(__file__).parents[1] / "docs" / "config.md"


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert llmtrain(["keys"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(), "stale: llmtrain keys > docs/config.md"


@pytest.mark.parametrize("root", [TrainConfig, PrepareConfig, PlanConfig])
def test_every_key_has_a_row_with_a_meaning(root: type[TrainConfig]) -> None:
    rows = re.findall(r"^\| `([^`]+)` \| `[^`]+` \| (?:`.*`)? ?\| (\S.*) \|$", PAGE.read_text(), re.M)
    named = {re.sub(r"\.<\w+>", "", name) for name, _ in rows}
    assert {key for key in keys(root) if not key.endswith(".kind")} - named == set()


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (bool | None, "true | false | null"),
        (dict[str, float], "{<name>: float}"),
        (list[tuple[int, int]], "[[int, int], ...]"),
        (TrainConfig.model_fields["fp8"].annotation, "false | tensorwise | rowwise"),
    ],
)
def test_types_read_as_values_are_written(annotation: object, text: str) -> None:
    assert type_text(annotation) == text


def test_comments_of_several_lines_and_of_groups_are_found(tmp_path: Path) -> None:
    (tmp_path / "top.yaml").write_text(
        "a: 1   # one\n       # and more\n"
        "b:    # two\n  c: [x]  # three\n  d: 2\n"
        "# no comment of a key\ne: 3\n"
    )
    said = {key: listed[0].comment for key, listed in entries(tmp_path, "top").items()}
    assert said == {"a": "one and more", "b": "two", "b.c": "three", "b.d": "", "e": ""}
