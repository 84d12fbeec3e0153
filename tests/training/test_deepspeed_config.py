"""The deepspeed group: every key is one of DeepSpeed's own, reaches it, and offload trains the same."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from llmtrain import distributed
from llmtrain.config import UserError
from llmtrain.config.hydra import compose
from llmtrain.distributed import World
from llmtrain.training.build import build_model_engine
from llmtrain.training.config import TrainConfig
from llmtrain.training.engine.config import OWNERS, DeepSpeedConfig, ZeroConfig
from tests.ranks import PATCH
from tests.training.test_engine import batch

CHANGES = {
    "contiguous_gradients": "false",
    "reduce_scatter": "false",
    "reduce_bucket_size": "1000",
    "allgather_bucket_size": "2000",
    "overlap_comm": "true",
    "round_robin_gradients": "true",
    "parameter_alignment": "true",
    "stage3_prefetch_bucket_size": "1000",
    "stage3_param_persistence_threshold": "1000",
    "stage3_max_live_parameters": "1000",
    "stage3_max_reuse_distance": "1000",
    "stage3_module_granularity_threshold": "1000",
}


def build(overrides, precision="fp32"):
    config = compose(TrainConfig, overrides)
    distributed.initialize(World())
    return build_model_engine(config, World(), vocab_size=258, sources=1, precision=precision)


def test_every_key_is_deepspeed_s_own(tiny):
    """DeepSpeed ignores keys that it does not know."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = {field.alias or name: field for name, field in DeepSpeedZeroConfig.model_fields.items()}
    offload = {"offload_optimizer", "offload_param"}
    assert set(ZeroConfig.model_fields) == {"stage", *CHANGES, *offload}
    assert set(ZeroConfig.model_fields) <= set(theirs)
    for name in offload:
        (inner,) = [cls for cls in theirs[name].annotation.__args__ if cls is not type(None)]
        assert {"device", "pin_memory"} <= set(inner.model_fields)


def test_every_key_reaches_deepspeed(tiny):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = {field.alias or name: name for name, field in DeepSpeedZeroConfig.model_fields.items()}

    def told(*overrides: str) -> dict[str, object]:
        engine = build([*tiny, "deepspeed=zero1", *overrides])
        section = engine.deepspeed._config.zero_config
        engine.close()
        return {key: getattr(section, names[key]) for key in CHANGES}

    before = told()
    after = told(*(f"deepspeed.zero_optimization.{key}={value}" for key, value in CHANGES.items()))
    assert {key: str(int(value)) for key, value in after.items()} == {
        key: {"true": "1", "false": "0"}.get(value, value) for key, value in CHANGES.items()
    }
    assert all(before[key] != after[key] for key in CHANGES)


def test_python_s_garbage_collector_stays_off_until_a_save(tiny):
    assert gc.isenabled()
    engine = build([*tiny, "deepspeed=zero1"])
    assert not gc.isenabled()
    ring: list[object] = []
    ring.append(ring)
    address = id(ring)
    del ring
    assert any(id(item) == address for item in gc.get_objects())
    engine.state()
    assert not any(id(item) == address and item == [item] for item in gc.get_objects())
    engine.close()
    assert gc.isenabled()
    engine = build([*tiny, "deepspeed=zero1", "deepspeed.disable_python_gc=false"])
    assert gc.isenabled()
    engine.close()


def note_frozen() -> None:
    """In a rank: write down at each save how many objects a collection passes over, and how many not."""
    from llmtrain.training import trainer

    save = trainer.save

    def noted(run, **how):
        Path("frozen.json").write_text(json.dumps([gc.get_freeze_count(), len(gc.get_objects())]))
        return save(run, **how)

    trainer.save = noted


def test_a_collection_at_a_save_passes_over_what_the_run_is_built_of(ranks, tiny, tmp_path):
    """Half a second in which nothing trains, else."""
    ranks.run([*tiny, "max_steps=1"], 1, tmp_path, {PATCH: f"{__name__}:note_frozen"})
    frozen, others = json.loads((tmp_path / "frozen.json").read_text())
    assert frozen > 10 * others


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
@pytest.mark.parametrize("stage", [2, 3])
def test_offload_trains_the_same(tiny, stage, precision):
    results = []
    for option in (f"zero{stage}", f"zero{stage}_offload"):
        engine = build([*tiny, f"deepspeed={option}"], precision)
        steps = [engine.train_step(batch(8, 64), lr=1e-2).result() for _ in range(3)]
        results.append([(step.source_losses.item(), float(step.grad_norm)) for step in steps])
        inner = engine.deepspeed.optimizer.optimizer
        assert type(inner) is torch.optim.AdamW
        engine.close()
    assert results[0][0] != results[0][2]
    # norms are summed in another order; gradients accumulated in bf16 would differ by 1e-3
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("zero_optimization.offload_optimizer.device=cpu", "needs ZeRO stage 2: deepspeed=zero2_offload"),
        ("zero_optimization.offload_param.device=cpu", "needs ZeRO stage 3: deepspeed=zero3_offload"),
        ("zero_optimization.allgather_bucket_size=3", "multiple of 2"),
        ("zero_optimization.overlap_com=true", "overlap_com"),
    ],
)
def test_mistakes_name_their_key(override, words):
    with pytest.raises(UserError, match=words):
        compose(TrainConfig, [f"deepspeed.{override}"])


@pytest.mark.parametrize("key", OWNERS)
def test_what_is_owned_elsewhere_is_refused(key):
    with pytest.raises(ValidationError, match=f"{key} is set by"):
        DeepSpeedConfig.model_validate({key: 1})
