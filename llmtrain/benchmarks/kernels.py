"""Attention backends side by side, for every mask: error and speed, for `llmtrain bench kernels`.

Letters: B rows, T positions, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmtrain.benchmarks.data import machine
from llmtrain.benchmarks.measure import FailedError, Result, interleaved, markdown, medians, number
from llmtrain.config import UserError
from llmtrain.model.documents import Documents
from llmtrain.model.kernels import Kernel, Shape, Use
from llmtrain.model.kernels.choose import BACKENDS, load, missing
from llmtrain.model.position import alibi_slopes

logger = logging.getLogger(__name__)

MASKS = ("causal", "documents", "alibi", "both")
WARM_UP = 3
"""Calls before the clock starts: the first of them compile."""
ERRORS = ("out_error", "dq_error", "dk_error", "dv_error")
SPEEDS = ("forward_ms", "forward_tflops", "both_ms", "both_tflops")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Sizes:
    """What attention is computed of."""

    rows: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    documents: int
    """Documents of a row, where there are several."""
    dtype: str


TRAINING = Sizes(rows=8, length=2048, heads=16, kv_heads=16, head_dim=128, documents=4, dtype="bf16")
"""A micro-batch of the 1.3B preset."""
SMALL = Sizes(rows=1, length=256, heads=4, kv_heads=1, head_dim=32, documents=4, dtype="fp32")
"""What a CPU computes in no time."""


def sizes_here(**changes: Any) -> Sizes:
    """TRAINING with a GPU, else SMALL, but for changes that are not None; UserError where they do not fit."""
    start = TRAINING if torch.cuda.is_available() else SMALL
    sizes = replace(start, **{key: value for key, value in changes.items() if value is not None})
    if sizes.heads % sizes.kv_heads:
        raise UserError(f"--kv-heads {sizes.kv_heads} does not divide --heads {sizes.heads}")
    if not 1 <= sizes.documents <= sizes.length:
        raise UserError(f"--documents {sizes.documents}: a row of --length {sizes.length} holds 1 to as many")
    return sizes


@dataclass(frozen=True)
class Problem:
    """One batch of one mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    starts: list[int]
    slopes: Tensor | None

    @property
    def flops(self) -> int:
        """Useful operations of the forward pass: 4 D for each head, query, and key that it may see."""
        lengths = [b - a for a, b in zip(self.starts, self.starts[1:], strict=False)]
        pairs = sum(n * (n + 1) // 2 for n in lengths)
        return 4 * self.q.shape[2] * self.q.shape[3] * pairs

    def prepared(self, kernel: Kernel, dtype: torch.dtype) -> Any:
        """What the kernel makes of the mask."""
        rows, length = self.q.shape[:2]
        starts = torch.tensor(self.starts, dtype=torch.int32, device=self.q.device)
        return kernel.prepare(Documents(rows, length, starts, self.q.device), self.slopes, dtype)


def problem(sizes: Sizes, mask: str, device: torch.device) -> Problem:
    """Normal q, k, v and gradient of the output, the same at every call; documents cut at random."""
    generator = torch.Generator().manual_seed(0)

    def heads(count: int) -> Tensor:
        shape = sizes.rows, sizes.length, count, sizes.head_dim
        return torch.randn(shape, generator=generator).to(device, DTYPES[sizes.dtype])

    starts = [*range(0, sizes.rows * sizes.length + 1, sizes.length)]
    if mask in ("documents", "both"):
        for row in range(sizes.rows):
            cuts = torch.randperm(sizes.length - 1, generator=generator)[: sizes.documents - 1] + 1
            starts += (row * sizes.length + cuts).tolist()
    slopes = torch.tensor(alibi_slopes(sizes.heads), device=device) if mask in ("alibi", "both") else None
    kv = sizes.kv_heads
    return Problem(heads(sizes.heads), heads(kv), heads(kv), heads(sizes.heads), sorted(starts), slopes)


def results(kernel: Kernel, given: Problem, dtype: torch.dtype, backward: bool) -> list[Tensor]:
    """Output, and the gradients of q, k and v, computed in `dtype`."""
    q, k, v = (x.to(dtype, copy=True).requires_grad_(backward) for x in (given.q, given.k, given.v))
    out = kernel.attend(q, k, v, given.prepared(kernel, dtype))
    return [out.detach(), *(torch.autograd.grad(out, (q, k, v), given.grad.to(dtype)) if backward else ())]


def errors(kernel: Kernel, sizes: Sizes, mask: str, device: torch.device, backward: bool) -> Result:
    """The largest difference from float64 over the largest value, of one row."""
    given = problem(replace(sizes, rows=1), mask, device)
    exact = results(load("eager"), given, torch.float64, backward)
    found = results(kernel, given, DTYPES[sizes.dtype], backward)
    return {
        f"{name}_error": float((value.double() - reference).abs().max() / reference.abs().max())
        for name, value, reference in zip(("out", "dq", "dk", "dv"), found, exact, strict=False)
    }


def turn(kernel: Kernel, given: Problem, seconds: float, backward: bool) -> Result:
    """Milliseconds of a forward pass, and of a forward and a backward pass; the mask is made beforehand."""
    prepared = given.prepared(kernel, given.q.dtype)
    q, k, v = (x.detach().requires_grad_(backward) for x in (given.q, given.k, given.v))

    def forward() -> Tensor:
        with torch.no_grad():
            return kernel.attend(q, k, v, prepared)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(kernel.attend(q, k, v, prepared), (q, k, v), given.grad)

    times = {"forward_ms": _milliseconds(forward, seconds, q.device)}
    if backward:
        times["both_ms"] = _milliseconds(both, seconds, q.device)
    return times


def _milliseconds(call: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Of one call, over as many as fit into `seconds`; the device is waited for at both ends only."""

    def clock(calls: int) -> float:
        _wait(device)
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(device)
        return time.perf_counter() - begin

    clock(WARM_UP)
    calls = max(1, round(seconds / max(clock(1), 1e-6)))
    return clock(calls) / calls * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare_kernels(
    sizes: Sizes, *, backends: Sequence[str] = BACKENDS, seconds: float, rounds: int
) -> dict[str, Any]:
    """For each mask each backend's errors, times and TFLOP/s, or `missing` or `error`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # the table says so
        masks = {mask: _compare(mask, sizes, backends, device, seconds, rounds) for mask in MASKS}
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {"machine": machine() | {"device": name}, "sizes": asdict(sizes), "masks": masks}


def _compare(
    mask: str, sizes: Sizes, backends: Sequence[str], device: torch.device, seconds: float, rounds: int
) -> dict[str, Result]:
    shape = Shape(sizes.head_dim, slopes=mask in ("alibi", "both"))
    use = Use(device.type, DTYPES[sizes.dtype], documents=mask in ("documents", "both"))
    given = problem(sizes, mask, device)
    found: dict[str, Result] = {}
    turns: dict[str, Callable[[], Result]] = {}
    for backend in backends:
        backward = missing(backend, shape, use) is None
        lacking = missing(backend, shape, replace(use, training=backward))
        if lacking is not None:
            found[backend] = {"missing": lacking}
            continue
        logger.info("%s, %s: error against float64", mask, backend)
        kernel = load(backend)
        try:
            found[backend] = _attempt(partial(errors, kernel, sizes, mask, device, backward))
        except FailedError as error:
            found[backend] = {"error": str(error)}
        else:
            turns[backend] = partial(_attempt, partial(turn, kernel, given, seconds, backward))
    logger.info("%s: %d rounds of %s", mask, rounds, ", ".join(turns))
    for backend, measured in interleaved(turns, rounds).items():
        if not isinstance(measured, list):
            found[backend] = {"error": str(measured)}
            continue
        found[backend] |= medians(measured) | {"rounds": measured} | {"flops": given.flops}
        # The backward pass has five products of this size where the forward pass has two.
        for key, work in (("forward", 1.0), ("both", 3.5)):
            if f"{key}_ms" in found[backend]:
                found[backend][f"{key}_tflops"] = work * given.flops / found[backend][f"{key}_ms"] / 1e9
    return found


def _attempt(call: Callable[[], Result]) -> Result:
    """FailedError for whatever goes wrong, out of memory for one: the other backends go on."""
    try:
        return call()
    except Exception as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise FailedError(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from error


def kernels_table(report: Mapping[str, Any]) -> str:
    """Every mask and backend as a Markdown table; below it a line for each that could not be measured."""
    headings = (
        "mask", "backend", "error: out", "dq", "dk", "dv",
        "forward, ms", "TFLOP/s", "forward + backward, ms", "TFLOP/s",
    )  # fmt: skip
    rows, notes = [], []
    for mask, found in report["masks"].items():
        for backend, result in found.items():
            lacking = result.get("missing", result.get("error"))
            if lacking is not None:
                notes.append(f"- {mask}, {backend}: {lacking}")
                rows.append([mask, backend, "not here" if "missing" in result else "failed", *["-"] * 7])
                continue
            errors = [f"{result[key]:.1e}" if key in result else "-" for key in ERRORS]
            rows.append([mask, backend, *errors, *(number(result.get(key)) for key in SPEEDS)])
    if report["machine"]["device"] == "CPU" and any("flex" in found for found in report["masks"].values()):
        notes.append("- flex is not fused on a CPU: its times here say nothing of a GPU's")
    return "\n".join([markdown(headings, rows), *(["", *notes] if notes else [])])
