"""The ranks of `llmtrain bench save`: one engine, and every way to save its state in turn.

python -m llmtrain.benchmarks.save_turns <directory> <megabytes> <stage> <rounds>      in each rank
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmtrain import distributed
from llmtrain.benchmarks.measure import Result, interleaved
from llmtrain.config.hydra import compose
from llmtrain.data.batch import Batch
from llmtrain.distributed import World
from llmtrain.files import sync
from llmtrain.training.build import build_model_engine
from llmtrain.training.checkpoint import CheckpointConfig, Failed, Saver
from llmtrain.training.checkpoint.saving import named_tensors
from llmtrain.training.config import TrainConfig
from llmtrain.training.engine.engine import Engine

BYTES_PER_PARAMETER = 12
"""fp32 weights and two moments."""
CHUNK = 8 << 20
VOCABULARY, LENGTH = 258, 16
RESULT = "result.json"

Finish = Callable[[], object]


def shape(megabytes: int) -> list[str]:
    """A decoder whose checkpoint takes about so many MB."""
    width = 256 if megabytes < 100 else 512
    layer = 4 * width**2 + 3 * width * 4 * width
    layers = max(1, round(megabytes * 1e6 / BYTES_PER_PARAMETER / layer))
    return [
        *(f"model.d_model={width}", f"model.n_layers={layers}", f"model.d_ff={4 * width}"),
        *("model.n_heads=4", "model.n_kv_heads=4"),
    ]


def build(world: World, megabytes: int, stage: int) -> Engine:
    """An engine after one step, so that the optimizer has its moments."""
    config = compose(
        TrainConfig,
        [
            *shape(megabytes),
            *("tokenizer=bytes", f"seq_len={LENGTH}", "precision=bf16", f"deepspeed=zero{stage}"),
            *("micro_batch_size=1", f"global_batch_size={world.world_size}"),
        ],
    )
    engine = build_model_engine(config, world, VOCABULARY, 1, "bf16")
    ids = torch.arange(LENGTH + 1, dtype=torch.int32)[None] % VOCABULARY
    batch = Batch(
        input_ids=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        position_ids=torch.arange(LENGTH, dtype=torch.int32)[None],
        cu_seqlens=torch.tensor([0, LENGTH], dtype=torch.int32),
        source_ids=torch.zeros(1, dtype=torch.int32),
    )
    engine.train_step(batch, lr=1e-3).result()
    gc.collect()
    gc.freeze()  # as a run does before its first step
    return engine


class Ways:
    """Every way to save, below one directory. Each is collective; what it returns waits until all is done."""

    def __init__(self, engine: Engine, world: World, directory: Path) -> None:
        self._engine, self._world, self._directory = engine, world, directory
        self._step = 0
        self._synchronous, self._background = self._saver(False), self._saver(True)

    def verified(self) -> Finish:
        """Ours: hashed, durable and published when it returns."""
        self._save(self._synchronous)
        return self._synchronous.join

    def asynchronous(self) -> Finish:
        """Ours, in the background."""
        self._save(self._background)
        return self._background.join

    def stock(self) -> Finish:
        """DeepSpeed's own, with `latest`; what it wrote may still be in the page cache only."""
        self._engine.deepspeed.save_checkpoint(str(self._directory), tag="state")
        return distributed.barrier

    def stock_durable(self) -> Finish:
        """DeepSpeed's own, and fsync of its files and directories."""
        self.stock()
        for path in [*self._directory.rglob("*"), self._directory]:
            sync(path)
        return distributed.barrier

    def raw(self) -> Finish:
        """The same bytes as ours, in one file a rank, and fsync."""
        with (self._directory / f"raw{self._world.rank}").open("xb") as stream:
            for tensor in named_tensors(self._engine.state()).values():
                content = tensor.cpu().contiguous().view(torch.uint8).numpy().data
                for start in range(0, len(content), CHUNK):
                    stream.write(content[start : start + CHUNK])
            stream.flush()
            os.fsync(stream.fileno())
        return distributed.barrier

    def _saver(self, asynchronous: bool) -> Saver:
        config = CheckpointConfig(every=1, keep=2, keep_every=None, asynchronous=asynchronous)
        return Saver(
            self._directory, config, self._world, on_saved=lambda saved: None, on_failed=_raise_failed
        )

    def _save(self, saver: Saver) -> None:
        self._step += 1
        saver.save(self._engine.state(), {"step": self._step, "world_size": self._world.world_size})


def _raise_failed(failed: Failed) -> None:
    raise OSError(str(failed))


def turn(way: Callable[[], Finish], directory: Path, world: World) -> Result:
    """Seconds of standstill and until all is done, the slowest rank's, and the MB that were written."""
    if world.is_main:
        shutil.rmtree(directory, ignore_errors=True)  # with the pages that a turn before left dirty
        directory.mkdir()
    distributed.barrier()
    began = time.perf_counter()
    finish = way()
    stall = time.perf_counter() - began
    finish()
    total = time.perf_counter() - began
    times = distributed.gather_objects((stall, total))
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    distributed.barrier()
    return {"stall_s": max(t[0] for t in times), "total_s": max(t[1] for t in times), "mb": size / 1e6}


def measure(world: World, directory: Path, megabytes: int, stage: int, rounds: int) -> dict[str, Any]:
    """The turns of every way, in the order A B C ... C B A; one round before them is not counted."""
    torch.set_num_threads(1)
    place = directory / "saves"
    engine = build(world, megabytes, stage)
    ways = Ways(engine, world, place)
    names = ("raw", "verified", "asynchronous", "stock_durable", "stock")
    turns = {name: partial(turn, getattr(ways, name), place, world) for name in names}
    interleaved(turns, 1)
    found = interleaved(turns, rounds)
    parameters = engine.model.parameter_count
    engine.close()
    return {"parameters": parameters, "ways": found}


def main(directory: str, megabytes: str, stage: str, rounds: str) -> None:
    """Rank 0 writes what was measured."""
    world = World.from_environment()
    distributed.initialize(world)
    found = measure(world, Path(directory), int(megabytes), int(stage), int(rounds))
    if world.is_main:
        (Path(directory) / RESULT).write_text(json.dumps(found))
    distributed.finalize()


if __name__ == "__main__":
    main(*sys.argv[1:])
