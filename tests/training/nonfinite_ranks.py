"""Steps that must not be applied, in every stage, precision and optimizer: rank 0 writes what became of them.

Arguments: <file> <case>...
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llmtrain import distributed
from llmtrain.config.hydra import compose
from llmtrain.distributed import World
from llmtrain.model import Losses
from llmtrain.training.build import build_model_engine
from llmtrain.training.config import TrainConfig
from llmtrain.training.engine.engine import Engine
from llmtrain.training.engine.guard import Limits
from llmtrain.training.engine.transfer import StepResult
from tests.training.optimizer_ranks import GQA, SHAPE, VOCABULARY, WHOLE, rows

BF16 = ["bf16_autocast", "bf16", "bf16", "bf16"]
CASES: dict[str, tuple[list[str], Any]] = {
    f"{name} zero{stage} {precision}": ([f"optimizer={name}", f"deepspeed=zero{stage}"], precision)
    for name in ("adamw", "lion")
    for stage, precisions in {
        **{stage: ("fp32", BF16[stage]) for stage in range(4)},
        "2_offload": ("fp32", "bf16"),
        "3_offload": ("fp32", "bf16"),
    }.items()
    for precision in precisions
} | {
    f"muon zero{stage} {precision}": (["optimizer=muon", f"deepspeed=zero{stage}", WHOLE], precision)
    for stage in ("1", "2", "3", "2_offload", "3_offload")
    for precision in ("fp32", "bf16_autocast")
}  # fmt: skip


def state(engine: Engine) -> list[torch.Tensor]:
    """The model's parameters as they lie here, the masters, and all that the optimizer keeps; copies."""
    optimizer = engine.deepspeed.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    found = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.model.parameters()]
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        found += getattr(optimizer, name, [])
    found += [value for kept in inner.state.values() for value in kept.values() if torch.is_tensor(value)]
    return [tensor.detach().clone() for tensor in found]


@contextmanager
def spoilt(engine: Engine, here: bool, value: float) -> Iterator[None]:
    """The activations are not finite on this rank; on the others the hook is there too, and does nothing."""
    handle = engine.model.final_norm.register_forward_hook(
        lambda module, inputs, output: output * (value if here else 1.0)
    )
    yield
    handle.remove()


@contextmanager
def infinite_loss(engine: Engine, here: bool) -> Iterator[None]:
    """The loss is infinite on this rank, and its gradients are what they were."""
    more = math.inf if here else 0.0
    handle = engine.model.register_forward_hook(
        lambda module, inputs, output: Losses(output.total + more, output.rows + more)
    )
    yield
    handle.remove()


def tried(case: str, world: World) -> dict[str, Any]:
    """Good steps and bad ones in turn: spoilt on the last rank, and above a limit of each kind."""
    overrides, precision = CASES[case]
    config = compose(TrainConfig, [*SHAPE, GQA, *overrides])
    engine = build_model_engine(config, world, VOCABULARY, 1, precision)
    numbers = iter(range(99))

    def step(limits: Limits | None = None) -> StepResult:
        rank_rows = 8 // world.world_size
        rows_here = rows(next(numbers)).split(rank_rows)[world.rank]
        return engine.train_step(rows_here, 0.01, limits=limits).result()

    last = world.rank == world.world_size - 1

    def spoilt_step(value: float) -> StepResult:
        with spoilt(engine, here=last, value=value):
            return step()

    def infinite_step() -> StepResult:
        with infinite_loss(engine, here=last):
            return step()

    good = [step(), step(Limits(1e3, 1e3))]
    loss, norm = good[1].loss, good[1].grad_norm
    bad = {
        "nan": lambda: spoilt_step(math.nan),
        "inf": lambda: spoilt_step(math.inf),
        "infinite loss": infinite_step,
        "loss": lambda: step(Limits(loss / 2, 1e3)),
        "norm": lambda: step(Limits(1e3, norm / 2)),
    }
    found = {}
    for kind, take in bad.items():
        before = state(engine)
        result = take()
        after = state(engine)
        same = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        good.append(step())
        moved = any(not torch.equal(one, other) for one, other in zip(after, state(engine), strict=True))
        found[kind] = {
            "applied": result.applied,
            "finite": math.isfinite(result.grad_norm),
            "same": all(distributed.gather_objects(same)),
            "moved": all(distributed.gather_objects(moved)),
        }
    finite = all(torch.isfinite(tensor).all() for tensor in state(engine))
    engine.close()
    return {**found, "good": all(one.applied for one in good) and finite}


def main(argv: list[str]) -> int:
    file, cases = Path(argv[0]), argv[1:]
    torch.compiler.set_stance("force_eager")  # DeepSpeed compiles Muon's update, which takes a minute here
    world = World.from_environment()
    distributed.initialize(world)
    found = {case: tried(case, world) for case in cases}
    if world.is_main:
        file.write_text(json.dumps(found))
    distributed.finalize()
    return 0
