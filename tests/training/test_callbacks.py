from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from llmtrain.config import UserError
from llmtrain.config.hydra import compose
from llmtrain.data.batch import Batch
from llmtrain.data.dataset import PackedDataset
from llmtrain.data.shards import Header, ShardedSource, ShardWriter, shard_path, write_index
from llmtrain.distributed import World
from llmtrain.model import Decoder
from llmtrain.tokenizer import BytesConfig
from llmtrain.training.callbacks.evaluation import EvaluationCallback, EvaluationConfig
from llmtrain.training.callbacks.samples import SampleCallback, SampleConfig, printable, prompt_ids
from llmtrain.training.config import TrainConfig
from llmtrain.training.early_stop import EarlyStop
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.signals import StopRequest

SEQ_LEN = 32
TOKENIZER = BytesConfig(kind="bytes").load()
TEXTS = {"code": "def f(x):\n    return x + {}\n", "prose": "The value of the object is {}. "}


def evaluation(**keys: Any) -> EvaluationConfig:
    return EvaluationConfig(patience=None, min_delta=0.0, **keys)


class Plain:
    """The two reading methods of the engine over a decoder in this process; counts its calls."""

    device = torch.device("cpu")

    def __init__(self, model: Decoder) -> None:
        self.model, self.calls = model.eval(), 0

    @torch.no_grad()
    def loss(self, batch: Batch) -> torch.Tensor:
        self.calls += 1
        return self.model(batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens).rows

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.model(input_ids)


@dataclass
class Run:
    """What the trainer hands to callbacks."""

    directory: RunDirectory
    config: Any
    engine: Plain
    held_out: dict[str, ShardedSource]
    dataset: PackedDataset
    world: World = field(default_factory=World)
    tokenizer: Any = TOKENIZER
    stop: StopRequest = field(default_factory=StopRequest)
    step: int = 0
    cut_short: bool = False
    early_stop: EarlyStop = field(default_factory=lambda: EarlyStop(None, 0.0))

    @property
    def finished(self) -> bool:
        return self.step >= self.config.max_steps


def write_source(directory: Path, text: str, first: int, count: int) -> ShardedSource:
    header = Header(TOKENIZER.fingerprint, TOKENIZER.vocab_size, "bos_eos")
    writer = ShardWriter(shard_path(directory, 0), header)
    writer.begin("text", "row")
    for number in range(first, first + count):
        document = text.format(number)
        ids = np.array([TOKENIZER.bos_id, *TOKENIZER.encode_batch([document])[0], TOKENIZER.eos_id])
        writer.add(ids, len(document.encode()), number)
    writer.finish()
    write_index(directory, header, 1)
    return ShardedSource.open(directory)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    shape = ["d_model=32", "n_layers=1", "d_ff=32"]
    config = compose(TrainConfig, ["model=tiny", "model/position=none", *(f"model.{key}" for key in shape)])
    decoder = config.model.build(vocab_size=TOKENIZER.vocab_size, seq_len=SEQ_LEN, seed=1)
    train = {name: write_source(tmp_path / name / "train", text, 0, 30) for name, text in TEXTS.items()}
    held_out = {
        name: write_source(tmp_path / name / "validation", text, 30, 7) for name, text in TEXTS.items()
    }
    order = {
        "seq_len": SEQ_LEN,
        "global_batch_size": 4,
        "seed": 3,
        "documents": "separate",
        "shuffle_span": 64,
    }
    dataset = PackedDataset(train, [(0, {"code": 0.75, "prose": 0.25})], **order)
    config = SimpleNamespace(
        seed=3, seq_len=SEQ_LEN, max_steps=10, micro_batch_size=2,
        data=SimpleNamespace(
            documents="separate", trains_boundaries=False, boundary="bos_eos", validation_fraction=0.0
        ),
    )  # fmt: skip
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    return Run(directory, config, Plain(decoder), held_out, dataset)


def lines_of(
    callback: EvaluationCallback | SampleCallback, run: Run, last: int = 10
) -> dict[int, dict[str, Any]]:
    """The line of each step of a run, after the callback was at it."""
    callback.on_start(run)
    lines: dict[int, dict[str, Any]] = {}
    for run.step in range(1, last + 1):
        lines[run.step] = {"step": run.step}
        if callback.is_due(run, run.step):
            callback.load(run, run.step)
            callback.after_step(run, lines[run.step])
    return lines


# Evaluation


@pytest.mark.parametrize(("every", "steps"), [(4, [4, 8, 10]), (5, [5, 10]), (0, [10]), (1000, [10])])
def test_evaluation_is_every_n_steps_and_at_the_end(run: Run, every: int, steps: list[int]) -> None:
    lines = lines_of(EvaluationCallback(evaluation(every=every, documents=None)), run)
    assert [step for step, line in lines.items() if "eval/loss" in line] == steps
    assert [event["step"] for event in run.directory.read_events() if event["event"] == "evaluation"] == steps


def test_an_evaluation_writes_into_its_steps_line_and_the_last_one_has_the_baselines(run: Run) -> None:
    lines = lines_of(EvaluationCallback(evaluation(every=5, documents=None)), run)
    keys = {f"eval/{key}{source}" for key in ("loss", "bits_per_byte") for source in ("", "/code", "/prose")}
    assert set(lines[5]) == {"step"} | keys
    baselines = {"eval/unigram_bits_per_byte", "eval/shuffled_bits_per_byte"}
    assert set(lines[10]) == {"step"} | keys | baselines
    assert {key: lines[10][key] for key in keys} == {key: lines[5][key] for key in keys}, (
        "nothing was trained"
    )
    # At initialisation a decoder is close to uniform over its vocabulary, which the unigram is far below.
    assert lines[10]["eval/loss"] == pytest.approx(np.log(TOKENIZER.vocab_size), rel=0.05)
    assert lines[10]["eval/unigram_bits_per_byte"] < 0.7 * lines[10]["eval/bits_per_byte"]
    stored = json.loads((run.directory.eval / "heldout.json").read_text())
    assert stored["step"] == 10
    assert stored["all"]["bits_per_byte"] == lines[10]["eval/bits_per_byte"]
    assert stored["sources"]["code"]["loss"] == lines[10]["eval/loss/code"]
    assert stored["sources"]["prose"]["bytes"] == sum(len(TEXTS["prose"].format(n)) for n in range(30, 37))


def test_the_unigram_is_mixed_by_the_weights_of_the_run(run: Run) -> None:
    config = evaluation(every=0, documents=None)
    mixed = lines_of(EvaluationCallback(config), run)[10]["eval/unigram_bits_per_byte"]
    stages = [(0, {"code": 0.01, "prose": 0.99})]
    order = {
        "seq_len": SEQ_LEN,
        "global_batch_size": 4,
        "seed": 3,
        "documents": "separate",
        "shuffle_span": 64,
    }
    train = {name: stream.source for name, stream in run.dataset.streams.items()}
    run.dataset = PackedDataset(train, stages, **order)
    assert lines_of(EvaluationCallback(config), run)[10]["eval/unigram_bits_per_byte"] > 1.02 * mixed


def test_documents_limits_what_is_read(run: Run) -> None:
    lines_of(EvaluationCallback(evaluation(every=0, documents=2)), run)
    stored = run.directory.read_json("eval/heldout.json")
    assert stored["sources"]["code"]["bytes"] == sum(len(TEXTS["code"].format(n)) for n in (30, 31))


def test_without_held_out_documents_nothing_is_evaluated(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.held_out = {}
    with caplog.at_level(logging.INFO):
        lines = lines_of(EvaluationCallback(evaluation(every=1, documents=None)), run)
    assert all(set(line) == {"step"} for line in lines.values())
    assert "data.validation_fraction" in caplog.text
    assert not run.directory.eval.exists()


def test_a_source_that_turns_out_to_hold_nothing_out_is_left_out(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = evaluation(every=0, documents=None)
    alone = lines_of(EvaluationCallback(config), run)[10]
    empty = write_source(tmp_path / "empty" / "validation", "", 0, 0)
    run.held_out["empty"] = empty
    assert lines_of(EvaluationCallback(config), run)[10] == alone
    assert "empty" not in run.directory.read_json("eval/heldout.json")["sources"]
    run.held_out = {"empty": empty}
    with caplog.at_level(logging.INFO):
        assert lines_of(EvaluationCallback(config), run)[10] == {"step": 10}
    assert "nothing will be evaluated" in caplog.text


def test_other_ranks_write_nothing(run: Run) -> None:
    run.world = World(1, 2, 1, 2)
    lines_of(EvaluationCallback(evaluation(every=5, documents=None)), run)
    lines_of(SampleCallback(sample_config()), run)
    assert not list(run.directory.path.iterdir())
    assert run.engine.calls > 0, "they take part all the same"


# Samples


def sample_config(**changes: Any) -> SampleConfig:
    fixed = {"every": 4, "prompts": ["def ", "The é"], "max_new_tokens": 9, "temperature": 0.8}
    return SampleConfig.model_validate({**fixed, **changes})


def samples(run: Run, **changes: Any) -> dict[str, str]:
    lines_of(SampleCallback(sample_config(**changes)), run)
    return {file.name: file.read_text() for file in sorted(run.directory.samples.glob("*"))}


def test_samples_are_files_every_n_steps_and_the_last_is_logged(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        files = samples(run)
    assert list(files) == ["step_00000004.txt", "step_00000008.txt", "step_00000010.txt"]
    for text in files.values():
        assert text.startswith("--- prompt 1: 'def '\ndef ")
        assert "--- prompt 2: 'The é'\nThe é" in text
    assert printable(files["step_00000010.txt"].rstrip()) in caplog.text
    assert printable(files["step_00000004.txt"].rstrip()) not in caplog.text


def test_what_a_model_writes_cannot_steer_a_terminal() -> None:
    assert printable("a\tb\nc\x1b[2J\r\x00\x9bé") == "a\tb\nc\ufffd[2J\ufffd\ufffd\ufffdé"


def test_samples_of_a_step_are_drawn_alike_and_of_another_step_anew(run: Run) -> None:
    first, second = samples(run), samples(run)
    assert first == second
    assert len(set(first.values())) == 3, "the weights are the same: only the draws differ"
    run.config.seed = 4
    assert samples(run) != first


def test_the_temperature_is_that_of_the_draws(run: Run) -> None:
    cold = samples(run, temperature=0)
    assert len(set(cold.values())) == 1, "the likeliest token leaves nothing to draw"
    assert samples(run, temperature=5.0) != samples(run, temperature=0.5)


@pytest.mark.parametrize("tokens", [1, 7])
def test_every_sample_makes_the_same_number_of_calls(run: Run, tokens: int) -> None:
    """Under ZeRO-3 a call is a collective: what comes out must not decide how many there are."""
    samples(run, every=0, max_new_tokens=tokens)
    assert run.engine.calls == 2 * tokens


def test_no_prompts_no_samples(run: Run) -> None:
    assert samples(run, prompts=[]) == {} and run.engine.calls == 0


@pytest.mark.parametrize(
    ("boundary", "begin"), [("bos_eos", [256]), ("bos", [256]), ("eos", []), ("none", [])]
)
def test_a_prompt_begins_as_documents_do(boundary: str, begin: list[int]) -> None:
    assert prompt_ids(TOKENIZER, "ab", boundary) == [*begin, 97, 98]


def test_an_empty_prompt_is_a_new_document_where_one_can_begin(run: Run) -> None:
    assert prompt_ids(TOKENIZER, "", "bos") == [256]
    assert prompt_ids(TOKENIZER, "", "eos") == [257]
    run.config.data.boundary = "none"
    with pytest.raises(UserError, match=r"callbacks\.sample\.prompts: '' .* data\.boundary=none"):
        SampleCallback(sample_config(prompts=[""])).on_start(run)


# Config


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        (EvaluationConfig, {"every": -1, "documents": None}),
        (EvaluationConfig, {"every": 1, "documents": 0}),
        (SampleConfig, {"every": -1, "prompts": [], "max_new_tokens": 1, "temperature": 1}),
        (SampleConfig, {"every": 1, "prompts": [], "max_new_tokens": 0, "temperature": 1}),
        (SampleConfig, {"every": 1, "prompts": [], "max_new_tokens": 1, "temperature": -0.1}),
    ],
)
def test_impossible_values_are_refused(cls: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="greater than"):
        cls.model_validate(wrong)


def test_the_yaml_has_every_key_and_no_other() -> None:
    conf = Path(__file__).parents[2] / "conf" / "callbacks" / "default.yaml"
    values = yaml.safe_load(conf.read_text())
    assert set(values) == {"evaluation", "sample", "extra"}
    EvaluationConfig.model_validate(values["evaluation"])
    SampleConfig.model_validate(values["sample"])
