"""Optimizers under every ZeRO stage against plain loops from their papers, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmtrain import distributed
from llmtrain.config import UserError
from llmtrain.config.hydra import compose
from llmtrain.distributed import World
from llmtrain.optim.muon import MuonConfig
from llmtrain.training.config import TrainConfig
from llmtrain.training.engine.optimizers import build_optimizer
from tests.ranks import EAGER
from tests.training.optimizer_ranks import CASES, RATES, VOCABULARY, configured, rows
from tests.training.test_engine import batch, build
from tests.training.test_resume import records
from tests.training.test_syncs import HostReads


@pytest.fixture(scope="module", params=[1, 2])
def trained(request, cpu_ranks, tmp_path_factory) -> dict[str, Any]:
    """What tests/training/optimizer_ranks.py writes on one rank, and on two."""
    file = tmp_path_factory.mktemp("optimizers") / "found.pt"
    cpu_ranks.run([str(file)], request.param, file.parent, door="tests.training.optimizer_ranks", timeout=600)
    return torch.load(file)


@pytest.mark.parametrize("case", CASES)
def test_weights_against_a_plain_loop(trained, case):
    found = trained[case]
    expected = plain_loop(configured(case), found["before"])
    moved = {name: found["before"][name] - after for name, after in expected.items()}
    error = 0.3 if "bf16" in case else 5e-3
    for name, after in found["after"].items():
        distance = torch.linalg.vector_norm(after - expected[name])
        assert distance < error * torch.linalg.vector_norm(moved[name]), name


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_not_finite_is_left_out(trained, case):
    """The plain loop knows nothing of it: weights and states are as if it had not been."""
    assert trained[case]["skipped"]


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_holds_the_weights(trained, case):
    saved, after = trained[case]["saved"], trained[case]["after"]
    assert set(saved) == set(after)
    assert all(torch.equal(saved[name], after[name]) for name in after)


def plain_loop(config: TrainConfig, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights after the steps, one parameter at a time."""
    decoder = config.model.assemble(vocab_size=VOCABULARY, seq_len=16)
    decoder.load_state_dict(before)
    states: dict[str, list[torch.Tensor]] = {}
    for step, lr in enumerate(RATES):
        batch = rows(step)
        decoder.zero_grad()
        total = decoder(batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens).total
        (total / batch.labels.numel()).backward()
        gradients = {name: parameter.grad for name, parameter in decoder.named_parameters()}
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).double().norm().item()
        clip = (
            min(1.0, config.optimizer.gradient_clipping / norm) if config.optimizer.gradient_clipping else 1
        )
        for name, parameter in decoder.named_parameters():
            two = [torch.zeros_like(parameter), torch.zeros_like(parameter)]
            update(
                config, name, parameter.data, gradients[name] * clip, states.setdefault(name, two), lr, step
            )
    return {name: parameter.detach() for name, parameter in decoder.named_parameters()}


def update(config: TrainConfig, name: str, x: Any, g: Any, state: list[Any], lr: float, step: int) -> None:
    """One parameter's step: Muon of matrices, Lion, AdamW."""
    o, is_matrix = config.optimizer, name.startswith("blocks") and x.ndim == 2
    scales = {"embedding.weight": 0.5, "head.weight": 2.0}
    if is_matrix:
        lr *= o.lr_scales.matrices
    else:
        lr *= scales.get(name, 3.0)
    if x.ndim == 2:
        x.mul_(1 - lr * o.weight_decay)
    m, v = state
    if isinstance(o, MuonConfig) and is_matrix:
        m.lerp_(g, 1 - o.momentum)
        for piece, direction in zip(
            separate(config, name, x), separate(config, name, g.lerp(m, o.momentum)), strict=True
        ):
            piece.sub_(lr * orthogonal(direction) * max(1, direction.size(0) / direction.size(1)) ** 0.5)
    elif o.kind == "lion":
        x.sub_(lr * (o.betas[0] * m + (1 - o.betas[0]) * g).sign())
        m.mul_(o.betas[1]).add_(g, alpha=1 - o.betas[1])
    else:
        m.mul_(o.betas[0]).add_(g, alpha=1 - o.betas[0])
        v.mul_(o.betas[1]).addcmul_(g, g, value=1 - o.betas[1])
        m_hat, v_hat = m / (1 - o.betas[0] ** (step + 1)), v / (1 - o.betas[1] ** (step + 1))
        x.sub_(lr * m_hat / (v_hat.sqrt() + o.eps))


def separate(config: TrainConfig, name: str, matrix: torch.Tensor) -> list[torch.Tensor]:
    """The matrices that a fused one holds; of q as many as it is times higher than k."""
    heads, key = config.model.n_heads, config.model.n_kv_heads
    if name.endswith("attention.qkv.weight"):
        q, k, v = matrix.split([heads * 8, key * 8, key * 8])
        return [*q.chunk(heads // key), k, v]
    if name.endswith("gate_up.weight"):
        return [matrix[:40], matrix[40:]]
    return [matrix]


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz as in Jordan et al. 2024, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.double() / (matrix.double().norm() + 1e-7)
    x = x.T if matrix.size(0) > matrix.size(1) else x
    for _ in range(5):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return (x.T if matrix.size(0) > matrix.size(1) else x).float()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["deepspeed=zero0"], "optimizer=muon with deepspeed=zero0"),
        (["precision=bf16"], "optimizer=muon with precision=bf16"),
        (["deepspeed=zero3"], "reduce_scatter=false"),
        (["deepspeed.zero_optimization.parameter_alignment=true"], "parameter_alignment=false"),
        (["optimizer.gradient_clipping=1"], "gradient_clipping"),
    ],
)
def test_what_deepspeed_s_muon_computes_otherwise_is_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        compose(TrainConfig, ["optimizer=muon", *overrides])


def test_auto_is_autocast_where_the_optimizer_needs_fp32_weights():
    for optimizer, expected in (("adamw", "bf16"), ("lion", "bf16"), ("muon", "bf16_autocast")):
        config = compose(TrainConfig, [f"optimizer={optimizer}"])
        needs = config.optimizer.fp32_weights
        assert config.deepspeed.resolve_precision("auto", "cuda", False, needs) == expected


CASES_OF_RESUME = [("lion", 0, "fp32"), ("lion", 1, "bf16"), ("lion", 3, "bf16"), ("muon", 1, "fp32"),
                   ("muon", 2, "bf16_autocast"), ("muon", 3, "fp32")]  # fmt: skip


@pytest.mark.parametrize(("optimizer", "stage", "precision"), CASES_OF_RESUME)
def test_a_resumed_run_is_bit_equal(ranks, tiny, tmp_path, optimizer, stage, precision):
    common = [*tiny, f"optimizer={optimizer}", f"deepspeed=zero{stage}", f"precision={precision}",
              "max_steps=6", "checkpoint.every=3", "optimizer.lr_scales.embedding=0.5",
              "deepspeed.zero_optimization.reduce_scatter=false"]  # fmt: skip
    ranks.run([*common, f"output_dir={tmp_path}/whole"], 2, tmp_path, {EAGER: "1"})
    source = tmp_path / "whole" / "checkpoints" / "step_00000003"
    ranks.run([*common, f"output_dir={tmp_path}/resumed", f"resume={source}"], 2, tmp_path, {EAGER: "1"})
    whole, resumed = records(tmp_path / "whole"), records(tmp_path / "resumed")
    assert sorted(resumed) == [4, 5, 6]
    assert all(resumed[step] == whole[step] for step in resumed)


def test_muon_s_momentum_is_the_key_s(tiny):
    distributed.initialize(World())
    config = compose(TrainConfig, [*tiny, "optimizer=muon", "optimizer.momentum=0.5"])
    with torch.device("meta"):
        model = config.model.assemble(vocab_size=258, seq_len=64)
    groups = build_optimizer(config.optimizer, model).param_groups
    assert [group["momentum"] for group in groups if group["use_muon"]] == [0.5]


def test_lion_s_step_reads_nothing_of_the_device(tiny):
    _, engine = build([*tiny, "optimizer=lion", "deepspeed=zero0"])
    for _ in range(2):
        with HostReads() as reads:
            engine.train_step(batch(8, 64), lr=1e-3)
    assert reads.count == 0
    engine.close()
