"""Text to token shards, once: train or load the tokenizer, encode each source, keep both in the cache.

What lies in the cache depends on the text, the tokenizer, the boundary policy and the held-out fraction; not
on seed, weights or the number of processes. It is made ahead of training or beside it, part by part: a part
that is done is never made again. Documents are counted on their way in and on their way out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from llmtrain.config import UserError
from llmtrain.data import readers
from llmtrain.data.artefacts import (
    HEAD_START,
    POLL,
    REMIND,
    Tick,
    artefact_key,
    cache_errors,
    make_once,
    no_tick,
)
from llmtrain.data.config import DataConfig, SourceConfig
from llmtrain.data.growing import VERSION, Preparation
from llmtrain.data.prepared import Prepared, PreparedSource, absolute, is_prepared, open_place
from llmtrain.data.progress import Progress, SilentProgress, console_progress, work
from llmtrain.data.readers.files import is_url
from llmtrain.data.records import Document, Slice
from llmtrain.data.shards import Header, LocalShards
from llmtrain.data.tokenizing import TRAIN, VALIDATION, boundary_ids, is_held_out, make, worked_at
from llmtrain.data.workers import NICE, Crew, Job
from llmtrain.distributed import World, usable_cores
from llmtrain.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceConfig,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
)
from llmtrain.tokenizer.training import LOSSLESS, train_sentencepiece

__all__ = [
    "Prepared", "PreparedSource", "build_tokenizer", "check_inputs", "parse_part", "prepare",
    "prepared_tokens", "sample_documents", "sample_source", "train_tokenizer",
]  # fmt: skip

logger = logging.getLogger(__name__)

SAMPLE_BYTES = 10_000_000
"""Text that a tokenizer is trained on: more makes it slower and hardly better at these sizes."""
SAMPLE_INPUTS = 64
"""Slices a source is sampled from, evenly spaced."""
SAMPLE_DOCUMENTS, SAMPLE_DOCUMENT_BYTES = 50, 100_000
"""Documents of a source, not longer than this, on which tokenizer libraries are compared."""
SMALL = 16 << 20
"""Bytes of input that are prepared at once, in this process: starting others would take as long."""
TOKENS_ALREADY = ("shards", "megatron", "nanogpt")


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig | Tokenizer,
    cache_dir: Path,
    progress: Progress | None = None,
    *,
    background: bool = False,
    part: tuple[int, int] = (1, 1),
    workers: int | None = None,
    world: World | None = None,
    tick: Tick = no_tick,
) -> Prepared:
    """Shards of every source and the tokenizer they were made with; quick where they exist already.

    Any number of processes and machines may call it at any time: each part is made by one of them. With
    `background` it returns while parts are still made, by processes of local rank 0. `part` (3, 16) makes
    the third of sixteen shares only. `world` is this process's place where the environment does not say it.
    `tick` is called as long as the work gets on, be it another process's that is waited for.
    UserError for text that cannot be read, a boundary policy that the tokenizer cannot serve, or prepared
    shards of another tokenizer.
    """
    check_inputs(data, tick)
    world = world or World.from_environment()
    if isinstance(tokenizer, TokenizerConfig):
        tokenizer, _ = build_tokenizer(data, tokenizer, cache_dir, tick)
    boundary_ids(data.boundary, tokenizer)
    prepared = look(data, tokenizer, cache_dir, tick)
    jobs = _missing(prepared, part, tick)
    if jobs and background and not _is_small(jobs):
        if (saved := _saved(tokenizer, cache_dir, tick)) is not None:
            prepared.crew = _crew_beside(jobs, tokenizer, saved, workers, world)
            return prepared
        logger.info(
            "data.preparation=background: other processes cannot load a %s, so everything is prepared first",
            type(tokenizer).__name__,
        )
    _make_all(jobs, tokenizer, cache_dir, progress, workers, world, tick)
    return _without_empty(prepared)


def look(data: DataConfig, tokenizer: Tokenizer, cache_dir: Path, tick: Tick = no_tick) -> Prepared:
    """What is there of every source's shards; nothing is made."""
    header = Header(tokenizer.fingerprint, tokenizer.vocab_size, data.boundary)
    sources = {}
    for name, source in data.sources.items():
        sources[name] = _source(name, source, data, header, cache_dir)
        tick()
    return Prepared(tokenizer, sources, cache_dir, data.remote_cache_bytes)


def check_inputs(data: DataConfig, tick: Tick = no_tick) -> None:
    """Raise, before any work, if a source's files are not there or its keys do not suit them."""
    mistakes = []
    for name, source in data.sources.items():
        try:
            readers.check(source)
        except UserError as error:
            key = f"data.sources.{name}" if source.path is None else f"data.sources.{name}.path="
            mistakes += [f"{key}{line}" if source.path else f"{key} {line}" for line in error.lines]
        tick()
    if mistakes:
        raise UserError(*mistakes)


def prepared_tokens(
    name: str, source: SourceConfig, data: DataConfig, tokenizer: Tokenizer | None, cache_dir: Path
) -> int | None:
    """Tokens to train on of a source that is prepared already, else None; nothing is made.

    `tokenizer` is None where no source is text.
    """
    if readers.resolve_format(source) == "shards":
        where = source.location if is_url(source.location) else Path(source.location).expanduser()
        table = open_place(where, name, cache_dir, data.remote_cache_bytes).table()
        return None if table is None else int(table["tokens"].sum())
    if tokenizer is None:
        return None
    header = Header(tokenizer.fingerprint, tokenizer.vocab_size, data.boundary)
    preparation = Preparation(name, source, data, header, cache_dir)
    if not preparation.complete:
        return None
    return LocalShards(preparation.directory / TRAIN).index["tokens"]


# Which parts, and who makes them


def _missing(prepared: Prepared, part: tuple[int, int], tick: Tick) -> list[Job]:
    """The parts of all sources that are not there and are in this share; what is there is looked at again."""
    share, shares = part
    jobs: dict[tuple[Path, int], Job] = {}
    for name, source in prepared.sources.items():
        tick()
        preparation = source.preparation
        if preparation is None:
            continue
        if preparation.complete:
            preparation.check_complete()
            continue
        with cache_errors(preparation.directory, f"source {name}"):
            preparation.begin()
        done = preparation.done()
        for number in range(len(preparation.parts)):
            if number not in done and number % shares == share - 1:
                job = Job(preparation, number)
                jobs.setdefault(job.key, job)
        if len(done) == len(preparation.parts):  # only the index is missing
            preparation.finish(tick)
    return list(jobs.values())


def _is_small(jobs: list[Job]) -> bool:
    sizes = [job.size for job in jobs]
    return None not in sizes and sum(size or 0 for size in sizes) <= SMALL


def _make_all(
    jobs: list[Job],
    tokenizer: Tokenizer,
    cache_dir: Path,
    progress: Progress | None,
    workers: int | None,
    world: World,
    tick: Tick,
) -> None:
    """Have all these parts there, by processes if that is worth it."""
    if not jobs:
        return
    if world.local_rank > 0:  # people watch local rank 0's console; the others help if there is more to do
        time.sleep(HEAD_START)
        progress = SilentProgress()
    for preparation in _preparations(jobs):
        preparation.forget_failure()
        preparation.check(preparation.done())
        tick()
    workers = min(workers or usable_cores(), len(jobs))
    directory = None
    if workers > 1 and not _is_small(jobs) and world.local_rank == 0:
        directory = _saved(tokenizer, cache_dir, tick)
    sizes = [job.size for job in jobs]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    progress = progress or console_progress()
    names = dict.fromkeys(job.preparation.name for job in jobs)
    with work(progress, f"prepare {', '.join(names)}", total):
        tell = _Totals(progress, tick)
        if directory is None:
            _make_here(jobs, tokenizer, tell)
        else:
            Crew(jobs, directory, workers, backend=_backend(tokenizer, jobs), tell=tell).run()


class _Totals:
    """Adds up what becomes of parts, for the progress of all of them; ticks."""

    def __init__(self, progress: Progress, tick: Tick) -> None:
        self._progress, self.tick, self._sums = progress, tick, [0, 0, 0, 0]

    def __call__(self, *more: int) -> None:
        self.tick()
        self._sums = [total + new for total, new in zip(self._sums, more, strict=True)]
        self._progress.update(*self._sums)


def _make_here(jobs: list[Job], tokenizer: Tokenizer, tell: _Totals) -> None:
    """Make parts one after another in this process; wait for those that others have, as long as it takes."""
    left, spoke = list(jobs), time.monotonic()
    seen: list[int] = []
    while left:
        elsewhere = []
        for job in left:
            with cache_errors(job.preparation.directory, f"source {job.preparation.name}"):
                if not make(job.preparation.task(job.number), tokenizer, tell):
                    elsewhere.append(job)
        if len(elsewhere) == len(left):
            if time.monotonic() - spoke > REMIND:
                spoke = time.monotonic()
                name = left[0].preparation.name
                logger.info("source %s: another process is at work on it (%d parts)", name, len(left))
            time.sleep(POLL)
        left, before = elsewhere, seen
        seen = [worked_at(*job.key) for job in left]
        if seen != before:
            tell.tick()
    for preparation in _preparations(jobs):
        preparation.finish(tell.tick)


def _crew_beside(
    jobs: list[Job], tokenizer: Tokenizer, saved: Path, workers: int | None, world: World
) -> Crew | None:
    """Processes of local rank 0 that work beside training; None on other ranks."""
    if world.local_rank > 0:
        return None
    for preparation in _preparations(jobs):
        preparation.forget_failure()
    workers = workers or max(1, usable_cores() - world.local_world_size)
    logger.info("tokenising %d parts in the background, %d processes", len(jobs), workers)
    crew = Crew(jobs, saved, workers, backend=_backend(tokenizer, jobs), nice=NICE, recheck=True)
    crew.start()
    return crew


def _preparations(jobs: list[Job]) -> list[Preparation]:
    return list({job.preparation.directory: job.preparation for job in jobs}.values())


def _saved(tokenizer: Tokenizer, cache_dir: Path, tick: Tick) -> Path | None:
    """A directory that other processes can load the tokenizer from; None for one that we cannot load."""
    directory = cache_dir.expanduser() / "tokenizers" / f"saved-{tokenizer.fingerprint[:32]}"
    make_once(directory, tokenizer.save, "tokenizer", tick)
    try:
        same = load_tokenizer(directory).fingerprint == tokenizer.fingerprint
    except UserError:
        same = False
    return directory if same else None


def _backend(tokenizer: Tokenizer, jobs: list[Job]) -> str | None:
    """The library that the processes encode with, chosen once on some of their documents."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return None
    texts: list[str] = []
    for preparation in _preparations(jobs):
        if readers.resolve_format(preparation.source) in TOKENS_ALREADY:
            continue
        piece = preparation.parts[0].slices[0]
        records = readers.read(preparation.source, piece, SAMPLE_DOCUMENT_BYTES)
        documents = (record.text for record in records if isinstance(record, Document))
        texts += islice(documents, SAMPLE_DOCUMENTS)
    return tokenizer.choose_backend(texts)


def parse_part(text: str) -> tuple[int, int]:
    """`3/16` as (3, 16); UserError for what is no share."""
    share, slash, shares = text.partition("/")
    if slash and share.strip().isdecimal() and shares.strip().isdecimal():
        part = int(share), int(shares)
        if 1 <= part[0] <= part[1]:
            return part
    raise UserError(f"part={text}: give i/n with i from 1 to n, such as 3/16; 1/1 is everything")


# Sources


def _source(
    name: str, source: SourceConfig, data: DataConfig, header: Header, cache_dir: Path
) -> PreparedSource:
    if readers.resolve_format(source) == "shards":
        return _already_prepared(name, source, header, data, cache_dir)
    preparation = Preparation(name, source, data, header, cache_dir)
    held_out = preparation.directory / VALIDATION if data.validation_fraction else None
    return PreparedSource(preparation.directory / TRAIN, held_out, preparation)


def _without_empty(prepared: Prepared) -> Prepared:
    """Without the held-out splits that hold nothing after all."""
    for name, source in prepared.sources.items():
        if source.preparation is None or not source.preparation.complete or source.validation is None:
            continue
        assert isinstance(source.validation, Path)
        if not LocalShards(source.validation).index["documents"]:
            prepared.sources[name] = PreparedSource(source.train, None, source.preparation)
    return prepared


def _already_prepared(
    name: str, source: SourceConfig, header: Header, data: DataConfig, cache_dir: Path
) -> PreparedSource:
    """A source that `llmtrain prepare` wrote elsewhere: the same tokenizer and boundary, or an error."""
    if is_url(source.location):
        url = source.location.rstrip("/")
        train: Path | str = url
        beside: Path | str = f"{url.rpartition('/')[0]}/{VALIDATION}"
    else:
        train = Path(source.location).expanduser()
        beside = train.resolve().parent / VALIDATION
    itself = absolute(train) == absolute(beside)
    opened = [open_place(train, name, cache_dir, data.remote_cache_bytes)]
    if not itself and is_prepared(beside):
        held_out = open_place(beside, name, cache_dir, data.remote_cache_bytes)
        if held_out.fingerprint == f"{opened[0].fingerprint} {VALIDATION}":  # not another source's
            opened.append(held_out)
    for split, shards in zip((train, beside), opened, strict=False):
        found = shards.header
        for key in ("tokenizer", "boundary"):
            there, asked = getattr(found, key), getattr(header, key)
            if there != asked:
                raise UserError(
                    f"data.sources.{name}.path={split} was prepared with {key} {there}, not {asked}:"
                    f" set {'tokenizer' if key == 'tokenizer' else 'data.boundary'} to that, or prepare again"
                )
    return PreparedSource(train, beside if len(opened) > 1 else None)


# The tokenizer


def build_tokenizer(
    data: DataConfig, config: TokenizerConfig, cache_dir: Path, tick: Tick = no_tick
) -> tuple[Tokenizer, Path | None]:
    """The tokenizer, and the directory in the cache where it is if it was trained there."""
    check_inputs(data, tick)
    if not (isinstance(config, SentencePieceConfig) and config.path is None):
        return config.load(), None
    directory = train_tokenizer(data, config.vocab_size, cache_dir, tick)
    return load_tokenizer(directory), directory


def train_tokenizer(data: DataConfig, vocab_size: int, cache_dir: Path, tick: Tick = no_tick) -> Path:
    """A SentencePiece model trained on the training documents, once; the directory it is in."""
    texts = _texts(data)
    prints = sorted(readers.fingerprint(source) for source in texts.values())
    key = artefact_key(VERSION, vocab_size, LOSSLESS, SAMPLE_BYTES, data.validation_fraction, prints)

    def build(directory: Path) -> None:
        logger.info("training a tokenizer of %d ids on at most %d MB", vocab_size, SAMPLE_BYTES // 10**6)
        sample = (document.text for document in sample_documents(data))
        train_sentencepiece(sample, vocab_size, directory / "tokenizer.model")

    return make_once(cache_dir.expanduser() / "tokenizers" / key, build, "tokenizer", tick)


def _texts(data: DataConfig) -> dict[str, SourceConfig]:
    """The sources that are text; UserError where all are shards already."""
    texts = {n: s for n, s in data.sources.items() if readers.resolve_format(s) not in TOKENS_ALREADY}
    if not texts:
        raise UserError(
            "tokenizer.path is null, and every source is already made of tokens: give the tokenizer"
            " that the shards were prepared with"
        )
    return texts


def sample_documents(data: DataConfig) -> Iterator[Document]:
    """About SAMPLE_BYTES of training documents of all sources, each in proportion to its size on disk.

    Always the same documents, whatever the sources are called; a long one is cut.
    """
    texts = sorted(_texts(data).values(), key=readers.fingerprint)
    inputs = [[piece for part in readers.parts(source) for piece in part.slices] for source in texts]
    sizes = [_size_of(slices) for slices in inputs]
    known = [size for size in sizes if size is not None]
    typical = sum(known) // len(known) if known else SAMPLE_BYTES  # for a source whose size nobody knows
    guessed = [typical if size is None else size for size in sizes]
    for source, slices, size in zip(texts, inputs, guessed, strict=True):
        share = SAMPLE_BYTES * size // max(1, sum(guessed))
        yield from _sample_slices(source, slices, share, data)


def sample_source(source: SourceConfig, share: int, data: DataConfig) -> Iterator[Document]:
    """About `share` bytes of training documents of one source, always the same; none where it is tokens."""
    if readers.resolve_format(source) not in TOKENS_ALREADY:
        slices = [piece for part in readers.parts(source) for piece in part.slices]
        yield from _sample_slices(source, slices, share, data)


def _size_of(slices: Sequence[Slice]) -> int | None:
    sizes = [piece.size for piece in slices]
    return None if None in sizes else sum(size or 0 for size in sizes)


def _sample_slices(
    source: SourceConfig, slices: Sequence[Slice], share: int, data: DataConfig
) -> Iterator[Document]:
    """The first training documents of evenly spaced slices, together `share` bytes of text if there are."""
    chosen = slices[:: -(-len(slices) // SAMPLE_INPUTS)]
    left = share
    for number, piece in enumerate(chosen):
        budget = left // (len(chosen) - number)  # what a short one leaves over goes to those after it
        for record in readers.read(source, piece, data.max_document_bytes):
            if budget <= 0:
                break
            if isinstance(record, Document) and not is_held_out(
                record.text.encode(), data.validation_fraction
            ):
                kept = record._replace(text=record.text[:budget])
                size = len(kept.text.encode())
                budget, left = budget - size, left - size
                yield kept
