"""The engine in one process: what DeepSpeed was told, what it keeps, what it refuses to apply."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmtrain import distributed
from llmtrain.config.hydra import compose
from llmtrain.data.batch import Batch
from llmtrain.distributed import World
from llmtrain.model.decoder import Block
from llmtrain.training.build import build_model_engine
from llmtrain.training.config import TrainConfig


def build(overrides, precision="fp32"):
    config = compose(TrainConfig, overrides)
    distributed.initialize(World())
    return config, build_model_engine(config, World(), vocab_size=258, sources=2, precision=precision)


def batch(rows: int, length: int, sources=None) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 258, (rows, length + 1), generator=generator, dtype=torch.int32)
    return Batch(
        input_ids=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        position_ids=torch.arange(length, dtype=torch.int32).repeat(rows, 1),
        cu_seqlens=torch.arange(rows + 1, dtype=torch.int32) * length,
        source_ids=torch.tensor(sources or [0] * rows, dtype=torch.int32),
    )


def test_activation_checkpointing_keeps_fewer_tensors(tiny):
    kept = {}
    for setting in ("false", "true"):
        _, engine = build([*tiny, "deepspeed=zero0", f"activation_checkpointing={setting}"])
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            engine.train_step(batch(8, 64), lr=1e-3)
        kept[setting] = sum(sizes)
        engine.close()
    assert kept["true"] < kept["false"] / 2


def test_compile_is_on_where_it_is_asked_for(tiny):
    for setting, expected in (("true", True), ("false", False), ("auto", torch.cuda.is_available())):
        _, engine = build([*tiny, "deepspeed=zero0", f"compile={setting}"])
        assert all((block.in_training is not Block.compute) == expected for block in engine.model.blocks)
        engine.close()


def test_losses_are_summed_by_source(tiny):
    _, engine = build([*tiny, "deepspeed=zero0"])
    data = batch(8, 64, sources=[0, 1, 1, 1, 0, 1, 1, 1])
    rows = torch.cat([engine.loss(part) for part in data.split(2)]).double()
    result = engine.train_step(data, lr=0.0).result()
    expected = torch.stack([rows[[0, 4]].sum(), rows[[1, 2, 3, 5, 6, 7]].sum()])
    torch.testing.assert_close(result.source_losses, expected)
    assert result.source_targets.tolist() == [2 * 64, 6 * 64]
    engine.close()


BF16_OF_EACH_STAGE = [(0, "bf16_autocast"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.mark.parametrize(("stage", "precision"), BF16_OF_EACH_STAGE)
def test_bf16_accumulates_gradients_in_fp32(tiny, stage, precision):
    """64 times the same row is the row: its bf16 gradients are the same but for their exponent."""
    norms = []
    for rows in (1, 64):
        sizes = [f"global_batch_size={rows}", "micro_batch_size=1"]
        _, engine = build([*tiny, f"deepspeed=zero{stage}", *sizes], precision)
        row = batch(1, 64)
        data = replace(
            row,
            **{key: value.repeat(rows, 1) for key, value in vars(row).items() if value.ndim == 2},
            cu_seqlens=torch.arange(rows + 1, dtype=torch.int32) * 64,
            source_ids=torch.zeros(rows, dtype=torch.int32),
        )
        norms.append(engine.train_step(data, lr=1e-3).result().grad_norm)
        engine.close()
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_a_step_with_a_gradient_that_is_not_finite_leaves_the_weights_alone(tiny):
    offloaded = [("2_offload", "fp32"), ("2_offload", "bf16"), ("3_offload", "bf16")]
    for stage, precision in [*((s, "fp32") for s in range(4)), *((s, "bf16") for s in (1, 2, 3)), *offloaded]:
        _, engine = build([*tiny, f"deepspeed=zero{stage}"], precision)
        data = batch(8, 64)
        assert engine.train_step(data, lr=1e-3).result().applied
        handle = engine.model.final_norm.register_forward_hook(
            lambda module, inputs, output: output * float("nan")
        )
        before = [engine.loss(part) for part in data.split(2)] and weights(engine)
        result = engine.train_step(data, lr=1e-3).result()
        assert not result.applied, stage
        assert not torch.isfinite(torch.tensor(result.grad_norm)), stage
        handle.remove()
        after = weights(engine)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), stage
        assert engine.train_step(data, lr=1e-3).result().applied
        engine.close()


def test_stage_0_clips_by_the_exact_norm_and_leaves_its_state_alone_at_a_step_that_is_not_finite(tiny):
    _, engine = build([*tiny, "deepspeed=zero0", "optimizer.gradient_clipping=0.01"])
    seen = []
    step = engine.deepspeed.optimizer.step
    parameters = list(engine.model.parameters())

    def watch():
        seen.append([parameter.grad.double().clone() for parameter in parameters])
        return step()

    engine.deepspeed.optimizer.step = watch
    result = engine.train_step(batch(8, 64), lr=1e-3).result()
    norm = torch.cat([gradient.flatten() for gradient in seen[0]]).square().sum().sqrt().item()
    assert result.grad_norm == pytest.approx(norm, rel=1e-9) and norm > 0.01
    states = [engine.deepspeed.optimizer.state[parameter] for parameter in parameters]
    for gradient, state in zip(seen[0], states, strict=True):  # after one step m is (1 - beta1) g
        expected = 0.1 * gradient * 0.01 / norm
        torch.testing.assert_close(state["exp_avg"].double(), expected, rtol=1e-4, atol=1e-12)

    before = [{key: value.clone() for key, value in state.items()} for state in states]
    handle = engine.model.final_norm.register_forward_hook(lambda module, inputs, output: output / 0)
    assert not engine.train_step(batch(8, 64), lr=1e-3).result().applied
    handle.remove()
    for old, new in zip(before, states, strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    engine.close()


def test_an_optimizer_without_torch_amp_s_contract_is_clipped_and_guarded_the_same(tiny):
    curves = []
    for contract in (True, False):
        _, engine = build([*tiny, "deepspeed=zero0", "optimizer.gradient_clipping=0.01"])
        engine.deepspeed.optimizer._step_supports_amp_scaling = contract
        steps = [engine.train_step(batch(8, 64), lr=1e-2).result() for _ in range(2)]
        handle = engine.model.final_norm.register_forward_hook(lambda module, inputs, output: output / 0)
        steps.append(engine.train_step(batch(8, 64), lr=1e-2).result())
        handle.remove()
        steps.append(engine.train_step(batch(8, 64), lr=1e-2).result())
        assert [step.applied for step in steps] == [True, True, False, True]
        curves.append([step.source_losses.sum().item() for step in steps if step.applied])
        engine.close()
    assert curves[0] == pytest.approx(curves[1], rel=1e-6) and len(set(curves[0])) == 3


def weights(engine):
    import deepspeed

    parameters = list(engine.model.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return [parameter.detach().clone() for parameter in parameters]
