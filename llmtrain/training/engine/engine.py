"""The training step under DeepSpeed ZeRO."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from llmtrain import distributed
from llmtrain.data.batch import IGNORED, Batch
from llmtrain.distributed import World
from llmtrain.model import Decoder, Losses
from llmtrain.model.decoder import Block
from llmtrain.model.init import Gather
from llmtrain.optim.base import OptimizerConfig, set_learning_rate
from llmtrain.training.engine.config import DeepSpeedConfig, ResolvedPrecision
from llmtrain.training.engine.guard import Guard, Limits
from llmtrain.training.engine.optimizers import build_optimizer
from llmtrain.training.engine.state import EngineState, Read, read_state, restore_state
from llmtrain.training.engine.transfer import PendingStep, Upload
from llmtrain.training.heartbeat import Phase


def build_engine(
    *,
    construct: Callable[[], Decoder],
    initialize: Callable[[Decoder, Gather], None],
    config: DeepSpeedConfig,
    optimizer: OptimizerConfig,
    precision: ResolvedPrecision,
    world: World,
    global_batch_size: int,
    micro_batch_size: int,
    sources: int,
) -> Engine:
    """Construct the model, partitioned from the start under ZeRO-3, initialise it, and start DeepSpeed.

    `initialize(model, gather)` writes each parameter inside `gather(parameter)`.
    """
    import deepspeed
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import set_z3_leaf_modules

    settings = config.settings(
        micro_batch_size=micro_batch_size,
        accumulation=global_batch_size // (world.world_size * micro_batch_size),
        clipping=optimizer.gradient_clipping,
        precision=precision,
    )
    partitioned = config.stage == 3
    with deepspeed.zero.Init(config_dict_or_path=settings) if partitioned else nullcontext():
        model = construct()
    if partitioned:
        # One gather and one hook a block, not one a matrix; and none inside, where blocks are compiled.
        set_z3_leaf_modules(model, [Block])
        initialize(model, lambda parameter: GatheredParameters(parameter, modifier_rank=0))
    else:
        initialize(model, nullcontext)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=build_optimizer(optimizer, model), config=settings
    )
    return Engine(engine, world, config.stage, optimizer.gradient_clipping, micro_batch_size, sources)


class Engine:
    """A model under DeepSpeed. Every method is collective: all ranks call it in the same order."""

    def __init__(
        self,
        deepspeed_engine: Any,
        world: World,
        stage: int,
        clipping: float,
        micro_batch_size: int,
        sources: int,
    ) -> None:
        self.deepspeed = deepspeed_engine
        self._rank, self._ranks = world.rank, world.world_size
        self.device = torch.device(deepspeed_engine.device)
        self._stage = stage
        self._clipping = clipping
        self._micro_batch_size = micro_batch_size
        self._sources = sources
        self._upload = Upload(self.device)
        self._parameters = list(self.model.parameters())
        self.beat: Callable[[Phase], None] = lambda phase: None
        """Told what this rank comes to."""
        self._guard = Guard(deepspeed_engine.optimizer, stage)

    @property
    def accumulation(self) -> int:
        """Micro-batches a rank computes for one optimizer step."""
        return self.deepspeed.gradient_accumulation_steps()

    @property
    def model(self) -> Decoder:
        """The module inside; under ZeRO-3 its parameters are partitioned."""
        return self.deepspeed.module

    def train_step(
        self, batch: Batch, lr: float, stop: bool = False, limits: Limits | None = None
    ) -> PendingStep:
        """One optimizer step over this rank's rows of a global batch, given to the device.

        The loss is the mean over the trained targets of the whole global batch, so neither ranks nor micro
        batches change it. `stop` tells the other ranks that this one wants to end after the step. A step
        above the `limits` is not applied. Under stage 0 nothing here waits for the device.
        """
        self.beat("forward")
        if not self.model.training:
            self.deepspeed.train()
        parts = self._upload(batch.split(self._micro_batch_size))
        targets = torch.cat([(part.labels != IGNORED).sum(dim=1) for part in parts])
        total = distributed.all_reduce_sum(
            torch.stack([targets.sum(), torch.full((), int(stop), device=self.device)])
        )
        # DeepSpeed averages gradients over ranks; the mean over targets is ours.
        scale = self._ranks / total[0].clamp(min=1)
        losses = []
        for part in parts[:-1]:
            losses.append(self._backward(part, scale))
            self.deepspeed.step()
        losses.append(self._backward(parts[-1], scale))
        self.beat("reduce")
        rows = torch.stack([torch.cat(losses).double(), targets.double()])
        sums = self._sum_by_source(rows, torch.cat([part.source_ids for part in parts]))
        self._guard.watch(limits, sums)
        grad_norm, applied = self._update(lr)
        return PendingStep(sums, rows, grad_norm, applied, total[1] > 0)

    @torch.no_grad()
    def loss(self, batch: Batch) -> torch.Tensor:
        """Sum of the target losses of each row [rows], without gradient and without any change of state."""
        self.beat("eval")
        self.deepspeed.eval()
        return self._forward(batch.to(self.device)).rows

    @torch.no_grad()
    def logits(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [rows, T, V] of ids [rows, T]; see Decoder for the rest."""
        self.beat("eval")
        self.deepspeed.eval()
        return self.deepspeed(input_ids.to(self.device), None, position_ids, cu_seqlens)

    def state(self) -> EngineState:
        """What this rank answers for, live, between two steps; see llmtrain/training/engine/state.py."""
        self.deepspeed.collect_python_gc()  # `deepspeed.disable_python_gc` leaves cycles to this moment
        return self.look()

    def look(self) -> EngineState:
        """The same for a look between saves, which leaves cycles alone."""
        return read_state(self.deepspeed, self._rank, self._ranks)

    def restore(self, read: Read, scalars: Mapping[str, Any]) -> None:
        """Go on from the state that `read` and `scalars` tell of, whatever stage and ranks wrote it.

        `read(name, key, start, count)` is asked for what this rank needs only. The optimizer's settings stay
        those of this run.
        """
        restore_state(self.deepspeed, self._rank, self._ranks, read, scalars)

    def close(self) -> None:
        """Free what DeepSpeed holds; the engine is of no use afterwards."""
        self.deepspeed.destroy()

    def _forward(self, batch: Batch) -> Losses:
        return self.deepspeed(batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens)

    def _backward(self, part: Batch, scale: torch.Tensor) -> torch.Tensor:
        """Add a micro-batch's gradients; returns the losses of its rows.

        Of a loss that is not finite no gradient is, so that the step is left out: by itself an infinite loss
        may have finite ones.
        """
        self.beat("forward")
        losses = self._forward(part)
        scale = torch.where(losses.total.detach().isfinite(), scale, math.nan)
        self.beat("backward")
        self.deepspeed.backward(losses.total * scale, scale_wrt_gas=False)
        return losses.rows

    def _update(self, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip and step; returns the gradient norm and whether the step was applied, both on the device."""
        assert self.deepspeed.is_gradient_accumulation_boundary(), "a batch of another size than the engine's"
        optimizer = self.deepspeed.optimizer
        set_learning_rate(optimizer, lr)
        if self._stage > 0:
            self.deepspeed.step()
            norm, applied = self.deepspeed.get_global_grad_norm(), self.deepspeed.was_step_applied()
            if self._stage == 2 and self.deepspeed.zero_cpu_offload() and not applied:
                # DeepSpeed 0.19.8 keeps these where the optimizer is offloaded: NaN would stay for ever.
                optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
                optimizer.all_grad_tensors = dict.fromkeys(optimizer.all_grad_tensors)
            return self._scalar(self._guard.true_norm(norm, applied)), self._scalar(applied)
        # The raw torch optimizer of stage 0 has no guard: a single NaN would stay in the weights for ever.
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        # float64, because torch's fp32 norm of a large CPU tensor is off in the fourth digit.
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)))
        applied = self._guard.passes(norm)
        divisor = ((norm + 1e-6) / self._clipping).clamp(min=1).float() if self._clipping else None
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            # What torch.amp asks of fused optimizers: nothing is read, and gradients are passed over once.
            optimizer.grad_scale, optimizer.found_inf = divisor, (~applied).float()
        elif not applied:
            self.model.zero_grad(set_to_none=True)  # the optimizer passes over parameters without gradient
        elif divisor is not None:
            torch._foreach_div_(gradients, divisor)
        self.deepspeed.step()
        return norm, applied

    def _scalar(self, value: torch.Tensor | float) -> torch.Tensor:
        """A number on the device, fp64, whether DeepSpeed has it there or on the host."""
        if isinstance(value, torch.Tensor):
            return value.to(self.device, torch.float64)
        return torch.full((), float(value), dtype=torch.float64, device=self.device)

    def _sum_by_source(self, rows: torch.Tensor, source_ids: torch.Tensor) -> torch.Tensor:
        """[2, sources]: losses and targets [2, rows] summed over this step's rows on all ranks."""
        sums = torch.zeros(2, self._sources, dtype=torch.float64, device=self.device)
        sums.index_add_(1, source_ids.long(), rows)
        return distributed.all_reduce_sum(sums)
