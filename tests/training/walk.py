"""Build real engines on the ranks of this job, walk their tensors, and write what was found beside the model.

Arguments: <file> [case ...]        rank 0 writes it: a list of what was found
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from llmtrain import distributed
from llmtrain.config.hydra import compose
from llmtrain.data.batch import IGNORED, Batch
from llmtrain.distributed import World
from llmtrain.training.build import build_model_engine
from llmtrain.training.config import TrainConfig
from llmtrain.training.sizing.memory import Layout, checkpoint_bytes, memory, state
from llmtrain.training.sizing.model import Model

GLOO_SECONDS = 0.2
"""After a collective is done, in which gloo's own thread lets go of the tensor that it reduced."""

SCALAR = 64
"""Bytes below which a tensor is a counter or a flag."""

SHAPE = [
    "tokenizer=bytes",
    "model.d_model=60",  # no power of two: padding shows
    "model.n_layers=2",
    "model.n_heads=3",
    "model.n_kv_heads=1",
    "model.head_dim=18",
    "model.d_ff=77",
    "model.norm=layernorm",
    "model.bias=all",
    "model/position=none",  # no table of angles beside the parameters
    "seq_len=16",
    "global_batch_size=8",
    "micro_batch_size=2",
    "deepspeed.zero_optimization.reduce_bucket_size=5000",
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=100",
]
CASES = [
    *((f"zero{stage}", precision) for stage in range(4) for precision in ("fp32", "bf16_autocast")),
    *((f"zero{stage}", "bf16") for stage in (1, 2, 3)),
    ("zero2_offload", "bf16"),
    ("zero3_offload", "bf16"),
    ("zero1 optimizer=lion", "bf16"),
    ("zero3 optimizer=lion", "fp32"),
    ("zero1 optimizer=muon", "fp32"),
    ("zero2 optimizer=muon", "bf16_autocast"),
]
"""An option of `deepspeed`, perhaps one of `optimizer`, and a precision."""
VOCABULARY = 258


def storages() -> dict[int, torch.UntypedStorage]:
    """Every tensor's storage that lives, by address; counters and flags are left out."""
    gc.collect()
    found: dict[int, torch.UntypedStorage] = {}
    for item in gc.get_objects():
        if not issubclass(type(item), torch.Tensor) or item.device.type == "meta":
            continue
        for tensor in (item, item.grad if item.is_leaf else None):
            if tensor is not None and tensor.untyped_storage().nbytes() >= SCALAR:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return found


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages of tensors."""
    kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(bytes for bytes in kept.values() if bytes >= SCALAR)


def walk(world: World, cases: list[str]) -> Iterator[dict[str, Any]]:
    """For every case: bytes found between the steps and between two micro-batches, and of a checkpoint."""
    data = batch(8 // world.world_size, 16)
    for option, precision in CASES:
        case = f"{option} {precision}"
        if cases and case not in cases:
            continue
        config = compose(TrainConfig, [*SHAPE, *f"deepspeed={option}".split()])
        before = storages()  # held, so that no address is given away again

        def found(before: dict[int, torch.UntypedStorage] = before) -> int:
            return sum(kept.nbytes() for address, kept in storages().items() if address not in before)

        engine = build_model_engine(config, world, VOCABULARY, 1, precision)
        engine.train_step(data, lr=1e-3)
        between_steps = found()
        parameters = list(engine.model.parameters())
        optimizer = getattr(engine.deepspeed.optimizer, "optimizer", engine.deepspeed.optimizer)
        states = [value for values in optimizer.state.values() for value in values.values()]
        parts = {
            "weights": size([*parameters, *(p.ds_tensor for p in parameters if hasattr(p, "ds_tensor"))]),
            "optimizer": size(value for value in states if isinstance(value, torch.Tensor)),
        }
        engine.deepspeed.train()
        engine.deepspeed.backward(engine._forward(data.split(2)[0]).total, scale_wrt_gas=False)
        time.sleep(GLOO_SECONDS)
        gradients = found() - between_steps
        pieces = engine.state().pieces
        saved = sum(tensor.nbytes for piece in pieces for tensor in piece.tensors.values())
        del pieces
        engine.close()
        del engine, optimizer, parameters, states
        ranks = distributed.gather_objects({**parts, "total": between_steps})
        model, layout = Model.of(config, VOCABULARY), Layout.of(config, world.world_size, precision)
        kept, needed = state(model, layout), memory(model, layout)
        yield {
            "case": case,
            "found": {key: max(rank[key] for rank in ranks) for key in ranks[0]},
            "state": {"weights": kept.weights, "optimizer": kept.optimizer, "total": kept.total},
            "gradients": max(distributed.gather_objects(gradients)),
            "predicted_gradients": needed.gradients,
            "checkpoint": sum(distributed.gather_objects(saved)),
            "predicted_checkpoint": checkpoint_bytes(model),
        }


def batch(rows: int, length: int) -> Batch:
    """Random rows."""
    ids = torch.randint(0, VOCABULARY, (rows, length + 1), dtype=torch.int32)
    assert IGNORED not in ids
    return Batch(
        input_ids=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        position_ids=torch.arange(length, dtype=torch.int32).repeat(rows, 1),
        cu_seqlens=torch.arange(rows + 1, dtype=torch.int32) * length,
        source_ids=torch.zeros(rows, dtype=torch.int32),
    )


def main(argv: list[str]) -> int:
    file, cases = Path(argv[0]), argv[1:]
    torch.compiler.set_stance("force_eager")  # DeepSpeed compiles Muon's update, which takes a minute here
    world = World.from_environment()
    distributed.initialize(world)
    found = list(walk(world, cases))
    if world.is_main:
        file.write_text(json.dumps(found))
    distributed.finalize()
    return 0
