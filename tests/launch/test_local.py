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


@pytest.fixture
def launcher(environment, tmp_path) -> dict[str, str]:
    """A machine without GPUs and with a launcher that notes its arguments in `called` and says done."""
    (tmp_path / "DONE").touch()
    told = json.dumps({"run": str(tmp_path), "grace_seconds": 1, "done": True})
    note = f"echo '{told}' >$LLMTRAIN_SUPERVISOR\n"
    note += f'echo "${{CUDA_VISIBLE_DEVICES-unset}} ${{DS_ACCELERATOR-unset}} $*" >{tmp_path}/called'
    executable(tmp_path / "bin" / "deepspeed", note)
    executable(tmp_path / "bin" / "nvidia-smi", "exit 9")
    return environment | {"PATH": f"{tmp_path}/bin:{environment['PATH']}"}


@pytest.fixture
def gpus(launcher, tmp_path) -> dict[str, str]:
    """The same with GPUs, as far as nvidia-smi says, enough for two ranks."""
    executable(tmp_path / "bin" / "nvidia-smi", 'echo "GPU 0: NVIDIA H200 (UUID: GPU-1)"')
    return launcher | {"ANSWER": "2"}


def test_every_rank_has_the_overrides_unchanged_and_the_terminal(environment, stand_in):
    """Through the real launcher; rich draws its progress bar on a terminal only."""
    overrides = ["name=a b", "data.sources={web:{path:/a,weight:1}}", "run=${model.d_model}-x", 'k="q\'s"']
    ours, theirs = pty.openpty()
    job = subprocess.run(
        ["bash", LOCAL, *overrides],
        env=environment | {"ANSWER": "2"},
        cwd=stand_in,
        stdout=theirs,
        stderr=theirs,
        timeout=120,
    )
    os.close(theirs)
    assert job.returncode == 0
    for rank in (0, 1):
        note = json.loads((stand_in / f"started-{rank}").read_text())
        assert [word for word in note["argv"] if not word.startswith("--local_rank")] == overrides
        assert note["environment"]["WORLD_SIZE"] == "2"
        assert note["tty"] is True
    os.set_blocking(ours, False)
    with pytest.raises(OSError):  # nothing to read: the launcher has nothing to say to the user
        os.read(ours, 1)
    os.close(ours)


def test_a_rank_that_fails_gives_its_code(environment):
    assert run(environment, CODE="87").returncode == 87


def test_a_config_mistake_ends_before_anything_starts(launcher, tmp_path):
    result = run(launcher, "typo")
    assert result.returncode == 78
    assert result.stderr == "typo: no such key\n"
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("flag", ["--hydra-help", "--cfg=job", "--info", "-m"])
def test_questions_to_hydra_need_no_launcher(environment, stand_in, flag):
    assert run(environment, "a=1", flag).returncode == 0
    assert json.loads((stand_in / "started-alone").read_text())["argv"] == ["a=1", flag]


def test_ranks_are_ours_to_choose(launcher, tmp_path):
    assert run(launcher, LLMTRAIN_RANKS="none").returncode == 78
    assert run(launcher, LLMTRAIN_RANKS="2", ANSWER="7", MASTER_PORT="29501").returncode == 0
    called = (tmp_path / "called").read_text()
    assert called.startswith("unset cpu ")
    assert "--master_port 29501 --num_gpus 2 --module llmtrain.train" in called


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


def test_more_ranks_than_visible_gpus_are_refused(gpus, tmp_path):
    result = run(gpus, LLMTRAIN_RANKS="3", CUDA_VISIBLE_DEVICES="4,5")
    assert (result.returncode, result.stderr.count("\n")) == (78, 1)
    assert "LLMTRAIN_RANKS=3, but CUDA_VISIBLE_DEVICES=4,5" in result.stderr
    assert not (tmp_path / "called").exists()


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


def test_quickstart_is_local_with_the_experiment(launcher, tmp_path):
    command = ["bash", LAUNCH / "quickstart.sh", "max_steps=3"]
    result = subprocess.run(command, env=launcher, cwd=tmp_path / "stand_in", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "called").read_text().endswith(" llmtrain.train experiment=quickstart max_steps=3\n")
    assert result.stdout.count("\n") == 1
