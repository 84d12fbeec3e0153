"""What the trainer costs the host: its processor time a step beside that of DeepSpeed's own loop."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from llmtrain.benchmarks.measure import Result, Station, markdown
from llmtrain.training import callbacks
from llmtrain.training.build import Run

STAGES = (0, 1, 2, 3)
TENSORS = 171
"""Parameters of the model: six a block, the embedding, the head and its norm."""
SHAPE = [
    *("model.d_model=32", "model.n_layers=28", "model.n_heads=2", "model.n_kv_heads=1", "model.d_ff=32"),
    *("model.tie_embeddings=false", "seq_len=32", "global_batch_size=2", "micro_batch_size=2"),
    *("tokenizer=bytes", "precision=fp32", "logger.progress=none"),
    *("callbacks.evaluation.every=0", "callbacks.sample.every=0", "callbacks.sample.prompts=[]"),
    *("data.validation_fraction=0", "checkpoint.every=1000000"),
]


class BareLoop:
    """Forward, backward and step of the run's own engine, as DeepSpeed's tutorial has them.

    A second engine would be as much DeepSpeed's, but lie elsewhere in memory: that alone is a percent or two.
    """

    def __init__(self, run: Run, batches: int = 8) -> None:
        config = run.config
        self._engine = run.engine.deepspeed
        self._clipping = config.optimizer.gradient_clipping
        rows = [run.dataset.rows(step, 0, config.global_batch_size) for step in range(1, batches + 1)]
        self._batches = cycle([batch.to(run.engine.device).split(config.micro_batch_size) for batch in rows])

    def steps(self, count: int) -> None:
        """Optimizer steps on rows that are there already."""
        config, optimizer = self._engine._config, self._engine.optimizer
        # Under stage 0 our engine clips, by what the fused optimizer divides by; here DeepSpeed has to.
        before, config.gradient_clipping = config.gradient_clipping, self._clipping
        optimizer.grad_scale = optimizer.found_inf = None
        for _ in range(count):
            for part in next(self._batches):
                losses = self._engine(part.input_ids, part.labels, part.position_ids, part.cu_seqlens)
                self._engine.backward(losses.total / part.labels.numel())
                self._engine.step()
        config.gradient_clipping = before


class Turns(callbacks.Callback):
    """A callback that lets the bare loop run as many steps, in the middle of a run, as the run just did."""

    def __init__(self, bare: BareLoop, every: int, warm_up: int) -> None:
        self._bare, self._every, self._warm_up = bare, every, warm_up
        self._since = 0.0
        self.pairs: list[tuple[float, float]] = []
        """Processor seconds of `every` steps: the trainer's, with all its threads, and the bare loop's."""

    def is_due(self, run: callbacks.Run, step: int) -> bool:
        return step % self._every == 0

    def after_step(self, run: callbacks.Run, line: dict[str, Any]) -> None:
        ours = time.process_time() - self._since
        gc.collect()  # before the turn of each: DeepSpeed leaves cycles, and finding them costs both alike
        began = time.process_time()
        self._bare.steps(self._every)
        bare = time.process_time() - began
        if run.step > self._warm_up:
            self.pairs.append((ours, bare))
        gc.collect()
        self._since = time.process_time()


def measure(directory: str, stage: int, turns: int, every: int = 10) -> Result:
    """Milliseconds of processor time a step of both, and the ratio: medians over the turns."""
    import torch

    from llmtrain import distributed
    from llmtrain.config.hydra import compose
    from llmtrain.data.prepare import prepare
    from llmtrain.distributed import World
    from llmtrain.training.build import build_run, open_run
    from llmtrain.training.config import TrainConfig
    from llmtrain.training.trainer import begin, fit

    torch.set_num_threads(1)
    config = compose(
        TrainConfig,
        [
            *SHAPE,
            f"deepspeed=zero{stage}",
            f"max_steps={every * (turns + 2)}",
            f"log_every={every}",
            f"cache_dir={directory}/cache",
            f"output_dir={directory}/zero{stage}",
            "resume=never",
        ],
    )
    with closing(prepare(config.data, config.tokenizer, config.cache_dir)) as prepared:
        distributed.initialize(World())
        run = build_run(config, World(), open_run(config, World()), prepared)
        tensors = len(list(run.engine.model.parameters()))
        assert tensors == TENSORS, tensors
        begin(run)
        turn = Turns(BareLoop(run), every, warm_up=2 * every)
        run.callbacks = [*run.callbacks, turn]
        fit(run)
    return {
        "stage": stage,
        "tensors": tensors,
        "ours_ms": median(ours for ours, _ in turn.pairs) / every * 1000,
        "bare_ms": median(bare for _, bare in turn.pairs) / every * 1000,
        "ratio": median(ours / bare for ours, bare in turn.pairs),
    }


def compare_steps(directory: Path | None, turns: int, stages: Sequence[int] = STAGES) -> list[Result]:
    """`measure` of every stage, each in a process of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="llmtrain-bench-", dir=directory) as place,
        Station(__name__, ["llmtrain.training.trainer", "deepspeed"]) as station,
    ):
        return [station.call("measure", place, stage, turns) for stage in stages]


def steps_table(results: Sequence[Result]) -> str:
    """The comparison as Markdown."""
    rows = [(r["stage"], f"{r['bare_ms']:.2f}", f"{r['ours_ms']:.2f}", f"{r['ratio']:.3f}") for r in results]
    return markdown(("ZeRO stage", "DeepSpeed alone, ms a step", "llmtrain, ms a step", "ratio"), rows)
