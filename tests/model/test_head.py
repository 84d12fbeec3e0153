"""The head and its cross entropy in chunks: against the plain formula, in memory, and without waiting."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.model.decoder import padded
from llmtrain.model.loss import IGNORED, Losses, head_losses, softmax_
from tests.model.small import POSITIONS, decoder, packed_batch, relative_error

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROWS, LENGTH, WIDTH, VOCAB = 3, 16, 8, 300


def inputs(
    vocab_size: int = VOCAB,
    dtype: torch.dtype = torch.float64,
    shape: Sequence[int] = (ROWS, LENGTH),
    device: str = "cpu",
    width: int = WIDTH,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, a table whose padding is far from zero, and labels of which some are none."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(padded(vocab_size), width, generator=generator, dtype=torch.float64)
    weight[vocab_size:] = 50.0
    labels = torch.randint(0, vocab_size, tuple(shape), generator=generator, dtype=torch.int32)
    labels[0, :3] = labels[-1, -1] = IGNORED
    leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
    return leaves[0], leaves[1], labels.to(device)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, z_loss: float = 0.0) -> Losses:
    """The same by the book: all logits at once, and autograd."""
    logits = F.linear(hidden, weight)[..., :vocab_size]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten().long(), reduction="none").view(
        labels.shape
    )
    normalisers = logits.logsumexp(-1)[labels != IGNORED]
    return Losses(losses.sum() + z_loss * normalisers.square().sum(), losses.sum(dim=1))


def gradients(losses: Losses, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(losses.total * 0.37, list(leaves))


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [1, 7, 16, 47, 48, 8192])
def test_chunks_equal_the_plain_loss_and_its_gradients(chunk: int, z_loss: float) -> None:
    hidden, weight, labels = inputs()
    ours = head_losses(hidden, weight, labels, VOCAB, z_loss, chunk=chunk)
    expected = plain(hidden, weight, labels, VOCAB, z_loss)
    torch.testing.assert_close(ours.total, expected.total, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.rows, expected.rows, rtol=1e-12, atol=0)
    assert not ours.rows.requires_grad
    for one, other in zip(
        gradients(ours, (hidden, weight)), gradients(expected, (hidden, weight)), strict=True
    ):
        assert relative_error(one, other) < 1e-12


def test_its_gradient_is_the_numerical_one() -> None:
    hidden, weight, labels = inputs(vocab_size=5, shape=(2, 3), width=4)
    weight = weight.detach()[:8].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: head_losses(h, w, labels, 5, 1e-2, chunk=4).total, (hidden, weight), atol=1e-6
    )


def test_z_loss_is_in_the_total_alone() -> None:
    hidden, weight, labels = inputs()
    without, with_z = (head_losses(hidden, weight, labels, VOCAB, z) for z in (0.0, 0.5))
    assert torch.equal(without.rows, with_z.rows)
    normalisers = (hidden @ weight[:VOCAB].T).logsumexp(-1)[labels != IGNORED]
    torch.testing.assert_close(with_z.total - without.total, 0.5 * normalisers.square().sum())


def test_the_decoder_s_z_loss_reaches_the_total() -> None:
    model, batch = decoder(), packed_batch()
    before = model(**batch)
    model.z_loss = 1e-2
    after = model(**batch)
    assert torch.equal(before.rows, after.rows)
    assert after.total > before.total + 1


def test_bf16_weights_sum_their_gradient_in_fp32() -> None:
    """64 chunks lose no more than one: products are rounded to bf16 on the CPU, their sum is not."""
    hidden, weight, labels = inputs(dtype=torch.bfloat16, shape=(4, 64))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = gradients(plain(exact[0], exact[1], labels, VOCAB), exact)
    for chunk in (4, 256):
        found = gradients(head_losses(hidden, weight, labels, VOCAB, chunk=chunk), (hidden, weight))
        assert [x.dtype for x in found] == [torch.bfloat16] * 2
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) < 1e-2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_scale_of_a_loss_is_not_rounded(dtype: torch.dtype, device: str) -> None:
    """1 / 3 in bf16 is off by 0.2 %, and so would be all gradients of the blocks."""
    hidden, weight, labels = inputs(dtype=dtype, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        total = head_losses(hidden, weight, labels, VOCAB).total
    whole = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    for one, three in zip(torch.autograd.grad(total / 3, (hidden, weight)), whole, strict=True):
        ratio = (one.double() * three.double()).sum() / three.double().square().sum()
        assert ratio.item() == pytest.approx(1 / 3, rel=2e-4)


def test_autocast_multiplies_in_bf16_and_returns_fp32() -> None:
    hidden, weight, labels = inputs(dtype=torch.float32)
    expected = plain(hidden, weight, labels, VOCAB)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = head_losses(hidden, weight, labels, VOCAB, chunk=16)
    found = gradients(losses, (hidden, weight))
    assert [losses.total.dtype, *(x.dtype for x in found)] == [torch.float32] * 3
    assert 0 < relative_error(losses.rows, expected.rows) < 1e-2
    for one, other in zip(found, gradients(expected, (hidden, weight)), strict=True):
        assert 1e-6 < relative_error(one, other) < 3e-2


def test_a_leaf_that_needs_no_gradient_gets_none() -> None:
    hidden, weight, labels = inputs()
    expected = gradients(plain(hidden, weight, labels, VOCAB), (hidden, weight))
    for index, leaf in enumerate((hidden, weight)):
        leaves = [hidden.detach(), weight.detach()]
        leaves[index] = leaf
        (found,) = gradients(head_losses(leaves[0], leaves[1], labels, VOCAB, chunk=16), [leaf])
        assert relative_error(found, expected[index]) < 1e-12


def test_a_hidden_that_is_not_contiguous_gets_its_gradient() -> None:
    hidden, weight, labels = inputs()
    turned = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    expected = gradients(plain(hidden, weight, labels, VOCAB), (hidden,))
    (found,) = gradients(head_losses(turned, weight, labels, VOCAB, chunk=16), (turned,))
    assert relative_error(found, expected[0]) < 1e-12


def test_a_label_below_zero_is_refused() -> None:
    hidden, weight, labels = inputs()
    for wrong in (-1, VOCAB, padded(VOCAB)):
        labels[1, 1] = wrong
        with pytest.raises(IndexError, match=str(wrong)):
            head_losses(hidden, weight, labels, VOCAB)


class Operations(TorchDispatchMode):
    """Counts operators, and remembers the largest result of each dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func._schema.name.removeprefix("aten::")] += 1
        if isinstance(result, Tensor):
            self.largest[result.dtype] = max(self.largest[result.dtype], result.numel())
        return result


def test_no_more_than_a_chunk_of_logits_is_ever_there() -> None:
    vocab_size, positions, chunk = 5000, 256, 32
    hidden, weight, labels = inputs(vocab_size, torch.bfloat16, shape=(4, positions // 4))
    with Operations() as seen:
        head_losses(hidden, weight, labels, vocab_size, chunk=chunk).total.backward()
    of_chunk = chunk * padded(vocab_size)
    assert seen.largest[torch.bfloat16] == of_chunk
    assert seen.largest[torch.float32] == of_chunk
    assert seen.largest[torch.bool] == of_chunk


def test_a_chunk_is_gone_before_the_next_is_made() -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.mm.default:
                alive.append(sum(logits() is not None for logits in seen))
            return func(*args, **(kwargs or {}))

    def watched(logits: Tensor, *rest: Any) -> Tensor:
        seen.append(weakref.ref(logits))
        return softmax_(logits, *rest)

    hidden, weight, labels = inputs()
    with Products():
        head_losses(hidden, weight, labels, VOCAB, softmax=watched, chunk=16)
    assert alive == [0, 0, 0]


def test_without_gradients_there_is_one_product_a_chunk() -> None:
    hidden, weight, labels = inputs()
    expected = plain(hidden, weight, labels, VOCAB).rows
    products = {}
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with mode, Operations() as seen:
            losses = head_losses(hidden, weight, labels, VOCAB, chunk=16)
        torch.testing.assert_close(losses.rows, expected, rtol=1e-12, atol=0)
        products[type(mode).__name__] = sum(seen.calls[name] for name in ("mm", "addmm", "matmul"))
    assert products == {"enable_grad": 9, "no_grad": 3, "inference_mode": 3}


READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"}


@pytest.mark.parametrize("position", POSITIONS)
def test_a_step_reads_nothing_back_from_the_device(position: str) -> None:
    model, batch = decoder(position=POSITIONS[position], attention={"backend": "sdpa"}), packed_batch()
    model.z_loss = 1e-4
    with Operations() as seen:
        model(**batch).total.backward()
    assert seen.calls["mm"] > 0
    assert not READS & seen.calls.keys()
    with Operations() as seen:
        model(**batch).rows.sum().item()
    assert READS & seen.calls.keys()  # or the count above could not fail


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_it_waits_for_nothing_and_equals_float64(compiled: bool) -> None:
    hidden, weight, labels = inputs(5000, torch.bfloat16, shape=(4, 300), device="cuda")
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = plain(exact[0], exact[1], labels, 5000, 1e-4)
    softmax: Any = torch.compile(softmax_) if compiled else softmax_
    arguments: Any = (hidden, weight, labels, 5000, 1e-4, softmax, 500)
    head_losses(*arguments).total.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = head_losses(*arguments)
        found = gradients(losses, (hidden, weight))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative_error(losses.rows, expected.rows) < 1e-2
    for one, other in zip(found, gradients(expected, exact), strict=True):
        assert relative_error(one, other) < 5e-2


@pytest.mark.gpu
@on_gpu
def test_on_a_gpu_the_compiled_softmax_makes_no_fp32_copy_of_the_logits() -> None:
    logits = torch.randn(2048, 50304, device="cuda").bfloat16()
    labels = torch.randint(0, 50257, (2048,), device="cuda")
    softmax = torch.compile(softmax_)
    softmax(logits.clone(), labels, 50257, 0.0, True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    softmax(logits, labels, 50257, 0.0, True)
    assert torch.cuda.max_memory_allocated() - before < logits.nbytes / 8
