"""Roles and groups of parameters, one update against each paper's formula, and torch.amp's contract."""

from __future__ import annotations

import pytest
import torch

from llmtrain.config.hydra import compose
from llmtrain.optim.adamw import AdamWConfig
from llmtrain.optim.base import LrScales, set_learning_rate
from llmtrain.optim.lion import LionConfig
from llmtrain.training.config import TrainConfig

SHARED = {
    "lr": 0.1,
    "lr_scales": LrScales(embedding=0.5, head=2.0, matrices=1.0, vectors=3.0),
    "weight_decay": 0.5,
    "gradient_clipping": 1.0,
}
ADAMW = AdamWConfig(kind="adamw", betas=(0.9, 0.95), eps=1e-8, **SHARED)
LION = LionConfig(kind="lion", betas=(0.9, 0.99), **SHARED)


def groups_of(*overrides: str) -> list[dict]:
    config = compose(TrainConfig, [*overrides, "model.bias=all"])
    with torch.device("meta"):
        decoder = config.model.assemble(vocab_size=258, seq_len=16)
    named = dict(decoder.named_parameters())
    groups = config.optimizer.parameter_groups(named.items(), lambda parameter: parameter.ndim)
    ids = {id(parameter): name for name, parameter in named.items()}
    return [{**group, "names": {ids[id(parameter)] for parameter in group["params"]}} for group in groups]


def test_every_parameter_has_one_role():
    embedding, head, matrices, vectors = groups_of("model.tie_embeddings=false", "model/position=learned")
    assert embedding["names"] == {"embedding.weight", "position.embedding.weight"}
    assert head["names"] == {"head.weight"}
    assert {name.split(".", 2)[2] for name in matrices["names"]} == {
        "attention.qkv.weight", "attention.out.weight",
        "feed_forward.gate_up.weight", "feed_forward.down.weight",
    }  # fmt: skip
    assert "final_norm.weight" in vectors["names"] and "blocks.0.attention.qkv.bias" in vectors["names"]
    assert [group["weight_decay"] for group in (embedding, head, matrices, vectors)] == [0.1, 0.1, 0.1, 0.0]


def test_a_tied_head_is_the_embedding_s_and_a_group_without_parameters_is_left_out():
    assert [group["role"] for group in groups_of("model.tie_embeddings=true")] == [
        "embedding", "matrices", "vectors"
    ]  # fmt: skip


def test_muon_has_the_matrices_and_adamw_the_rest():
    groups = groups_of("optimizer=muon")
    assert {group["role"]: group["use_muon"] for group in groups} == {
        "embedding": False, "matrices": True, "vectors": False
    }  # fmt: skip


@pytest.mark.parametrize("config", [ADAMW, LION])
def test_the_schedule_s_rate_reaches_each_role_at_its_scale(config):
    weight, gain = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    named = [("embedding.weight", weight), ("final_norm.weight", gain)]
    optimizer = config.build(config.parameter_groups(named, lambda p: p.ndim))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 * 0.5, 0.1 * 3]
    set_learning_rate(optimizer, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01 * 0.5, 0.01 * 3]


@pytest.mark.parametrize("config", [ADAMW, LION])
def test_the_first_update_is_the_sign_of_the_gradient_after_decay(config):
    weight = torch.nn.Parameter(torch.tensor([[2.0, -1.0]]))
    optimizer = config.build(config.parameter_groups([("w", weight)], lambda p: p.ndim))
    weight.grad = torch.tensor([[0.3, -7.0]])
    optimizer.step()
    expected = torch.tensor([[2.0, -1.0]]) * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(weight.detach(), expected)


def lion(steps: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and momentum after steps, each a gradient and what torch.amp would set."""
    weight = torch.nn.Parameter(torch.tensor([[2.0, -1.0, 0.5]]))
    optimizer = LION.build(LION.parameter_groups([("w", weight)], lambda p: p.ndim))
    for step in steps:
        weight.grad = torch.tensor([step["gradient"]])
        optimizer.grad_scale = step.get("scale")
        optimizer.found_inf = torch.tensor(step.get("found_inf", 0.0))
        optimizer.step()
    return weight.detach(), optimizer.state[weight]["exp_avg"]


def test_lion_follows_algorithm_2_of_its_paper():
    gradients = [[0.3, -7.0, 1.0], [-3.0, 60.0, 1.0], [0.1, 0.2, -90.0]]
    x, m = torch.tensor([[2.0, -1.0, 0.5]]), torch.zeros(1, 3)
    for gradient in map(torch.tensor, gradients):
        c = 0.9 * m + 0.1 * gradient
        x = x - 0.1 * (c.sign() + 0.5 * x)
        m = 0.99 * m + 0.01 * gradient
    ours = lion([{"gradient": gradient} for gradient in gradients])
    torch.testing.assert_close(ours, (x, m))


def test_lion_divides_by_the_scale_and_a_step_with_inf_changes_nothing():
    plain = lion([{"gradient": [0.3, -7.0, 1.0]}, {"gradient": [-3.0, 60.0, 1.0]}])
    scaled = lion([
        {"gradient": [1.2, -28.0, 4.0], "scale": torch.tensor(4.0)},
        {"gradient": [float("nan"), float("inf"), 1.0], "found_inf": 1.0},
        {"gradient": [-3.0, 60.0, 1.0]},
    ])  # fmt: skip
    assert torch.equal(plain[0], scaled[0])
    assert torch.equal(plain[1], scaled[1])
