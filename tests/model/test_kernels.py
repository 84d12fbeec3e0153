"""Every backend for every mask and kind of heads against float64; which one a run gets; the probe."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask

from llmtrain.config import UserError
from llmtrain.model.documents import Documents
from llmtrain.model.kernels import AttentionConfig, Kernel, Shape, Use, choose, eager, sdpa
from llmtrain.model.kernels.probe import check_gradients, check_isolation
from llmtrain.model.position import alibi_slopes
from tests.model.libraries import MODULES, stand_in
from tests.model.small import KV_HEADS, POSITIONS, SEQ_LEN, VOCAB, decoder, relative_error

CPU, HEADS, LENGTH = torch.device("cpu"), 4, 150
PACKED = [0, 7, 8, 140, 150, 183, 300]
"""Two rows of 150 positions, more than a block: documents of 7, 1, 132 and 10, then of 33 and 117."""
MASKS = ("causal", "documents", "alibi", "both")
CELLS = [
    pytest.param(mask, heads, id=f"{mask}-{heads}") for mask, heads in itertools.product(MASKS, KV_HEADS)
]


def inputs(mask: str, heads: str, head_dim: int, device: torch.device) -> tuple[Any, ...]:
    """q, k, v float64 [2, 150, H or K, D], the documents and the slopes of a cell."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, LENGTH, n, head_dim, generator=generator, dtype=torch.float64).to(device)
        for n in (HEADS, KV_HEADS[heads], KV_HEADS[heads])
    )
    starts = PACKED if mask in ("documents", "both") else [0, LENGTH, 2 * LENGTH]
    documents = Documents(2, LENGTH, torch.tensor(starts, dtype=torch.int32, device=device), device)
    slopes = torch.tensor(alibi_slopes(HEADS), device=device) if mask in ("alibi", "both") else None
    return q, k, v, documents, slopes


def outcome(
    kernel: Kernel, cell: tuple[Any, ...], dtype: torch.dtype, attend: Any = None, backward: bool = True
) -> list[Tensor]:
    """Output and the gradients of q, k, v, which come as views of one tensor, as attention has them."""
    *heads, documents, slopes = cell
    joint = torch.cat(heads, dim=2).to(dtype).requires_grad_(backward)
    q, k, v = joint.split([x.shape[2] for x in heads], dim=2)
    out = (attend or kernel.attend)(q, k, v, kernel.prepare(documents, slopes, dtype))
    if not backward:
        return [out]
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
    (out * weights.to(dtype)).sum().backward()
    assert joint.grad is not None
    return [out, *joint.grad.split([x.shape[2] for x in heads], dim=2)]


def agree(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, value, reference in zip(("out", "dq", "dk", "dv"), found, expected, strict=False):
        assert relative_error(value, reference) < tolerance, name


@pytest.mark.parametrize(("mask", "heads"), CELLS)
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex"])
def test_cpu_backends_equal_float64(backend: str, mask: str, heads: str) -> None:
    cell = inputs(mask, heads, 16, CPU)
    backward = backend != "flex"
    found = outcome(choose.load(backend), cell, torch.float32, backward=backward)
    agree(found, outcome(eager.KERNEL, cell, torch.float64), 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("mask", "heads"), CELLS)
@pytest.mark.parametrize("backend", choose.BACKENDS)
def test_gpu_backends_equal_float64(backend: str, mask: str, heads: str) -> None:
    slopes = mask in ("alibi", "both")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    use = Use("cuda", torch.bfloat16, documents=True)
    lacking = "needs a CUDA device" if device == "cpu" else choose.missing(backend, Shape(64, slopes), use)
    if lacking is not None:
        pytest.skip(f"{backend}: {lacking}")
    kernel, cell = choose.load(backend), inputs(mask, heads, 64, torch.device(device))
    cell = tuple(x.bfloat16().double() for x in cell[:3]) + cell[3:]
    expected = outcome(eager.KERNEL, cell, torch.float64)
    agree(outcome(kernel, cell, torch.bfloat16), expected, 3e-2)
    torch._dynamo.reset()  # it compiles a function a few times only
    compiled = torch.compile(kernel.attend, fullgraph=True, dynamic=False)
    agree(outcome(kernel, cell, torch.bfloat16, compiled), expected, 3e-2)


@pytest.mark.parametrize(("mask", "heads"), CELLS)
@pytest.mark.parametrize("backend", ["flash", "flash4", "varlen"])
def test_what_libraries_are_given(
    monkeypatch: pytest.MonkeyPatch, backend: str, mask: str, heads: str
) -> None:
    if mask in ("alibi", "both") and backend != "flash":
        pytest.skip(f"{backend} has no ALiBi")
    stand_in(monkeypatch, backend)
    cell = inputs(mask, heads, 8, CPU)
    agree(
        outcome(choose.load(backend), cell, torch.float32), outcome(eager.KERNEL, cell, torch.float64), 2e-6
    )


def test_varlen_without_grouped_heads_gets_repeated_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "varlen")
    kernel, cell = choose.load("varlen"), inputs("documents", "GQA", 8, CPU)
    monkeypatch.setattr(import_module("llmtrain.model.kernels.varlen"), "GROUPS", False)
    agree(outcome(kernel, cell, torch.float32), outcome(eager.KERNEL, cell, torch.float64), 2e-6)


OTHER_DOCUMENTS = (
    PACKED,
    [0, 1, 2, 3, 150, 160, 170, 180, 300],
    [0, 20, 40, 150, 151, 152, 300],
)


@pytest.mark.parametrize(
    ("backend", "slopes"),
    [("eager", True), ("sdpa", False), ("sdpa", True), ("flex", False), ("flex", True), ("flash4", False),
     ("varlen", False)],
)  # fmt: skip
def test_one_graph_for_all_documents(monkeypatch: pytest.MonkeyPatch, backend: str, slopes: bool) -> None:
    """`fullgraph` makes a break an error."""
    if backend in MODULES or backend == "varlen":
        stand_in(monkeypatch, backend)
    kernel, counter = choose.load(backend), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(kernel.attend, fullgraph=True, dynamic=False, backend=counter)
    backward = backend != "flex"
    *heads, _, given = inputs("alibi" if slopes else "causal", "GQA", 8, CPU)
    for starts in OTHER_DOCUMENTS:
        cell = (*heads, Documents(2, LENGTH, torch.tensor(starts, dtype=torch.int32), CPU), given)
        found = outcome(kernel, cell, torch.float32, compiled, backward)
        agree(found, outcome(eager.KERNEL, cell, torch.float64), 2e-6)
        assert counter.frame_count == 1


def test_layers_share_the_mask_that_sdpa_keeps_for_the_backward_pass() -> None:
    *heads, documents, _ = inputs("documents", "MHA", 16, CPU)
    mask = sdpa.prepare(documents, None, torch.float32)
    assert mask is not None
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for _ in range(3):
            sdpa.attend(*(x.float().requires_grad_() for x in heads), mask)
    assert kept.count(mask.untyped_storage().data_ptr()) == 3


@pytest.mark.parametrize(("given", "places"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8)])
def test_starts_have_few_lengths(given: int, places: int) -> None:
    starts = torch.linspace(0, 60, given + 1).int()
    padded = Documents(1, 60, starts, CPU).starts
    assert padded.tolist() == [*starts.tolist(), *[60] * (places - given)]
    assert padded.dtype == torch.int32
    assert Documents(3, 20, None, CPU).starts.tolist() == [0, 20, 40, 60, 60]


@pytest.mark.parametrize(("rows", "length"), [(2, 24), (2, 300), (3, 512), (1, 129), (1, 128)])
def test_flex_blocks_are_those_of_the_full_mask(rows: int, length: int) -> None:
    flex = choose.load("flex")
    generator = torch.Generator().manual_seed(length)
    cuts = torch.randint(0, rows * length, (9,), generator=generator).tolist()
    starts = sorted({*range(0, rows * length + 1, length), *cuts})
    for given in (starts, [*range(0, rows * length + 1, length)]):
        documents = Documents(rows, length, torch.tensor(given, dtype=torch.int32), CPU)
        found = flex.prepare(documents, None, torch.float32).mask
        expected = create_block_mask(found.mask_mod, found.shape[0], None, length, length, device="cpu")
        for kind in ("kv", "full_kv", "q", "full_q"):
            numbers = getattr(expected, f"{kind}_num_blocks")
            assert torch.equal(getattr(found, f"{kind}_num_blocks"), numbers)
            indices, reference = getattr(found, f"{kind}_indices"), getattr(expected, f"{kind}_indices")
            listed = torch.arange(indices.shape[-1]) < numbers[..., None]
            assert torch.equal(indices[listed], reference[listed])


# Which backend a run gets

H100, A100, B200, V100 = (9, 0), (8, 0), (10, 0), (7, 0)
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Pretends to a GPU and to libraries that can be imported."""

    def pretend(capability: tuple[int, int], *libraries: str) -> None:
        known = {id(demand): name for name, demand in choose.DEMANDS.items()}

        def failure(demand: choose.Demand) -> str | None:
            return None if known[id(demand)] in libraries else f"{known[id(demand)]} is not here"

        monkeypatch.setattr(choose, "_import_failure", failure)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return pretend


ALL = ("flex", "flash", "flash4", "varlen")


@pytest.mark.parametrize(
    ("capability", "libraries", "dtype", "documents", "slopes", "head_dim", "expected"),
    [
        (H100, ALL, torch.bfloat16, False, False, 128, "sdpa"),
        (H100, ALL, torch.bfloat16, True, False, 128, "flash4"),
        (H100, ("flash", "varlen", "flex"), torch.bfloat16, True, False, 128, "flash"),
        (H100, ("varlen", "flex"), torch.bfloat16, True, False, 128, "varlen"),
        (H100, ("flex",), torch.bfloat16, True, False, 128, "flex"),
        (H100, (), torch.bfloat16, True, False, 128, "sdpa"),
        (H100, ALL, torch.bfloat16, True, False, 36, "flash"),
        (H100, ("varlen", "flex"), torch.bfloat16, True, False, 36, "flex"),
        (H100, ALL, torch.bfloat16, True, True, 128, "flash"),
        (H100, ALL, torch.bfloat16, False, True, 128, "flash"),
        (H100, ("flash4", "varlen", "flex"), torch.bfloat16, True, True, 128, "flex"),
        (H100, ALL, torch.float32, True, False, 128, "flex"),
        (H100, ALL, torch.float32, True, False, 8, "sdpa"),
        (A100, ALL, torch.bfloat16, True, False, 128, "flash"),
        (B200, ALL, torch.bfloat16, True, False, 128, "flash4"),
        (B200, ALL, torch.bfloat16, True, False, 192, "flash"),
        (V100, ALL, torch.float16, True, True, 64, "flex"),
    ],
)
def test_auto_on_a_gpu(
    machine: Machine,
    capability: tuple[int, int],
    libraries: tuple[str, ...],
    dtype: torch.dtype,
    documents: bool,
    slopes: bool,
    head_dim: int,
    expected: str,
) -> None:
    machine(capability, *libraries)
    backend, reason = choose.automatic(Shape(head_dim, slopes), Use("cuda", dtype, documents))
    assert backend == expected
    assert reason


def test_auto_says_what_it_took_and_why(machine: Machine) -> None:
    config = AttentionConfig(backend="auto")
    kernel = config.kernel(Shape(64, slopes=True), Use("cpu", torch.float32, True))
    assert kernel.name == "sdpa" and kernel.why.startswith("the fused one of a CPU;")
    machine(A100, "flex")
    kernel = config.kernel(Shape(64, slopes=True), Use("cuda", torch.bfloat16, True))
    assert (kernel.name, kernel.why) == (
        "flex",
        "the fastest here for ALiBi; not flash: flash is not here: "
        "pip install --no-build-isolation 'llmtrain[flash]', or take auto",
    )
    asked = AttentionConfig(backend="sdpa").kernel(Shape(64, slopes=True), Use("cpu", torch.float32, True))
    assert asked.why == "as asked"


Named = Literal["flex", "flash", "flash4", "varlen"]
LAPTOP, GPU = Use("cpu", torch.float32, True), Use("cuda", torch.bfloat16, True)
GPU_FP32 = Use("cuda", torch.float32, True)
PLAIN, ALIBI = Shape(64, slopes=False), Shape(64, slopes=True)


@pytest.mark.parametrize(
    ("backend", "use", "shape", "words"),
    [
        ("flash", LAPTOP, PLAIN, "needs an NVIDIA GPU: take auto, sdpa or eager on a CPU"),
        ("varlen", LAPTOP, PLAIN, "needs an NVIDIA GPU"),
        ("flex", LAPTOP, PLAIN, "has no backward pass on a CPU"),
        ("flash", GPU_FP32, PLAIN, "computes in bf16, not in fp32: set precision=bf16 or bf16_autocast"),
        ("varlen", GPU_FP32, PLAIN, "computes in bf16, not in fp32"),
        ("flash4", GPU, ALIBI, "has no ALiBi: take auto, flash, flex or sdpa"),
        ("varlen", GPU, ALIBI, "has no ALiBi: take auto, flash, flex or sdpa"),
        ("varlen", LAPTOP, ALIBI, "has no ALiBi: take auto, flash, flex or sdpa"),
        ("flash4", GPU, PLAIN, "needs a GPU of compute capability 9.0 or later, this one has 8.0"),
        ("varlen", GPU, Shape(60, False), "takes a head_dim of 8 to 256 in steps of 8, not 60"),
        ("flash", GPU, Shape(288, False), "takes a head_dim of 1 to 256, not 288: change model.head_dim"),
        ("flex", GPU, Shape(8, False), "takes a head_dim of 16 to 256, not 8"),
        ("flash", GPU, PLAIN, "flash is not here: pip install --no-build-isolation 'llmtrain[flash]'"),
        ("varlen", GPU, PLAIN, "varlen is not here: torch 2.11 and later have it"),
    ],
    ids=str,
)
def test_what_cannot_be_had_ends_in_one_line(
    machine: Machine, backend: Named, use: Use, shape: Shape, words: str
) -> None:
    machine(A100)
    with pytest.raises(UserError) as caught:
        AttentionConfig(backend=backend).kernel(shape, use)
    assert len(caught.value.lines) == 1
    assert caught.value.lines[0].startswith(f"model.attention.backend={backend}: ")
    assert words in caught.value.lines[0]


def test_missing_packages_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn 4 lets `import flash_attn` succeed without flash-attn 2, and 2 brings an old `cute`."""
    failure = choose._import_failure
    for backend, words in [("flash", "flash_attn"), ("flash4", "flash-attn-4 is not installed")]:
        try:
            choose.load(backend)
        except ImportError:
            assert words in str(failure(choose.DEMANDS[backend]))
    stand_in(monkeypatch, "flash4")
    assert "flash_attn.flash_attn_interface cannot be imported" in str(failure(choose.DEMANDS["flash"]))
    assert failure(choose.Demand("json", "")) is None


def test_what_is_only_counted_asks_nothing_of_the_machine() -> None:
    for backend, name in [("eager", "eager"), ("auto", "sdpa"), ("flash", "sdpa")]:
        assert AttentionConfig.model_validate({"backend": backend}).kernel(Shape(64, False)).name == name


# The probe


def probe(model: Any, documents: bool = True) -> None:
    with torch.no_grad():
        check_isolation(
            lambda ids, positions, cu_seqlens: model(ids, None, positions, cu_seqlens),
            backend=model.kernel.name,
            documents=documents,
            vocab_size=VOCAB,
            seq_len=SEQ_LEN,
            device=CPU,
        )


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("documents", [True, False])
def test_kernels_pass_the_probe(backend: str, position: str, documents: bool) -> None:
    probe(decoder(sharp=False, attention={"backend": backend}, position=POSITIONS[position]), documents)


def changed(prepare: Any) -> Any:
    """An unsharpened decoder whose kernel prepares something else."""
    model = decoder(sharp=False)
    model.kernel = Kernel("mine", prepare, eager.attend)
    return model


def one_document(documents: Documents, slopes: Tensor | None, dtype: torch.dtype) -> Tensor:
    return eager.prepare(Documents(documents.rows, documents.length, None, CPU), slopes, dtype)


def sees_the_future(documents: Documents, slopes: Tensor | None, dtype: torch.dtype) -> Tensor:
    ids = documents.ids
    return torch.where((ids[:, :, None] == ids[:, None])[:, None], 0.0, float("-inf"))


def test_the_probe_finds_a_kernel_that_ignores_documents() -> None:
    with pytest.raises(UserError, match=r"backend=mine: a changed token moved logits of the next document"):
        probe(changed(one_document))
    probe(changed(one_document), documents=False)


@pytest.mark.parametrize("documents", [True, False])
def test_the_probe_finds_a_kernel_that_sees_the_future(documents: bool) -> None:
    with pytest.raises(UserError, match=r"moved logits of earlier tokens of the same document"):
        probe(changed(sees_the_future), documents)


def test_the_probe_finds_rows_that_meet() -> None:
    model = decoder(sharp=False)
    mixed = lambda ids, positions, starts: model(ids, None, positions, starts).cumsum(0)  # noqa: E731
    with torch.no_grad(), pytest.raises(UserError, match="moved logits of another row"):
        check_isolation(mixed, backend="mine", documents=True, vocab_size=VOCAB, seq_len=SEQ_LEN, device=CPU)


def gradient_probe(
    kernel: Kernel,
    position: str = "rope",
    documents: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    width: int = 16,
) -> None:
    slopes = torch.tensor(alibi_slopes(HEADS), device=device) if position == "alibi" else None
    check_gradients(
        kernel,
        shape=(HEADS, 2, width),
        slopes=slopes,
        dtype=dtype,
        documents=documents,
        seq_len=1024,
        device=device,
    )


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_the_probe(backend: str, position: str, documents: bool, dtype: torch.dtype) -> None:
    gradient_probe(choose.load(backend), position, documents, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("backend", choose.BACKENDS)
@pytest.mark.parametrize("documents", [True, False])
def test_gradients_pass_the_probe_on_a_gpu(backend: Any, position: str, documents: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"{backend}: needs a CUDA device")
    lacking = choose.missing(backend, Shape(64, position == "alibi"), Use("cuda", torch.bfloat16, documents))
    if lacking is not None:
        pytest.skip(f"{backend}: {lacking}")
    gradient_probe(choose.load(backend), position, documents, torch.bfloat16, torch.device("cuda"), 64)


def backward_leak(reached: Callable[[Tensor], Tensor]) -> Kernel:
    """A kernel whose outputs are right and whose gradients also go where `reached` has its values from."""

    def attend(q: Tensor, k: Tensor, v: Tensor, prepared: Any) -> Tensor:
        other = reached(v).sum(dim=2, keepdim=True)
        return eager.attend(q, k, v, prepared) + (other - other.detach())

    return Kernel("mine", eager.prepare, attend)


@pytest.mark.parametrize(
    ("reached", "name"),
    [
        (lambda v: v.roll(-1, dims=1), "later tokens of the same document"),
        (lambda v: v.cumsum(1), "the document before it in the row"),
        (lambda v: v.flip(0), "another row"),
    ],
)
def test_the_probe_finds_a_backward_pass_that_leaks(reached: Any, name: str) -> None:
    with pytest.raises(UserError, match=f"backend=mine: a gradient reached {name}"):
        gradient_probe(backward_leak(reached))


@pytest.mark.parametrize("position", ["none", "alibi"])
def test_forward_passes_that_leak_do_so_backward(position: str) -> None:
    for prepare in (one_document, sees_the_future):
        with pytest.raises(UserError, match="backend=mine: a gradient reached"):
            gradient_probe(Kernel("mine", prepare, eager.attend), position)
