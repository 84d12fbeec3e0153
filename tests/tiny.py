"""The run that most tests train: two sources of real text, and a decoder of 0.1 M parameters."""

from __future__ import annotations

import json
import pydoc_data.topics
from importlib import import_module
from pathlib import Path


def write_corpus(directory: Path) -> Path:
    """Write text of the standard library as `code/*.py` and `prose.jsonl`; returns the directory."""
    (directory / "code").mkdir()
    for name in ("json.decoder", "textwrap", "heapq", "bisect", "string"):
        source = Path(import_module(name).__file__ or "").read_text()
        (directory / "code" / f"{name}.py").write_text(source)
    with (directory / "prose.jsonl").open("w") as file:
        for title, text in list(pydoc_data.topics.topics.items())[:20]:
            file.write(json.dumps({"text": text, "title": title}) + "\n")
            for word in text.split()[:15]:  # short documents: rows differ in how many targets they have
                file.write(json.dumps({"text": word, "title": title}) + "\n")
    return directory


def tiny_run(corpus: Path, cache: Path, output: Path) -> list[str]:
    """Overrides of a run over `write_corpus` that takes seconds."""
    return [
        "tokenizer=bytes",
        "data=files",
        "~data.sources.text",
        f"+data.sources.code.path={corpus}/code/*.py",
        "+data.sources.code.format=text",
        "+data.sources.code.weight=0.7",
        f"+data.sources.prose.path={corpus}/prose.jsonl",
        "+data.sources.prose.weight=0.3",
        "model.d_model=64",
        "model.n_layers=2",
        "model.n_heads=4",
        "model.n_kv_heads=1",
        "model.d_ff=128",
        "seq_len=64",
        "max_steps=12",
        "global_batch_size=8",
        "micro_batch_size=2",
        "precision=fp32",
        "log_every=1",
        "callbacks.evaluation.every=0",
        "callbacks.sample.every=0",
        "callbacks.sample.max_new_tokens=4",
        "logger.progress=none",
        "scheduler.warmup_steps=4",
        f"cache_dir={cache}",
        f"output_dir={output}",
    ]
