"""`llmtrain check` runs what the run will run, finds what is wrong with it, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest

from llmtrain import check as door
from llmtrain.config import UserError
from llmtrain.training import preflight, trial
from llmtrain.training.preflight import Note, Report
from llmtrain.training.trial import PREFIX
from tests.ranks import PATCH, Job

LINE = re.compile(r"(ok|warning|failed) +([\w ]+): (.*) \(\d+\.\d s\)")
CHINESE = "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。"


def lines(printed: str) -> list[tuple[str, str, str]]:
    """(state, what, text) of the report's lines."""
    found = (LINE.fullmatch(line) for line in printed.splitlines())
    return [(match[1], match[2], match[3]) for match in found if match]


def tree(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file.relative_to(directory)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(directory.rglob("*"))
        if file.is_file() and not file.name.startswith("output-")
    }


def test_a_run_that_goes_on_is_tried_and_left_alone(ranks, tiny, tmp_path):
    """Two ranks, ZeRO-3, beside a run that has trained already."""
    common = [*tiny, "deepspeed=zero3", "data.validation_fraction=0.3", "callbacks.sample.max_new_tokens=2"]
    ranks.run([*common, "max_steps=2"], 2, tmp_path)
    before = tree(tmp_path)
    job = ranks.start(common, 2, tmp_path, door="llmtrain.check")
    assert job.wait() == [0, 0], job.output()
    assert tree(tmp_path) == before
    assert list(tmp_path.glob(f"**/{PREFIX}*")) == []
    found = lines(job.outputs[0].read_text())
    said = {what: text for _, what, text in found}
    assert said["start"].startswith("goes on from ") and said["start"].endswith("step_00000002")
    assert "2 rank(s), ZeRO stage 3" in said["build"]
    assert re.fullmatch(r"loss \d\.\d{4}, gradient norm [\d.]+", said["one step"])
    assert re.fullmatch(r"held-out loss .*, \d\.\d{3} bits per byte", said["evaluate"])
    assert re.fullmatch(r"[\d.]+ MB in [\d.]+ s", said["save"])
    assert said["reload"] == "verified, and bit-equal to what was saved"
    assert said["export"].startswith("Llama, logits differ by ")
    assert [what for state, what, _ in found if state == "failed"] == []
    assert lines(job.outputs[1].read_text()) == []


def wait_for_build(job: Job) -> None:
    deadline = time.monotonic() + 240
    (output,) = job.outputs
    while not (output.exists() and "ok       build:" in output.read_text()):
        assert time.monotonic() < deadline and job.codes() == [None], job.output()
        time.sleep(0.05)


def test_sigterm_in_the_middle_leaves_nothing(ranks, tiny, tmp_path):
    job = ranks.start(
        [*tiny, "global_batch_size=4096", "micro_batch_size=1"], 1, tmp_path, door="llmtrain.check"
    )
    wait_for_build(job)
    assert list(tmp_path.glob(f"{PREFIX}*"))
    job.kill(signal.SIGTERM)
    assert job.wait() == [128 + signal.SIGTERM], job.output()
    assert list(tmp_path.glob(f"{PREFIX}*")) == []
    assert not (tmp_path / "run").exists()


def test_what_fails_on_rank_0_alone_ends_every_rank_with_one_line(ranks, tiny, tmp_path):
    """It tells of the step, and exports; the others would wait for it."""
    for patch, code, says in (
        ("lose_lines", [78, 78], "the first step has loss None"),
        ("refuse_export", [1, 1], "No space left on device"),
    ):
        environment = {PATCH: f"tests.training.faults:{patch}"}
        job = ranks.start(tiny, 2, tmp_path, environment, door="llmtrain.check")
        assert job.wait() == code, job.output()
        (line,) = [line for line in job.output().splitlines() if line.startswith("error: ")]
        assert says in line and "Traceback" not in job.output()
        assert list(tmp_path.glob(f"{PREFIX}*")) == []


def test_what_a_killed_check_left_is_removed_by_the_next_and_what_lives_stays(ranks, tiny, tmp_path):
    job = ranks.start(
        [*tiny, "global_batch_size=4096", "micro_batch_size=1"], 1, tmp_path, door="llmtrain.check"
    )
    wait_for_build(job)
    (left,) = tmp_path.glob(f"{PREFIX}*")
    trial.sweep(tmp_path)
    assert (left / "run" / "config.yaml").exists(), "it was at work"
    job.kill()
    job.wait()
    begun = tmp_path / f"{PREFIX}just-made"
    begun.mkdir()
    trial.sweep(tmp_path)
    assert [*tmp_path.glob(f"{PREFIX}*")] == [begun]


def test_a_state_that_comes_back_otherwise_is_found(tiny, tmp_path, monkeypatch, capsys):
    digests = iter("ab")
    monkeypatch.setattr(trial, "digest", lambda engine: next(digests))
    assert door.main(tiny) == 1
    captured = capsys.readouterr()
    assert "error: the state that was loaded is not the one that was saved" in captured.err
    assert "reload" not in {what for _, what, _ in lines(captured.out)}
    assert list(tmp_path.iterdir()) == []


def chinese(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("chinese") / "text.jsonl"
    texts = [CHINESE[number % 10 :] for number in range(200)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def test_epochs_duplicates_and_a_tokenizer_for_other_text_are_warned_of(
    tiny, tmp_path, tmp_path_factory, corpus, capsys, monkeypatch
):
    from llmtrain.tokenizer.training import train_sentencepiece

    model = tmp_path_factory.mktemp("english") / "tokenizer.model"
    train_sentencepiece([(corpus / "prose.jsonl").read_text()], 400, model)
    monkeypatch.setattr(trial, "_train", lambda *_: None)  # the text is what this test is about
    monkeypatch.setattr(trial, "_export", lambda *_: None)
    words = [
        *tiny,
        "tokenizer=sentencepiece",
        f"tokenizer.path={model}",
        f"data.sources.prose.path={chinese(tmp_path_factory)}",
        "max_steps=4000",
    ]
    assert door.main(words) == 0
    warned = [text for state, _, text in lines(capsys.readouterr().out) if state == "warning"]
    assert any(re.match(r"data\.sources\.prose: [\d.]+ epochs, far above 16", text) for text in warned)
    assert any(re.match(r"data\.sources\.prose: \d\d% of the tokens are bytes", text) for text in warned)
    assert any(re.match(r"data\.sources\.prose: \d\d% of a sample are duplicates", text) for text in warned)
    assert not any("data.sources.code" in text and "bytes" in text for text in warned)


def test_a_run_warns_of_the_text_before_its_first_step(ranks, tiny, tmp_path, tmp_path_factory):
    words = [*tiny, f"data.sources.code.path={chinese(tmp_path_factory)}", "data.sources.code.format=jsonl"]
    job = ranks.run([*words, "max_steps=1"], 1, tmp_path)
    assert "data.sources.code: " in job.output() and "duplicates of others" in job.output()
    job = ranks.run([*words, "max_steps=2"], 1, tmp_path)
    assert "duplicates of others" not in job.output(), "it was said when the run began"


def test_a_group_ends_with_all_its_mistakes(capsys):
    from llmtrain.distributed import World

    def fails(*complaints: str) -> list[Note]:
        raise UserError(*complaints)

    report = Report(World())
    report.look("one", lambda: [Note("fine"), Note("so so", warns=True)])
    report.look("two", lambda: fails("a=1: wrong", "b=2: wrong"))
    report.look("three", lambda: fails("c=3: wrong"))
    with pytest.raises(UserError) as caught:
        report.end_group()
    assert caught.value.lines == ["a=1: wrong", "b=2: wrong", "c=3: wrong"]
    assert [(state, what) for state, what, _ in lines(capsys.readouterr().out)] == [
        ("ok", "one"), ("warning", "one"), ("failed", "two"), ("failed", "three"),
    ]  # fmt: skip


def test_the_disk_is_held_against_the_schedule(tiny, monkeypatch):
    from llmtrain.config.hydra import compose
    from llmtrain.training.checkpoint import space
    from llmtrain.training.config import TrainConfig
    from llmtrain.training.preflight import check_disk

    monkeypatch.setattr(preflight, "checkpoint_bytes", lambda model: 10**9)
    monkeypatch.setattr(space, "free_bytes", lambda directory: 4 * 10**9)
    monkeypatch.setattr(preflight, "free_bytes", lambda directory: 4 * 10**9)

    def disk(*overrides: str) -> Note:
        return check_disk(compose(TrainConfig, [*tiny, "max_steps=1000", *overrides]), None)

    assert disk("checkpoint.keep=2") == Note("4 checkpoints of 1 GB in the end, and 4 GB are free")
    with pytest.raises(UserError, match=r"checkpoint\.keep=3: 5 checkpoints of"):
        disk("checkpoint.keep=3")
    assert disk("checkpoint.keep=2", "checkpoint.keep_every=1000").warns
    nothing_held_out = "data.validation_fraction=0"  # no checkpoint is the best
    assert not disk("checkpoint.keep=2", "checkpoint.keep_every=1000", nothing_held_out).warns


@pytest.mark.parametrize(
    ("overrides", "keep"),
    [
        ([], None),  # 100 steps back, of checkpoints of which two stay, 100 steps apart
        (["spikes.rewind_steps=101"], None),
        (["spikes.rewind_steps=102"], 3),
        (["checkpoint.every=20"], 6),
        (["checkpoint.every=20", "checkpoint.keep=6"], None),
        (["checkpoint.every=20", "checkpoint.keep_every=100"], None),
        (["checkpoint.every=20", "spikes.action=log"], None),
    ],
)
def test_checkpoints_that_no_rewind_can_reach_are_warned_of(tiny, overrides, keep):
    from llmtrain.config.hydra import compose
    from llmtrain.training.config import TrainConfig

    config = compose(TrainConfig, [*tiny, "spikes.action=rewind", *overrides])
    notes = list(preflight.check_rewinds(config))
    assert [note.text.rpartition("checkpoint.keep=")[2] for note in notes] == ([str(keep)] if keep else [])


def test_a_run_and_a_check_warn_of_rewinds_alike(tiny, monkeypatch, capsys, caplog):
    monkeypatch.setattr(trial, "_train", lambda *_: None)
    monkeypatch.setattr(trial, "_export", lambda *_: None)
    words = [*tiny, "spikes.action=rewind", "checkpoint.every=20"]
    assert door.main(words) == 0
    (warned,) = [
        text for state, what, text in lines(capsys.readouterr().out) if (state, what) == ("warning", "rewind")
    ]
    from llmtrain.config.hydra import compose
    from llmtrain.distributed import World
    from llmtrain.training.config import TrainConfig

    config = compose(TrainConfig, words)
    preflight.preflight(config, World(), preflight.open_tokenizer(config))
    assert warned in caplog.messages
