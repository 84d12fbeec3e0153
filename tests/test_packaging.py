"""What a user installs: the wheel holds every module and every config file, and finds them anywhere."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import grimp
import pytest

import llmtrain

REPOSITORY = Path(__file__).resolve().parents[1]
# Where the name of a package on PyPI is not the name that one imports.
IMPORT_NAMES = {"hydra-core": "hydra", "pyyaml": "yaml"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree, built offline from a copy: building writes into the source directory."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("llmtrain", "conf"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(*arguments: str, cwd: Path, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python elsewhere, with `site` in front of the editable install."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def relative_files(root: Path, pattern: str) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob(pattern)}


def test_wheel_holds_every_config_file(unpacked):
    expected = relative_files(REPOSITORY / "conf", "*")
    assert {name for name in expected if name.endswith(".yaml")}, "no conf/ to compare with"
    assert relative_files(unpacked / "llmtrain" / "conf", "*") == expected


def test_wheel_holds_every_module_and_nothing_else(unpacked):
    modules = relative_files(REPOSITORY / "llmtrain", "*.py")
    assert relative_files(unpacked / "llmtrain", "*.py") == modules
    assert (unpacked / "llmtrain" / "py.typed").exists()
    tops = {path.name for path in unpacked.iterdir()}
    assert tops == {"llmtrain", f"llmtrain-{llmtrain.__version__}.dist-info"}


def test_wheel_metadata(unpacked):
    info = unpacked / f"llmtrain-{llmtrain.__version__}.dist-info"
    metadata = email.message_from_string((info / "METADATA").read_text())
    assert metadata["Version"] == llmtrain.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "llmtrain = llmtrain.cli:main" in (info / "entry_points.txt").read_text()
    assert (info / "licenses" / "LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()


FIND = "from llmtrain.config.hydra import config_directory; print(config_directory())"


def test_conf_is_found_from_the_editable_install_in_any_directory(tmp_path):
    result = python("-c", FIND, cwd=tmp_path)
    assert Path(result.stdout.strip()) == REPOSITORY / "conf", result.stderr


def test_conf_is_found_from_the_wheel(unpacked, tmp_path):
    result = python("-c", FIND, cwd=tmp_path, site=unpacked)
    assert Path(result.stdout.strip()) == unpacked / "llmtrain" / "conf", result.stderr


def test_the_wheel_composes_the_quickstart(unpacked, tmp_path):
    result = python("-m", "llmtrain.ranks", "experiment=quickstart", cwd=tmp_path, site=unpacked)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 1
    assert list(tmp_path.iterdir()) == []  # asking leaves nothing behind


def requirement_names(requirements: list[str]) -> set[str]:
    names = {re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0].lower() for text in requirements}
    return {IMPORT_NAMES.get(name, name) for name in names}


def test_dependencies_are_what_is_imported():
    """Nothing imported that only came with another library, nothing declared that nobody imports."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    graph = grimp.build_graph("llmtrain", include_external_packages=True, cache_dir=None)
    outside = {module for module in graph.modules if not module.startswith("llmtrain")}
    imported = outside - set(sys.stdlib_module_names)
    declared = requirement_names(project["dependencies"])
    optional = project["optional-dependencies"]
    extra = {"flash_attn"} | requirement_names(optional["fast"]) | requirement_names(optional["fp8"])
    peers = {"grain", "litdata", "megatron", "streaming"}  # benchmarks compare with them where they are
    assert peers <= imported
    assert imported - extra - peers <= declared
    assert declared - imported == {"zstandard"}  # datasets, for .zst files
