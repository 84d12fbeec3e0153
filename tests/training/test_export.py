"""A trained checkpoint of any stage, as a Hugging Face directory that `transformers` loads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtrain.export import main as export_main
from llmtrain.training.finished import open_finished

CASES = [
    # stage, ranks, precision, n_kv_heads, tied
    (3, 2, "fp32", 1, True),
    (3, 2, "bf16", 2, False),
    (2, 2, "fp32", 4, True),
    (1, 2, "bf16", 1, False),
    (1, 1, "fp32", 1, True),
    (0, 2, "fp32", 2, True),
]


@pytest.mark.parametrize(("stage", "size", "precision", "n_kv_heads", "tied"), CASES)
def test_transformers_loads_what_was_trained(ranks, tiny, tmp_path, stage, size, precision, n_kv_heads, tied):
    from transformers import AutoModelForCausalLM

    ranks.run(
        [
            *tiny,
            f"deepspeed=zero{stage}",
            f"precision={precision}",
            f"model.n_kv_heads={n_kv_heads}",
            f"model.tie_embeddings={str(tied).lower()}",
            "max_steps=3",
        ],
        size,
        tmp_path,
    )
    assert export_main([str(tmp_path / "run"), str(tmp_path / "exported")]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    ours = open_finished(tmp_path / "run").model
    ids = torch.randint(0, 258, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (theirs(ids).logits - ours(ids)).abs().max().item()
    assert difference <= 1e-6
    assert theirs.config.num_key_value_heads == n_kv_heads


def test_the_exported_tokenizer_gives_our_ids(ranks, tiny, tmp_path):
    from transformers import AutoTokenizer

    ranks.run([*tiny, "tokenizer=sentencepiece", "tokenizer.vocab_size=400", "max_steps=1"], 1, tmp_path)
    assert export_main([str(tmp_path / "run"), str(tmp_path / "exported")]) == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported")
    ours = open_finished(tmp_path / "run").tokenizer
    for text in (Path(__file__).read_text(), "  two\n\tlines é 😀 ", " leading", "trailing \n"):
        ids = ours.encode_batch([text])[0].tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == text


def test_an_option_without_a_home_is_refused_by_name(ranks, tiny, tmp_path, capsys):
    ranks.run([*tiny, "model/position=alibi", "max_steps=1"], 1, tmp_path)
    assert export_main([str(tmp_path / "run"), str(tmp_path / "exported")]) == 78
    error = capsys.readouterr().err
    assert "model/position=alibi" in error
    assert "the nearest is Falcon, which has" in error
    assert [path.name for path in tmp_path.iterdir() if "exported" in path.name] == []


def test_an_export_says_what_it_is_and_how_far_from_the_run(ranks, tiny, tmp_path, capsys):
    ranks.run([*tiny, "max_steps=2", "name=mine"], 1, tmp_path)
    run, output = str(tmp_path / "run"), tmp_path / "exported"
    assert export_main([run, str(output), "--max-shard-gb", "1e-4"]) == 0
    told = capsys.readouterr().out
    note = json.loads((output / "llmtrain_export.json").read_text())
    versions = note.pop("versions")
    assert {"llmtrain", "torch", "transformers"} == {*versions}
    assert (note["run"], note["step"], note["family"], note["dtype"]) == ("mine", 2, "Llama", "fp32")
    assert 0 <= note["max_logit_difference"] < 1e-5
    assert f"Llama, fp32; largest logit difference to transformers {note['max_logit_difference']:.2g}" in told
    assert len([*output.glob("model-0000?-of-0000?.safetensors")]) > 2

    assert export_main([run, f"{output}-bf16", "--dtype", "bf16", "--step", "2"]) == 0
    rounded = json.loads((tmp_path / "exported-bf16" / "llmtrain_export.json").read_text())
    assert 1e-5 < rounded["max_logit_difference"] < 0.1  # what rounding the weights costs
    assert rounded["dtype"] == "bf16"


def test_a_model_that_does_not_fit_is_not_compared(ranks, tiny, tmp_path, capsys, monkeypatch):
    import psutil

    ranks.run([*tiny, "max_steps=1"], 1, tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert export_main([str(tmp_path / "run"), str(tmp_path / "exported")]) == 0
    assert "not compared with transformers: " in capsys.readouterr().out
    note = json.loads((tmp_path / "exported" / "llmtrain_export.json").read_text())
    assert note["max_logit_difference"] is None
    assert "do not fit" in note["not_compared"]


def test_a_difference_that_no_rounding_explains_is_a_warning(ranks, tiny, tmp_path, monkeypatch, caplog):
    from llmtrain.training import exporting

    ranks.run([*tiny, "max_steps=1"], 1, tmp_path)
    run, there = str(tmp_path / "run"), exporting.logits_there
    assert export_main([run, f"{tmp_path}/right"]) == 0
    assert "tokenizer=bytes: transformers has no such tokenizer" in caplog.text
    assert "which rounding does not explain" not in caplog.text
    monkeypatch.setattr(exporting, "logits_there", lambda *inputs: there(*inputs) + 0.002)
    assert export_main([run, f"{tmp_path}/bf16", "--dtype", "bf16"]) == 0
    assert "which rounding does not explain" not in caplog.text
    assert export_main([run, f"{tmp_path}/wrong"]) == 0
    assert "logits differ by 0.002 from those of transformers, which rounding does not" in caplog.text


def test_an_existing_directory_is_not_written_into(ranks, tiny, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert export_main([str(tmp_path), str(tmp_path / "mine")]) == 78
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_what_ends_the_comparison_leaves_a_whole_export(ranks, tiny, tmp_path, monkeypatch):
    """A model that is too large for the GPU, and for which memory then ends."""
    from llmtrain.model import Decoder
    from llmtrain.training import exporting

    ranks.run([*tiny, "max_steps=1"], 1, tmp_path)
    run, output = str(tmp_path / "run"), tmp_path / "exported"

    def too_large(model: Decoder, *_: object) -> Decoder:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Decoder, "to", too_large)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert export_main([run, f"{output}-compared"]) == 0

    def ends(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(exporting, "logits_there", ends)
    assert export_main([run, str(output)]) == 1
    compared = {path.name for path in (tmp_path / "exported-compared").iterdir()}
    assert {path.name for path in output.iterdir()} == compared
    note = json.loads((output / "llmtrain_export.json").read_text())
    assert (note["step"], note["max_logit_difference"]) == (1, None)
    assert note["not_compared"] == "the comparison did not come to its end"


def test_an_empty_directory_is_written_into_wherever_one_stands(ranks, tiny, tmp_path, monkeypatch):
    ranks.run([*tiny, "max_steps=1"], 1, tmp_path)
    here = tmp_path / "here"
    (here / ".unfinished").mkdir(parents=True)  # an export that was interrupted
    (here / ".unfinished" / "half").touch()
    monkeypatch.chdir(here)
    assert export_main([str(tmp_path / "run"), "."]) == 0
    names = {path.name for path in Path.cwd().iterdir()}
    assert {"config.json", "model.safetensors", "llmtrain_export.json"} <= names
    assert not {".unfinished", "half"} & names


def test_a_place_that_cannot_be_written_is_one_line(ranks, tiny, tmp_path, capsys):
    ranks.run([*tiny, "max_steps=1"], 1, tmp_path)
    (tmp_path / "file").touch()
    for place in ("file", "file/x", "/proc/x/y"):
        output = tmp_path / place
        assert export_main([str(tmp_path / "run"), str(output)]) == 78
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {output}: cannot be written: ")
