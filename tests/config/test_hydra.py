"""The door: composition, mistakes as one line, exit codes, and nothing printed twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.config import UserError
from llmtrain.config.help_page import config_groups
from llmtrain.config.hydra import compose, config_directory, quoted, without_local_rank
from tests.config.small import CONF, RopeConfig, SmallConfig, TheirConfig, main

ROOT = Path(__file__).parents[2]
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_PROCID")


def small(*overrides: str, config_dir: Path | None = None) -> SmallConfig:
    return compose(SmallConfig, overrides, CONF, config_dir)


def start(arguments: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    clean = {key: value for key, value in os.environ.items() if key not in LAUNCHER_NAMES}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.config.small", *arguments],
        cwd=ROOT,
        env={**clean, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Composition


def test_compose_gives_the_typed_root() -> None:
    config = small("model=small", "max_steps=3", "sources.web.weight=2")
    assert (config.model.d_model, config.max_steps, config.sources["web"].weight) == (256, 3, 2.0)
    assert config.output_dir == Path("runs/small")
    assert isinstance(config.model.position, RopeConfig)


def test_an_experiment_overrides_root_values_and_groups_but_not_the_command_line() -> None:
    assert small("experiment=long").max_steps == 99
    assert small("experiment=long").model.d_model == 256
    assert small("experiment=long", "max_steps=5", "model.d_model=8").max_steps == 5


def test_config_dir_adds_options(tmp_path: Path) -> None:
    directory = tmp_path / "it's mine, really"
    (directory / "model" / "position").mkdir(parents=True)
    (directory / "model" / "position" / "mine.yaml").write_text(
        "_target_: tests.config.small.TheirConfig\nbase: 3\ninner: {depth: 1}\n"
    )
    config = small("model/position=mine", config_dir=directory)
    assert isinstance(config.model.position, TheirConfig)
    with pytest.raises(UserError, match="model/position has none, rope"):
        small("model/position=mine")


@given(st.text(alphabet="ab \\'\"$[]{},:=()~+@", max_size=8))
def test_quoted_text_passes_the_grammar_unchanged(text: str) -> None:
    if "${" not in text:  # an interpolation keeps its meaning inside quotes
        assert OverridesParser.create().parse_override("k=" + quoted(text)).value() == text


def test_the_real_config_directory_is_found_beside_the_package() -> None:
    assert (config_directory() / "config.yaml").is_file()
    assert config_groups([CONF]) == {
        "experiment": ["long"],
        "model": ["small", "tiny", "unset"],
        "model/position": ["none", "rope"],
    }


@pytest.mark.parametrize(
    "argv",
    [["--local_rank=3", "a=1"], ["--local-rank=3", "a=1"], ["a=1", "--local_rank", "3"], ["a=1"]],
)
def test_the_launchers_local_rank_is_taken_out(argv: list[str]) -> None:
    assert without_local_rank(argv) == ["a=1"]


# Mistakes


MISTAKES = [
    (["model.d_modle=3"], "model.d_modle=3: no such key; did you mean model.d_model?"),
    (["+model.d_modle=3"], "model.d_modle=3: no such key; did you mean model.d_model?"),
    (["++model.d_modle=3"], "model.d_modle=3: no such key; did you mean model.d_model?"),
    (["modle=tiny"], "modle=tiny: no such key; did you mean model?"),
    (["model=tiney"], "model=tiney: no such option; model has small, tiny, unset; did you mean tiny?"),
    (
        ["model/position=ropes"],
        "model/position=ropes: no such option; model/position has none, rope; did you mean rope?",
    ),
    (
        ["model/positon=rope"],
        "model/positon: no such group; groups are experiment, model, model/position; "
        "did you mean model/position?",
    ),
    (
        ["model.position=none"],
        "model.position=none: an option of a group is chosen with a slash: model/position=none",
    ),
    (["++model.position=rope"], "++model.position=rope: an option of a group is chosen with a slash"),
    (["model.position=nope"], "model.position=nope: expected a mapping"),
    (
        ["model.position.kind=none"],
        "model.position.kind=none: its other keys are still another kind's; choose it as model/position=none",
    ),
    (
        ["model/position=none", "model.position.kind=rope"],
        "model.position.kind=rope: its other keys are still another kind's; choose it as model/position=rope",
    ),
    (["model=unset"], "model.d_model: missing, and it has no default: set model.d_model=..."),
    (["~model"], "model: missing, and it has no default: set model=..."),
    (["~nam"], "Could not delete from config. 'nam' does not exist."),
    (["max_steps=${nope}"], "max_steps: Interpolation key 'nope' not found"),
    (["hydra.run.dir=x"], "hydra.run.dir=x: Hydra composes the config"),
    (["name=a=b"], "name=a=b: not a valid override: mismatched input '='"),
    (["nonsense"], "nonsense: not a valid override"),
    ([""], "'': not a valid override"),
    (["model=3"], "model=3: a group takes the name of one of its options"),
    (["+experiment=long"], "Multiple values for experiment."),
    (["--max_steps=3"], "--max_steps=3: no such option; keys are written without dashes: max_steps=3"),
    (["--json"], "--json: no such option; see --help"),
    (["--cfg", "everything"], "argument --cfg/-c: invalid choice: 'everything'"),
    (["--cfg", "job", "--package", "nope"], "--package nope: no such key"),
    (["--config-dir", "/no/such"], "--config-dir /no/such: no such directory"),
    (["--multirun", "hydra/sweeper=x"], "hydra/sweeper=x: Hydra composes the config"),
]


@pytest.mark.parametrize(("argv", "expected"), MISTAKES, ids=[" ".join(argv) for argv, _ in MISTAKES])
def test_a_mistake_is_one_line_and_78(
    argv: list[str], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 78
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"error: {expected}")
    assert err.count("\n") == 1


def test_a_broken_yaml_file_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "broken.yaml").write_text("a: [1,\nb: }\n")
    assert main(["--config-dir", str(tmp_path), "experiment=broken"]) == 78
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "broken.yaml" in err


def test_several_mistakes_are_told_together(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["model.d_modle=3", "max_stpes=4", "precision=bf17"]) == 78
    assert [line.split("=")[0] for line in capfd.readouterr().err.splitlines()] == [
        "error: precision",
        "error: model.d_modle",
        "error: max_stpes",
    ]


# What the door returns, and what it shows


def test_what_run_returns_is_the_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert json.loads(capfd.readouterr().out)["max_steps"] == 10
    assert main(["name=seven"]) == 7


def test_a_user_error_inside_run_has_its_own_code(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["name=missing"]) == 73
    assert capfd.readouterr().err.endswith("error: no such file: missing.jsonl\n")


def test_help_lists_groups_with_options_and_marks_the_choice(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help", "model=small"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("A small door.\n\nExample:\n\n    python -m tests.config.small max_steps=3")
    assert "  model           small* tiny unset\n" in out
    assert "  model/position  none rope*\n" in out
    assert "choose a file of a group below            experiment=long\n" in out
    assert main(["--help", "no_such=1"]) == 0


def test_cfg_shows_the_config_without_running(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "job", "max_steps=4"]) == 0
    assert "max_steps: 4\n" in capfd.readouterr().out
    assert main(["--cfg", "job", "--resolve", "--package", "output_dir", "name=x"]) == 0
    assert capfd.readouterr().out == "runs/x\n"


def test_info_is_answered_by_hydra() -> None:
    process = start(["--info", "searchpath"])
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert str(CONF) in out


def test_hydra_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    assert main(["--cfg", "job"]) == 0
    assert list(tmp_path.iterdir()) == []


# Real processes


def two_ranks(*overrides: list[str], patience: float = 3) -> list[str]:
    """What two ranks print that are started with these arguments, both ending with 78.

    patience: seconds for which one that has told its mistake waits for another that makes the same.
    """
    ranks = []
    for rank, arguments in enumerate(overrides):
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        env["SECONDS_FOR_OTHERS"] = str(patience)
        ranks.append(start([f"--local_rank={rank}", *arguments], env))
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [78, 78]
    return errors


def test_two_ranks_print_the_same_mistake_once() -> None:
    printed = "".join(two_ranks(["model.d_modle=3"], ["model.d_modle=3"], patience=60))
    assert printed.count("\n") == 1
    assert printed.startswith("error: model.d_modle=3: no such key; did you mean model.d_model?")


def test_a_mistake_of_one_rank_is_told_with_its_number() -> None:
    first, second = two_ranks(["model.d_modle=3"], ["model.n_layer=3"])
    assert first == "error: model.d_modle=3: no such key; did you mean model.d_model?\n"
    assert second.startswith("error: model.n_layer=3: no such key")
    assert "(rank 1 on " in second


def test_other_ranks_answer_no_questions(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for argv, code in (
        (["--help"], 0),
        (["--cfg", "job"], 0),
        (["name=interrupted"], 130),
    ):
        assert main(argv) == code
    assert capfd.readouterr() == ("", "")


def test_an_impossible_environment_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([]) == 78
    assert capfd.readouterr().err == "error: environment variable RANK is 'first'; it must be a number\n"


def test_multirun_is_refused_under_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["--multirun", "max_steps=1,2"]) == 78
    assert capfd.readouterr().err.startswith("error: --multirun under a launcher")


def test_multirun_runs_each_job_in_its_own_process_and_directory() -> None:
    process = start(["--multirun", "max_steps=1,2", 'name="it\'s",seven'])
    out, err = process.communicate(timeout=120)
    jobs = [json.loads(line) for line in out.splitlines()]
    assert [(job["max_steps"], job["name"]) for job in jobs] == [
        (1, "it's-0"),
        (1, "seven-1"),
        (2, "it's-2"),
        (2, "seven-3"),
    ], err
    assert len({job["output_dir"] for job in jobs}) == 4
    assert process.returncode == 0


def test_ctrl_c_is_one_line_and_130(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "from llmtrain.config.door import plain_door\n"
        "def run():\n    print('up', flush=True)\n    time.sleep(60)\n"
        "sys.exit(plain_door(run))\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "error: interrupted\n")


def test_importing_the_config_package_imports_neither_hydra_nor_torch() -> None:
    code = (
        "import sys, llmtrain.config, llmtrain.cli, llmtrain.config.door\n"
        "print({'hydra', 'omegaconf', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"
