"""From a config to the parts of a run, in the order data flows."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmtrain import distributed
from llmtrain.config import UserError
from llmtrain.config.secrets import redact
from llmtrain.data.config import DataConfig
from llmtrain.data.dataset import PackedDataset
from llmtrain.data.mixture import Stage, Weight, weights_from_epochs
from llmtrain.data.prepare import Prepared, check_inputs
from llmtrain.data.shards import ShardedSource
from llmtrain.distributed import World
from llmtrain.model import Decoder
from llmtrain.model.fp8 import check_fp8, convert_to_fp8, without_fp8
from llmtrain.model.kernels import Use
from llmtrain.model.kernels.probe import check_gradients, check_isolation
from llmtrain.optim.schedules import Schedule
from llmtrain.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer
from llmtrain.training.callbacks import Callback
from llmtrain.training.callbacks.evaluation import EvaluationCallback
from llmtrain.training.callbacks.prediction import PredictionCallback
from llmtrain.training.callbacks.profile import ProfileCallback
from llmtrain.training.callbacks.samples import SampleCallback
from llmtrain.training.changes import Change, changes, check_changes, tell_changes
from llmtrain.training.checkpoint import (
    DamagedError,
    Saver,
    check_space,
    checkpoints,
    choose,
    find_checkpoint,
    read_record,
)
from llmtrain.training.clock import StepClock
from llmtrain.training.config import TrainConfig
from llmtrain.training.corruption import CorruptionCheck
from llmtrain.training.early_stop import EarlyStop, early_stop_of, has_stopped
from llmtrain.training.engine.config import ResolvedPrecision
from llmtrain.training.engine.engine import Engine, build_engine
from llmtrain.training.goodput import Goodput
from llmtrain.training.heartbeat import Heart
from llmtrain.training.loggers import Loggers
from llmtrain.training.messages import opening_line
from llmtrain.training.places import check_places
from llmtrain.training.rewinds import Rewind, hide_stale, merged, read_rewinds
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.saver import build_saver
from llmtrain.training.signals import StopRequest
from llmtrain.training.sizing.memory import checkpoint_bytes
from llmtrain.training.sizing.model import Model
from llmtrain.training.source_losses import SourceLosses
from llmtrain.training.spikes import SpikeDetector

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """The parts of a run, as the loop and the callbacks see them."""

    config: TrainConfig
    world: World
    directory: RunDirectory
    tokenizer: Tokenizer
    train_sources: dict[str, ShardedSource]
    held_out: dict[str, ShardedSource]
    dataset: PackedDataset
    precision: ResolvedPrecision
    engine: Engine
    schedule: Schedule
    callbacks: Sequence[Callback]
    prepared: Prepared
    checkpoint: Path | None
    """What the run goes on from; every byte of it was verified."""
    changed: Sequence[Change]
    """In which settings that checkpoint was another run's."""
    rejected: Sequence[DamagedError]
    """Newer checkpoints that were not whole."""
    saver: Saver
    stop: StopRequest
    clock: StepClock
    heart: Heart
    corruption: CorruptionCheck
    spikes: SpikeDetector
    rewinds: Sequence[Rewind]
    """Those of the run's history, oldest first."""
    early_stop: EarlyStop
    began: int = 0
    """The last step that this process did not train."""
    step: int = 0
    skipped: int = 0
    """Steps in a row that were not applied."""
    losses: SourceLosses = field(default_factory=SourceLosses)
    loggers: Loggers = field(default_factory=Loggers)
    cut_short: bool = False
    """Whether a stop left out what is due after the last step."""
    waits: bool = False
    """Whether text may still be on its way when a step needs it; the same on every rank."""
    reported: float = -math.inf
    """When the last report was written, on the monotonic clock."""

    @property
    def goodput(self) -> Goodput:
        """What the time of the run was spent on."""
        return self.heart.goodput

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.config.max_steps or self.early_stop.is_due


def check_job(config: TrainConfig, world: World) -> None:
    """`check_start`; but where another job is at work in the run directory, that is what is told, with 73."""
    try:
        check_start(config, world)
    except UserError:
        RunDirectory(config.output_dir).refuse_others()
        raise


def check_start(config: TrainConfig, world: World) -> None:
    """UserError for what only the number of ranks or the disk can tell, before anything starts.

    Directories must be such that can be written. The text must be there, and a checkpoint that `resume`
    names, with settings that may go on here, or whole weights of `model.init_from`; the attention backend,
    FP8 and loggers, if asked for; the global batch must divide into ranks and micro-batches.
    """
    from llmtrain.training.pretrained import check_files

    check_places(output_dir=config.output_dir, cache_dir=config.cache_dir)
    check_inputs(config.data)
    config.logger.check()
    if config.fp8:
        check_fp8(config.fp8)
    if config.model.attention.asked != "auto":
        config.model.kernel(attention_use(config, precision_here(config)))
    directory = RunDirectory(config.output_dir)
    checkpoint = find_checkpoint(config.resume, directory.checkpoints)
    if checkpoint is None:
        check_files(config)
    else:
        saved = read_record(checkpoint)
        if not directory.owns(checkpoint) and saved["step"] >= config.max_steps:
            raise UserError(
                f"max_steps={config.max_steps}: {checkpoint} is at step {saved['step']}; raise max_steps"
            )
        now = describe_run(config, world, saved["tokenizer"], precision_here(config))
        check_changes(checkpoint, changes(saved, now), config.resume_changes)
    unit = world.world_size * config.micro_batch_size
    if config.global_batch_size % unit:
        raise UserError(
            f"global_batch_size={config.global_batch_size} is not a multiple of ranks x micro_batch_size = "
            f"{world.world_size} x {config.micro_batch_size}; change one of the three"
        )


def is_done(config: TrainConfig) -> bool:
    """Whether the run has finished already; says so."""
    directory = RunDirectory(config.output_dir)
    found = checkpoints(directory.checkpoints)
    if config.resume == "never" or not (directory.done.exists() and found):
        return False
    step, newest = found[-1]
    if step < config.max_steps and not has_stopped(config, directory, newest):
        return False
    key = "max_steps" if step >= config.max_steps else "callbacks.evaluation.patience"
    logger.info(
        f"{directory.path}: already trained to step {step}, max_steps={config.max_steps}; report: "
        f"{directory.report}. Raise {key} to go on, or start anew with resume=never or name=<another>"
    )
    return True


def tokenizer_of(config: TrainConfig) -> TokenizerConfig | Tokenizer:
    """The run's own tokenizer where the run goes on and nobody asked for another one, else the config's.

    A tokenizer that was trained on the sources of then stays the run's when a source is added.
    """
    directory = RunDirectory(config.output_dir)
    saved = directory.path / "tokenizer"
    if config.resume == "never" or not (checkpoints(directory.checkpoints) and saved.is_dir()):
        return config.tokenizer
    before = directory.read_config().get("tokenizer")
    return load_tokenizer(saved) if before == config.tokenizer.model_dump(mode="json") else config.tokenizer


def open_run(config: TrainConfig, world: World) -> RunDirectory:
    """This run's directory, locked by rank 0; collective: a lock of another job ends every rank, with 73.

    Nothing in it changes before the run begins. UserError, too, where the file system refuses.
    """
    directory, refusal = RunDirectory(config.output_dir), None
    if world.is_main:
        try:
            directory.lock()
        except UserError as error:
            refusal = error
        except OSError as error:
            refusal = UserError(
                f"output_dir={config.output_dir}: cannot be locked: {error}; free the disk, or choose a "
                "directory on a file system that has locks (flock)"
            )
    if refusal := distributed.broadcast_object(refusal):
        raise refusal
    return directory


def build_run(
    config: TrainConfig,
    world: World,
    directory: RunDirectory,
    prepared: Prepared,
    stop: StopRequest | None = None,
    heart: Heart | None = None,
) -> Run:
    """Every part of the run; collective, after the process group has started. Without `stop` nobody asks.

    A checkpoint to go on from is compared with the config before anything large is built.
    """
    heart = heart or Heart()
    heart.beat("build")
    tokenizer, step, changed = prepared.tokenizer, 0, list[Change]()
    train_sources, held_out = open_alike(prepared)
    rewinds = rewinds_of(config, world, directory)
    dataset = build_dataset(config, train_sources, rewinds)
    precision = precision_here(config)
    heart.beat("verify")
    with distributed.patience():
        chosen = choose(config.resume, directory.checkpoints, world, tick=lambda: heart.beat("verify"))
    checkpoint, saved = (chosen.path, chosen.record) if chosen else (None, {})
    if chosen is not None:
        changed = changes(saved, describe_run(config, world, tokenizer.fingerprint, precision))
        check_changes(chosen.path, changed, config.resume_changes)
        tell_changes(chosen.path, changed)
        dataset, step = dataset.resumed(saved["data"]), saved["step"]
    size = checkpoint_bytes(Model.of(config, tokenizer.vocab_size))
    check_space(directory.checkpoints, size, config.checkpoint, evaluated=bool(held_out))
    heart.beat("build")
    engine = build_model_engine(
        config, world, tokenizer.vocab_size, len(dataset.names), precision, goes_on=checkpoint is not None
    )
    heart.beat("build", step)
    check_kernel(config, engine, precision)
    engine.beat = heart.beat
    logger.info(opening_line(config, world, engine, precision))
    prepared.schedule(*dataset.needs(step))
    _tell_mixture(dataset, step, config.max_steps)
    return Run(
        config=config,
        world=world,
        directory=directory,
        tokenizer=tokenizer,
        train_sources=train_sources,
        held_out=held_out,
        dataset=dataset,
        precision=precision,
        engine=engine,
        prepared=prepared,
        checkpoint=checkpoint,
        changed=changed,
        rejected=chosen.rejected if chosen else (),
        saver=build_saver(config.checkpoint, world, directory, heart, checkpoint=checkpoint, step=step),
        stop=stop or StopRequest(),
        clock=StepClock(engine.device, step),
        heart=heart,
        corruption=CorruptionCheck(config.corruption_check),
        spikes=SpikeDetector(config.spikes, saved.get("spikes", ())),
        skipped=saved.get("left_out", 0),
        rewinds=rewinds,
        early_stop=early_stop_of(config, saved, changed),
        began=step,
        step=step,
        waits=any(distributed.gather_objects(prepared.is_remote or not prepared.complete)),
        schedule=config.scheduler.build(config.max_steps),
        callbacks=[
            PredictionCallback(config, world, tokenizer.vocab_size, precision),
            EvaluationCallback(config.callbacks.evaluation),
            SampleCallback(config.callbacks.sample),
            ProfileCallback(config.profile),
            *(extra.build() for extra in config.callbacks.extra.values()),
        ],
    )


def rewinds_of(config: TrainConfig, world: World, directory: RunDirectory) -> list[Rewind]:
    """The rewinds of the run that goes on; checkpoints that are from before one, and later, are renamed."""
    rewinds: list[Rewind] = []
    if world.is_main and config.resume != "never":
        rewinds = read_rewinds(directory)
        hide_stale(directory.checkpoints, rewinds)
    return distributed.broadcast_object(rewinds)


def check_kernel(config: TrainConfig, engine: Engine, precision: ResolvedPrecision) -> None:
    """UserError if the attention kernel lets documents, or gradients, meet here; collective."""
    model, shape = engine.model, engine.model.config
    seen: Any = {
        "documents": config.data.documents == "separate",
        "seq_len": config.seq_len,
        "device": engine.device,
    }
    with without_fp8(model):
        check_isolation(engine.logits, backend=model.kernel.name, vocab_size=model.vocab_size, **seen)
    check_gradients(
        model.kernel,
        shape=(shape.n_heads, shape.n_kv_heads, shape.d_head),
        slopes=model.position.slopes(engine.device),
        dtype=attention_use(config, precision).dtype,
        **seen,
    )


def open_alike(prepared: Prepared) -> tuple[dict[str, ShardedSource], dict[str, ShardedSource]]:
    """Training and held-out text; what one rank already knows to hold nothing out, no rank evaluates."""
    train_sources, held_out = prepared.open()
    known = distributed.gather_objects(list(held_out))
    return train_sources, {
        name: source for name, source in held_out.items() if all(name in names for names in known)
    }


def _tell_mixture(dataset: PackedDataset, step: int, max_steps: int) -> None:
    """Log the share of each source from the next step on, and the passes over it then and at the end."""
    by_now, at_the_end = dataset.epochs(step), dataset.epochs(max_steps)
    for name, share in dataset.needs(step)[1].items():
        now, end = by_now[name], at_the_end[name]
        if now is None or end is None:
            passes = "its size is known when all of it is tokenised"
        else:
            so_far = f"{now:.2f} epochs by then, " if step else ""
            passes = f"{so_far}{end:.2f} epochs of {dataset.streams[name].source.tokens:,} tokens"
            passes += f" by step {max_steps}"
        logger.info(f"{name}: {share:.1%} of the stream from step {step + 1} on; {passes}")


def describe_run(
    config: TrainConfig, world: World, fingerprint: str, precision: ResolvedPrecision
) -> dict[str, Any]:
    """What a checkpoint is bound to, beside the state of the data."""
    return {
        "world_size": world.world_size,
        "stage": config.deepspeed.stage,
        "precision": precision,
        "tokenizer": fingerprint,
        "config": redact(config.model_dump(mode="json")),
    }


def build_dataset(
    config: TrainConfig, sources: dict[str, ShardedSource], rewinds: Sequence[Rewind] = ()
) -> PackedDataset:
    """The packed rows of every step, from prepared sources; what `rewinds` left out is left out again."""
    data, grows = config.data, config.data.curriculum
    return PackedDataset(
        sources,
        mixture_stages(config, sources),
        seq_len=config.seq_len,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        documents=data.documents,
        boundary_targets=data.trains_boundaries,
        packing=data.packing,
        max_padding=data.max_padding,
        curriculum=(grows.from_length, grows.until_step) if grows else None,
        shuffle_span=data.shuffle_span,
        skip=merged([*data.skip, *(rewind.skip for rewind in rewinds)]),
    )


def mixture_stages(config: TrainConfig, sources: Mapping[str, ShardedSource]) -> list[Stage]:
    """The weights of the sources, and what `data.stages` makes of them, by the first window."""
    stages = [
        ((stage.from_step - 1) * config.global_batch_size, stage.weights) for stage in config.data.stages
    ]
    return [(0, mixture_weights(config.data, sources)), *stages]


def mixture_weights(data: DataConfig, sources: Mapping[str, ShardedSource]) -> Mapping[str, Weight]:
    """The weight of each source, as given or from its epochs; those need sources that are complete."""
    epochs = {name: source.epochs for name, source in data.sources.items() if source.epochs is not None}
    if epochs:
        return weights_from_epochs(epochs, {name: sources[name].tokens or 0 for name in epochs})
    return {name: source.weight for name, source in data.sources.items() if source.weight is not None}


def device_here() -> str:
    """What this machine's ranks compute on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def precision_here(config: TrainConfig) -> ResolvedPrecision:
    """The run's precision on this machine."""
    return config.precision_on(device_here())


def attention_use(config: TrainConfig, precision: ResolvedPrecision) -> Use:
    """What attention is used for in this run, on this machine."""
    return Use(
        device=device_here(),
        dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        documents=config.data.documents == "separate",
    )


def build_model_engine(
    config: TrainConfig,
    world: World,
    vocab_size: int,
    sources: int,
    precision: ResolvedPrecision,
    goes_on: bool = False,
) -> Engine:
    """The decoder with its first weights under DeepSpeed. A run that `goes_on` gets others after it."""
    from llmtrain.training.pretrained import Initialize

    def construct() -> Decoder:
        decoder = config.model.assemble(
            vocab_size=vocab_size, seq_len=config.seq_len, use=attention_use(config, precision)
        )
        decoder.activation_checkpointing = config.activation_checkpointing
        decoder.z_loss = config.z_loss
        if config.fp8:
            names = convert_to_fp8(decoder, config.fp8)
            logger.info(f"fp8={config.fp8}: {len(names)} matrices of the blocks multiply in FP8")
        if config.compile is True or (config.compile == "auto" and torch.cuda.is_available()):
            decoder.compile_blocks()
        return decoder

    return build_engine(
        construct=construct,
        initialize=Initialize(config, vocab_size, goes_on),
        config=config.deepspeed,
        optimizer=config.optimizer,
        precision=precision,
        world=world,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        sources=sources,
    )
