"""Checkpoints: `<run>/checkpoints/step_00000100/`, complete and verified, or invisible.

    MANIFEST.json            size and SHA-256 of every file, and of itself
    checkpoint.json          the record: step, ranks, stage, model, the state of the data, shapes
    rank_00000.safetensors   the pieces of parameters for which that rank answers, and its random states

A save writes to `.tmp-*`, hashing what it writes; when every rank's file is durable, rank 0 writes the
manifest and renames. A load reads every byte and compares, before anything is parsed, and takes the newest
checkpoint that is whole. Files hold tensors and JSON: there is no code in them that could run.
"""

from llmtrain.training.checkpoint.best import Score, best_step, mark_best
from llmtrain.training.checkpoint.choosing import (
    Chosen,
    choose,
    find_checkpoint,
    newest_verified,
    verified_checkpoint,
)
from llmtrain.training.checkpoint.config import CheckpointConfig
from llmtrain.training.checkpoint.directory import abandon, checkpoints, hide, sweep
from llmtrain.training.checkpoint.manifest import DamagedError, Manifest, damages, read_record
from llmtrain.training.checkpoint.reading import (
    CheckpointTensors,
    CheckpointWeights,
    seed_random_states,
    set_random_states,
)
from llmtrain.training.checkpoint.saving import Failed, Saved, Saver
from llmtrain.training.checkpoint.space import check_space, free_bytes, most_at_a_time

__all__ = [
    "CheckpointConfig",
    "CheckpointTensors",
    "CheckpointWeights",
    "Chosen",
    "DamagedError",
    "Failed",
    "Manifest",
    "Saved",
    "Saver",
    "Score",
    "abandon",
    "best_step",
    "check_space",
    "checkpoints",
    "choose",
    "damages",
    "find_checkpoint",
    "free_bytes",
    "hide",
    "mark_best",
    "most_at_a_time",
    "newest_verified",
    "read_record",
    "seed_random_states",
    "set_random_states",
    "sweep",
    "verified_checkpoint",
]
