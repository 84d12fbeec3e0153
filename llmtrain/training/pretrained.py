"""`model.init_from`: a run that begins with the shape and the weights of a Hugging Face directory."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.config import UserError
from llmtrain.model import Decoder
from llmtrain.model.huggingface import Pretrained, family_of
from llmtrain.model.init import Gather, initialize_parameters
from llmtrain.tokenizer import vocab_size_of
from llmtrain.training.checkpoint import find_checkpoint, read_record
from llmtrain.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from llmtrain.training.config import TrainConfig

logger = logging.getLogger(__name__)


def with_shape(value: Mapping[str, Any], given: Mapping[str, str]) -> Mapping[str, Any]:
    """The composed keys of a run with the shape of `model.init_from`; the same where it is not set.

    The shape of a preset that nobody named gives way. What the command line names (`given`: preset, group or
    key, and its text) and that says something else is a UserError. A run that goes on keeps its own shape,
    and the directory may be gone.
    """
    model = value.get("model")
    if not isinstance(model, Mapping) or not model.get("init_from"):
        return value
    shape, source = _shape_of_run(value) or _shape_of_directory(value)
    if wrong := list(_contradictions(model, shape, source, given)):
        raise UserError(*wrong)
    return {**value, "model": {**model, **shape}}


def _shape_of_run(value: Mapping[str, Any]) -> tuple[dict[str, Any], Path] | None:
    resume, output = str(value.get("resume")), value.get("output_dir")
    checkpoint = find_checkpoint(resume, RunDirectory(Path(str(output))).checkpoints)
    if checkpoint is None:
        return None
    saved = read_record(checkpoint)["config"]["model"]
    return {key: saved[key] for key in saved if key not in ("attention", "init_from")}, checkpoint


def _shape_of_directory(value: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    found = Pretrained.open(_directory(value["model"]["init_from"]))
    seq_len = value.get("seq_len")
    if found.window is not None and isinstance(seq_len, int) and seq_len > found.window:
        raise UserError(
            f"seq_len={seq_len}: a token of {found.path} sees {found.window} positions (sliding_window), "
            f"which this decoder cannot limit; set seq_len={found.window} or less"
        )
    return dict(found.shape), found.path


def _contradictions(
    model: Mapping[str, Any], shape: Mapping[str, Any], source: Path, given: Mapping[str, str]
) -> Iterator[str]:
    """A line for each word of the command line; `model=7b` and `model/family=mpt` give a whole shape."""
    for word, text in sorted(given.items()):
        group, *path = word.removesuffix("/family").replace("/", ".").split(".")
        if group != "model" or (path and path[0] not in shape):
            continue
        if path:
            ours, theirs = _get(model, path), _get(shape, path)
            differs = ours is not None and ours != theirs
        else:
            differs = any(model.get(key) not in (None, shape[key]) for key in shape)
        if differs and "." in word:
            yield f"{word}={ours}: {source} has {theirs}; leave {word} or model.init_from out"
        elif differs:
            what = path[0] if path else "shape"
            yield f"{word}={text}: {source} has another {what}; leave {word}={text} or model.init_from out"


def _get(value: Any, path: Collection[str]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def check_files(config: TrainConfig) -> None:
    """UserError where `model.init_from` has not the weights of its config.json, or another vocabulary.

    Nothing is needed of the text, and no weights are read.
    """
    path = config.model.init_from
    if path is not None:
        found = Pretrained.open(_directory(path))
        found.check(vocab_size_of(config.tokenizer))
        found.check_weights(config.model)


class Initialize:
    """Writes the first weights of a run: `engine.build_engine` calls it."""

    def __init__(self, config: TrainConfig, vocab_size: int, goes_on: bool) -> None:
        self.seed, self.pretrained = config.seed, None
        path = config.model.init_from
        if path is None or goes_on:
            return
        self.pretrained = Pretrained.open(_directory(path))
        self.pretrained.check(vocab_size)
        logger.info(f"weights begin as those of {path}, a {family_of(config.model).name}")
        if unused := self.pretrained.vocab_size - vocab_size:
            logger.info(f"{unused} rows of its vocabulary have no id of the tokenizer and are left out")

    def __call__(self, decoder: Decoder, gather: Gather) -> None:
        """Write every parameter inside `gather(parameter)`."""
        if self.pretrained is None:
            initialize_parameters(decoder, self.seed, gather)
        else:
            self.pretrained.initialize(decoder, gather)


def _directory(path: str | Path) -> Path:
    return Path(path).expanduser()
