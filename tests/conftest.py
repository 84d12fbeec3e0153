"""What many tests share: warm ranks, real text, and a clean /dev/shm."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.ranks import RankServer
from tests.tiny import tiny_run, write_corpus
from tests.turns import turn

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")


# A busy machine is no fault of what is tested, and the same commit has the same answer each time.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that a run takes over, and leaves ignored: children would inherit that."""


def pytest_collection_finish() -> None:
    """Every engine that is built collects garbage: what is here by now need not be looked through again."""
    gc.freeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Where pytest-xdist runs tests side by side, none of them runs beside one marked `quiet`."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    together = Path(item.config.option.basetemp).parent
    with turn(together, quiet=item.get_closest_marker("quiet") is not None):
        return (yield)


@pytest.fixture(autouse=True)
def alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that joins a process group leaves it, and nothing of DeepSpeed's or a door's to the next one.

    That is ranks that still run, names in the environment, what becomes of signals and of the log, the linear
    layer that ZeRO-3 exchanges in torch for good, and Python's garbage collector, which an engine that nobody
    closed holds off.
    """
    log, level = logging.getLogger("llmtrain"), logging.getLogger("llmtrain").level
    formatters = {one: one.formatter for one in logging.getLogger().handlers}
    before, handlers = dict(os.environ), {number: signal.getsignal(number) for number in STOPS}
    yield
    for fixture in request.node.funcargs.values():
        if isinstance(fixture, RankServer):
            fixture.end()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)
    log.setLevel(level)
    for one, formatter in formatters.items():
        one.setFormatter(formatter)
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
def cpu_ranks(ranks: RankServer) -> Iterator[RankServer]:
    """The same on the CPU, whatever the machine has."""
    if ranks.cpu:
        yield ranks
        return
    server = RankServer(cpu=True)
    yield server
    server.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of real text from the standard library: `code/*.py` and `prose.jsonl`."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def tiny(tmp_path: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run that takes seconds: bytes, two sources, a decoder of 0.1 M parameters."""
    return tiny_run(corpus, tmp_path_factory.getbasetemp() / "cache", tmp_path / "run")
