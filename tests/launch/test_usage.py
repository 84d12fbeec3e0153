"""--help and mistakes of the launch scripts, on a machine where nothing is set up."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.launch.conftest import LAUNCH


@pytest.mark.parametrize("words", [("--help",), ("a=1", "-h")])
@pytest.mark.parametrize("script", ["local.sh", "hostfile.sh", "slurm.sbatch", "slurm_prepare.sbatch"])
def test_help_prints_the_comment_on_top_and_sets_nothing_up(tmp_path, script, words):
    names = ("SLURM_", "LLMTRAIN_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(names)}
    done = subprocess.run(
        ["bash", LAUNCH / script, *words],
        env=environment | {"LLMTRAIN_VENV": str(tmp_path / "venv")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, *rest = done.stdout.splitlines()
    assert f"# {first}" == (LAUNCH / script).read_text().splitlines()[1]
    assert any(f"launch/{script} " in line for line in rest)
    assert "SBATCH" not in done.stdout and "set -euo" not in done.stdout
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("words", "named"), [(["host.txt", "a=1"], "host.txt: no such file"), ([], "the first word")]
)
def test_a_file_of_hosts_that_is_not_there_is_one_line(tmp_path, words, named):
    done = subprocess.run(
        ["bash", LAUNCH / "hostfile.sh", *words],
        env=os.environ | {"LLMTRAIN_VENV": str(tmp_path / "venv")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line.startswith(f"hostfile: {named}")) == (78, True), line
    assert not (tmp_path / "venv").exists()
