"""FP8 matrices through torchao, emulated on a CPU: which ones, how close, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.config import UserError
from llmtrain.config.hydra import compose
from llmtrain.model import Decoder
from llmtrain.model.fp8 import check_fp8, convert_to_fp8, without_fp8
from llmtrain.training.config import TrainConfig
from tests.model.small import decoder, packed_batch, relative_error
from tests.training.test_engine import batch, build

PARTITIONED = "aot_eager_decomp_partition"
"""A backend that cuts a graph into forward and backward as inductor does, and compiles nothing."""

NAMES = ["attention.qkv", "attention.out", "feed_forward.gate_up", "feed_forward.down"]


def shape(**changes: Any) -> Decoder:
    return decoder(**{"sharp": False, "attention": {"backend": "sdpa"}, "bias": "all"} | changes)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("compiles", [False, True])
def test_losses_and_gradients_are_near_those_of_bf16(recipe: Any, compiles: bool) -> None:
    """e4m3 has 3 bits after the point, e5m2 2: products are off by about 3 %, a loss by far less."""
    torch._dynamo.reset()
    plain, ours = shape().bfloat16(), shape().bfloat16()
    assert convert_to_fp8(ours, recipe) == [f"{layer}.{name}" for layer in (0, 1) for name in NAMES]
    if compiles:
        ours.compile_blocks("aot_eager")
    results = []
    for model in (plain, ours):
        losses = model(**packed_batch())
        losses.total.backward()
        results.append((losses.rows, {name: p.grad for name, p in model.named_parameters()}))
    (expected, gradients), (rows, found) = results
    assert 0 < relative_error(rows, expected) < 1e-3
    for name, gradient in gradients.items():
        assert relative_error(found[name], gradient) < 0.2, name


def test_weights_and_their_names_stay() -> None:
    plain, ours = shape(), shape()
    convert_to_fp8(ours, "tensorwise")
    state = ours.state_dict()
    assert [*state] == [*plain.state_dict()]
    assert all(torch.equal(state[name], weight) for name, weight in plain.state_dict().items())
    plain.load_state_dict(state)


def test_fp8_can_be_left_out_for_a_while() -> None:
    plain, ours = shape().bfloat16(), shape().bfloat16()
    convert_to_fp8(ours, "tensorwise")
    ids = packed_batch()["input_ids"]
    with without_fp8(ours):
        assert torch.equal(ours(ids), plain(ids))
    assert not torch.equal(ours(ids), plain(ids))
    with without_fp8(plain):
        plain(ids)


def test_only_matrices_of_round_sizes_are_converted() -> None:
    """d_ff=24 leaves the feed-forward part as it is; the head and the norms of q and k never change."""
    model = shape(d_ff=24, qk_norm=True, tie_embeddings=False, feed_forward="gelu")
    assert convert_to_fp8(model, "rowwise") == [f"{layer}.{name}" for layer in (0, 1) for name in NAMES[:2]]
    with pytest.raises(UserError, match=r"fp8=rowwise: no matrix .* multiples of 16: change model\.d_model"):
        convert_to_fp8(shape(d_model=24, d_ff=24), "rowwise")


def test_without_torchao_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"fp8=rowwise: torchao .*pip install 'llmtrain\[fp8\]'"):
        check_fp8("rowwise")


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(UserError, match=r"NVIDIA A100 has compute capability 8\.0, FP8 needs 8\.9"):
        check_fp8("tensorwise")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            ["deepspeed=zero3", "compile=false"],
            "zero3 and compile=false: .*; use compile=true",
        ),
        (["precision=fp32"], "fp8=tensorwise with precision=fp32"),
        (
            ["micro_batch_size=1", "seq_len=72"],
            "= 1 x 72 = 72 tokens, not a multiple of 16",
        ),
    ],
)
def test_what_cannot_be_is_refused(tiny: list[str], overrides: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        compose(TrainConfig, [*tiny, "precision=bf16", "fp8=tensorwise", *overrides])


def test_compiled_blocks_keep_no_weight_that_zero3_gathered(tiny: list[str], monkeypatch: Any) -> None:
    """Torchao saves a view of each weight, which the partitioner of compiled blocks makes again."""
    torch._dynamo.reset()
    compile_blocks = Decoder.compile_blocks
    monkeypatch.setattr(
        Decoder, "compile_blocks", lambda it: compile_blocks(it, "aot_eager_decomp_partition")
    )
    threshold = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    options = ["deepspeed=zero3", threshold, "precision=bf16", "fp8=tensorwise", "compile=true"]
    _, engine = build([*tiny, *options], "bf16")
    matrices = {tuple(weight.ds_shape) for weight in engine.model.blocks.parameters()}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if {tuple(tensor.shape), tuple(tensor.shape)[::-1]} & {it for it in matrices if len(it) == 2}:
            kept.append(tensor)
        return tensor

    part = batch(1, 40)  # no activation of 40 tokens has the shape of a matrix
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.deepspeed(part.input_ids, part.labels, part.position_ids, part.cu_seqlens)
    assert [tensor.untyped_storage().nbytes() for tensor in kept] == [0] * 8  # freed when the block was done
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "recipe", "compiles"),
    [
        (0, "bf16_autocast", "rowwise", "false"),
        (1, "bf16", "tensorwise", "false"),
        (2, "bf16", "rowwise", "true"),
        (3, "bf16", "tensorwise", "true"),
    ],
)
def test_two_ranks_train_as_without(
    ranks: Any, tiny: list[str], tmp_path: Path, stage: int, precision: str, recipe: str, compiles: str
) -> None:
    common = [f"deepspeed=zero{stage}", f"precision={precision}", "max_steps=6", f"compile={compiles}"]
    losses = []
    for fp8 in ("false", recipe):
        run = tmp_path / fp8
        options = [*common, f"fp8={fp8}", "activation_checkpointing=true", f"output_dir={run}"]
        ranks.run([*tiny, *options], 2, tmp_path)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["train/loss"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert losses[1] != losses[0]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs FP8 on CUDA"
)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu_losses_are_near_those_of_bf16(recipe: Any, compiles: bool, autocast: bool) -> None:
    torch._dynamo.reset()
    sizes = {"d_model": 256, "d_ff": 512, "n_heads": 4}
    weights = torch.float32 if autocast else torch.bfloat16
    plain, ours = (shape(**sizes).to("cuda", weights) for _ in range(2))
    convert_to_fp8(ours, recipe)
    if compiles:
        ours.compile_blocks()
    packed = {name: tensor.cuda() for name, tensor in packed_batch().items()}
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        expected, losses = plain(**packed), ours(**packed)
    losses.total.backward()
    assert relative_error(losses.rows, expected.rows) < 1e-2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
