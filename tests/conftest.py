"""What many tests share: warm ranks, real text, and a clean /dev/shm."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import RankServer

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A test that joins a process group leaves it, and nothing of DeepSpeed's to the next one.

    That is names in the environment, the linear layer that ZeRO-3 exchanges in torch for good, and Python's
    garbage collector, which an engine that nobody closed holds off.
    """
    before = dict(os.environ)
    yield
    if "llmtrain.distributed" in sys.modules and "torch.distributed" in sys.modules:
        sys.modules["llmtrain.distributed"].finalize()
        torch = sys.modules["torch"]
        torch.nn.functional.linear = torch._C._nn.linear
    if "deepspeed.runtime.python_gc" in sys.modules:
        manager = sys.modules["deepspeed.runtime.python_gc"].python_gc_manager
        while manager.active_engines:
            manager.release(manager._generation)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankServer]:
    """Forks ranks of `llmtrain.train`; see tests/ranks.py."""
    server = RankServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of real text from the standard library: `code/*.py` and `prose.jsonl`."""
    import json
    import pydoc_data.topics
    from importlib import import_module

    directory = tmp_path_factory.mktemp("corpus")
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


@pytest.fixture
def tiny(tmp_path: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run that takes seconds: bytes, two sources, a decoder of 0.1 M parameters."""
    cache = tmp_path_factory.getbasetemp() / "cache"
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
        "logger.progress=none",
        "scheduler.warmup_steps=4",
        f"cache_dir={cache}",
        f"output_dir={tmp_path}/run",
    ]
