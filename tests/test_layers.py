"""The house's layers, as pyproject.toml states them, and the absence of import cycles."""

from __future__ import annotations

import graphlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grimp

REPOSITORY = Path(__file__).resolve().parents[1]


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Run the contracts of `root`/pyproject.toml over `root`/llmtrain."""
    script = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([script, "--no-logo", "--no-cache"], cwd=root, capture_output=True, text=True)


def test_every_contract_is_kept():
    result = lint_imports(REPOSITORY)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_contracts_see_planted_breaches(tmp_path):
    """Each breach is one that a contract exists for; local imports count like those at the top."""
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    shutil.copytree(
        REPOSITORY / "llmtrain", tmp_path / "llmtrain", ignore=shutil.ignore_patterns("__pycache__")
    )

    def plant(module: str, line: str) -> None:
        with (tmp_path / "llmtrain" / module).open("a") as file:
            file.write(f"\n\ndef planted() -> None:\n    {line}\n")

    plant("data/stream.py", "import llmtrain.model.decoder")  # rooms that do not know each other
    plant("training/trainer.py", "import llmtrain.evaluate")  # a door
    plant("optim/adamw.py", "import deepspeed")
    plant("training/config.py", "import omegaconf")
    plant("model/norm.py", "import datasets")
    plant("training/build.py", "import sentencepiece")
    plant("data/mixture.py", "import wandb")
    plant("optim/schedules.py", "import transformers")
    plant("training/signals.py", "import torchao")
    plant("model/attention.py", "import flash_attn")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    verdicts = re.findall(r" (BROKEN|KEPT)\b", result.stdout)
    assert verdicts == ["BROKEN"] * 10, result.stdout
    assert "llmtrain.data -> llmtrain.model" in result.stdout.replace(" is not allowed to import ", " -> ")
    assert "llmtrain.training.trainer -> llmtrain.evaluate" in result.stdout


def test_a_room_without_a_place_in_the_layers_is_refused(tmp_path):
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    shutil.copytree(
        REPOSITORY / "llmtrain", tmp_path / "llmtrain", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "llmtrain" / "attic.py").write_text("")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert "llmtrain.attic" in result.stdout


def find_cycle(package: str) -> list[str] | None:
    """Modules that import each other in a circle when the program runs; local imports count."""
    graph = grimp.build_graph(package, exclude_type_checking_imports=True, cache_dir=None)
    needs = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_no_module_imports_itself_through_others():
    assert find_cycle("llmtrain") is None


def test_a_cycle_through_a_local_import_is_found(tmp_path, monkeypatch):
    package = tmp_path / "circular"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("import circular.two\n")
    (package / "two.py").write_text("def f():\n    from circular import one\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert set(find_cycle("circular") or []) == {"circular.one", "circular.two"}
