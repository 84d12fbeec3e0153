"""A trained checkpoint of any stage, as a Hugging Face directory that `transformers` loads."""

from __future__ import annotations

from pathlib import Path

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
    assert "model.position=alibi" in error
    assert "yet" in error
    assert not (tmp_path / "exported").exists()


def test_an_existing_directory_is_not_written_into(ranks, tiny, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert export_main([str(tmp_path), str(tmp_path / "mine")]) == 78
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
