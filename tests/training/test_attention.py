"""Attention kernels in a run: none waits for the device, and one that leaks stops the start."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.config import UserError
from llmtrain.model import Decoder
from llmtrain.model.init import initialize_parameters
from llmtrain.model.kernels import Kernel, Shape, Use, choose, eager, sdpa
from tests.model.libraries import MODULES, stand_in
from tests.model.small import POSITIONS, VOCAB, config, relative_error
from tests.model.test_kernels import CPU, MASKS, backward_leak, inputs, one_document
from tests.training.test_syncs import HostReads, started


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", choose.BACKENDS)
def test_nothing_is_read_on_the_host(monkeypatch: pytest.MonkeyPatch, backend: str, mask: str) -> None:
    """What is ours: below some attention there is a library, and torch's own for flex lets nobody look on."""
    if mask in ("alibi", "both") and backend in ("flash4", "varlen"):
        pytest.skip(f"{backend} has no ALiBi")
    if backend in (*MODULES, "varlen"):
        stand_in(monkeypatch, backend)
    kernel, (*heads, documents, slopes) = choose.load(backend), inputs(mask, "GQA", 16, CPU)
    q, k, v = (x.float() for x in heads)
    with HostReads() as reads:
        prepared = kernel.prepare(documents, slopes, torch.float32)
        if backend in ("eager", "sdpa"):
            kernel.attend(q, k, v, prepared)
    assert reads.count == 0


@pytest.mark.parametrize("options", [[], ["precision=bf16_autocast", "fp8=tensorwise"]], ids=str)
def test_a_run_does_not_start_with_a_kernel_that_ignores_documents(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setattr(sdpa, "KERNEL", Kernel("sdpa", one_document, eager.attend))
    refused = pytest.raises(UserError, match="backend=sdpa: a changed token moved logits")
    with refused, started([*tiny, *options]):
        pass


def test_a_run_does_not_start_with_a_backward_pass_that_leaks(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaks = backward_leak(lambda v: v.cumsum(1))
    monkeypatch.setattr(sdpa, "KERNEL", leaks._replace(name="sdpa"))
    refused = pytest.raises(UserError, match="backend=sdpa: a gradient reached the document before it")
    with refused, started(tiny):
        pass


LENGTH = 256


def packed(starts: list[int], device: str) -> dict[str, Tensor]:
    """A batch of two rows with documents that begin at `starts`."""
    ids = torch.randint(VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(len(starts)))
    positions = [torch.arange(b - a) for a, b in itertools.pairwise(starts)]
    batch = {
        "input_ids": ids[:, :-1],
        "labels": ids[:, 1:],
        "position_ids": torch.cat(positions).view(2, LENGTH),
        "cu_seqlens": torch.tensor(starts),
    }
    return {name: tensor.int().to(device) for name, tensor in batch.items()}


def step(model: Decoder, batch: dict[str, Tensor], device: str) -> list[Tensor]:
    """The rows' losses, and a gradient that comes through attention."""
    model.zero_grad()
    with torch.autocast(device, torch.bfloat16):
        losses = model(**batch)
    losses.total.backward()
    gradient = model.get_parameter("blocks.0.attention.qkv.weight").grad
    assert gradient is not None
    return [losses.rows.clone(), gradient.clone()]


@pytest.mark.gpu
@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("backend", choose.BACKENDS)
def test_compiled_blocks_on_a_gpu_neither_wait_nor_compile_again(backend: Any, position: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"{backend}: needs a CUDA device")
    lacking = choose.missing(backend, Shape(64, position == "alibi"), Use("cuda", torch.bfloat16, True))
    if lacking is not None:
        pytest.skip(f"{backend}: {lacking}")
    compiled_equals_eager(backend, position, "cuda")


def compiled_equals_eager(backend: Any, position: str, device: str, compiler: str = "inductor") -> None:
    """Three batches with other documents each: one graph, and after the first nothing is read on the host."""
    keys = {"d_model": 256, "n_kv_heads": 2, "position": POSITIONS[position]}
    plain = config(**keys).build(vocab_size=VOCAB, seq_len=LENGTH, seed=0).to(device)
    use = Use(device, torch.bfloat16, documents=True)
    ours = config(**keys, attention={"backend": backend}).assemble(vocab_size=VOCAB, seq_len=LENGTH, use=use)
    initialize_parameters(ours, 0)
    ours.to(device)
    torch._dynamo.reset()
    ours.compile_blocks(compiler)
    half, end = LENGTH, 2 * LENGTH
    batches = [
        packed(starts, device)
        for starts in (
            [0, 7, 8, half, 300, end],
            [0, 100, 130, 140, half, end],
            [0, half, 257, 258, 400, end],
        )
    ]
    found = [step(ours, batches[0], device)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            found += [step(ours, batch, device) for batch in batches[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch, results in zip(batches, found, strict=True):
        for value, reference in zip(results, step(plain, batch, device), strict=True):
            assert relative_error(value, reference) < 5e-2
