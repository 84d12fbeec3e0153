"""The run itself, for one step and in a directory of its own: what is built, saved and loaded is real."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from llmtrain import distributed
from llmtrain.config import ExitCode, UserError
from llmtrain.data.plan import Plan
from llmtrain.data.prepare import Prepared, prepare
from llmtrain.distributed import World
from llmtrain.tokenizer import Tokenizer
from llmtrain.training.build import build_run, open_run
from llmtrain.training.config import TrainConfig
from llmtrain.training.engine.engine import Engine
from llmtrain.training.exporting import export
from llmtrain.training.places import existing
from llmtrain.training.preflight import Report
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.run_lock import RunLock
from llmtrain.training.trainer import begin, finish, fit

PREFIX = ".llmtrain-check-"
DOCUMENTS, NEW_TOKENS = 4, 4
"""Of each held-out source that are evaluated, and of each sample: enough to run that code."""


def trial(config: TrainConfig, world: World, tokenizer: Tokenizer, plan: Plan, report: Report) -> None:
    """Build, train one step, evaluate, save, verify, load and export beside `output_dir`; leaves nothing.

    Collective. UserError where a part of it fails.
    """
    with _quiet(), _aside(config, world) as directory:
        short = trial_config(config, plan, directory)
        background, workers = short.data.prepares_in_background, short.data.workers
        prepared = prepare(
            short.data, tokenizer, short.cache_dir, background=background, workers=workers, world=world
        )
        with closing(prepared):
            _train(short, world, prepared, report)
        _on_main(world, lambda: _export(short.output_dir, directory / "exported", report))


def trial_config(config: TrainConfig, plan: Plan, directory: Path) -> TrainConfig:
    """The run's config, but for its length, its directory and what only watches.

    Sources with `epochs` have the weights that follow from them: no text is prepared but what is read.
    """
    sources = {
        name: source.model_copy(update={"epochs": None, "weight": plan.sources[name].weight})
        for name, source in config.data.sources.items()
    }
    callbacks = config.callbacks
    documents = min(callbacks.evaluation.documents or DOCUMENTS, DOCUMENTS)
    new_tokens = min(callbacks.sample.max_new_tokens, NEW_TOKENS)
    return config.model_copy(
        update={
            "output_dir": directory / "run",
            "resume": "auto",
            "max_steps": 1,
            "log_every": 1,
            "data": config.data.model_copy(update={"sources": sources, "preparation": "background"}),
            "profile": config.profile.model_copy(update={"steps": 0}),
            "logger": config.logger.silent(),
            "callbacks": callbacks.model_copy(
                update={
                    "evaluation": callbacks.evaluation.model_copy(update={"documents": documents}),
                    "sample": callbacks.sample.model_copy(update={"max_new_tokens": new_tokens}),
                }
            ),
        }
    )


@contextmanager
def _aside(config: TrainConfig, world: World) -> Iterator[Path]:
    """A new directory on the file system of `output_dir`, the same on every rank, and gone afterwards.

    Those of checks that were killed go, too.
    """
    with ExitStack() as ends:
        made = None
        if world.is_main:
            place = existing(config.output_dir.absolute().parent)
            sweep(place)
            made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
            lock = RunLock(made)
            ends.callback(lock.release)
            ends.callback(shutil.rmtree, made, ignore_errors=True)
            lock.take()
        yield distributed.broadcast_object(made)


def sweep(place: Path) -> None:
    """Remove the directories of checks whose process died."""
    for left in place.glob(f"{PREFIX}*"):
        lock = RunLock(left)
        if lock.inherit():
            shutil.rmtree(left, ignore_errors=True)
            lock.release()


def _on_main(world: World, work: Callable[[], None]) -> None:
    """Do what only rank 0 does; collective: where it fails, no rank goes on to wait for another."""
    failed: Exception | None = None
    if world.is_main:
        try:
            work()
        except UserError as error:
            failed = error
        except OSError as error:
            failed = UserError(f"rank 0 failed: {error}", exit_code=1)
        except Exception as error:
            distributed.broadcast_object(UserError(f"rank 0 failed: {error!r}", exit_code=1))
            raise
    if failed := distributed.broadcast_object(failed):
        raise failed


@contextmanager
def _quiet() -> Iterator[None]:
    """What a run tells of itself would stand between the lines of the report."""
    package = logging.getLogger("llmtrain")
    level = package.level
    package.setLevel(logging.WARNING)
    try:
        yield
    finally:
        package.setLevel(level)


def _train(config: TrainConfig, world: World, prepared: Prepared, report: Report) -> None:
    directory = open_run(config, world)
    run = build_run(config, world, directory, prepared)
    begin(run)
    model = f"{run.engine.model.parameter_count:,} parameters, {run.precision}, {run.engine.device.type}"
    report.say("build", f"{model}, {world.world_size} rank(s), ZeRO stage {config.deepspeed.stage}")
    fit(run)
    before = digest(run.engine)
    if finish(run) != ExitCode.OK:
        raise UserError(f"{directory.checkpoints}: no checkpoint could be written there, as is said above")
    _on_main(world, lambda: _tell_step(directory, report))
    _reload(config, world, directory, prepared, before)
    report.say("reload", "verified, and bit-equal to what was saved")
    directory.unlock()


def _tell_step(directory: RunDirectory, report: Report) -> None:
    (line,) = directory.read_metrics()
    loss, norm = line["train/loss"], line["train/grad_norm"]
    if loss is None or norm is None or not math.isfinite(loss):
        raise UserError(f"the first step has loss {loss} and gradient norm {norm}: lower optimizer.lr")
    report.say("one step", f"loss {loss:.4f}, gradient norm {norm:.3g}")
    if "eval/loss" in line:
        bits = line["eval/bits_per_byte"]
        report.say("evaluate", f"held-out loss {line['eval/loss']:.4f}, {bits:.3f} bits per byte")
    else:
        report.say("evaluate", "no document is held out: data.validation_fraction is too small", "warning")
    (saved,) = (event for event in directory.read_events() if event["event"] == "save")
    report.say("save", f"{saved['bytes'] / 1e6:,.1f} MB in {saved['seconds']:.2f} s")


def _reload(
    config: TrainConfig, world: World, directory: RunDirectory, prepared: Prepared, before: str
) -> None:
    """UserError where the state of a rank is not what it was before the save."""
    run = build_run(config, world, directory, prepared)
    begin(run)
    same = digest(run.engine) == before
    run.engine.close()
    if not all(distributed.gather_objects(same)):
        raise UserError("the state that was loaded is not the one that was saved", exit_code=1)


def digest(engine: Engine) -> str:
    """SHA-256 of all that this rank's part of the state holds."""
    state = engine.state()
    sha = hashlib.sha256(json.dumps(state.scalars, sort_keys=True).encode())
    for piece in state.pieces:
        for key, tensor in sorted(piece.tensors.items()):
            sha.update(f"{piece.name} {piece.start} {key}".encode())
            sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def _export(run: Path, output: Path, report: Report) -> None:
    """A model that no family of Hugging Face's can be is trained all the same: a warning."""
    try:
        note: dict[str, Any] = export(run, output, None, "fp32", 5.0)
    except UserError as error:
        report.say("export", "; ".join(error.lines), "warning")
        return
    difference = note["max_logit_difference"]
    told = note["not_compared"] or f"logits differ by {difference:.2g} at most in transformers"
    report.say("export", f"{note['family']}, {told}")
