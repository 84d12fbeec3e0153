"""A run directory opened for reading: its config, its tokenizer, its weights on one device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from llmtrain.config import UserError, describe
from llmtrain.data.batch import Batch
from llmtrain.data.dataset import is_same_text
from llmtrain.data.prepare import OnDemand, look
from llmtrain.data.prepared import Prepared
from llmtrain.data.shards import ShardedSource
from llmtrain.model import Decoder
from llmtrain.tokenizer import Tokenizer, load_tokenizer
from llmtrain.training.checkpoint import checkpoints, read_record
from llmtrain.training.config import TrainConfig
from llmtrain.training.engine.weights import CheckpointWeights
from llmtrain.training.run_directory import RunDirectory


@dataclass(frozen=True)
class FinishedRun:
    """A run at one of its checkpoints."""

    path: Path
    step: int
    config: TrainConfig
    tokenizer: Tokenizer
    weights: CheckpointWeights
    """By parameter name, fp32 on the CPU; each is read when it is asked for."""
    record: dict[str, Any]
    """What the checkpoint says of itself."""

    @cached_property
    def model(self) -> Decoder:
        """The decoder with these weights, in fp32 on one device."""
        model = self.config.model.assemble(vocab_size=self.tokenizer.vocab_size, seq_len=self.config.seq_len)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.weights[name])
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    def sources(self) -> tuple[dict[str, ShardedSource], dict[str, ShardedSource]]:
        """Training and held-out text: the shards it was trained on, or the same text prepared again.

        Other text is a UserError.
        """
        train, held_out = open_sources(self.path, self.config, self.tokenizer)
        for name, source in self.record["data"]["sources"].items():
            if name in train and not is_same_text(train[name], source):
                raise UserError(f"data.sources.{name}: its text is not what {self.path} was trained on")
        return train, held_out


def open_sources(
    path: Path, config: TrainConfig, tokenizer: Tokenizer
) -> tuple[dict[str, ShardedSource], dict[str, ShardedSource]]:
    """Training and held-out text of a run: the shards it reads, or the same text prepared again.

    What is not there yet of a run that is at work is waited for, and made where no run is.
    """
    directory = RunDirectory(path)
    places = directory.read_json("data/prepared.json") or {}
    prepared = Prepared.from_dict(tokenizer, places, config.cache_dir, config.data.remote_cache_bytes)
    if not prepared.is_there():
        prepared = look(config.data, tokenizer, config.cache_dir)
        if not directory.is_locked():
            prepared.crew = OnDemand(tokenizer)
    return prepared.open()


class LocalModel:
    """The engine's two reading methods over a plain module in one process."""

    def __init__(self, model: Decoder) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def loss(self, batch: Batch) -> torch.Tensor:
        """Sum of the target losses of each row [rows]."""
        batch = batch.to(self.device)
        return self.model(batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens).rows

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [rows, T, V] of ids [rows, T]."""
        return self.model(input_ids.to(self.device))


def open_finished(path: Path, step: int | None = None) -> FinishedRun:
    """Open a run at its newest checkpoint, or at the one of `step`.

    Works for a running run too, whatever ZeRO stage and number of ranks wrote it.
    """
    config = read_config(path)
    found = dict(checkpoints(path / "checkpoints"))
    if not found:
        raise UserError(f"{path}: no checkpoint in it yet")
    step = max(found) if step is None else step
    if step not in found:
        raise UserError(f"{path}: no checkpoint of step {step}; there are {', '.join(map(str, found))}")
    record = read_record(found[step])
    tokenizer = load_tokenizer(path / "tokenizer")
    weights = CheckpointWeights(found[step], record["stage"])
    return FinishedRun(path, step, config, tokenizer, weights, record)


def read_config(path: Path) -> TrainConfig:
    """The typed config of the run in `path`."""
    value = RunDirectory(path).read_config()
    try:
        return TrainConfig.model_validate(value)
    except ValidationError as error:
        mistakes = "; ".join(describe(TrainConfig, value, error))
        raise UserError(f"{path / 'config.yaml'}: not a config of this version: {mistakes}") from error
