"""launch/hostfile.py without hosts: what it reads, compares, exports and makes of exit codes."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest

from tests.launch.conftest import LAUNCH


@pytest.fixture
def hostfile(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(LAUNCH)
    loaded = importlib.import_module("hostfile")
    yield loaded
    for name in ("hostfile", "supervise"):
        sys.modules.pop(name, None)


def test_hosts_are_read_in_order(hostfile, tmp_path):
    file = tmp_path / "hosts.txt"
    file.write_text("# all of them\nnode-1 slots=8\n\nme@node-2.example slots=4  # half\n10.0.0.3 slots=1\n")
    with file.open("a") as lines:
        lines.write("fd00::4 slots=8\n[fd00::5] slots=8\nme@[fe80::6%eth0] slots=8\n")
    assert list(hostfile.read_hosts(file).items()) == [
        *(("node-1", 8), ("me@node-2.example", 4), ("10.0.0.3", 1)),
        *(("fd00::4", 8), ("fd00::5", 8), ("me@fe80::6%eth0", 8)),
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a slots=1\nb slot=2", "line 2: 'b slot=2' must be `<host> slots=<ranks>`"),
        ("a slots=0", "line 1: 'a slots=0' must be"),
        ("a[1-3] slots=1", "line 1: 'a[1-3] slots=1' must be"),
        ("node:22 slots=1", "line 1: 'node:22 slots=1' must be"),
        ("abc:22 slots=1", "line 1: 'abc:22 slots=1' must be"),
        ("[fd00::1 slots=1", "line 1: '[fd00::1 slots=1' must be"),
        ("a slots=1\na slots=2", "line 2: a is there already"),
        ("fd00::1 slots=1\n[fd00:0::1] slots=2", "line 2: fd00::1 is there already"),
        ("# nothing", "no hosts; a line is"),
    ],
)
def test_a_wrong_line_is_named(hostfile, tmp_path, text, line):
    file = tmp_path / "hosts.txt"
    file.write_text(text)
    with pytest.raises(hostfile.HostsError, match=f"hosts.txt.*{hostfile.re.escape(line)}"):
        hostfile.read_hosts(file)


@pytest.mark.parametrize(("prints", "said"), [("", "nothing"), ("echo welcome to a", "welcome to a")])
def test_a_host_that_runs_no_command_is_named(hostfile, prints, said):
    """The start-up files of its shell end it, say."""
    with pytest.raises(hostfile.HostsError, match=f"^a: .* printed '{said}' there"):
        hostfile.facts("a", ["sh", "-c", f"cat >/dev/null; {prints}"])


def test_what_a_host_prints_beside_its_facts_is_passed_over(hostfile):
    greets = f"printf 'h\\351llo\\n'; {sys.executable} -; echo bye"
    assert hostfile.facts("a", ["sh", "-c", greets])["directory"] is True


HERE = {
    "directory": True,
    "versions": {"Python": "3.11.7", "torch": "2.13.0"},
    "code": {"llmtrain/a.py": "1", "llmtrain/b.py": "2", "conf/c.yaml": "3"},
}


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ({}, ""),
        ({"versions": {"Python": "3.11.7", "torch": "2.12.1"}}, "torch 2.12.1, here 2.13.0"),
        ({"code": HERE["code"] | {"llmtrain/b.py": "9"}}, "other code than here in llmtrain/b.py"),
        (
            {"code": {"llmtrain/a.py": "1", "llmtrain/d.py": "4", "conf/c.yaml": "3"}},
            "other code than here in llmtrain/b.py and 1 more files",
        ),
        ({"code": {}}, f"no code of llmtrain in {LAUNCH.parent}"),
        ({"directory": False}, "no directory /"),
    ],
)
def test_what_differs_is_told(hostfile, there, says):
    told = hostfile.differences(HERE, HERE | there)
    assert told.startswith(says)
    assert bool(told) == bool(says)


def test_a_mistake_in_the_config_is_told_beside_one_of_the_hosts(hostfile, tmp_path, monkeypatch, capfd):
    def look(hosts: dict[str, int]) -> None:
        raise hostfile.HostsError("a cannot be reached")

    monkeypatch.setattr(hostfile, "look", look)
    monkeypatch.setattr(hostfile, "listen", list)
    monkeypatch.setattr(hostfile.shutil, "which", str)
    file = tmp_path / "hosts.txt"
    file.write_text("a slots=1")
    with pytest.raises(hostfile.HostsError, match="a cannot be reached"):
        hostfile.run(file, ["seq_lenn=3"])
    assert "seq_lenn" in capfd.readouterr().err


def test_slots_are_gpus_where_any_host_has_some(hostfile):
    assert hostfile.wrong_slots(8, 8, True) == hostfile.wrong_slots(4, 8, True) == ""
    assert hostfile.wrong_slots(2, 0, False) == ""  # ranks on CPUs
    assert hostfile.wrong_slots(8, 4, True) == "slots=8, but nvidia-smi lists 4 GPU(s)"
    assert hostfile.wrong_slots(1, 0, True) == "slots=1, but nvidia-smi lists 0 GPU(s)"


def test_gpus_that_torch_could_not_use_are_told(hostfile, monkeypatch):
    """As on nodes that share their home with a machine without a GPU, where the environment was made."""
    idle = {"versions": {"torch": "2.13.0+cpu"}, "gpus": 8}
    assert hostfile.wrong_torch(idle).startswith("torch 2.13.0+cpu cannot use its 8 GPU(s): LLMTRAIN_TORCH=")
    assert hostfile.wrong_torch({"versions": {"torch": "2.13.0+cu130"}, "gpus": 8}) == ""
    assert hostfile.wrong_torch({**idle, "gpus": 0}) == ""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert hostfile.wrong_torch(idle) == ""


def test_the_environment_that_ranks_get(hostfile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text("PROXY=a=b\nNCCL_DEBUG=WARN\n")
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n\n")
    same = ("WANDB_API_KEY", "https_proxy", "HTTP_PROXY", "no_proxy", "FI_PROVIDER", "TRITON_F32_DEFAULT")
    own = ("OTHER", "CUDA_VISIBLE_DEVICES", "TMPDIR", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR")
    own += ("TORCH_EXTENSIONS_DIR",)
    for name in ("MINE", "TRITON_CACHE_DIR", *same, *own):
        monkeypatch.setenv(name, f"{name} it's")
    monkeypatch.setenv("LLMTRAIN_EXPORT", "MINE TRITON_CACHE_DIR")
    found = hostfile.exported()
    assert found.items() >= {"PROXY": "a=b", "NCCL_DEBUG": "INFO", "MINE": "MINE it's"}.items()
    assert {name: found[name] for name in (*same, "TRITON_CACHE_DIR")} == {
        name: f"{name} it's" for name in (*same, "TRITON_CACHE_DIR")
    }
    assert not {*own, "HOME"} & found.keys()
    (tmp_path / ".deepspeed_env").write_text("A=1\nexport\n")
    with pytest.raises(hostfile.HostsError, match="line 2: must be KEY=VALUE"):
        hostfile.exported()


@pytest.mark.parametrize(
    ("codes", "asked", "code"),
    [
        ([], False, 0),
        ([85, 85], True, 85),
        ([85, 85], False, 85),  # time_limit
        ([1, 85], True, 85),  # a peer of one that was stopped may fail of it
        ([1, 85], False, 1),  # stopped because another one failed
        ([137, 1], False, 137),
        ([85, 78], False, 78),
        ([1, 86], False, 86),
        ([255, 86], False, 86),
        ([255, 85], False, 85),
        ([255], False, 1),
        ([130, 130], False, 130),
    ],
)
def test_one_exit_code_for_all_hosts(hostfile, codes, asked, code):
    assert hostfile.verdict(codes, asked, 0) == code


def test_pdsh_that_dies_is_no_success(hostfile):
    assert hostfile.verdict([], False, -9) == 137
