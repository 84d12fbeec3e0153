"""Which kernel a run gets: what each backend needs, what is here, and the fastest exact one of those."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Literal, get_args

import torch

from llmtrain.config import Config, UserError
from llmtrain.model.kernels.base import Kernel

Backend = Literal["eager", "sdpa", "flex", "flash", "flash4", "varlen"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Use:
    """Where a decoder runs, and for what."""

    device: str
    """cpu or cuda."""
    dtype: torch.dtype
    """What q, k and v come in."""
    documents: bool
    """Whether rows hold several documents that are kept apart."""
    training: bool = True
    """Whether there is a backward pass."""


@dataclass(frozen=True)
class Shape:
    """What a decoder asks of its kernel."""

    head_dim: int
    slopes: bool
    """Whether positions are ALiBi's."""


@dataclass(frozen=True)
class Demand:
    """What a backend of CUDA needs."""

    library: str
    """The module that has it."""
    way: str
    """How to get the library."""
    distribution: str | None = None
    """The package it comes with, where other packages have a module of that name."""
    generation: tuple[int, int] = (8, 0)
    """The oldest compute capability."""
    dtypes: tuple[torch.dtype, ...] = HALF
    slopes: bool = False
    """Whether it has ALiBi."""
    head_dims: range = range(8, 257, 8)


DEMANDS: dict[str, Demand] = {
    "flex": Demand(
        "triton",
        "torch for CUDA brings it",
        generation=(7, 0),
        dtypes=(*HALF, torch.float32),
        slopes=True,
        head_dims=range(16, 257),
    ),
    "flash": Demand(
        "flash_attn.flash_attn_interface",
        "pip install --no-build-isolation 'llmtrain[flash]'",
        slopes=True,
        head_dims=range(1, 257),
    ),
    "flash4": Demand(
        "flash_attn.cute.interface", "pip install 'llmtrain[flash4]'", "flash-attn-4", generation=(9, 0)
    ),
    "varlen": Demand("torch.nn.attention.varlen", "torch 2.11 and later have it"),
}


class KernelConfig(Config):
    """What `model.attention` may hold; a kernel of one's own is a subclass, chosen by its `_target_`."""

    @property
    def asked(self) -> str:
        """Which kernel is asked for, by name; `auto`: none in particular."""
        return type(self).__name__

    def kernel(self, shape: Shape, use: Use | None = None) -> Kernel:
        """The kernel for such a decoder and use; UserError in one line where it cannot be had.

        Without a `use`, as for a decoder that is only counted or exported, it is one that works everywhere.
        """
        raise NotImplementedError


class AttentionConfig(KernelConfig):
    """How attention is computed; never what it computes."""

    backend: Literal["auto", "eager", "sdpa", "flex", "flash", "flash4", "varlen"]
    """eager is the readable reference, auto the fastest exact one for this run."""

    @property
    def asked(self) -> str:
        """See KernelConfig."""
        return self.backend

    def kernel(self, shape: Shape, use: Use | None = None) -> Kernel:
        """The kernel that `backend` names. Of `auto` it says why it is that one.

        UserError in one line where it cannot be had. Without a `use`, as for a decoder that is only counted
        or exported, it is eager or sdpa, which work everywhere.
        """
        if use is None:
            return load("eager" if self.backend == "eager" else "sdpa")
        if self.backend == "auto":
            backend, reason = automatic(shape, use)
            return load(backend)._replace(why=reason)
        lacking = missing(self.backend, shape, use)
        if lacking is not None:
            raise UserError(f"model.attention.backend={self.backend}: {lacking}")
        return load(self.backend)


def load(backend: str) -> Kernel:
    """The kernel; the libraries it needs are imported only now."""
    kernel: Kernel = import_module(f"llmtrain.model.kernels.{backend}").KERNEL
    return kernel


def automatic(shape: Shape, use: Use) -> tuple[Backend, str]:
    """The fastest exact backend for such a run, and why it is that one."""
    if use.device != "cuda":
        return "sdpa", "the fused one of a CPU; documents and ALiBi are one mask a forward"
    wanted: tuple[Backend, ...]
    if shape.slopes:
        task, wanted = "ALiBi", ("flash", "flex")
    elif use.documents:
        task, wanted = "documents kept apart", ("flash4", "flash", "varlen", "flex")
    else:
        return "sdpa", "nothing but the causal mask: torch takes cuDNN's or its flash attention"
    passed: list[str] = []
    for backend in wanted:
        lacking = missing(backend, shape, use)
        if lacking is None:
            return backend, "; ".join([f"the fastest here for {task}", *passed])
        passed.append(f"not {backend}: {lacking}")
    return "sdpa", "; ".join([f"{task} as one mask a forward, which is slow", *passed])


def missing(backend: str, shape: Shape, use: Use) -> str | None:
    """What there is not for this backend, and how to get it; None where it can be had."""
    return next(_obstacles(backend, shape, use), None)


def _obstacles(backend: str, shape: Shape, use: Use) -> Iterator[str]:
    demand = DEMANDS.get(backend)
    if demand is None:
        return
    if shape.slopes and not demand.slopes:
        yield "has no ALiBi: take auto, flash, flex or sdpa, or another model.position"
    if use.device != "cuda":
        if backend != "flex":
            yield "needs an NVIDIA GPU: take auto, sdpa or eager on a CPU"
        elif use.training:
            yield "has no backward pass on a CPU: take auto, sdpa or eager there"
        return
    if use.dtype not in demand.dtypes:
        name = {torch.float32: "fp32"}.get(use.dtype, str(use.dtype))
        yield f"computes in bf16, not in {name}: set precision=bf16 or bf16_autocast, or take auto"
    capability = torch.cuda.get_device_capability()
    if capability < demand.generation:
        needed, has = (".".join(map(str, version)) for version in (demand.generation, capability))
        yield f"needs a GPU of compute capability {needed} or later, this one has {has}: take auto"
    head_dims = _head_dims(backend, demand, capability)
    if shape.head_dim not in head_dims:
        steps = f" in steps of {head_dims.step}" if head_dims.step > 1 else ""
        yield (
            f"takes a head_dim of {head_dims[0]} to {head_dims[-1]}{steps}, not {shape.head_dim}: "
            "change model.head_dim, or take auto"
        )
    failure = _import_failure(demand)
    if failure is not None:
        yield f"{failure}: {demand.way}, or take auto"


def _head_dims(backend: str, demand: Demand, capability: tuple[int, int]) -> range:
    """flash-attn 4 goes up to 256 on Hopper only (interface.py, _validate_head_dims)."""
    return range(8, 129, 8) if backend == "flash4" and capability[0] > 9 else demand.head_dims


def _import_failure(demand: Demand) -> str | None:
    try:
        if demand.distribution is not None:
            metadata.version(demand.distribution)
        import_module(demand.library)
    except metadata.PackageNotFoundError:
        return f"{demand.distribution} is not installed"
    except Exception as error:  # whatever a library of someone else's raises at import, it cannot be had
        return f"{demand.library} cannot be imported ({type(error).__name__}: {error})"
    return None
