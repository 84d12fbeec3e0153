"""What can be known of a run before its first step: memory, disk, text. Arithmetic and small samples."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import psutil
import torch

from llmtrain.config import UserError
from llmtrain.data.plan import Plan, make_plan
from llmtrain.data.prepare import build_tokenizer, look, sample_source
from llmtrain.distributed import World
from llmtrain.tokenizer import Tokenizer, TokenizerConfig
from llmtrain.tokenizer.coverage import coverage
from llmtrain.training.build import check_start, precision_here, tokenizer_of
from llmtrain.training.checkpoint import check_space, find_checkpoint, free_bytes, most_at_a_time
from llmtrain.training.config import TrainConfig
from llmtrain.training.planning import measure, run_length
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.sizing.memory import Layout, checkpoint_bytes, memory
from llmtrain.training.sizing.model import Model
from llmtrain.training.words import short

logger = logging.getLogger(__name__)

SAMPLE_BYTES = 100_000
"""Text of a source that the tokenizer is tried on."""
DUPLICATES, FEW = 0.1, 20
"""Part of a sample that may stand in it twice, and documents below which nothing is said of it."""
GIB = 2**30


@dataclass(frozen=True)
class Note:
    """What a check found."""

    text: str
    warns: bool = False


class Report:
    """Prints a line a check, from rank 0. Failures are collected, and end a group together."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._failed: list[str] = []
        self._began = time.perf_counter()

    def look(self, what: str, notes: Callable[[], Iterable[Note]]) -> None:
        """Make a check and print what it notes, or that it failed."""
        try:
            for note in notes():
                self.say(what, note.text, "warning" if note.warns else "ok")
        except UserError as error:
            self._failed += error.lines
            self.say(what, "see the error below", "failed")

    def say(self, what: str, text: str, state: str = "ok") -> None:
        """Print a line with the seconds since the one before."""
        now = time.perf_counter()
        if self._world.is_main:
            sys.stdout.write(f"{state:<8} {what}: {text} ({now - self._began:.1f} s)\n")
            sys.stdout.flush()
        self._began = now

    def end_group(self) -> None:
        """UserError with every failure so far."""
        if self._failed:
            raise UserError(*self._failed)


# What the config asks for


def start_notes(config: TrainConfig, world: World) -> list[Note]:
    """What `check_start` lets pass: batch, sources, and where the run begins."""
    check_start(config, world)
    ranks, rows = world.world_size, config.micro_batch_size
    parts = f"{ranks} rank(s) x {rows} rows x {config.global_batch_size // (ranks * rows)} micro-batch(es)"
    checkpoint = find_checkpoint(config.resume, RunDirectory(config.output_dir).checkpoints)
    return [
        Note(f"{config.global_batch_size} rows a step = {parts}"),
        Note(f"{len(config.data.sources)} source(s) can be opened"),
        Note("begins anew" if checkpoint is None else f"goes on from {checkpoint}"),
    ]


def open_tokenizer(config: TrainConfig) -> Tokenizer:
    """The tokenizer that the run will have; one that is yet to be trained is trained, into the cache."""
    tokenizer = tokenizer_of(config)
    if isinstance(tokenizer, TokenizerConfig):
        tokenizer, _ = build_tokenizer(config.data, tokenizer, config.cache_dir)
    return tokenizer


def tokenizer_notes(config: TrainConfig, tokenizer: Tokenizer) -> list[Note]:
    """UserError where prepared shards are another tokenizer's."""
    prepared = look(config.data, tokenizer, config.cache_dir)
    ready = sum(source.is_there() for source in prepared.sources.values())
    fits = f"{ready} of {len(prepared.sources)} source(s) are prepared with it"
    return [Note(f"{tokenizer.vocab_size:,} ids, {fits}")]


# The machine


def check_memory(config: TrainConfig, world: World, model: Model) -> Note:
    """What a rank takes at its peak; UserError where weights and optimizer state alone do not fit."""
    layout = Layout.of(config, world.world_size, precision_here(config))
    on_gpu = torch.cuda.is_available()
    needed = memory(model, layout if on_gpu else replace(layout, compiled=config.compile is True))
    stays, peak = needed.weights + needed.masters + needed.optimizer + needed.accumulators, needed.total
    if on_gpu:
        # By its index, and nothing allocated: `check` asks before ranks have chosen their devices.
        own = min(world.local_rank, torch.cuda.device_count() - 1)
        room, where = torch.cuda.get_device_properties(own).total_memory, "the device has"
    else:
        room, where = psutil.virtual_memory().total // world.local_world_size, "this machine has"
        stays, peak = stays + needed.host, peak + needed.host
    if stays > room:
        raise UserError(
            f"deepspeed.zero_optimization.stage={layout.stage}: weights, gradients and optimizer state of "
            f"{model.parameters:,} parameters take {stays / GIB:.1f} GiB a rank, and {where} "
            f"{room / GIB:.1f}: use more ranks, deepspeed=zero3 or a smaller model (`llmtrain plan` compares)"
        )
    text = f"about {peak / GIB:.2f} GiB a rank at the peak, and {where} {room / GIB:.1f}"
    return Note(f"{text}; `llmtrain plan` shows what takes less" if peak > room else text, peak > room)


def check_disk(config: TrainConfig, model: Model) -> Note:
    """What the checkpoints take, those that stay for ever too; UserError where those of `keep` do not fit."""
    size, directory = checkpoint_bytes(model), RunDirectory(config.output_dir).checkpoints
    evaluated = config.data.validation_fraction > 0
    check_space(directory, size, config.checkpoint, evaluated=evaluated)
    kept = most_at_a_time(config.checkpoint, evaluated=evaluated)
    if config.checkpoint.keep_every:
        kept += config.max_steps // config.checkpoint.keep_every
    free = free_bytes(directory)
    text = f"{kept} checkpoints of {size / 1e9:.3g} GB in the end, and {free / 1e9:.3g} GB are free"
    return Note(f"checkpoint.keep_every: {text}" if kept * size > free else text, kept * size > free)


def check_rewinds(config: TrainConfig) -> Iterator[Note]:
    """A warning where the checkpoints that stay are all nearer to a spike than a rewind is to go back."""
    spikes, kept = config.spikes, config.checkpoint
    reach = (kept.keep - 1) * kept.every + 1  # of a spike in the step after a save
    if spikes.action == "rewind" and reach < spikes.rewind_steps and kept.keep_every is None:
        keep = 1 + math.ceil((spikes.rewind_steps - 1) / kept.every)
        yield Note(
            f"spikes.rewind_steps={spikes.rewind_steps}: checkpoint.keep={kept.keep} with checkpoint.every="
            f"{kept.every} may reach {reach} steps back only; set checkpoint.keep={keep}",
            warns=True,
        )


# The text


def plan_text(config: TrainConfig, tokenizer: Tokenizer) -> Plan:
    """How often the run passes over each source; sizes of raw text are estimated from a sample."""
    return make_plan(config.data, measure(config, tokenizer), run_length(config))


def check_epochs(plan: Plan) -> Iterator[Note]:
    """Size, share and epochs of each source, and what is wrong with them."""
    for name, source in plan.sources.items():
        about = "" if source.exact else "~"
        size = "?" if source.size is None else about + short(source.size)
        passes = "" if source.epochs is None else f", {source.epochs:.2f} epochs of it"
        yield Note(f"{name}: {size} tokens, {source.share:.1%} of the stream{passes}")
        for warning in source.warnings:
            yield Note(f"data.sources.{name}: {warning}", warns=True)


def check_samples(
    config: TrainConfig, tokenizer: Tokenizer, tick: Callable[[], None] = lambda: None
) -> Iterator[Note]:
    """Unknown characters, bytes and duplicates in a small sample of each source of text."""
    for name, source in config.data.sources.items():
        tick()
        texts = [document.text for document in sample_source(source, SAMPLE_BYTES, config.data)]
        if not texts:
            continue
        tick()
        found = coverage(tokenizer, texts)
        yield Note(f"{name}: {found.words}, in {len(texts)} documents")
        for warning in found.warnings:
            yield Note(f"data.sources.{name}: {warning}; choose tokenizer= for this text", warns=True)
        twice = 1 - len(set(texts)) / len(texts)
        if twice > DUPLICATES and len(texts) >= FEW:
            yield Note(f"data.sources.{name}: {twice:.0%} of a sample are duplicates of others", warns=True)


def preflight(
    config: TrainConfig, world: World, tokenizer: Tokenizer, tick: Callable[[], None] = lambda: None
) -> None:
    """The quick part of `llmtrain check`, before every run: UserError, or warnings in the log of rank 0.

    The text of a run that goes on was looked at when it began. Text that cannot be read ends a run where all
    ranks come to it, not here on rank 0. `tick` is called before each source is sampled.
    """
    notes = [check_memory(config, world, Model.of(config, tokenizer.vocab_size)), *check_rewinds(config)]
    if world.is_main and find_checkpoint(config.resume, RunDirectory(config.output_dir).checkpoints) is None:
        try:
            notes += check_samples(config, tokenizer, tick)
        except UserError as error:
            notes += [Note(f"no sample of the text: {line}", warns=True) for line in error.lines]
    for note in notes:
        if note.warns and world.is_main:
            logger.warning("%s", note.text)
