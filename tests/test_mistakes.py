"""Mistakes that users make: each ends before any process group, in one line that names the key."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.ranks import PATCH, Job

PROSE = "data.sources.prose"
# Files that are not as they should be; HERE stands for the directory of `wrong_files`.
HERE = "<here>"

MISTAKES: dict[str, tuple[list[str], str]] = {
    # what was done: (overrides on top of a run that works, what the one line must contain)
    "a typo in a key": (["model.d_modle=64"], "model.d_modle=64: no such key; did you mean model.d_model?"),
    "a typo with a plus": (["+model.n_layer=2"], "did you mean model.n_layers?"),
    "a typo at the root": (["max_step=5"], "max_step=5: no such key; did you mean max_steps?"),
    "a typo inside a source": (["+data.sources.prose.wieght=1"], "data.sources.prose.wieght"),
    "an unknown group": (["optimiser=adamw"], "did you mean optimizer?"),
    "an unknown option": (["model=tinny"], "did you mean tiny?"),
    "an unknown kind": (["scheduler.kind=cosin"], "did you mean cosine?"),
    "an unknown value": (["precision=bf32"], "precision=bf32"),
    "text for a number": (["seq_len=long"], "seq_len=long"),
    "a negative number": (["seq_len=-64"], "seq_len=-64"),
    "a fraction for a count": (["max_steps=1.5"], "max_steps=1.5"),
    "a list that is too short": (["optimizer.betas=[0.9]"], "optimizer.betas"),
    "heads that do not divide": (["model.n_kv_heads=3"], "model.n_kv_heads=3"),
    "a width that heads do not divide": (["model.d_model=66"], "d_model=66"),
    "a batch that micro batches do not divide": (["micro_batch_size=3"], "global_batch_size=8"),
    "a key that belongs elsewhere": (["+deepspeed.train_batch_size=8"], "global_batch_size"),
    "a combination that computes wrongly": (["deepspeed=zero0", "precision=bf16"], "precision=bf16"),
    "FP8 that would hold what ZeRO-3 gathers": (
        ["deepspeed=zero3", "precision=bf16", "fp8=rowwise", "compile=false"],
        "fp8=rowwise",
    ),
    "an attention backend that is not here": (["model/attention=flash"], "model.attention.backend=flash"),
    "an unknown way to compile": (["compile=maybe"], "compile=maybe"),
    "an unknown FP8 recipe": (["fp8=rowise"], "fp8=rowise: must be one of false, tensorwise, rowwise"),
    "a file that is not there": (["data.sources.prose.path=nowhere/*.jsonl"], "data.sources.prose.path"),
    "a field that is not there": (["+data.sources.prose.text_key=body"], "body"),
    "weight and epochs mixed": (["+data.sources.prose.epochs=2"], "epochs"),
    "a value that was never set": (["tokenizer=huggingface"], "tokenizer.path"),
    "a checkpoint that is not there": (["resume=runs/nowhere"], "resume=runs/nowhere"),
    "a boundary that the shuffle cannot have": (["data.shuffle_span=0"], "data.shuffle_span=0"),
    "a source of which only the size is known": (
        [f"~{PROSE}.path", f"+{PROSE}.tokens=1000"],
        f"{PROSE} has tokens and no path, which is enough for `plan` alone: say where the text is",
    ),
    "a size and a path": ([f"+{PROSE}.tokens=1000"], "give path (where the text is), or tokens alone"),
    "a template with a field that is not there": (
        [f"+{PROSE}.template='{{titel}}: {{text}}'"],
        "320 are bad (320 missing field), more than data.max_bad_fraction=0.001 allows",
    ),
    "a template with an open brace": (
        [f"+{PROSE}.template='{{title: {{text}}'"],
        f"{PROSE}.template is '{{title: {{text}}': a brace that is text is written twice",
    ),
    "a template without a field": ([f"+{PROSE}.template=title"], "name a field in braces, such as {title}"),
    "a template and a key": (
        [f"+{PROSE}.template='{{title}}'", f"+{PROSE}.text_key=title"],
        f"{PROSE}: give text_key (one field) or template (a text made of several), not both",
    ),
    "a stage with an unknown source": (
        ["data.stages=[{from_step: 3, weights: {prosa: 1}}]"],
        "stages.0.weights.prosa: no such source; there are code, prose",
    ),
    "stages out of order": (
        ["data.stages=[{from_step: 5, weights: {prose: 1}}, {from_step: 3, weights: {code: 1}}]"],
        "stages begin at steps [5, 3]: each must be after the one before it",
    ),
    "a stage without a weight": (
        ["data.stages=[{from_step: 3, weights: {code: 0}}]"],
        "stages.0.weights: no weight is above 0",
    ),
    "stretches that overlap": (
        ["data.skip=[[2,5],[4,9]]"],
        "skip has [4, 9] after step 5: each is [first, last], ascending, apart",
    ),
    "a stretch from its end": (["data.skip=[[5,2]]"], "skip has [5, 2] after step 0"),
    "segments above the row": (
        ["data.curriculum={from_length: 128, until_step: 4}"],
        "data.curriculum.from_length=128 is above seq_len=64: segments grow up to seq_len",
    ),
    "a URL of a package that is not there": (
        [f"{PROSE}.path=oss://bucket/web/*.jsonl"],
        f"{PROSE}.path=oss://bucket/web/*.jsonl: this kind of URL needs another package: Install ossfs",
    ),
    "a URL of no known kind": ([f"{PROSE}.path=nonsense://bucket/a.jsonl"], f"{PROSE}.path=nonsense://"),
    "JSON that is no array": (
        [f"{PROSE}.path={HERE}/lines.json"],
        "lines.json: begins with '{', not with the [ of a JSON array; if it holds one object a line, set "
        "format=jsonl",
    ),
    "too many bad records": (
        [f"{PROSE}.path={HERE}/bad.jsonl"],
        "bad.jsonl that were read, 3 are bad (3 malformed JSON), more than data.max_bad_fraction=0.001 "
        "allows; the first is ",
    ),
    "a bad record where none may be": (
        [f"{PROSE}.path={HERE}/bad.jsonl", "data.bad_records=raise"],
        "mend the record, or set data.bad_records to quarantine",
    ),
    "shards of an older version": (
        [f"{PROSE}.path={HERE}/old"],
        "old/index.json: version 1 of the format is not 2: prepare the text again",
    ),
    "dashes": (["--max_steps=5"], "max_steps=5"),
    "a run directory below a file": (
        [f"output_dir={HERE}/lines.json/run"],
        "lines.json is a file, not a directory; name another place",
    ),
    "a cache below a file": ([f"cache_dir={HERE}/lines.json/cache"], "cache_dir="),
    "a key that needs no permission": (
        ["resume_changes=[max_steps]"],
        "max_steps needs no permission: it is safe",
    ),
    "a typo in a permission": (["resume_changes=[optimiser.lr]"], "did you mean optimizer?"),
    "a model that no memory holds": (
        ["model.d_model=65536", "model.d_ff=262144", "model.n_layers=400"],
        "deepspeed.zero_optimization.stage=1: weights, gradients and optimizer state of ",
    ),
    "more checkpoints than the disk holds": (
        ["max_steps=1000000000", "checkpoint.every=1", "checkpoint.keep=1000000000"],
        "checkpoint.keep=1000000000: ",
    ),
    "more ids than the text has words for": (
        ["tokenizer=sentencepiece", "tokenizer.vocab_size=90000"],
        "tokenizer.vocab_size=90000 does not suit this text",
    ),
    "a tokenizer that is none": (
        ["tokenizer=sentencepiece", f"tokenizer.path={HERE}/bad.jsonl"],
        "bad.jsonl: not a SentencePiece model",
    ),
    "a file without text": ([f"{PROSE}.path={HERE}/empty.jsonl"], "of 0 documents none has text"),
    "text of another format": ([f"+{PROSE}.format=parquet"], "cannot be read as parquet"),
    "everything held out": (["data.validation_fraction=0.9999"], "lower data.validation_fraction"),
    "weights that come to nothing": (
        ["data.sources.code.weight=0", f"{PROSE}.weight=0"],
        "data.sources: no source has a weight above 0",
    ),
    "a source that is never read": ([f"{PROSE}.weight=1e-9"], "is below 1/65536 of the stream"),
}


AT_ONCE = 6
"""Jobs side by side."""

AT_OTHER_DOORS: list[tuple[str, list[str], str]] = [
    # the door, words after those of a run that works (of `where`: all words), what the one line must contain
    ("prepare", ["part=3/2"], "part=3/2: give i/n with i from 1 to n, such as 3/16; 1/1 is everything"),
    ("prepare", ["part=half"], "part=half: give i/n"),
    ("prepare", [f"{PROSE}.path={HERE}/bad.jsonl"], "3 are bad (3 malformed JSON)"),
    ("plan", ["weights=unimaxx"], "weights=unimaxx: must be one of given, proportional, temperature, unimax; "
     "did you mean unimax?"),
    (
        "plan",
        [f"{PROSE}.path=oss://bucket/a.jsonl"],
        f"{PROSE}.path=oss://bucket/a.jsonl: this kind of URL needs another package: Install ossfs",
    ),
    ("where", [HERE, "step=1"], "config.yaml: no such file; is "),
    ("where", [f"{HERE}/nowhere", "step=1"], "nowhere/config.yaml: no such file; is "),
    ("where", [HERE, "stp=1"], "stp=1: keys are step, row, document, text, until, most, loss, format, as "
     "key=value; did you mean step?"),
    ("where", [HERE, "step=1", "text=x"], "ask for one of step=, document= or text= (got step, text)"),
]  # fmt: skip


@pytest.fixture(scope="session")
def wrong_files(tmp_path_factory) -> Path:
    """Files and directories with something wrong in each."""
    directory = tmp_path_factory.mktemp("wrong")
    (directory / "lines.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    (directory / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n' * 3)
    (directory / "empty.jsonl").write_text("")
    (directory / "old").mkdir()
    (directory / "old" / "index.json").write_text(
        json.dumps({"version": 1, "shards": [], "manifest_hash": "0"})
    )
    return directory


def complaint(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error:")]


def at(directory: Path, words: list[str]) -> list[str]:
    return [word.replace(HERE, str(directory)) for word in words]


@pytest.mark.parametrize("size", [1, 2])
def test_every_mistake_is_one_line_and_78(ranks, tiny, tmp_path, wrong_files, size):
    def directory(name: str) -> Path:
        return tmp_path / name.replace(" ", "-")

    def start(name: str) -> Job:
        words = [*tiny, f"output_dir={directory(name)}/run", *MISTAKES[name][0]]
        patient = {PATCH: "tests.training.faults:wait_for_others"}
        return ranks.start(at(wrong_files, words), size, directory(name), patient)

    names = list(MISTAKES)
    for first in range(0, len(names), AT_ONCE):
        jobs = {name: start(name) for name in names[first : first + AT_ONCE]}
        for name, job in jobs.items():
            assert job.wait() == [78] * size, (name, job.output())
            assert "Traceback" not in job.output(), name
            told = [line for output in job.outputs for line in complaint(output.read_text())]
            assert len(told) == 1 and MISTAKES[name][1] in told[0], (name, told)
            run = directory(name) / "run"
            assert not run.exists() or [file.name for file in run.iterdir()] == [".lock"], name


@pytest.mark.parametrize("name", MISTAKES)
def test_a_check_finds_it_too(tiny, tmp_path, wrong_files, capsys, name):
    words = [*tiny, f"output_dir={tmp_path}/run", *MISTAKES[name][0]]
    assert import_module("llmtrain.check").main(at(wrong_files, words)) == 78
    (line,) = complaint(capsys.readouterr().err)
    assert MISTAKES[name][1] in line
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


@pytest.mark.parametrize(("door", "words", "expected"), AT_OTHER_DOORS)
def test_other_doors_are_no_different(tiny, wrong_files, capsys, door, words, expected):
    main = import_module(f"llmtrain.{door}").main
    assert main(at(wrong_files, words if door == "where" else [*tiny, *words])) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint(line) == [line]
    assert expected in line


def test_a_mixture_without_text_cannot_be_trained(tiny, capsys):
    main = import_module("llmtrain.train").main
    without_data = [word for word in tiny if "data" not in word]
    assert main([*without_data, "data=gpt3"]) == 78
    lines = complaint(capsys.readouterr().err)
    names = "common_crawl", "webtext2", "books1", "books2", "wikipedia"
    for name, line in zip(names, lines, strict=True):
        assert f"data.sources.{name} has tokens and no path" in line


@pytest.mark.parametrize("name", ["a typo in a key", "an unknown option", "a file that is not there"])
def test_as_a_user_starts_it_it_takes_less_than_ten_seconds(tiny, tmp_path, name):
    overrides, expected = MISTAKES[name]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "llmtrain.train", *tiny, *overrides]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 78
    assert [expected in line for line in complaint(done.stderr)] == [True]
    # Processor time: what it takes on a machine that does nothing else.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
