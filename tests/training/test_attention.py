"""Attention kernels in a run: none waits for the device, and one that computes something else stops the start."""

from __future__ import annotations

import pytest
import torch

from llmtrain.config import UserError
from llmtrain.model.kernels import Kernel, choose, eager, sdpa
from tests.model.libraries import MODULES, stand_in
from tests.model.test_kernels import CPU, MASKS, inputs, one_document
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


def test_a_run_does_not_start_with_a_kernel_that_ignores_documents(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa, "KERNEL", Kernel("sdpa", one_document, eager.attend))
    with pytest.raises(UserError, match="backend=sdpa: a changed token moved logits"), started(tiny):
        pass
