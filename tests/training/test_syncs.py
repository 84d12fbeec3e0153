"""A step gives the device its work and waits for none of it: results are read a step later."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain import distributed
from llmtrain.benchmarks.step import BareLoop
from llmtrain.config.hydra import compose
from llmtrain.data.prepare import prepare
from llmtrain.distributed import World
from llmtrain.training.build import Run, build_run, open_run
from llmtrain.training.config import TrainConfig
from llmtrain.training.engine.transfer import PendingStep, Upload
from llmtrain.training.trainer import begin, finish, fit
from tests.training.test_engine import batch, build

READS = {
    f"aten::{name}"
    for name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2")
}
"""What makes the host wait for a number of a device."""


class HostReads(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What a graph does inside is not seen: a read would break it, and `fullgraph` allows no break."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = args[1] if func._schema.name == "aten::index" else ()
        by_mask = any(mask is not None and mask.dtype == torch.bool for mask in masks)
        self.count += by_mask or func._schema.name in READS
        return func(*args, **(kwargs or {}))


@contextmanager
def started(overrides: list[str]) -> Iterator[Run]:
    """A run in this process, before its first step."""
    config = compose(TrainConfig, [*overrides, "callbacks.sample.prompts=[]", "data.validation_fraction=0"])
    with closing(prepare(config.data, config.tokenizer, config.cache_dir)) as prepared:
        directory = open_run(config, World())
        distributed.initialize(World())
        run = build_run(config, World(), directory, prepared)
        begin(run)
        yield run
        finish(run)


def test_what_is_counted() -> None:
    x = torch.arange(3.0)
    with HostReads() as reads:
        _ = x.sum().item(), bool(x[1] > 0), float(x[2]), x.nonzero(), x[x > 1]
        x.add(1).mul_(2)
    assert reads.count == 5


@pytest.mark.parametrize(
    ("stage", "precision", "beside"),
    [
        (0, "fp32", []),
        (0, "bf16_autocast", []),
        (1, "bf16", []),
        (1, "fp32", []),
        (2, "bf16", []),
        (3, "bf16", []),
        (0, "fp32", ["data.documents=attend", "activation_checkpointing=true"]),
        (0, "fp32", ["data.packing=best_fit", "model/position=alibi", "z_loss=1e-4"]),
        (0, "fp32", ["profile.steps=3", "profile.from_step=4"]),
        pytest.param(0, "bf16_autocast", ["compile=true"], marks=pytest.mark.slow),
        pytest.param(3, "bf16", ["compile=true", "model/position=alibi"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_trainer_adds_no_host_read_to_those_of_deepspeed(
    tiny, stage: int, precision: str, beside: list[str]
) -> None:
    overrides = [*tiny, f"deepspeed=zero{stage}", f"precision={precision}", "max_steps=9", *beside]
    with started(overrides) as run:
        ours: list[int] = []
        give = run.engine.train_step

        def train_step(*arguments: Any, **keywords: Any) -> PendingStep:
            ours.append(reads.count)
            return give(*arguments, **keywords)

        run.engine.train_step = train_step  # type: ignore[method-assign]
        with HostReads() as reads:
            fit(run)
        bare = BareLoop(run)
        theirs = []
        with HostReads() as reads:
            for _ in range(5):
                bare.steps(1)
                theirs.append(reads.count)
    a_step = [after - before for before, after in pairwise(ours[2:])]
    assert a_step == [theirs[-1] - theirs[-2]] * 6  # each step of them writes its line, too
    assert a_step[0] == 0 or stage > 0
    assert (run.directory.path / "metrics.jsonl").read_text().count("\n") == 9


def test_a_step_is_read_after_the_next_is_given_except_where_something_is_due(tiny, monkeypatch) -> None:
    order: list[str] = []
    read = PendingStep.result

    def result(pending: PendingStep) -> Any:
        order.append(f"read {pending.number}")  # type: ignore[attr-defined]
        return read(pending)

    with started([*tiny, "deepspeed=zero0", "max_steps=8", "checkpoint.every=5", "log_every=3"]) as run:
        give = run.engine.train_step

        def train_step(*arguments: Any, **keywords: Any) -> PendingStep:
            pending = give(*arguments, **keywords)
            pending.number = run.step + 1  # type: ignore[attr-defined]
            order.append(f"give {run.step + 1}")
            return pending

        monkeypatch.setattr(PendingStep, "result", result)
        run.engine.train_step = train_step  # type: ignore[method-assign]
        fit(run)
    lines = [json.loads(line) for line in (run.directory.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 8]
    assert order == [
        "give 1", "give 2", "read 1", "give 3", "read 2", "give 4", "read 3", "give 5", "read 4", "read 5",
        "give 6", "give 7", "read 6", "give 8", "read 7", "read 8",
    ]  # fmt: skip


def test_a_stop_is_seen_a_step_later_and_ends_with_a_checkpoint(tiny) -> None:
    with started([*tiny, "deepspeed=zero0", "max_steps=9", "log_every=100"]) as run:
        give = run.engine.train_step

        def train_step(*arguments: Any, **keywords: Any) -> PendingStep:
            if run.step == 4:  # while step 5 is given
                run.stop._ask(signal.SIGTERM, "SIGTERM")
            return give(*arguments, **keywords)

        run.engine.train_step = train_step  # type: ignore[method-assign]
        fit(run)
    assert run.step == 7  # asked with step 6, which was read while 7 was on its way
    lines = [json.loads(line) for line in (run.directory.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [7]
    assert [path.name for path in (run.directory.path / "checkpoints").iterdir()] == ["step_00000007"]


def test_the_seconds_a_step_are_the_mean_over_the_steps_since_the_last_line(tiny, monkeypatch) -> None:
    import time

    with started([*tiny, "deepspeed=zero0", "max_steps=6", "log_every=3"]) as run:
        give = run.engine.train_step

        def train_step(*arguments: Any, **keywords: Any) -> PendingStep:
            time.sleep(0.3 if run.step in (1, 4) else 0.0)
            return give(*arguments, **keywords)

        run.engine.train_step = train_step  # type: ignore[method-assign]
        began = time.perf_counter()
        fit(run)
        spent = time.perf_counter() - began
    lines = [json.loads(line) for line in (run.directory.path / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["perf/step_seconds"] for line in lines]
    assert all(0.1 < second < spent / 3 for second in seconds)
    assert sum(seconds) * 3 <= spent


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast"])
@pytest.mark.parametrize("documents", [1, 2])
def test_a_step_of_stage_0_never_waits_for_the_gpu(tiny, documents, precision, compiles) -> None:
    _, engine = build([*tiny, "deepspeed=zero0", "seq_len=128", f"compile={compiles}"], precision)
    length = 128 // documents
    data = replace(
        batch(8, 128),
        cu_seqlens=torch.arange(8 * documents + 1, dtype=torch.int32) * length,
        position_ids=torch.arange(length, dtype=torch.int32).repeat(8, documents),
    )
    for _ in range(3):
        engine.train_step(data, lr=1e-3).result()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = [engine.train_step(data.pin_memory(), lr=1e-3) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(step.result().applied for step in pending)
    assert pending[1].done.seconds_since(pending[0].done) > 0
    engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_uploaded_rows_are_the_rows_however_long_the_device_takes_to_read_them() -> None:
    device = torch.device("cuda")
    upload, kept = Upload(device), []
    for step in range(50):
        data = batch(8, 1024)
        ids = data.input_ids + step
        parts = upload([type(data)(ids, *list(vars(data).values())[1:])])
        torch.cuda._sleep(1_000_000)
        kept.append((parts[0].input_ids.sum(), ids.sum()))
        del parts
    assert all(int(there) == int(here) for there, here in kept)
