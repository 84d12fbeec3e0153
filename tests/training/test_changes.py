"""Every key has a rule for a resume; what differs is told in one table, and refused or allowed by it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config import UserError
from llmtrain.config.hydra import compose
from llmtrain.distributed import World
from llmtrain.training.build import describe_run
from llmtrain.training.changes import (
    TABLE,
    Change,
    changes,
    check_changes,
    check_permissions,
    rule_of,
    tell_changes,
)
from llmtrain.training.config import TrainConfig
from tests.training.test_keys import keys

WITHOUT_A_KEY = {"ranks", "tokenizer.fingerprint", "optimizer._target_"}
CHECKPOINT = Path("runs/a/checkpoints/step_00000002")

RULES = {
    # rule: overrides that change a key with that rule
    "safe": [
        "max_steps=20", "micro_batch_size=4", "checkpoint.keep=5", "callbacks.sample.every=3", "compile=true",
        "data.sources.code.weight=0.5", "data.workers=2", "logger.wandb.mode=offline", "name=other",
        "activation_checkpointing=true", "deepspeed.zero_optimization.reduce_bucket_size=1000",
        "model/attention=eager", "data.stages=[{from_step: 3, weights: {prose: 1}}]", "data.skip=[[2,3]]",
        "hardware=h100_80gb", "resume=never", "cache_dir=elsewhere", "log_every=5",
    ],
    "flag": [
        "optimizer.lr=1e-5", "optimizer.betas=[0.9,0.9]", "optimizer.weight_decay=0.2", "z_loss=0.1",
        "scheduler.min_lr_ratio=0.5", "scheduler=wsd", "data.curriculum={from_length: 8, until_step: 4}",
        "optimizer.lr_scales.head=2",
    ],
    "refused": [
        "seed=1", "seq_len=32", "global_batch_size=16", "model.d_ff=192", "model/position=alibi",
        "optimizer=lion", "data.packing=best_fit", "data.boundary=eos", "data.documents=attend",
        "data.shuffle_span=7", "data.validation_fraction=0.5", "data.max_document_bytes=1000",
    ],
}  # fmt: skip


def record(tiny: list[str], *overrides: str, ranks: int = 1) -> dict[str, Any]:
    config = compose(TrainConfig, [*tiny, *overrides])
    return json.loads(json.dumps(describe_run(config, World(0, ranks), "a", "fp32")))


def test_every_key_has_a_rule_of_its_own():
    known = set(keys(TrainConfig)) | WITHOUT_A_KEY
    covered = {key for key in known for row in TABLE if key == row or key.startswith(f"{row}.")}
    assert known - covered == set()
    assert {row for row in TABLE if not any(f"{key}.".startswith(f"{row}.") for key in known)} == set()


@pytest.mark.parametrize(("rule", "override"), [(rule, one) for rule, some in RULES.items() for one in some])
def test_the_rule_of_a_change(tiny, rule, override):
    found = changes(record(tiny), record(tiny, override))
    rules = {change.rule for change in found}
    worst = next(one for one in ("refused", "flag", "safe") if one in rules)
    assert worst == rule, found


def test_the_longest_row_holds_and_an_unknown_key_needs_a_permission():
    assert rule_of("optimizer.kind")[0] == "refused"
    assert rule_of("optimizer.anything.else")[0] == "flag"
    assert rule_of("model.attention.backend")[0] == "safe"
    assert rule_of("model.d_model")[0] == "refused"
    assert rule_of("data.invented")[0] == rule_of("invented")[0] == "flag"


def test_equal_settings_are_no_change(tiny):
    assert changes(record(tiny), record(tiny)) == []


def test_precision_is_compared_as_it_was_resolved(tiny):
    before, now = record(tiny), record(tiny, "precision=auto")
    assert changes(before, now) == []
    (change,) = changes(before, {**now, "precision": "bf16_autocast"})
    assert (change.key, change.run, change.now) == ("precision", "fp32", "bf16_autocast")


def test_another_tokenizer_and_a_source_more(tiny):
    before, now = record(tiny), record(tiny, "+data.sources.more.path=x", "+data.sources.more.weight=1")
    found = {change.key: change for change in changes(before, {**now, "tokenizer": "other"})}
    assert found.keys() == {"data.sources.more", "tokenizer.fingerprint"}
    assert found["data.sources.more"].run == "-" and found["data.sources.more"].rule == "safe"
    assert found["tokenizer.fingerprint"].rule == "refused"


def test_one_message_shows_every_difference_and_what_to_type(tiny, caplog):
    now = record(tiny, "optimizer.lr=1e-5", "scheduler.min_lr_ratio=0.5", "max_steps=20", "seed=1")
    found = changes(record(tiny), now)
    caplog.set_level(logging.INFO, "llmtrain")
    with pytest.raises(UserError) as caught:
        check_changes(CHECKPOINT, found, ["optimizer.eps"])
    heading, *rows = caplog.messages[0].splitlines()[1:]
    assert heading.split() == ["key", "run", "now", "rule"]
    assert [row.split()[0] for row in rows] == [
        "seed", "max_steps", "optimizer.lr", "scheduler.min_lr_ratio",
    ]  # fmt: skip
    assert rows[1].split()[:4] == ["max_steps", "12", "20", "safe:"]
    refused, asks = caught.value.lines
    assert refused.startswith(f"seed=1: {CHECKPOINT} has 0, which no resume can change")
    assert asks.endswith("'resume_changes=[optimizer.eps,optimizer.lr,scheduler.min_lr_ratio]'")


@pytest.mark.parametrize(
    ("allowed", "passes"),
    [(["optimizer.lr"], True), (["optimizer"], True), (["optimizer.l"], False), (["scheduler"], False)],
)
def test_a_permission_is_a_key_or_what_it_begins_with(tiny, allowed, passes):
    found = changes(record(tiny), record(tiny, "optimizer.lr=1e-5"))
    if passes:
        check_changes(CHECKPOINT, found, allowed)
        return
    with pytest.raises(UserError, match=r"optimizer\.lr=1e-05"):
        check_changes(CHECKPOINT, found, allowed)


def test_what_is_refused_cannot_be_allowed():
    for name, words in [
        ("seed", "cannot be allowed: it is refused"),
        ("max_steps", "needs no permission: it is safe"),
        ("optimiser", "mean optimizer"),
    ]:
        with pytest.raises(ValueError, match=words):
            check_permissions([name])
    check_permissions(["optimizer.lr", "scheduler", "z_loss"])


def test_nothing_is_told_where_nothing_differs(caplog):
    caplog.set_level(logging.INFO, "llmtrain")
    tell_changes(CHECKPOINT, [])
    assert caplog.messages == []
    tell_changes(CHECKPOINT, [Change("name", "a" * 99, "b", "safe", "a name")])
    assert "a" * 40 in caplog.messages[0] and "a" * 41 not in caplog.messages[0]


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def test_a_change_that_is_allowed_is_written_down(ranks, tiny, tmp_path):
    ranks.run([*tiny, "max_steps=2"], 1, tmp_path)
    changed = [*tiny, "max_steps=4", "optimizer.lr=1e-5"]
    job = ranks.start(changed, 1, tmp_path)
    assert job.wait() == [78], job.output()
    (line,) = [line for line in job.output().splitlines() if line.startswith("error: ")]
    assert line.endswith("or allow the change: 'resume_changes=[optimizer.lr]'")
    assert [event["event"] for event in events(tmp_path / "run")].count("resume") == 0

    ranks.run([*changed, "resume_changes=[optimizer.lr]"], 1, tmp_path)
    (event,) = [event for event in events(tmp_path / "run") if event["event"] == "resume"]
    assert event["changes"]["optimizer.lr"] == {"run": 3e-3, "now": 1e-5, "rule": "flag"}
    assert event["changes"]["max_steps"] == {"run": 2, "now": 4, "rule": "safe"}
    # The checkpoint now says what it was trained with: the same command needs no permission any more.
    moved = [*tiny, "max_steps=5", "optimizer.lr=1e-5", "deepspeed=zero3", "micro_batch_size=1"]
    job = ranks.run(moved, 2, tmp_path)
    rows = [line.split()[:4] for line in job.outputs[0].read_text().splitlines()]
    assert ["ranks", "1", "2", "safe:"] in rows
    assert ["deepspeed.zero_optimization.stage", "1", "3", "safe:"] in rows
