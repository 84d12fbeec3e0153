"""Held-out loss at intervals, and the baselines beside it after the last step."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from llmtrain import distributed
from llmtrain.config import Config
from llmtrain.training.callbacks.base import Callback
from llmtrain.training.evaluation import CutShortError, Unigram, evaluate_model, open_held_out
from llmtrain.training.run_directory import disk_may_refuse

if TYPE_CHECKING:
    from llmtrain.data.heldout import HeldOut
    from llmtrain.training.callbacks.base import Run

logger = logging.getLogger(__name__)


class EvaluationConfig(Config):
    """When held-out text is evaluated, and how much of it."""

    every: Annotated[int, Field(ge=0)]
    documents: Annotated[int, Field(gt=0)] | None
    patience: Annotated[int, Field(gt=0)] | None
    min_delta: Annotated[float, Field(ge=0, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _is_evaluated(self) -> Self:
        if self.patience is not None and not self.every:
            raise ValueError(
                f"patience={self.patience} counts evaluations: with every=0 there is one, at the end"
            )
        return self


class EvaluationCallback(Callback):
    """Puts eval/* into the step's line and writes eval/heldout.json, every `every` steps and at the last.

    Without held-out documents it does nothing.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self._config = config
        self._texts: dict[str, HeldOut] = {}
        self._unigram: Unigram | None = None

    def on_start(self, run: Run) -> None:
        if not run.held_out:
            self._tell_nothing(run)

    def is_due(self, run: Run, step: int) -> bool:
        every = self._config.every
        last = run.finished or step >= run.config.max_steps
        return bool(run.held_out) and (last or (every > 0 and step % every == 0))

    def is_owed(self, run: Run) -> bool:
        return run.step > 0 and self.is_due(run, run.step) and not run.early_stop.has(run.step)

    def load(self, run: Run, step: int) -> None:
        self._texts = open_held_out(run.held_out, run.config, self._config.documents)
        if run.world.is_main and (run.finished or step >= run.config.max_steps):
            self._unigram = Unigram.of(run.dataset, step, run.tokenizer.vocab_size)

    def after_step(self, run: Run, line: dict[str, Any]) -> None:
        if not self._texts:  # of text that is tokenised beside the training it is known only now
            self._tell_nothing(run)
            return
        step = run.step
        began = time.perf_counter()
        try:
            results = evaluate_model(
                run.engine.loss,
                self._texts,
                world=run.world,
                unigram=self._unigram,
                shuffle_seed=run.config.seed if run.finished else None,
                stop=lambda: run.stop.poll(run.engine.device),
            )
        except CutShortError:
            run.cut_short = run.finished
            return
        line.update(as_metrics(results))
        bits = distributed.broadcast_object(results["all"]["bits_per_byte"])
        if run.world.is_main:
            with disk_may_refuse():
                run.directory.write_json("eval/heldout.json", {"step": step, **results})
            seconds = round(time.perf_counter() - began, 3)
            run.directory.append_event("evaluation", step=step, bits_per_byte=bits, seconds=seconds)
        before = run.finished
        run.early_stop.add(step, bits)
        if run.finished and not before:
            self._tell_early_stop(run)

    def _tell_early_stop(self, run: Run) -> None:
        if not run.world.is_main:
            return
        step, bits = run.early_stop.best or (None, None)
        run.directory.append_event("early_stop", step=run.step, best_step=step, bits_per_byte=bits)
        best = "nothing" if bits is None else f"{bits:.4f} bits per byte after step {step}"
        logger.info(
            "%d evaluations were no better than %s: the run ends after step %d "
            "(callbacks.evaluation.patience)",
            self._config.patience, best, run.step,
        )  # fmt: skip

    def _tell_nothing(self, run: Run) -> None:
        fraction = run.config.data.validation_fraction
        if run.world.is_main:
            logger.info(
                f"data.validation_fraction={fraction} held out no document: nothing will be evaluated"
                + ("; raise it for so little text" if fraction else "")
            )


def as_metrics(results: dict[str, Any]) -> dict[str, float | None]:
    """The keys of a metrics line for what `evaluate_model` returned; baselines only where computed."""
    whole = results["all"]
    line = {"eval/loss": whole["loss"], "eval/bits_per_byte": whole["bits_per_byte"]}
    for key in ("unigram_bits_per_byte", "shuffled_bits_per_byte"):
        if whole[key] is not None:
            line[f"eval/{key}"] = whole[key]
    for name, scores in results["sources"].items():
        line[f"eval/loss/{name}"] = scores["loss"]
        line[f"eval/bits_per_byte/{name}"] = scores["bits_per_byte"]
    return line
