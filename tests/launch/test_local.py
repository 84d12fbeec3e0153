"""launch/local.sh: how many ranks, on which GPUs, with which arguments, and what comes back."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from tests.launch.conftest import LAUNCH, stand_ins, wait_for

LOCAL = LAUNCH / "local.sh"


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def run(environment: dict[str, str], *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", LOCAL, *arguments],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=environment["STAND_IN"],
    )


def test_overrides_arrive_unchanged_at_every_rank(environment, stand_in):
    overrides = [
        "name=a b",
        "data.sources={web:{path:/a,weight:1}}",
        "run.name=${model.d_model}-x",
        'k="q\'s"',
    ]
    result = run(environment, *overrides, ANSWER="2")
    assert result.returncode == 0, result.stderr
    for rank in (0, 1):
        note = json.loads((stand_in / f"started-{rank}").read_text())
        assert [word for word in note["argv"] if not word.startswith("--local_rank")] == overrides
        assert note["environment"]["WORLD_SIZE"] == "2"
    assert result.stdout + result.stderr == ""  # the launcher has nothing to say to the user


def test_a_rank_sees_the_terminal(environment, stand_in):
    """rich draws its progress bar only on one; the session of its own must not take it away."""
    ours, theirs = pty.openpty()
    subprocess.run(["bash", LOCAL], env=environment, stdout=theirs, stderr=theirs, timeout=120, check=True)
    os.close(theirs)
    os.close(ours)
    assert json.loads((stand_in / "started-0").read_text())["tty"] is True


def test_a_rank_that_fails_gives_its_code(environment):
    assert run(environment, CODE="87").returncode == 87


def test_a_config_mistake_ends_before_anything_starts(environment, stand_in, tmp_path):
    executable(tmp_path / "bin" / "deepspeed", f"touch {tmp_path}/launched")
    result = run(environment, "typo", PATH=f"{tmp_path}/bin:{environment['PATH']}")
    assert result.returncode == 78
    assert result.stderr == "typo: no such key\n"
    assert not (tmp_path / "launched").exists()


@pytest.mark.parametrize("flag", ["--help", "--cfg=job", "--info", "-m"])
def test_questions_to_hydra_need_no_launcher(environment, stand_in, flag):
    assert run(environment, "a=1", flag).returncode == 0
    assert json.loads((stand_in / "started-alone").read_text())["argv"] == ["a=1", flag]


def test_ranks_are_ours_to_choose(environment, stand_in):
    assert run(environment, LLMTRAIN_RANKS="none").returncode == 78
    assert run(environment, LLMTRAIN_RANKS="2", ANSWER="7").returncode == 0
    assert json.loads((stand_in / "started-1").read_text())["environment"]["WORLD_SIZE"] == "2"


@pytest.fixture
def gpus(environment, tmp_path) -> dict[str, str]:
    """A machine with GPUs, as far as nvidia-smi says, and a launcher that only notes its arguments."""
    executable(tmp_path / "bin" / "nvidia-smi", 'echo "GPU 0: NVIDIA H200 (UUID: GPU-1)"')
    note = f'echo "${{CUDA_VISIBLE_DEVICES-unset}} ${{DS_ACCELERATOR-unset}} $*" >{tmp_path}/called'
    executable(tmp_path / "bin" / "deepspeed", note)
    return environment | {"PATH": f"{tmp_path}/bin:{environment['PATH']}", "ANSWER": "2"}


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [(None, "--num_gpus 2"), ("0,1", "--include localhost:0,1"), ("5,3,7", "--include localhost:5,3")],
)
def test_the_gpus_that_are_visible_are_used(gpus, tmp_path, visible, chosen):
    """`deepspeed --num_gpus 2` takes GPUs 0 and 1, whatever CUDA_VISIBLE_DEVICES says."""
    result = run(gpus, "a=1", **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    assert result.returncode == 0, result.stderr
    called = (tmp_path / "called").read_text()
    assert called.startswith("unset unset ")
    assert f" {chosen} --module llmtrain.train a=1" in called


@pytest.mark.parametrize("visible", ["", "-1", "GPU-8a2f", "MIG-8a2f"])
def test_one_rank_without_gpu_numbers_needs_no_launcher(gpus, stand_in, tmp_path, visible):
    assert run(gpus, "a=1", ANSWER="1", CUDA_VISIBLE_DEVICES=visible).returncode == 0
    note = json.loads((stand_in / "started-alone").read_text())
    assert note["argv"] == ["a=1"]
    assert note["environment"]["CUDA_VISIBLE_DEVICES"] == visible
    assert not (tmp_path / "called").exists()


def test_several_ranks_by_uuid_are_refused_with_the_way_out(gpus):
    result = run(gpus, CUDA_VISIBLE_DEVICES="GPU-1,GPU-2")
    assert result.returncode == 78
    assert result.stderr.count("\n") == 1
    assert "CUDA_VISIBLE_DEVICES=GPU-1,GPU-2" in result.stderr


def test_ctrl_c_through_the_script_leaves_nothing(start, stand_in):
    job = start("bash", LOCAL, ANSWER="2", MODE="orderly")
    wait_for(stand_in / "started-0", stand_in / "started-1")
    job.send_signal(2)
    job.communicate(timeout=60)
    assert job.returncode == 85
    assert stand_ins(stand_in) == []


def test_quickstart_is_local_with_the_experiment(environment, stand_in):
    result = subprocess.run(
        ["bash", LAUNCH / "quickstart.sh", "max_steps=3"],
        env=environment,
        cwd=stand_in,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    argv = json.loads((stand_in / "started-0").read_text())["argv"]
    assert argv[-2:] == ["experiment=quickstart", "max_steps=3"]
    assert result.stdout.count("\n") == 1
