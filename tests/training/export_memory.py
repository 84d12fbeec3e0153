"""How much memory an export takes, beside the size of what it writes: python -m tests.training.export_memory.

Writes a checkpoint of a run that never was, exports it, and reads the export back, each in a process of its
own. What is counted is memory of the process's own: pages of mapped files can be dropped.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch

from llmtrain.config.hydra import compose
from llmtrain.model import DecoderConfig
from llmtrain.model.huggingface import Pretrained, write_pretrained
from llmtrain.model.huggingface.reading import Weights
from llmtrain.training.checkpoint import CheckpointWeights
from llmtrain.training.config import TrainConfig
from llmtrain.training.engine.state import EngineState, Piece
from tests.training.checkpoint.small import record, saver

VOCABULARY, SEQ_LEN, SHARD_GB = 50257, 1024, 0.25


def decoder_config() -> DecoderConfig:
    """0.35 billion parameters."""
    return compose(TrainConfig, ["model=350m"]).model


def write_checkpoint(directory: Path) -> float:
    """A checkpoint as a run writes it, with one moment; returns the GB of the fp32 weights."""
    with torch.device("meta"):
        model = decoder_config().assemble(vocab_size=VOCABULARY, seq_len=SEQ_LEN)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    pieces = [
        Piece(name, 0, {"weight": torch.rand(prod(shape)), "exp_avg": torch.rand(prod(shape))})
        for name, shape in shapes.items()
    ]
    saver(directory).save(EngineState(pieces, shapes, {}), record(1))
    return 4 * sum(map(prod, shapes.values())) / 1e9


def export(directory: Path) -> None:
    write_pretrained(
        directory / "exported",
        decoder_config(),
        CheckpointWeights(directory / "step_00000001"),
        vocab_size=VOCABULARY,
        seq_len=SEQ_LEN,
        bos_id=None,
        eos_id=None,
        dtype=torch.float32,
        max_shard_gb=SHARD_GB,
    )


def read(directory: Path) -> None:
    found = Pretrained.open(directory / "exported")
    config = DecoderConfig.model_validate({**found.shape, "attention": decoder_config().attention})
    with torch.device("meta"):
        model = config.assemble(vocab_size=VOCABULARY, seq_len=SEQ_LEN)
    weights = Weights(directory / "exported", config, VOCABULARY)
    for name, _ in model.named_parameters():
        weights[name].sum()


def measured(work: Callable[[Path], None], directory: Path, say: Callable[[float], None]) -> None:
    """Tell the GB by which the process's own memory grew at most during `work`."""
    peak, done = [own_memory()], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak.append(max(peak.pop(), own_memory()))
            time.sleep(0.002)

    import deepspeed  # noqa: F401
    import transformers  # noqa: F401

    start = own_memory()
    watcher = threading.Thread(target=watch)
    watcher.start()
    work(directory)
    done.set()
    watcher.join()
    say((peak[0] - start) / 1e6)


def own_memory() -> int:
    """kB of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def main() -> None:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        whole = write_checkpoint(directory)
        sys.stdout.write(f"weights {whole:.2f} GB, shards of at most {SHARD_GB} GB\n")
        for work in (export, read):
            answers = spawn.SimpleQueue()
            process = spawn.Process(target=measured, args=(work, directory, answers.put))
            process.start()
            process.join()
            sys.stdout.write(f"{work.__name__}: {answers.get():.2f} GB at most\n")


if __name__ == "__main__":
    main()
