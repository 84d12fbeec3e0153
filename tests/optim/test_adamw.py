"""Which parameters decay, and one update against the formula."""

import torch

from llmtrain.optim.adamw import AdamWConfig

CONFIG = AdamWConfig(
    kind="adamw", lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5, gradient_clipping=1.0
)


def test_matrices_decay_and_gains_do_not():
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    groups = CONFIG.parameter_groups(module.named_parameters(), lambda p: p.ndim)
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [len(group["params"]) for group in groups] == [1, 3]
    assert groups[0]["params"][0] is module[0].weight


def test_a_group_without_parameters_is_left_out():
    module = torch.nn.Linear(3, 2, bias=False)
    assert len(CONFIG.parameter_groups(module.named_parameters(), lambda p: p.ndim)) == 1


def test_first_update_is_the_sign_of_the_gradient_after_decay():
    weight = torch.nn.Parameter(torch.tensor([[2.0, -1.0]]))
    optimizer = CONFIG.build(CONFIG.parameter_groups([("w", weight)], lambda p: p.ndim))
    weight.grad = torch.tensor([[0.3, -7.0]])
    optimizer.step()
    expected = torch.tensor([[2.0, -1.0]]) * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(weight.detach(), expected)
