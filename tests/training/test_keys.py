"""Every key of the configuration changes something that can be seen, or is refused; no key is decoration.

The table has a row for every key of TrainConfig, and a test that it is complete: a new key without a row
fails. Most rows start a short run twice, as a user does, and compare what it left behind.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from llmtrain.config import UserError
from llmtrain.config.hydra import compose
from llmtrain.data.prepare import SMALL
from llmtrain.model import DecoderConfig
from llmtrain.training.config import TrainConfig
from llmtrain.training.engine.config import OffloadConfig, ZeroConfig
from tests.ranks import Job

SHORT = [
    "max_steps=4",
    "data.validation_fraction=0.3",
    "checkpoint.every=2",
]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> Any:
    return [(line["train/loss"], line["train/grad_norm"]) for line in metrics(run)]


def lines(run: Path) -> Any:
    return [line["step"] for line in metrics(run)]


def learning_rates(run: Path) -> Any:
    return [line["train/lr"] for line in metrics(run)]


def checkpoints(run: Path) -> Any:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def stood_still(run: Path) -> Any:
    """Whether the run did for as long as its first save took."""
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    first = next(event for event in events if event["event"] == "save")
    return first["stall_seconds"] == first["seconds"]


def start(run: Path) -> Any:
    event = json.loads((run / "events.jsonl").read_text().splitlines()[0])
    return {key: value for key, value in event.items() if key != "time"}


def evaluations(run: Path) -> Any:
    return {line["step"]: line["eval/loss"] for line in metrics(run) if "eval/loss" in line}


def held_out(run: Path) -> Any:
    return json.loads((run / "eval" / "heldout.json").read_text())["all"]["bytes"]


def sampled(run: Path) -> Any:
    return {path.name: path.read_text() for path in (run / "samples").glob("*")}


def report(run: Path) -> Any:
    return re.search(r"<title>(.*?)</title>", (run / "report.html").read_text())


def tokenizer(run: Path) -> Any:
    return {path.name: path.stat().st_size for path in (run / "tokenizer").iterdir()}


def rejected(run: Path) -> Any:
    sources = json.loads((run / "data.json").read_text())["sources"]
    return {name: source["input"]["rejected"] for name, source in sources.items()}


def kept_aside(run: Path) -> Any:
    files = (run / "data" / "quarantine").glob("*/*.jsonl")
    return {file.parent.name: len(file.read_text().splitlines()) for file in files}


def background(run: Path) -> Any:
    return re.findall(r"tokenising .* in the background, \d+ processes", printed(run))


def wandb_folder(run: Path) -> Any:
    return sorted(path.parent.name for path in run.glob("wandb/*/*.wandb"))


def wandb_project(run: Path) -> Any:
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    return b"elsewhere" in file.read_bytes()


def tensorboard_files(run: Path) -> Any:
    return len([*run.glob("tensorboard/events.out.tfevents.*")])


def console(run: Path) -> Any:
    return printed(run).count("loss")


def printed(run: Path) -> str:
    return next(iter(run.parent.glob("output-*"))).read_text()


# In overrides, OWN stands for a directory of this one run, LARGE and DAMAGED for the files of the fixtures.
OWN, LARGE, DAMAGED = "<own>", "<large>", "<damaged>"
EARLY_PEAK = "scheduler.warmup_steps=1"
NEW_CACHE = f"cache_dir={OWN}"
FEW = "callbacks.evaluation.documents=2"  # of a large source
IN_BACKGROUND = [NEW_CACHE, f"data.sources.prose.path={LARGE}", FEW, "data.workers=1"]
WITH_BAD_RECORDS = [NEW_CACHE, f"data.sources.prose.path={DAMAGED}", "data.max_bad_fraction=0.5"]
BEST_FIT = ["data.packing=best_fit", "+data.sources.prose.text_key=title", "seq_len=24"]
STAGE = "data.stages=[{from_step: 2, weights: {code: 1, prose: 1}}]"
CURRICULUM = "data.curriculum={from_length: 8, until_step: 4}"
WITHOUT_WEIGHTS = ["~data.sources.code.weight", "~data.sources.prose.weight"]
SP = ["tokenizer=sentencepiece", "tokenizer.vocab_size=400"]

RUNS: dict[str, tuple[list[str], list[str], Callable[[Path], Any]]] = {
    # key: (overrides of both runs, overrides of the second, what must differ)
    "name": ([], ["name=another"], lambda run: report(run)[1]),
    "seed": ([], ["seed=1"], curve),
    "seq_len": ([], ["seq_len=32"], curve),
    "max_steps": ([], ["max_steps=3"], lines),
    "global_batch_size": ([], ["global_batch_size=4"], curve),
    "micro_batch_size": ([], ["micro_batch_size=4"], start),
    "precision": ([], ["precision=bf16_autocast"], curve),
    "fp8": (["precision=bf16"], ["fp8=tensorwise"], curve),
    "z_loss": ([], ["z_loss=0.1"], curve),
    "log_every": ([], ["log_every=3"], lines),
    "tokenizer.kind": ([], SP, tokenizer),
    "tokenizer.vocab_size": (SP, ["tokenizer.vocab_size=420"], tokenizer),
    "data.documents": ([], ["data.documents=attend"], curve),
    "data.boundary": ([], ["data.boundary=eos"], curve),
    "data.boundary_targets": ([], ["data.boundary_targets=true"], curve),
    "data.packing": ([], ["data.packing=best_fit"], curve),
    "data.max_padding": (BEST_FIT, ["data.max_padding=0.5"], curve),
    "data.curriculum.from_length": ([CURRICULUM], ["data.curriculum.from_length=16"], curve),
    "data.curriculum.until_step": ([CURRICULUM], ["data.curriculum.until_step=3"], curve),
    "data.stages.from_step": ([STAGE], [STAGE.replace("2", "3")], curve),
    "data.stages.weights": ([STAGE], [STAGE.replace("prose: 1", "prose: 9")], curve),
    "data.skip": ([], ["data.skip=[[2,2]]"], curve),
    "data.bad_records": (WITH_BAD_RECORDS, ["data.bad_records=skip"], kept_aside),
    "data.max_document_bytes": (["data.max_bad_fraction=1"], ["data.max_document_bytes=15000"], rejected),
    "data.preparation": (IN_BACKGROUND, ["data.preparation=ahead"], background),
    "data.workers": (IN_BACKGROUND, ["data.workers=2"], background),
    "data.shuffle_span": ([], ["data.shuffle_span=1"], curve),
    "data.validation_fraction": ([], ["data.validation_fraction=0.5"], held_out),
    "data.sources.weight": ([], ["data.sources.code.weight=0.1"], curve),
    "data.sources.epochs": (
        [*WITHOUT_WEIGHTS, "+data.sources.code.epochs=1", "+data.sources.prose.epochs=1"],
        ["data.sources.prose.epochs=9"],
        curve,
    ),
    "data.sources.format": (
        ["data.sources.code.path=${data.sources.prose.path}"],
        ["data.sources.code.format=jsonl"],
        curve,
    ),
    "data.sources.text_key": ([], ["+data.sources.prose.text_key=title"], curve),
    "data.sources.template": ([], ["+data.sources.prose.template='{title}: {text}'"], curve),
    "data.sources.path": ([], ["data.sources.code.path=${data.sources.prose.path}"], curve),
    "optimizer.kind": ([], ["optimizer=lion"], curve),
    "optimizer.lr": ([], ["optimizer.lr=1e-4"], curve),
    "optimizer.lr_scales.embedding": ([], ["optimizer.lr_scales.embedding=2"], curve),
    "optimizer.lr_scales.head": (
        ["model.tie_embeddings=false"],
        ["optimizer.lr_scales.head=2"],
        curve,
    ),
    "optimizer.lr_scales.matrices": ([], ["optimizer.lr_scales.matrices=2"], curve),
    "optimizer.lr_scales.vectors": ([], ["optimizer.lr_scales.vectors=2"], curve),
    "optimizer.betas": ([], ["optimizer.betas=[0.5,0.95]"], curve),
    "optimizer.eps": ([], ["optimizer.eps=0.01"], curve),
    "optimizer.weight_decay": ([], ["optimizer.weight_decay=1"], curve),
    "optimizer.gradient_clipping": ([], ["optimizer.gradient_clipping=1e-3", "optimizer.eps=1e-3"], curve),
    "scheduler.kind": ([EARLY_PEAK], ["scheduler=linear", EARLY_PEAK], learning_rates),
    "scheduler.warmup_steps": ([], ["scheduler.warmup_steps=2"], learning_rates),
    "scheduler.min_lr_ratio": ([EARLY_PEAK], ["scheduler.min_lr_ratio=0.5"], learning_rates),
    "scheduler.decay_ratio": (
        ["scheduler=wsd", EARLY_PEAK],
        ["scheduler.decay_ratio=0.9"],
        learning_rates,
    ),
    "deepspeed.zero_optimization.stage": (
        [],
        ["deepspeed=zero3"],
        lambda run: {json.loads(file.read_text())["stage"] for file in run.rglob("checkpoint.json")},
    ),
    "checkpoint.every": ([], ["checkpoint.every=3"], checkpoints),
    "checkpoint.keep": (["checkpoint.every=1"], ["checkpoint.keep=3"], checkpoints),
    "checkpoint.keep_every": (["checkpoint.every=1"], ["checkpoint.keep_every=1"], checkpoints),
    "checkpoint.asynchronous": ([], ["checkpoint.asynchronous=true"], stood_still),
    "callbacks.evaluation.every": ([], ["callbacks.evaluation.every=2"], evaluations),
    "callbacks.evaluation.documents": ([], ["callbacks.evaluation.documents=1"], held_out),
    "callbacks.sample.every": ([], ["callbacks.sample.every=2"], sampled),
    "callbacks.sample.prompts": ([], ["callbacks.sample.prompts=[once]"], sampled),
    "callbacks.sample.max_new_tokens": ([], ["callbacks.sample.max_new_tokens=8"], sampled),
    "callbacks.sample.temperature": ([], ["callbacks.sample.temperature=0"], sampled),
    "logger.progress": ([], ["logger.progress=lines"], console),
    "logger.tensorboard": ([], ["logger.tensorboard=true"], tensorboard_files),
    "logger.wandb.mode": ([], ["logger.wandb.mode=offline"], wandb_folder),
    "logger.wandb.project": (
        ["logger.wandb.mode=offline"],
        ["logger.wandb.project=elsewhere"],
        wandb_project,
    ),
}

ENGINE = "tests/training/test_engine.py"
SPIKES = "tests/training/test_spikes.py"
SIZING = "tests/training/test_sizing.py"
DEEPSPEED = "tests/training/test_deepspeed_config.py"
EARLY_STOP = "tests/training/test_early_stop.py"
ELSEWHERE: dict[str, str] = {
    # key: the test that shows its effect
    "output_dir": "tests/training/test_resume.py::test_a_resumed_run_is_bit_equal",
    "cache_dir": "tests/training/test_keys.py::test_cache_dir_is_where_shards_and_tokenizers_are",
    "tokenizer.backend": "tests/tokenizer/test_backends.py::test_a_backend_that_is_not_installed",
    "data.sources.tokens": "tests/test_plan_door.py::test_gpt3_from_the_command_line",
    "data.remote_cache_gb": "tests/training/test_keys.py::test_remote_cache_gb_bounds_what_is_fetched",
    "model.init_from": "tests/training/test_pretrained.py::test_the_first_loss_is_theirs",
    "tokenizer.path": "tests/training/test_keys.py::test_tokenizer_path_brings_a_tokenizer_along",
    "resume": "tests/training/test_resume.py::test_resume_never_sets_the_older_run_aside",
    "callbacks.extra": "tests/test_extending.py::test_every_part_of_another_package_is_used",
    "logger.extra": "tests/test_extending.py::test_every_part_of_another_package_is_used",
    "resume_changes": "tests/training/test_changes.py::test_a_change_that_is_allowed_is_written_down",
    "time_limit": "tests/training/test_preemption.py::test_a_run_stops_before_its_time_is_over",
    "grace_seconds": "tests/training/test_preemption.py::test_a_step_that_hangs_ends_with_the_grace",
    "compile": f"{ENGINE}::test_compile_is_on_where_it_is_asked_for",
    "optimizer.momentum": "tests/training/test_optimizers.py::test_muon_s_momentum_is_the_key_s",
    "activation_checkpointing": f"{ENGINE}::test_activation_checkpointing_keeps_fewer_tensors",
    **{
        f"hardware.{key}": f"{SIZING}::test_{test}"
        for test, names in {
            "auto_is_the_device_that_is_found": ("name", "devices", "bf16_tflops"),
            "the_largest_micro_batch_that_fits_is_the_largest": ("memory_gib",),
            "every_rate_changes_the_time": (
                "gpus_per_node",
                "matmul_tflops",
                "memory_gbps",
                "link_gbps",
                "network_gbps",
                "host_gbps",
            ),
        }.items()
        for key in names
    },
    **{
        f"callbacks.evaluation.{key}": f"{EARLY_STOP}::test_patience_counts_what_is_no_better"
        for key in ("patience", "min_delta")
    },
    "profile.steps": "tests/training/test_profile.py::test_the_steps_of_a_profile_are_traced",
    "hang_timeout": "tests/training/test_hang.py::test_a_rank_that_is_stopped_is_named",
    **{
        f"spikes.{key}": f"{SPIKES}::test_{test}"
        for test, names in {
            "a_spike_is_named_with_its_documents": ("action",),
            "the_limits_of_a_step_are_where_its_z_is_the_threshold": (
                "loss_threshold",
                "grad_norm_threshold",
            ),
            "a_step_is_judged_by_the_window_before_it": ("window", "warmup_steps"),
            "a_rewind_goes_to_a_commit_far_enough_back": ("rewind_steps", "skip_steps"),
            "a_spike_after_the_last_rewind_ends_the_run_with_87": ("max_rewinds",),
            "steps_that_are_not_finite_end_the_run_with_87": ("max_skipped",),
        }.items()
        for key in names
    },
    "corruption_check.every": "tests/training/test_corruption.py::test_a_flipped_bit_ends_the_run",
    "profile.from_step": "tests/training/test_profile.py::test_the_steps_of_a_profile_are_traced",
    "deepspeed.disable_python_gc": f"{DEEPSPEED}::test_python_s_garbage_collector_stays_off_until_a_save",
    **{
        f"deepspeed.zero_optimization.{key}": f"{DEEPSPEED}::test_every_key_reaches_deepspeed"
        for key in ZeroConfig.model_fields
        if key != "stage" and not key.startswith("offload")
    },
    **{
        f"deepspeed.zero_optimization.{part}.{key}": f"{DEEPSPEED}::test_offload_trains_the_same"
        for part in ("offload_optimizer", "offload_param")
        for key in OffloadConfig.model_fields
    },
}

JSONL = "+data.sources.prose.format=jsonl"
REFUSED: dict[str, list[str]] = {
    # key: overrides that end before the run, with a line that names the key
    "data.sources.revision": [JSONL, "+data.sources.prose.revision=main"],
    "data.sources.split": [JSONL, "+data.sources.prose.split=test"],
    "data.sources.subset": [JSONL, "+data.sources.prose.subset=en"],
}

ENDS: dict[str, tuple[list[str], list[str]]] = {
    # key: (overrides of a run that works, those with which it ends in a line that names the key)
    "data.max_bad_fraction": (WITH_BAD_RECORDS, ["data.max_bad_fraction=0"]),
}

MODEL_TABLE = "tests/model/test_config.py::test_every_key_shows"


def keys(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of every key below a config class; a choice contributes the keys of all its kinds."""
    for name, field in config.model_fields.items():
        inner = _classes(field.annotation)
        if not inner:
            yield prefix + name
        for cls in inner:
            yield from keys(cls, f"{prefix}{name}.")


def _classes(annotation: Any) -> list[type[BaseModel]]:
    """Config classes inside an annotation such as a union or a dict of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation] if annotation.model_fields else []
    return [cls for argument in typing.get_args(annotation) for cls in _classes(argument)]


def test_every_key_has_a_row():
    named = {*RUNS, *ELSEWHERE, *REFUSED, *ENDS}
    elsewhere = {f"model.{key}" for key in keys(DecoderConfig)}  # tests/model has its own table
    ours = {*keys(TrainConfig)} - elsewhere
    assert ours - named == set()
    assert named - ours == set()


@pytest.mark.parametrize("test", sorted({*ELSEWHERE.values(), MODEL_TABLE}))
def test_the_tests_named_here_exist(test):
    file, _, name = test.partition("::")
    assert f"def {name}(" in (Path(__file__).parents[2] / file).read_text()


@pytest.fixture(scope="session")
def files(corpus, tmp_path_factory) -> dict[str, Path]:
    """More than preparation makes at once, and text of which one record of eleven is none."""
    directory = tmp_path_factory.mktemp("files")
    large, damaged = directory / "large.jsonl", directory / "damaged.jsonl"
    lines = (corpus / "prose.jsonl").read_text().splitlines()
    text = "".join(f"{line}\n" for line in lines if len(line) > 1000)
    large.write_text(text * (SMALL // len(text) + 2))
    damaged.write_text("".join(f"{line}\n" + "{\n" * (n % 10 == 0) for n, line in enumerate(lines)))
    return {LARGE: large, DAMAGED: damaged}


_base_runs: dict[tuple[str, ...], Path] = {}


@pytest.fixture
def begin(ranks, tiny, files, tmp_path_factory):
    """Start the door with overrides on top of the tiny run; returns the job and its run directory."""

    def start(*overrides: str) -> tuple[Job, Path]:
        directory = tmp_path_factory.mktemp("keys")
        arguments = [*tiny, *SHORT, f"output_dir={directory}/run", *overrides]
        for name, place in {**files, OWN: directory / "own"}.items():
            arguments = [argument.replace(name, str(place)) for argument in arguments]
        return ranks.start(arguments, 1, directory), directory / "run"

    return start


@pytest.fixture
def observe(begin):
    """Run the door with overrides on top of the tiny run; returns its run directory. Equal runs run once."""

    def run(*overrides: str) -> Path:
        if overrides not in _base_runs:
            job, directory = begin(*overrides)
            assert job.wait() == [0], job.output()
            _base_runs[overrides] = directory
        return _base_runs[overrides]

    return run


@pytest.mark.parametrize("key", RUNS)
def test_a_changed_key_changes_the_run(observe, key):
    common, changed, observable = RUNS[key]
    assert observable(observe(*common)) != observable(observe(*common, *changed))


@pytest.mark.parametrize("key", REFUSED)
def test_a_changed_key_is_refused(tiny, key):
    with pytest.raises(UserError, match=re.escape(key.rpartition(".")[2])):
        compose(TrainConfig, [*tiny, *REFUSED[key]])


@pytest.mark.parametrize("key", ENDS)
def test_a_changed_key_ends_the_run(observe, begin, key):
    common, changed = ENDS[key]
    observe(*common)
    job, _ = begin(*common, *changed)
    assert job.wait() == [78], job.output()
    assert key in printed_error(job)


def printed_error(job: Job) -> str:
    (line,) = [line for line in job.output().splitlines() if line.startswith("error: ")]
    return line


def test_remote_cache_gb_bounds_what_is_fetched(observe, begin):
    shards = json.loads((observe() / "data" / "prepared.json").read_text())["code"]["train"]
    remote = [f"data.sources.code.path=file://{shards}", "data.sources.code.format=shards", NEW_CACHE]
    assert curve(observe(*remote)) == curve(observe())
    job, _ = begin(*remote, "data.remote_cache_gb=1e-6")
    assert job.wait() == [78], job.output()
    assert "data.remote_cache_gb=" in printed_error(job)


def test_tokenizer_path_brings_a_tokenizer_along(observe, tmp_path):
    trained = observe(*SP) / "tokenizer"
    path = f"tokenizer.path={trained}/tokenizer.model"
    assert curve(observe(*SP, path)) == curve(observe(*SP))
    assert curve(observe("tokenizer=sentencepiece", path, "tokenizer.vocab_size=420")) == curve(observe(*SP))


def test_cache_dir_is_where_shards_and_tokenizers_are(observe, tmp_path):
    observe(f"cache_dir={tmp_path}/elsewhere", *SP)
    assert len(list(tmp_path.glob("elsewhere/**/tokens.bin"))) >= 2
    assert len(list(tmp_path.glob("elsewhere/tokenizers/**/tokenizer.model"))) == 1
