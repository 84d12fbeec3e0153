"""`model.init_from`: runs that begin with a Hugging Face model's shape and weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmtrain.config import UserError
from llmtrain.config.hydra import compose
from llmtrain.export import main as export_main
from llmtrain.training.config import TrainConfig
from tests.model import huggingface_models as theirs
from tests.ranks import RECORD

BYTES = 258


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    """Hugging Face directories whose vocabulary is that of the byte tokenizer."""
    found = {}
    for name in ("Llama GQA", "Falcon RW", "Mistral 0.1"):
        model_type, keys = theirs.MODELS[name]
        theirs.MODELS["bytes"] = model_type, keys | {"vocab_size": BYTES}
        found[name] = theirs.save(theirs.build("bytes"), tmp_path_factory.mktemp("theirs"))
    del theirs.MODELS["bytes"]
    return found


@pytest.fixture
def run(tiny) -> list[str]:
    """The tiny run without a shape of its own."""
    return [word for word in tiny if not word.startswith("model.")] + ["data.documents=attend"]


def losses(directory: Path) -> list[float]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


def first_loss_there(directory: Path, recorded: Path, ranks: int, micro_batches: int) -> float:
    """transformers' mean loss over the targets of what all ranks trained on in their first step."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    total = targets = 0.0
    for rank in range(ranks):
        with (recorded / f"rank{rank}.npy").open("rb") as file:
            for _ in range(micro_batches):
                ids, labels = torch.from_numpy(np.load(file)).long()
                with torch.no_grad():
                    logits = model(ids).logits
                total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
                targets += int((labels != -100).sum())
    return total / targets


@pytest.mark.parametrize(
    ("name", "stage"), [("Llama GQA", 0), ("Llama GQA", 3), ("Falcon RW", 1), ("Falcon RW", 3)]
)
def test_the_first_loss_is_theirs(ranks, run, tmp_path, directories, name, stage):
    words = [f"model.init_from={directories[name]}", f"deepspeed=zero{stage}", "max_steps=2"]
    recorded = tmp_path / "recorded"
    recorded.mkdir()
    job = ranks.run([*run, *words], 2, tmp_path, env={RECORD: str(recorded)})
    found = losses(tmp_path / "run")
    # 8 rows a step: 2 ranks with 2 micro-batches of 2 rows
    assert found[0] == pytest.approx(first_loss_there(directories[name], recorded, 2, 2), rel=1e-5)
    assert found[1] != found[0]
    assert f"weights begin as those of {directories[name]}" in job.output()


def test_a_run_goes_on_without_the_directory(ranks, run, tmp_path, directories):
    gone = shutil.copytree(directories["Llama GQA"], tmp_path / "gone")
    schedule = ["scheduler=constant", "scheduler.warmup_steps=1"]
    common = [*run, f"model.init_from={gone}", "checkpoint.every=2", *schedule]
    ranks.run([*common, "max_steps=4", f"output_dir={tmp_path}/whole"], 1, tmp_path)
    ranks.run([*common, "max_steps=2"], 1, tmp_path)
    shutil.rmtree(gone)
    job = ranks.run([*common, "max_steps=4"], 1, tmp_path)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert "weights begin" not in job.output()


def test_what_was_trained_goes_back_to_its_family(ranks, run, tmp_path, directories, capsys):
    words = [f"model.init_from={directories['Falcon RW']}", "deepspeed=zero2", "max_steps=1"]
    ranks.run([*run, *words], 2, tmp_path)
    assert export_main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "Falcon, fp32; largest logit difference" in told
    assert "(transformers rounds Falcon's ALiBi to bf16" in told
    note = json.loads((tmp_path / "out" / "llmtrain_export.json").read_text())
    assert note["rounding_there"].startswith("transformers rounds Falcon's ALiBi")
    before, after = theirs.stored(directories["Falcon RW"]), theirs.stored(tmp_path / "out")
    assert {key: value.shape for key, value in before.items()} == {
        key: value.shape for key, value in after.items()
    }
    largest = max(float((after[key] - before[key]).abs().max()) for key in before)
    assert 0 < largest < 0.01  # one step away from where it began


def test_files_and_tokenizer_are_checked_before_the_text_is_prepared(ranks, run, tmp_path, directories):
    cut = shutil.copytree(directories["Llama GQA"], tmp_path / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    other = ["tokenizer=sentencepiece", "tokenizer.vocab_size=400"]
    for words, line in [
        ([f"model.init_from={cut}"], "cut/model.safetensors: cannot be read as weights"),
        (
            [f"model.init_from={directories['Llama GQA']}", *other],
            "has vocab_size=258, the tokenizer 400 ids: take the model's own",
        ),
    ]:
        job = ranks.start([*run, *words, f"cache_dir={tmp_path}/cache"], 1, tmp_path)
        assert job.wait() == [78]
        assert line in job.output()
        assert not (tmp_path / "cache").exists()
        assert not (tmp_path / "run").exists()


def shape(overrides: list[str]) -> dict[str, Any]:
    return compose(TrainConfig, overrides).model.model_dump(mode="json")


def test_the_shape_is_the_directorys_whatever_the_default_preset_says(directories):
    found = shape([f"model.init_from={directories['Llama GQA']}", "model/attention=eager"])
    assert (found["d_model"], found["n_layers"], found["d_ff"], found["head_dim"]) == (32, 2, 48, 16)
    assert (found["norm_eps"], found["tie_embeddings"]) == (1e-4, False)
    assert found["position"] == {"kind": "rope", "theta": 500.0, "layout": "half", "scaling": None}
    assert found["attention"]["backend"] == "eager"
    assert found["init_from"] == str(directories["Llama GQA"])


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["model.n_layers=3"], ["model.n_layers=3: DIR has 2; leave model.n_layers or model.init_from out"]),
        (["model.position.theta=1e4"], ["model.position.theta=10000.0: DIR has 500.0; "]),
        (["model.position={kind: alibi}"], ["model.position={'kind': 'alibi', "]),
        (
            ["model/family=mpt"],
            ["model/family=mpt: DIR has another shape; leave model/family=mpt or model.init_from out"],
        ),
        (
            ["model/position=alibi"],
            ["model/position=alibi: DIR has another position; leave model/position=alibi or model."],
        ),
        (["model=124m"], ["model=124m: DIR has another shape; leave model=124m or model.init_from out"]),
    ],
    ids=str,
)
def test_what_contradicts_the_directory_is_named(directories, words, lines):
    directory = directories["Llama GQA"]
    with pytest.raises(UserError) as caught:
        compose(TrainConfig, [f"model.init_from={directory}", *words])
    for line, expected in zip(caught.value.lines, lines, strict=True):
        assert line.startswith(expected.replace("DIR", str(directory)))


def test_what_agrees_with_the_directory_is_fine(directories):
    words = ["model.n_layers=2", "model.position.theta=500", "model.norm=rmsnorm"]
    assert shape([f"model.init_from={directories['Llama GQA']}", *words])["n_layers"] == 2


def test_a_window_that_is_shorter_than_seq_len_is_refused(directories):
    word = f"model.init_from={directories['Mistral 0.1']}"
    with pytest.raises(UserError, match=r"seq_len=513: .* sees 512 positions .*set seq_len=512 or less"):
        compose(TrainConfig, [word, "seq_len=513"])
    assert compose(TrainConfig, [word, "seq_len=512"]).model.n_heads == 4


def test_no_directory(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/config.json: No such file or directory"):
        compose(TrainConfig, [f"model.init_from={tmp_path}/nowhere"])
