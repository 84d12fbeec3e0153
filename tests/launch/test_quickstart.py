"""The quickstart as a user starts it, whole: it learns, and its report says how much."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_quickstart_beats_the_unigram_model_by_its_context(tmp_path):
    environment = {**os.environ, "LLMTRAIN_SKIP_SETUP": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", str(LAUNCH / "quickstart.sh"), f"cache_dir={tmp_path}/cache"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "quickstart"
    assert (run / "DONE").exists()
    scores = json.loads((run / "eval" / "heldout.json").read_text())["all"]
    assert scores["bits_per_byte"] < 0.9 * scores["unigram_bits_per_byte"]
    assert scores["shuffled_bits_per_byte"] > 1.1 * scores["bits_per_byte"]
    report = (run / "report.html").read_text()
    for key in ("bits_per_byte", "unigram_bits_per_byte", "shuffled_bits_per_byte"):
        assert f"{scores[key]:.4f}" in report
    assert str(Path("runs/quickstart/report.html")) in done.stderr
    assert "prompt 1" in done.stderr
    ledger = json.loads((run / "data.json").read_text())["sources"]
    shares = {"code": 0.50, "docstrings": 0.35, "prose": 0.15}
    for name, asked in shares.items():
        assert abs(ledger[name]["share"] - asked) * 300 * 16 < 1  # windows
