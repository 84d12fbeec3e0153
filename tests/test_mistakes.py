"""Twenty mistakes a newcomer makes: each ends before any process group, in one line that names the key."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

MISTAKES: dict[str, tuple[list[str], str]] = {
    # what was done: (overrides on top of a run that works, what the one line must contain)
    "a typo in a key": (["model.d_modle=64"], "model.d_modle=64: no such key; did you mean model.d_model?"),
    "a typo with a plus": (["+model.n_layer=2"], "did you mean model.n_layers?"),
    "a typo at the root": (["max_step=5"], "max_step=5: no such key; did you mean max_steps?"),
    "a typo inside a source": (["+data.sources.prose.wieght=1"], "data.sources.prose.wieght"),
    "an unknown group": (["optimiser=adamw"], "did you mean optimizer?"),
    "an unknown option": (["model=tinny"], "did you mean tiny?"),
    "an unknown kind": (["scheduler.kind=cosin"], "did you mean cosine?"),
    "an unknown value": (["precision=bf32"], "precision=bf32"),
    "text for a number": (["seq_len=long"], "seq_len=long"),
    "a negative number": (["seq_len=-64"], "seq_len=-64"),
    "a fraction for a count": (["max_steps=1.5"], "max_steps=1.5"),
    "a list that is too short": (["optimizer.betas=[0.9]"], "optimizer.betas"),
    "heads that do not divide": (["model.n_kv_heads=3"], "model.n_kv_heads=3"),
    "a width that heads do not divide": (["model.d_model=66"], "d_model=66"),
    "a batch that micro batches do not divide": (["micro_batch_size=3"], "global_batch_size=8"),
    "a key that belongs elsewhere": (["+deepspeed.train_batch_size=8"], "global_batch_size"),
    "a combination that computes wrongly": (["deepspeed=zero0", "precision=bf16"], "precision=bf16"),
    "a file that is not there": (["data.sources.prose.path=nowhere/*.jsonl"], "data.sources.prose.path"),
    "a field that is not there": (["+data.sources.prose.text_key=body"], "body"),
    "weight and epochs mixed": (["+data.sources.prose.epochs=2"], "epochs"),
    "a value that was never set": (["tokenizer=huggingface"], "tokenizer.path"),
    "a checkpoint that is not there": (["resume=runs/nowhere"], "resume=runs/nowhere"),
    "a boundary that the shuffle cannot have": (["data.shuffle_span=0"], "data.shuffle_span=0"),
    "dashes": (["--max_steps=5"], "max_steps=5"),
}


def complaint(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("size", [1, 2])
def test_every_mistake_is_one_line_and_78(ranks, tiny, tmp_path, size):
    def directory(name: str) -> Path:
        return tmp_path / name.replace(" ", "-")

    jobs = {
        name: ranks.start([*tiny, f"output_dir={directory(name)}/run", *overrides], size, directory(name))
        for name, (overrides, _) in MISTAKES.items()
    }
    for name, job in jobs.items():
        assert job.wait() == [78] * size, (name, job.output())
        assert "Traceback" not in job.output(), name
        (line,) = [line for output in job.outputs for line in complaint(output.read_text())]
        assert MISTAKES[name][1] in line, name
        assert not (directory(name) / "run" / "metrics.jsonl").exists(), name


@pytest.mark.parametrize("name", ["a typo in a key", "an unknown option", "a file that is not there"])
def test_as_a_user_starts_it_it_takes_less_than_ten_seconds(tiny, tmp_path, name):
    overrides, expected = MISTAKES[name]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "llmtrain.train", *tiny, *overrides]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 78
    assert [expected in line for line in complaint(done.stderr)] == [True]
    # Processor time: what it takes on a machine that does nothing else.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
