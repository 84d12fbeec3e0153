"""The console script, and the door that answers launch scripts."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import llmtrain
from llmtrain import ranks
from llmtrain.cli import doors, main

ROOT = Path(__file__).parents[1]


def llm(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmtrain", *words], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_the_list_has_every_door_with_a_sentence() -> None:
    listed = llm()
    assert listed.returncode == 0
    assert listed.stderr == ""
    for name, sentence in doors().items():
        assert len(sentence) > 20
        assert f"{name} " in listed.stdout
        assert sentence in listed.stdout
    assert {"train", "ranks"} <= set(doors())
    assert not {"cli", "distributed", "__main__", "__init__"} & set(doors())


@pytest.mark.parametrize("name", doors())
def test_every_door_has_the_same_shape(name: str) -> None:
    source = (Path(llmtrain.__file__).parent / f"{name}.py").read_text()
    assert source.rstrip().endswith('if __name__ == "__main__":\n    raise SystemExit(main())')
    assert len(source.splitlines()) < 120


def test_listing_imports_no_door() -> None:
    code = "import sys; from llmtrain.cli import main; main([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("number", "line"),
    [(signal.SIGINT, "error: interrupted\n"), (signal.SIGTERM, "error: stopped by SIGTERM\n")],
)
def test_a_signal_while_libraries_are_imported_is_one_line(number: signal.Signals, line: str) -> None:
    code = (
        "import os, sys, time, types\n"
        "from llmtrain import cli\n"
        f"slow = lambda name: os.kill(os.getpid(), {number}) or time.sleep(60)\n"
        "cli.importlib = types.SimpleNamespace(import_module=slow)\n"
        "sys.exit(cli.main(['train']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stderr) == (128 + number, line)
    heavy = "import sys, llmtrain.cli; sys.exit('pydantic' in sys.modules)"  # before the signals are heard
    assert subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, timeout=120).returncode == 0


def test_an_unknown_door_is_one_line() -> None:
    done = llm("trian")
    assert done.returncode == 78
    assert done.stderr.startswith("error: trian: no such door; there are ")
    assert done.stderr.endswith("; did you mean train?\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", doors())
def test_a_word_that_no_door_knows_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([name, "--stepp"])
    except SystemExit as end:
        code = end.code
    (line,) = capsys.readouterr().err.splitlines()
    assert (code, line[:7]) == (78, "error: ")
    assert "--help" in line


def test_a_door_gets_the_rest_of_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []
    door = importlib.import_module("llmtrain.ranks")
    monkeypatch.setattr(door, "main", lambda argv: seen.append(argv) or 87)
    assert main(["ranks", "a=1", "--cfg", "job"]) == 87
    assert seen == [["a=1", "--cfg", "job"]]
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("llmtrain ")


@pytest.mark.parametrize(
    ("gpus", "batch", "micro", "number", "reason"),
    [
        (0, 32, 8, "1", "no GPU is visible"),
        (4, 32, 8, "4", "one for each visible GPU"),
        (3, 32, 8, "2", "2 of 3 visible GPUs: the most that share global_batch_size=32"),
        (8, 32, 8, "4", "8 with micro_batch_size=4"),
    ],
)
def test_ranks_prints_a_number_and_says_why(
    gpus: int,
    batch: int,
    micro: int,
    number: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(ranks, "visible_accelerators", lambda: gpus)
    assert ranks.main([f"global_batch_size={batch}", f"micro_batch_size={micro}"]) == 0
    assert capsys.readouterr().out == f"{number}\n"
    assert reason in caplog.text


def test_a_mistake_ends_in_the_ranks_door_with_an_empty_answer() -> None:
    done = llm("ranks", "seq_len=long", "sede=3")
    assert done.returncode == 78
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: seq_len=long: must be a valid integer",
        "error: sede=3: no such key; did you mean seed?",
    ]
