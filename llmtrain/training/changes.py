"""What may differ between a run and its continuation: a rule for every key, and one message for all of them.

safe     what the next step computes does not depend on it, or the order of the data takes care of it
flag     the steps to come are other ones: `resume_changes` has to name the key
refused  weights, optimizer state or the order of the data would not be this run's any more
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmtrain.config import UserError
from llmtrain.config.errors import did_you_mean

logger = logging.getLogger(__name__)

Rule = Literal["safe", "flag", "refused"]

ABSENT = "-"
LONGEST = 40
"""Characters of a value that the table shows."""

TABLE: dict[str, tuple[Rule, str]] = {
    # a key, or what keys begin with: the rule, and why; the longest that fits holds
    "name": ("safe", "a name"),
    "output_dir": ("safe", "a place"),
    "cache_dir": ("safe", "a place"),
    "resume": ("safe", "how this start was asked for"),
    "resume_changes": ("safe", "how this start was asked for"),
    "max_steps": ("safe", "the schedule and the intervals follow it"),
    "micro_batch_size": ("safe", "accumulation makes up for it"),
    "log_every": ("safe", "watches only"),
    "hang_timeout": ("safe", "watches only"),
    "profile": ("safe", "watches only"),
    "callbacks": ("safe", "watches only"),
    "callbacks.evaluation.patience": ("safe", "when to stop"),
    "callbacks.evaluation.min_delta": ("safe", "when to stop"),
    "logger": ("safe", "watches only"),
    "hardware": ("safe", "watches only"),
    "corruption_check": ("safe", "watches only"),
    "spikes": ("safe", "when a step is left out, not how it is computed"),
    "checkpoint": ("safe", "when to save"),
    "time_limit": ("safe", "when to stop"),
    "grace_seconds": ("safe", "when to stop"),
    "compile": ("safe", "the same function, up to rounding"),
    "activation_checkpointing": ("safe", "the same function"),
    "ranks": ("safe", "the same rows, up to rounding"),
    "deepspeed": ("safe", "how ranks share the work"),
    "precision": ("flag", "other rounding"),
    "fp8": ("flag", "other rounding"),
    "z_loss": ("flag", "another loss"),
    "optimizer": ("flag", "other updates"),
    "optimizer.kind": ("refused", "its state is another optimizer's"),
    "optimizer._target_": ("refused", "its state is another optimizer's"),
    "scheduler": ("flag", "other learning rates"),
    "seed": ("refused", "the order of the data follows from it"),
    "seq_len": ("refused", "the order of the data follows from it"),
    "global_batch_size": ("refused", "the order of the data follows from it"),
    "model": ("refused", "the weights are another model's"),
    "model.attention": ("safe", "every backend computes the same function"),
    "model.init_from": ("safe", "the weights are the checkpoint's"),
    "tokenizer": ("safe", "its fingerprint is compared"),
    "tokenizer.fingerprint": ("refused", "ids would mean other text"),
    "data.sources": ("safe", "the mixture changes from the next step on; the text of each is compared"),
    "data.stages": ("safe", "the mixture changes from the next step on"),
    "data.skip": ("safe", "what was left out stays so"),
    "data.curriculum": ("flag", "segments of other lengths"),
    "data.documents": ("refused", "the order of the data follows from it"),
    "data.boundary_targets": ("refused", "the order of the data follows from it"),
    "data.packing": ("refused", "the order of the data follows from it"),
    "data.max_padding": ("refused", "the order of the data follows from it"),
    "data.shuffle_span": ("refused", "the order of the data follows from it"),
    "data.boundary": ("refused", "the text of every source would be another"),
    "data.validation_fraction": ("refused", "the text of every source would be another"),
    "data.max_document_bytes": ("refused", "the text of every source would be another"),
    "data.bad_records": ("safe", "a bad record is left out all the same"),
    "data.max_bad_fraction": ("safe", "when to give up"),
    "data.preparation": ("safe", "when text is tokenised, not how"),
    "data.workers": ("safe", "when text is tokenised, not how"),
    "data.remote_cache_gb": ("safe", "a place"),
}


@dataclass(frozen=True)
class Change:
    """A key with another value than the checkpoint was written with."""

    key: str
    run: Any
    now: Any
    rule: Rule
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """What events.jsonl has under the key."""
        return {"run": self.run, "now": self.now, "rule": self.rule}


def rule_of(key: str) -> tuple[Rule, str]:
    """The row of TABLE for a dotted key; a key that this version does not know needs a permission."""
    words = key.split(".")
    for length in range(len(words), 0, -1):
        row = TABLE.get(".".join(words[:length]))
        if row:
            return row
    return "flag", "this version does not know it"


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What differs between the record of a checkpoint and that of the run that would go on from it."""
    pairs = differences(_settings(saved), _settings(now))
    return [Change(key, run, ours, *rule_of(key)) for key, (run, ours) in pairs]


def check_changes(checkpoint: Path, found: Sequence[Change], allowed: Sequence[str]) -> None:
    """UserError where `found` has what a resume cannot change, or what `allowed` does not name.

    All that differs is told first, in one table.
    """
    refused = [change for change in found if change.rule == "refused"]
    unnamed = [change for change in found if change.rule == "flag" and not _names(allowed, change.key)]
    if not (refused or unnamed):
        return
    tell_changes(checkpoint, found)
    lines = [
        f"{change.key}={shown(change.now)}: {checkpoint} has {shown(change.run)}, which no resume can "
        f"change ({change.reason}); go back to it, or start anew with resume=never or another output_dir"
        for change in refused
    ]
    if unnamed:
        assigned = ", ".join(f"{change.key}={shown(change.now)}" for change in unnamed)
        before = ", ".join(shown(change.run) for change in unnamed)
        keys = ",".join([*allowed, *(change.key for change in unnamed)])
        lines.append(
            f"{assigned}: {checkpoint} has {before}; go back to it, or allow the change: "
            f"'resume_changes=[{keys}]'"
        )
    raise UserError(*lines)


def tell_changes(checkpoint: Path, found: Sequence[Change]) -> None:
    """Log what differs as a table."""
    if not found:
        return
    rows = [("key", "run", "now", "rule")]
    for change in found:
        run, now = shown(change.run)[:LONGEST], shown(change.now)[:LONGEST]
        rows.append((change.key, run, now, f"{change.rule}: {change.reason}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    logger.info("%s was written with other settings:\n%s", checkpoint, "\n".join(lines))


def other_text(found: Iterable[Change]) -> bool:
    """Whether what is held out is not what it was: more of it, less, or that of other sources."""
    return any(
        change.key == "callbacks.evaluation.documents"
        or (change.key.startswith("data.sources.") and ABSENT in (change.run, change.now))
        for change in found
    )


def check_permissions(allowed: Sequence[str]) -> None:
    """ValueError for a name in `resume_changes` that no key with a permission has."""
    known = [key for key, (rule, _) in TABLE.items() if rule == "flag"]
    for name in allowed:
        rule, reason = rule_of(name)
        if rule == "safe":
            raise ValueError(f"{name} needs no permission: it is safe ({reason})")
        if rule == "refused":
            raise ValueError(f"{name} cannot be allowed: it is refused ({reason})")
        if not any(name == key or name.startswith(f"{key}.") for key in known):
            raise ValueError(f"{name}: no such key; there are {', '.join(known)}{did_you_mean(name, known)}")


def _names(allowed: Sequence[str], key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a record, `auto` made concrete, and what no key says."""
    config = record["config"]
    return {
        **config,
        "precision": record["precision"],
        "tokenizer": {**config["tokenizer"], "fingerprint": record["tokenizer"]},
        "ranks": record["world_size"],
    }


def differences(*configs: Any, key: str = "") -> Iterator[tuple[str, Sequence[Any]]]:
    """(dotted key, its value in each config or ABSENT) of the smallest parts that are not the same in all."""
    if not all(isinstance(config, Mapping) for config in configs):
        if any(config != configs[0] for config in configs):
            yield key, configs
        return
    for name in dict.fromkeys(name for config in configs for name in config):
        values = [config.get(name, ABSENT) for config in configs]
        yield from differences(*values, key=f"{key}.{name}" if key else name)


def shown(value: Any) -> str:
    """A value of a config as one would write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
