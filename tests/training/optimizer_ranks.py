"""Train a few steps on the ranks of this job with every optimizer and stage; rank 0 writes the weights.

Arguments: <file>
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmtrain import distributed
from llmtrain.config.hydra import compose
from llmtrain.data.batch import Batch
from llmtrain.distributed import World
from llmtrain.training.build import build_model_engine
from llmtrain.training.checkpoint import CheckpointWeights
from llmtrain.training.config import TrainConfig
from llmtrain.training.engine.engine import Engine
from tests.training.checkpoint.small import record, saver

SHAPE = [
    "tokenizer=bytes", "model.d_model=24", "model.n_layers=2", "model.n_heads=4", "model.d_ff=40",
    "model.head_dim=8", "seq_len=16", "global_batch_size=8", "micro_batch_size=2",
    "model.tie_embeddings=false", "model.bias=all", "deepspeed.zero_optimization.reduce_bucket_size=3000",
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=100",
    "optimizer.lr_scales.embedding=0.5", "optimizer.lr_scales.head=2", "optimizer.lr_scales.vectors=3",
]  # fmt: skip
RATES = (0.02, 0.01, 0.02)
VOCABULARY = 258
WHOLE = "deepspeed.zero_optimization.reduce_scatter=false"

MHA, GQA, MQA = (f"model.n_kv_heads={heads}" for heads in (4, 2, 1))
CASES: dict[str, list[str]] = {
    **{f"{name} zero{stage}": [f"optimizer={name}", f"deepspeed=zero{stage}", GQA]
       for name in ("adamw", "lion") for stage in range(4)},
    "muon zero1 bf16_autocast": ["optimizer=muon", "deepspeed=zero1", GQA],
    **{f"muon zero{stage} {heads}": ["optimizer=muon", f"deepspeed=zero{stage}", option, WHOLE]
       for stage in (1, 2, 3) for heads, option in (("mha", MHA), ("gqa", GQA), ("mqa", MQA))},
    "muon zero2 round robin": [
        "optimizer=muon", "deepspeed=zero2", GQA, "deepspeed.zero_optimization.round_robin_gradients=true"
    ],
    "muon zero2 offload": ["optimizer=muon", "deepspeed=zero2_offload", GQA],
    "muon zero3 offload": ["optimizer=muon", "deepspeed=zero3_offload", GQA, WHOLE],
}  # fmt: skip


def configured(case: str) -> TrainConfig:
    return compose(TrainConfig, [*SHAPE, *CASES[case]])


def rows(step: int) -> Batch:
    """The global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCABULARY, (8, 17), generator=generator, dtype=torch.int32)
    return Batch(
        input_ids=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        position_ids=torch.arange(16, dtype=torch.int32).repeat(8, 1),
        cu_seqlens=torch.arange(9, dtype=torch.int32) * 16,
        source_ids=torch.zeros(8, dtype=torch.int32),
    )


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    import deepspeed

    named = dict(engine.model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: parameter.detach().float().cpu().clone() for name, parameter in named.items()}


def trained(case: str, world: World, directory: Path) -> dict[str, Any]:
    """Weights before and after, and as a checkpoint has them; a step that is not finite lies between."""
    config = configured(case)
    precision = "bf16_autocast" if "bf16" in case else "fp32"
    engine = build_model_engine(config, world, VOCABULARY, 1, precision)
    mine = 8 // world.world_size
    found: dict[str, Any] = {"before": weights(engine)}

    def step(number: int, lr: float) -> bool:
        return engine.train_step(rows(number).split(mine)[world.rank], lr).result().applied

    for number, lr in enumerate(RATES[:-1]):
        assert step(number, lr)
    spoilt = engine.model.final_norm.register_forward_hook(
        lambda module, inputs, output: output * float("nan")
    )
    found["skipped"] = not step(99, 1.0)
    spoilt.remove()
    assert step(len(RATES) - 1, RATES[-1])
    found["after"] = weights(engine)
    saver(directory, world).save(engine.state(), record(1) | {"world_size": world.world_size})
    found["saved"] = dict(CheckpointWeights(directory / "step_00000001"))
    engine.close()
    return found


def main(argv: list[str]) -> int:
    file = Path(argv[0])
    torch.compiler.set_stance("force_eager")  # DeepSpeed compiles Muon's update, which takes a minute here
    world = World.from_environment()
    distributed.initialize(world)
    found = {case: trained(case, world, file.parent / case) for case in CASES}
    if world.is_main:
        torch.save(found, file)
    distributed.finalize()
    return 0
