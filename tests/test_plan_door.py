"""`llmtrain plan` as a user calls it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.distributed import fast_bf16_cpu
from llmtrain.plan import main

ROOT = Path(__file__).parents[1]
GPT3 = [  # billions of tokens and weights of Brown et al. 2020, table 2.2, and the epochs that follow
    ("common_crawl", "410B", "0.6", "59.41%", "178B", "0.43"),
    ("webtext2", "19.0B", "0.22", "21.78%", "65.3B", "3.44"),
    ("books1", "12.0B", "0.08", "7.92%", "23.8B", "1.98"),
    ("books2", "55.0B", "0.08", "7.92%", "23.8B", "0.43"),
    ("wikipedia", "3.00B", "0.03", "2.97%", "8.91B", "2.97"),
]


def rows(text: str) -> list[tuple[str, ...]]:
    """The cells of the printed table, without its frame."""
    found = [
        re.split(r"\s*[│┃|]\s*", line.strip("│┃| ")) for line in text.splitlines() if re.search("[│|]", line)
    ]
    return [tuple(cell.strip() for cell in cells) for cells in found]


def test_gpt3_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmtrain", "plan", "data=gpt3", f"output_dir={tmp_path}/run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [row[:6] for row in rows(done.stdout)[: len(GPT3)]] == GPT3
    assert "sum to 1.01" in done.stdout and "webtext2 3.47" in done.stdout
    assert "3.15M tokens a step" in done.stdout and "hold 499B tokens" in done.stdout
    assert str(tmp_path / "run" / "report.html") in done.stdout.replace("\n", "")
    said = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert said["config"]["seq_len"] == 2048 and said["config"]["data"]["sources"]["books1"]["weight"] == 0.08
    assert said["run"]["tokens"] == 95367 * 1536 * 2048
    assert said["sources"]["webtext2"]["epochs"] == pytest.approx(0.22 / 1.01 * said["run"]["tokens"] / 19e9)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["plan.json", "report.html"]
    assert not (tmp_path / ".cache").exists(), "bare sizes need no tokenizer"


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_report_of_a_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "report.html").write_text("the run's")
    code, out, _ = call(capsys, "data=gpt3", f"output_dir={tmp_path}")
    assert code == 0 and "plan.html" in out
    assert (tmp_path / "report.html").read_text() == "the run's"
    assert "<title>run" in (tmp_path / "plan.html").read_text()


def test_json_is_what_is_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "data=gpt3", f"output_dir={tmp_path}", "format=json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "plan.json").read_text())


@pytest.mark.parametrize("helper", ["proportional", "temperature", "unimax"])
def test_a_helper_prints_weights_that_can_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], helper: str
) -> None:
    code, out, _ = call(capsys, "data=gpt3", f"output_dir={tmp_path}/a", f"weights={helper}", "max_epochs=2")
    assert code == 0
    planned = json.loads((tmp_path / "a" / "plan.json").read_text())["sources"]
    printed = out[out.index("data:\n") : out.index("\n\n", out.index("data:\n"))]
    weights = {name: source["weight"] for name, source in yaml.safe_load(printed)["data"]["sources"].items()}
    assert weights == {name: source["weight"] for name, source in planned.items()}
    copied = [f"data.sources.{name}.weight={weight}" for name, weight in weights.items()]
    assert call(capsys, "data=gpt3", f"output_dir={tmp_path}/b", *copied)[0] == 0
    again = json.loads((tmp_path / "b" / "plan.json").read_text())["sources"]
    assert again == planned
    if helper == "unimax":
        assert max(source["epochs"] for source in planned.values()) == pytest.approx(2, rel=1e-2)
    if helper == "proportional":
        assert {round(source["epochs"], 2) for source in planned.values()} == {0.6}


def test_the_page_has_the_helpers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "data=gpt3", f"output_dir={tmp_path}", "temperature=2.5")
    page = (tmp_path / "report.html").read_text()
    for label in ("Proportional", "Temperature 2.5", "UniMax, 4 epochs at most"):
        assert f'"{label}"' in page


def sources_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "plan.json").read_text())["sources"]


def test_raw_text_is_estimated_and_prepared_text_is_counted(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmtrain.prepare import main as prepare

    cold = [f"cache_dir={tmp_path}/cache"]
    code, out, _ = call(capsys, *tiny, *cold)
    assert code == 0
    assert rows(out)[0][1].startswith("~") and re.search(r"^~ prose: .* in a sample", out, re.M)
    estimated = sources_of(tmp_path / "run")
    assert prepare([*tiny, *cold]) == 0
    capsys.readouterr()
    code, out, _ = call(capsys, *tiny, *cold)
    assert code == 0 and "~" not in out
    exact = sources_of(tmp_path / "run")
    for name in ("code", "prose"):
        assert exact[name]["exact"] and exact[name]["how"] == "prepared" and not estimated[name]["exact"]
        # few documents: which of them are held out weighs more than the sample
        assert estimated[name]["size"] == pytest.approx(exact[name]["size"], rel=0.1)
        assert estimated[name]["windows"] == exact[name]["windows"]


def test_stages_and_skipped_steps_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(
        capsys, "data=gpt3", f"output_dir={tmp_path}", "max_steps=100", "data.skip=[[11,20]]",
        "data.stages=[{from_step: 91, weights: {wikipedia: 1, books1: 3}}]",
    )  # fmt: skip
    assert code == 0
    assert "from step 91 on:" in out and "wikipedia 25.00%" in out and "books1 75.00%" in out
    assert "data.skip leaves out 31.5M tokens" in out
    wikipedia = sources_of(tmp_path)["wikipedia"]
    assert wikipedia["windows"] == pytest.approx(1536 * (80 * 0.03 / 1.01 + 20 * 0.25), abs=3)


def test_warnings_are_lines_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "data=gpt3", f"output_dir={tmp_path}", "data.sources.wikipedia.weight=1")
    assert code == 0
    assert re.search(r"^! wikipedia: 50\.\d epochs, far above 16", out, re.M)
    assert [row[0] for row in rows(out) if row[-1] == "!"] == ["wikipedia"]


def test_the_cost_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["model=7b", "hardware=h100_80gb", "gpus=8", "tokenizer.vocab_size=50257"]
    code, out, _ = call(capsys, "data=gpt3", f"output_dir={tmp_path}", *model)
    assert code == 0
    table = {(row[0], row[1]): row for row in rows(out)[len(GPT3) :]}
    assert len(table) == 1 + 6 * 2
    assert table["zero0", "no"][-1] == table["zero0", "yes"][-1] == "x"
    assert [row[0] for row in table.values() if row[-1] == "*"] == ["zero3"]  # more rows fit
    assert "6,887,976,960 parameters, 411,705,344 of them in embedding tables" in out
    said = json.loads((tmp_path / "plan.json").read_text())["sizing"]
    overrides = re.search(r"^cheapest that fits: .*: (deepspeed=.*)$", out, re.M)
    assert overrides and overrides[1] == said["cheapest"]["overrides"]
    assert said["flops_per_token"] == 6 * 6_887_976_960 + 12 * 32 * 4096 * 2048
    assert said["flops_per_token_causal"] == 6 * 6_887_976_960 + 6 * 32 * 4096 * 2048
    tokens = 95367 * 1536 * 2048
    seconds = tokens / said["cheapest"]["seconds"]["tokens_per_second"]
    assert said["cheapest"]["days"] == pytest.approx(seconds / 86400)
    assert said["cheapest"]["gpu_hours"] == pytest.approx(seconds / 3600 * 8)
    parts = said["configured"]["memory"]
    assert parts["total"] == sum(size for key, size in parts.items() if key not in ("host", "total"))


def test_without_a_device_there_is_memory_but_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "data=gpt3", f"output_dir={tmp_path}", "hardware=cpu")
    assert code == 0
    assert "memory of hardware=cpu is not known: set hardware.memory_gib" in out
    assert "no time predicted: hardware=cpu has no bf16_tflops, memory_gbps" in out
    said = json.loads((tmp_path / "plan.json").read_text())["sizing"]
    assert said["cheapest"] is None and said["configured"]["seconds"] is None
    assert said["configured"]["memory"]["weights"] > 0


def test_deepspeed_is_not_imported_for_a_plan(tmp_path: Path) -> None:
    code = (
        "import sys; from llmtrain.plan import main; "
        f"main(['data=gpt3', 'model=70b', 'output_dir={tmp_path}', 'hardware=h200', 'gpus=64']); "
        "most = int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); "  # exec keeps ru_maxrss
        "print([name for name in ('deepspeed', 'transformers') if name in sys.modules], "
        "most < 2**20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] True", done.stdout[-300:]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["weights=uniform"], "weights=uniform: must be one of given, proportional, temperature, unimax"),
        (["data.sources.books1.tokens=null"], "give path (where the text is), or tokens alone"),
        (["temperature=0"], "temperature=0: must be greater than 0"),
        (
            ["data.sources.books1.path=nowhere.jsonl", "data.sources.books1.tokens=null"],
            "nowhere.jsonl: no file matches",
        ),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    code, out, err = call(capsys, "data=gpt3", f"output_dir={tmp_path}/run", *words)
    assert code == 78 and out == ""
    assert line in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_help_and_config_of_the_door() -> None:
    def llm(*words: str) -> str:
        command = [sys.executable, "-m", "llmtrain", "plan", *words]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
        ).stdout

    assert "Usage: llmtrain plan" in llm("--help")
    shown = yaml.safe_load(llm("--cfg", "job"))
    assert shown["weights"] == "given" and shown["max_steps"] == 1000


def test_a_batch_that_does_not_divide_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch = ["global_batch_size=32", "micro_batch_size=8", "hardware=h100_80gb", "gpus=8", "model=124m"]
    code, out, _ = call(capsys, "data=gpt3", *batch, f"output_dir={tmp_path}")
    assert code == 0
    assert "! as configured it does not start: global_batch_size=32 is not a multiple of 8 devices x" in out
    assert "cheapest that fits: " in out and "\nas configured: " not in out
    said = json.loads((tmp_path / "plan.json").read_text())["sizing"]
    assert said["configured"]["seconds"] is None and said["configured"]["days"] is None


def test_the_plan_of_a_processor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "data=gpt3", "hardware=cpu", "micro_batch_size=2", "format=json", f"output_dir={tmp_path}"
    code, out, _ = call(capsys, *words)
    assert code == 0
    expected = "bf16_autocast" if fast_bf16_cpu() else "fp32"
    assert json.loads(out)["sizing"]["configured"]["precision"] == expected
