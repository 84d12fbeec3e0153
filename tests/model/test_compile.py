"""Compiled blocks: one graph for all of them, no break, the same numbers; evaluation and sampling without."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.model import Decoder
from llmtrain.model.decoder import Block
from llmtrain.model.generation import generate
from tests.model.small import POSITIONS, SEQ_LEN, VOCAB, decoder, packed_batch, plain_batch, relative_error

LAYERS = 3


class Graphs:
    """A backend of torch.compile that counts what it is given and runs it as it is."""

    def __init__(self) -> None:
        self.blocks = self.softmaxes = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        if any(
            "scaled_dot_product" in str(node.target) or node.target is torch.nn.functional.linear
            for node in graph.graph.nodes
        ):
            self.blocks += 1
        else:
            self.softmaxes += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Graphs of other tests are forgotten, before and after, and torch's functions as ZeRO-3 wrapped them."""
    torch._dynamo.reset()
    torch._dynamo.trace_rules.clear_lru_cache()
    yield
    torch._dynamo.reset()


def compiled(backend: Any = "aot_eager", **changes: Any) -> Decoder:
    model = decoder(n_layers=LAYERS, **{"attention": {"backend": "sdpa"}} | changes)
    model.compile_blocks(backend)
    return model


def other_documents() -> dict[str, Tensor]:
    """A batch of the same shape whose documents lie, and count, otherwise."""
    starts = [0, 11, 24, 25, 30, 37, 48]
    positions = [torch.arange(b - a) for a, b in itertools.pairwise(starts)]
    return packed_batch() | {
        "cu_seqlens": torch.tensor(starts, dtype=torch.int32),
        "position_ids": torch.cat(positions).view(2, SEQ_LEN).int(),
    }


def step(model: Decoder, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    losses = model(**batch)
    losses.total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"total": losses.total, "rows": losses.rows, **gradients}


@pytest.mark.parametrize(
    "changes",
    [
        *({"position": position} for position in POSITIONS.values()),
        {"n_kv_heads": 4},
        {"qk_norm": True, "bias": "all", "residual": "parallel_one_norm"},
        {"attention": {"backend": "eager"}},
    ],
    ids=str,
)
def test_all_blocks_are_one_graph_for_all_documents(changes: dict[str, Any]) -> None:
    """`fullgraph` makes a break an error; that the graphs are counted right, the last line shows."""
    graphs = Graphs()
    model = compiled(graphs, **changes)
    step(model, packed_batch())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (packed_batch(), other_documents(), packed_batch()):
            step(model, batch)
    assert (graphs.blocks, graphs.softmaxes) == (1, 1)
    step(model, {name: tensor[:1] for name, tensor in packed_batch().items() if name != "cu_seqlens"})
    assert graphs.blocks == 2


def test_many_shapes_are_no_error() -> None:
    graphs = Graphs()
    model = compiled(graphs)
    for length in range(5, 17):
        ids = packed_batch()["input_ids"][:, :length]
        step(model, {"input_ids": ids, "labels": ids})
    assert graphs.blocks == 12


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
def test_losses_and_gradients_are_those_of_the_plain_model(precision: str, recompute: bool) -> None:
    results = []
    for model in (compiled(), decoder(n_layers=LAYERS, attention={"backend": "sdpa"})):
        model.activation_checkpointing, model.z_loss = recompute, 1e-3
        model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16_autocast" else nullcontext():
            results.append([step(model, batch) for batch in (packed_batch(), plain_batch(), packed_batch())])
    for ours, plain in zip(*results, strict=True):
        for name, value in plain.items():
            assert relative_error(ours[name], value) < (1e-5 if precision == "fp32" else 2e-2), name


def test_evaluation_and_sampling_compile_nothing() -> None:
    graphs = Graphs()
    model, plain = compiled(graphs), decoder(n_layers=LAYERS, attention={"backend": "sdpa"})
    arguments: Any = ([1, 2, 3], 10, SEQ_LEN, 0.0, torch.Generator(), None)
    assert generate(model, *arguments) == generate(plain, *arguments)
    with torch.no_grad():
        assert torch.equal(model(**packed_batch()).rows, plain(**packed_batch()).rows)
    assert (graphs.blocks, graphs.softmaxes) == (0, 0)
    step(model, packed_batch())
    assert (graphs.blocks, graphs.softmaxes) == (1, 1)


def test_names_stay_and_hooks_on_a_block_run_outside() -> None:
    model, plain = compiled(), decoder(n_layers=LAYERS)
    assert [*model.state_dict()] == [*plain.state_dict()]
    seen = []
    for block in model.blocks:
        assert isinstance(block, Block)
        block.register_forward_hook(lambda *_: seen.append(torch.compiler.is_compiling()))
    step(model, packed_batch())
    assert seen == [False] * LAYERS


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_train_alike_with_inductor(ranks: Any, tiny: list[str], tmp_path: Path, stage: int) -> None:
    """ZeRO-3 gathers a block from hooks around it: its graph stays whole there too."""
    losses = {}
    common = [f"deepspeed=zero{stage}", "max_steps=6", "activation_checkpointing=true", "z_loss=1e-3"]
    beside = ["callbacks.evaluation.every=3", "callbacks.sample.every=3", "callbacks.sample.max_new_tokens=8"]
    for setting in ("false", "true"):
        run = tmp_path / setting
        ranks.run([*tiny, *common, *beside, f"compile={setting}", f"output_dir={run}"], 2, tmp_path)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        losses[setting] = [json.loads(line)["train/loss"] for line in lines]
    assert losses["true"] == pytest.approx(losses["false"], abs=1e-5)
    assert len(losses["true"]) == 6


@pytest.mark.slow
def test_inductor_gives_the_same_losses_and_gradients() -> None:
    ours, plain = compiled("inductor"), decoder(n_layers=LAYERS, attention={"backend": "sdpa"})
    for batch in (packed_batch(), plain_batch(), other_documents()):
        expected = step(plain, batch)
        for name, value in step(ours, batch).items():
            assert relative_error(value, expected[name]) < 1e-5, name
    assert VOCAB % 128  # the softmax that was compiled masks padding
