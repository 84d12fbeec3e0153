"""docs/extending.md: a package outside of llmtrain brings parts of every kind."""

from __future__ import annotations

import csv
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

from llmtrain.cli import main as llmtrain
from llmtrain.config import UserError
from llmtrain.model.documents import Documents
from llmtrain.model.kernels import Shape, eager
from tests.ranks import PATCH

REPOSITORY = Path(__file__).parents[1]
EXAMPLE = REPOSITORY / "docs" / "examples" / "extend"
PAGE = (REPOSITORY / "docs" / "extending.md").read_text()
SMALL = [
    "max_steps=4",
    "seq_len=32",
    "global_batch_size=4",
    "micro_batch_size=2",
    "log_every=1",
    "precision=fp32",
    "model.d_model=32",
    "model.d_ff=64",
    "callbacks.sample.prompts=[]",
    "callbacks.evaluation.documents=2",
    "logger.progress=lines",
]


def importable() -> None:
    """Let this process import the package."""
    sys.path.insert(0, str(EXAMPLE))


def broken_disk() -> None:
    """As `importable`; the logger's file takes nothing."""
    importable()
    from my_parts import logger  # type: ignore[import-not-found]

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    logger.Csv.log = refuse


@pytest.fixture
def posts(tmp_path, monkeypatch) -> Path:
    """A directory with the database of the page."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLE / "make_posts.py"))
    return tmp_path


def words() -> list[str]:
    """Those of the page's run."""
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE.replace("\\\n", ""), re.S)
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert lines[0] == ["python", "docs/examples/extend/make_posts.py"]
    assert lines[1] == ["export", "PYTHONPATH=docs/examples/extend"]
    assert lines[2][:2] == ["llmtrain", "train"]
    return [str(REPOSITORY / word) if word.startswith("docs/") else word for word in lines[2][2:]]


def test_every_part_of_another_package_is_used(ranks, posts, monkeypatch, capsys):
    env = {PATCH: "tests.test_extending:importable"}
    output = ranks.run([*words(), *SMALL], 2, posts, env).output()
    run = posts / "runs" / "extended"
    assert "attention einsum (as asked)" in output
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert ["entropy" in line for line in metrics] == [False, True, False, True]
    rows = list(csv.reader((run / "losses.csv").open()))
    assert rows == [
        [str(line["step"]), str(line["train/loss"]), str(line.get("entropy", ""))] for line in metrics
    ]
    came = json.loads((run / "data.json").read_text())["sources"]["posts"]["input"]
    assert (came["documents"], came["rejected"]) == (79, {})
    record = next((run / "checkpoints").glob("*/checkpoint.json")).read_text()
    assert '"momentum_buffer"' in record, "the optimizer is the example's"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["position"] == {"_target_": "my_parts.position.SinusoidalConfig", "base": 10000.0}

    ranks.run([*words(), *SMALL, "max_steps=5"], 1, posts, env)  # goes on, under another number of ranks
    assert len((run / "losses.csv").read_text().splitlines()) == 5
    monkeypatch.syspath_prepend(EXAMPLE)
    assert llmtrain(["where", str(run), "step=1", "row=1"]) == 0
    assert "posts.db:1" in capsys.readouterr().out


def test_a_logger_that_fails_is_one_warning(ranks, posts):
    job = ranks.run([*words(), *SMALL], 1, posts, {PATCH: "tests.test_extending:broken_disk"})
    assert job.output().count("logger.extra.csv is off") == 1
    assert len((posts / "runs/extended/metrics.jsonl").read_text().splitlines()) == 4


def test_the_kernel_is_the_function_that_all_are(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    from my_parts.attention import EinsumConfig

    kernel = EinsumConfig().kernel(Shape(8, slopes=False))
    q, k, v = (torch.randn(2, 6, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    documents = Documents(2, 6, torch.tensor([0, 4, 6, 12]), q.device)
    out = kernel.attend(q, k, v, kernel.prepare(documents, None, q.dtype))
    reference = eager.attend(q, k, v, eager.prepare(documents, None, q.dtype))
    torch.testing.assert_close(out, reference, rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="ALiBi"):
        EinsumConfig().kernel(Shape(8, slopes=True))


def test_text_that_changes_is_prepared_anew_and_a_weight_is_none(posts, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    from my_parts.source import SqliteConfig

    from llmtrain.data.readers import fingerprint

    keys = {"path": "posts.db", "table": "posts", "column": "text"}
    before = fingerprint(SqliteConfig(**keys, weight=1))
    assert fingerprint(SqliteConfig(**keys, weight=2)) == before
    assert fingerprint(SqliteConfig(**{**keys, "column": "upper(text)"}, weight=1)) != before
    runpy.run_path(str(EXAMPLE / "make_posts.py"))
    assert fingerprint(SqliteConfig(**keys, weight=1)) != before


def test_a_source_that_is_not_there_is_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    assert llmtrain(["train", *words(), "precision=fp32"]) == 78
    err = capfd.readouterr().err
    assert "error: data.sources.posts.path=posts.db: no such database" in err
    assert "Traceback" not in err
