"""Train on the ranks of this job, and go on from the state in fresh engines of other layouts; rank 0 tells.

Arguments: <file> <layout of LAYOUTS> ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain import distributed
from llmtrain.config.hydra import compose
from llmtrain.distributed import World
from llmtrain.training.build import build_model_engine
from llmtrain.training.config import TrainConfig
from llmtrain.training.engine.engine import Engine
from tests.training.optimizer_ranks import GQA, SHAPE, VOCABULARY, WHOLE, rows

BEFORE, AFTER = 3, 2
"""Steps before the state is taken, and after it."""

ROBIN = "deepspeed.zero_optimization.round_robin_gradients=true"
ALIGNED = "deepspeed.zero_optimization.parameter_alignment=true"

FP32, BF16, AUTOCAST = (f"precision={name}" for name in ("fp32", "bf16", "bf16_autocast"))
LAYOUTS: dict[str, list[str]] = {
    **{f"adamw zero{stage} fp32": [f"deepspeed=zero{stage}", FP32] for stage in range(4)},
    **{f"adamw zero{stage} bf16": [f"deepspeed=zero{stage}", BF16] for stage in (1, 2, 3)},
    **{f"adamw zero{stage} autocast": [f"deepspeed=zero{stage}", AUTOCAST] for stage in range(4)},
    "adamw zero2 fp32 offload": ["deepspeed=zero2_offload", FP32],
    "adamw zero2 bf16 offload": ["deepspeed=zero2_offload", BF16],
    "adamw zero3 bf16 offload": ["deepspeed=zero3_offload", BF16],
    "adamw zero2 fp32 robin": ["deepspeed=zero2", FP32, ROBIN],
    "adamw zero2 bf16 robin aligned": ["deepspeed=zero2", BF16, ROBIN, ALIGNED],
    **{f"lion zero{stage} fp32": ["optimizer=lion", f"deepspeed=zero{stage}", FP32] for stage in range(4)},
    **{f"muon zero{stage} fp32": ["optimizer=muon", f"deepspeed=zero{stage}", FP32, WHOLE]
       for stage in (1, 2, 3)},
    "muon zero2 fp32 robin": ["optimizer=muon", "deepspeed=zero2", FP32, ROBIN],
    "muon zero3 autocast": ["optimizer=muon", "deepspeed=zero3", AUTOCAST, WHOLE],
    "muon zero2 fp32 offload": ["optimizer=muon", "deepspeed=zero2_offload", FP32],
    "muon zero3 fp32 offload": ["optimizer=muon", "deepspeed=zero3_offload", FP32, WHOLE],
}  # fmt: skip

MOVES: dict[str, list[str]] = {
    "adamw zero1 fp32": ["adamw zero3 fp32", "adamw zero0 fp32", "adamw zero2 fp32 robin"],
    "adamw zero3 fp32": ["adamw zero2 fp32", "adamw zero0 fp32"],
    "adamw zero0 fp32": ["adamw zero2 fp32 offload", "adamw zero3 fp32"],
    "adamw zero1 bf16": ["adamw zero2 bf16 robin aligned", "adamw zero3 bf16"],
    "adamw zero3 bf16": ["adamw zero2 bf16", "adamw zero3 bf16 offload", "adamw zero0 autocast"],
    "lion zero3 fp32": ["lion zero1 fp32", "lion zero0 fp32"],
    "muon zero1 fp32": ["muon zero3 fp32", "muon zero2 fp32 offload", "muon zero2 fp32 robin"],
    "muon zero3 fp32": ["muon zero1 fp32", "muon zero3 fp32 offload"],
    "muon zero2 fp32 offload": ["muon zero2 fp32"],
}  # fmt: skip
"""From which layout to which others a run goes on."""


@dataclass
class Store:
    """All ranks' pieces in memory, and what was asked of them."""

    scalars: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    whole: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    written: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, engine: Engine) -> Store:
        state = engine.state()
        pieces = [(piece.name, piece.start, {k: v.cpu().clone() for k, v in piece.tensors.items()})
                  for piece in state.pieces]  # fmt: skip
        store = cls(state.scalars, dict(state.shapes))
        gathered = distributed.gather_objects((pieces, state.scalars))
        assert all(scalars == state.scalars for _, scalars in gathered)
        for name, start, tensors in (piece for pieces, _ in gathered for piece in pieces):
            for key, tensor in tensors.items():
                size = torch.Size(state.shapes[name]).numel()
                whole = store.whole.setdefault((name, key), torch.full((size,), torch.nan))
                count = store.written.setdefault((name, key), torch.zeros(size, dtype=torch.int32))
                whole[start : start + len(tensor)] = tensor
                count[start : start + len(tensor)] += 1
        return store

    def read(self, name: str, key: str, start: int, count: int) -> Tensor:
        return self.whole[name, key][start : start + count]


def build(layout: str, world: World) -> Engine:
    config = compose(TrainConfig, [*SHAPE, GQA, *LAYOUTS[layout]])
    distributed.initialize(world)
    return build_model_engine(
        config,
        world,
        VOCABULARY,
        sources=1,
        precision=config.precision,  # type: ignore[arg-type]
    )


def train(engine: Engine, world: World, steps: range) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    mine = 8 // world.world_size
    results = [engine.train_step(rows(n).split(mine)[world.rank], 0.01).result() for n in steps]
    return [(r.source_losses.sum().item() / r.source_targets.sum().item(), r.grad_norm) for r in results]


def gone_on(layout: str, world: World, store: Store) -> dict[str, Any]:
    """The steps after `store` in a fresh engine, and where they end."""
    engine = build(layout, world)
    engine.restore(store.read, store.scalars)
    curve = train(engine, world, range(BEFORE, BEFORE + AFTER))
    end = Store.of(engine)
    engine.close()
    return {"curve": curve, "end": end}


def cases(layouts: Sequence[str], world: World) -> Iterator[tuple[str, dict[str, Any]]]:
    for layout in layouts:
        engine = build(layout, world)
        train(engine, world, range(BEFORE))
        store = Store.of(engine)
        whole = {"curve": train(engine, world, range(BEFORE, BEFORE + AFTER)), "end": Store.of(engine)}
        engine.close()
        moves = {other: gone_on(other, world, store) for other in (layout, *MOVES.get(layout, ()))}
        yield layout, {"begin": store, "whole": whole, "moves": moves}


def main(argv: list[str]) -> int:
    file, layouts = Path(argv[0]), argv[1:]
    torch.compiler.set_stance("force_eager")  # DeepSpeed compiles Muon's update, which takes a minute here
    world = World.from_environment()
    distributed.initialize(world)
    found = dict(cases(layouts, world))
    if world.is_main:
        torch.save(found, file)
    distributed.finalize()
    return 0
