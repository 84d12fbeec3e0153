"""A run's checkpoint as a Hugging Face directory, and how far `transformers` is from the run there."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from llmtrain import __version__
from llmtrain.config import UserError
from llmtrain.model.huggingface import rounding_there, write_pretrained
from llmtrain.model.huggingface.checking import logits_there, versions
from llmtrain.tokenizer import BytesTokenizer
from llmtrain.training.finished import FinishedRun, Step, open_finished

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = "In the beginning there was a word, and 2 + 2 was 4: so it is written. def main() -> None: pass"
"""What the export and the run are compared on."""
NOTE = "llmtrain_export.json"
UNFINISHED = ".unfinished"
LARGEST_ROUNDING = 1e-3
"""Of a logit: two exact computations in fp32 differ by less."""

logger = logging.getLogger(__name__)


def export(run: Path, output: Path, step: Step, dtype: str, max_shard_gb: float) -> dict[str, Any]:
    """Write weights, config and tokenizer for `transformers`, and compare; returns what NOTE then says.

    Weights are read and written a shard at a time. `output` has them when all of it is written; what then
    ends the comparison leaves a whole export, whose NOTE says that it was not compared.
    """
    try:
        output = output.expanduser().resolve()
        if output.exists() and any(entry.name != UNFINISHED for entry in output.iterdir()):
            raise UserError(f"{output}: exists and is not empty; name a new directory")
    except OSError as error:
        raise _not_writable(output, error) from error
    finished = open_finished(run, step)
    try:
        note = _write(finished, output, dtype, max_shard_gb)
    except OSError as error:
        raise _not_writable(output, error) from error
    note |= _compare(finished, output)
    _write_note(output, note)
    _warn(note)
    return note


def _not_writable(output: Path, error: OSError) -> UserError:
    return UserError(f"{output}: cannot be written: {error.strerror or error}; name another directory")


def _write(finished: FinishedRun, output: Path, dtype: str, max_shard_gb: float) -> dict[str, Any]:
    """Into a directory aside first; an empty one that is there already stays the one that it is."""
    aside = output / UNFINISHED if output.is_dir() else output.with_name(f".{output.name}{UNFINISHED}")
    shutil.rmtree(aside, ignore_errors=True)
    family = write_pretrained(
        aside,
        finished.config.model,
        finished.weights,
        vocab_size=finished.tokenizer.vocab_size,
        seq_len=finished.config.seq_len,
        bos_id=finished.tokenizer.bos_id,
        eos_id=finished.tokenizer.eos_id,
        dtype=DTYPES[dtype],
        max_shard_gb=max_shard_gb,
    )
    finished.tokenizer.save(aside)
    if isinstance(finished.tokenizer, BytesTokenizer):
        logger.info("tokenizer=bytes: transformers has no such tokenizer; its ids are a text's UTF-8 bytes")
    note = {
        "run": finished.config.name,
        "step": finished.step,
        "family": family.name,
        "dtype": dtype,
        "versions": {"llmtrain": __version__, **versions()},
        "max_logit_difference": None,
        "not_compared": "the comparison did not come to its end",
        "rounding_there": rounding_there(finished.config.model),
    }
    _write_note(aside, note)
    if aside.parent != output:
        aside.rename(output)
        return note
    for file in aside.iterdir():
        file.rename(output / file.name)
    aside.rmdir()
    return note


def _write_note(directory: Path, note: dict[str, Any]) -> None:
    (directory / NOTE).write_text(json.dumps(note, indent=2) + "\n")


def _compare(finished: FinishedRun, output: Path) -> dict[str, Any]:
    """The largest difference of a logit between the run's fp32 weights here and the export in transformers.

    Both on the CPU, one at a time; where even one does not fit, the difference is null and a reason given.
    """
    needed = 4 * sum(shape.numel() for shape in finished.weights.shapes())
    free = psutil.virtual_memory().available
    if needed > 0.8 * free:
        reason = f"{needed / 1e9:.1f} GB of weights do not fit into {free / 1e9:.1f} GB of free memory"
        return {"not_compared": reason}
    ids = torch.from_numpy(finished.tokenizer.encode_batch([PROMPT])[0])[None, : finished.config.seq_len]
    with torch.no_grad():
        here = finished.assemble()(ids)
    difference = float((here - logits_there(output, ids.long())).abs().max())
    return {
        "max_logit_difference": difference,
        "not_compared": None,
        "prompt": PROMPT,
        "positions": ids.shape[1],
    }


def _warn(note: dict[str, Any]) -> None:
    """Where an export in fp32 is not the model that was trained."""
    difference = note["max_logit_difference"] or 0.0
    if note["dtype"] == "fp32" and not note["rounding_there"] and not difference <= LARGEST_ROUNDING:
        logger.warning(
            "logits differ by %.2g from those of transformers, which rounding does not explain "
            "(%g at most): compare the two models before you use the export",
            difference, LARGEST_ROUNDING,
        )  # fmt: skip
