"""Every family both ways: transformers' weights here, ours there, and what has no home."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.config import UserError
from llmtrain.config.hydra import compose
from llmtrain.model import Decoder, DecoderConfig
from llmtrain.model.generation import generate
from llmtrain.model.huggingface import Pretrained, family_of, rounding_there, write_pretrained
from llmtrain.model.huggingface.families import CHOICES
from llmtrain.training.config import TrainConfig
from tests.model import huggingface_models as theirs
from tests.model.small import POSITIONS, SEQ_LEN, VOCAB, decoder, tokens


def export(model: Decoder, directory: Path, **changes: Any) -> Path:
    options = {
        "vocab_size": VOCAB, "seq_len": SEQ_LEN, "bos_id": 1, "eos_id": None,
        "dtype": torch.float32, "max_shard_gb": 5.0,
    }  # fmt: skip
    write_pretrained(directory, model.config, model.state_dict(), **(options | changes))
    return directory


@pytest.mark.parametrize("name", theirs.MODELS)
def test_their_model_is_ours_and_goes_back_bit_equal(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    model = theirs.build(name)
    directory = theirs.save(model, tmp_path / "in")
    ours = theirs.ours(directory)
    ids = tokens(length=200)
    assert theirs.largest_difference(ours, model, ids) < 1e-4
    with torch.no_grad():
        assert ours(ids).std() > 0.5  # a difference would be seen
    back = export(ours, tmp_path / "out", seq_len=256)
    before, after = theirs.stored(directory), theirs.stored(back)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    again = AutoModelForCausalLM.from_pretrained(back, local_files_only=True)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", theirs.MODELS)
def test_greedy_text_is_theirs(tmp_path: Path, name: str) -> None:
    model = theirs.build(name)
    ours = theirs.ours(theirs.save(model, tmp_path))
    prompt = [5, 17, 3]
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(prompt) :].tolist()
    found = generate(ours, prompt, 64, 128, temperature=0, generator=torch.Generator(), eos_id=None)
    assert found == expected
    assert len({*found}) > 3


HOMES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_embeddings": False, "n_kv_heads": 2},
    "Qwen2": {"bias": "qkv"},
    "Qwen3": {"qk_norm": True, "head_dim": 16},
    "Falcon": {"norm": "layernorm", "feed_forward": "relu_squared", "residual": "parallel_one_norm"},
    "Falcon 40B": {"norm": "layernorm", "feed_forward": "gelu", "residual": "parallel", "bias": "all"},
    "MPT": {
        "norm": "layernorm_no_bias", "feed_forward": "gelu", "position": POSITIONS["alibi"],
        "n_kv_heads": 4, "d_ff": 128,
    },
    "BLOOM": {
        "norm": "layernorm", "feed_forward": "gelu_tanh", "position": POSITIONS["alibi"], "bias": "all",
        "embedding_norm": True, "n_kv_heads": 4, "d_ff": 128, "tie_embeddings": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HOMES)
def test_our_model_is_theirs(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    model = decoder(attention={"backend": "sdpa"}, **HOMES[name])
    assert family_of(model.config).name == name
    exported = AutoModelForCausalLM.from_pretrained(export(model, tmp_path), local_files_only=True)
    ids = tokens()
    assert theirs.largest_difference(model, exported, ids) < 1e-4
    assert (exported.config.vocab_size, exported.config.eos_token_id) == (VOCAB, None)
    assert (exported.generation_config.bos_token_id, exported.generation_config.eos_token_id) == (1, None)


PRESETS = {
    "llama_7b": "Llama", "llama3_8b": "Llama", "mistral_7b": "Llama", "70b": "Llama", "124m": "Llama",
    "qwen3_8b": "Qwen3", "falcon_7b": "Falcon", "falcon_rw_1b": "Falcon", "mpt_7b": "MPT",
    "bloom_7b1": "BLOOM",
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_home_they_are_named_after(preset: str) -> None:
    assert family_of(compose(TrainConfig, [f"model={preset}"]).model).name == PRESETS[preset]


@pytest.mark.parametrize("qk_norm", [False, True], ids=["Llama", "Qwen3"])
def test_interleaved_rope_is_written_in_halves(tmp_path: Path, qk_norm: bool) -> None:
    from transformers import AutoModelForCausalLM

    position = POSITIONS["rope"] | {"layout": "interleaved"}
    model = decoder(position=position, qk_norm=qk_norm, n_kv_heads=2)
    exported = AutoModelForCausalLM.from_pretrained(export(model, tmp_path), local_files_only=True)
    assert theirs.largest_difference(model, exported, tokens()) < 1e-4


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {"position": POSITIONS["alibi"], "n_kv_heads": 4, "d_ff": 128},
            "model/position=alibi with model.norm=rmsnorm, model.feed_forward=swiglu: no Hugging Face "
            "architecture is such a model; the nearest is MPT, which has model.norm=layernorm_no_bias, "
            "model.feed_forward=gelu",
        ),
        ({"position": POSITIONS["alibi"]}, "scaled=false, model.norm=rmsnorm, .* nearest is Falcon, .*=true"),
        ({"position": {"kind": "learned"}}, "model/position=learned: no .* Llama, .* model/position=rope"),
        ({"position": {"kind": "none"}}, "model/position=none: .* nearest is Llama"),
        ({"norm": "layernorm"}, "model/position=rope with model.norm=layernorm: .* Llama"),
        ({"feed_forward": "gelu"}, "model.feed_forward=gelu: .* Llama, .*feed_forward=swiglu or geglu"),
        ({"bias": "all", "qk_norm": True}, "model.(bias=all|qk_norm=true): .* nearest is"),
        ({"n_heads": 3, "head_dim": 8}, "model.n_heads=3: .* Llama, .*=1 or 2 or 4 or 8 or 16 or 32"),
        (HOMES["MPT"] | {"d_ff": 64}, "model.d_ff=64: .* MPT, which has model.d_ff=128"),
        (
            HOMES["Falcon"] | {"position": POSITIONS["alibi"]},
            "model.position.scaled=false: .* Falcon, which has model.position.scaled=true",
        ),
        (HOMES["BLOOM"] | {"d_ff": 64}, "model.d_ff=64: .* nearest is BLOOM"),
    ],
    ids=lambda value: "",
)
def test_what_has_no_home_is_refused_with_the_nearest(
    tmp_path: Path, changes: dict[str, Any], lines: str
) -> None:
    with pytest.raises(UserError, match=lines):
        export(decoder(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_choice_of_a_decoder_is_looked_at() -> None:
    """An option that is added to the decoder must be given a home, or refused."""
    sizes = {"d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "norm_eps", "tie_embeddings"}
    assert {*DecoderConfig.model_fields} == {*CHOICES, *sizes, "position", "attention"}


# Files


class Lent(Mapping[str, Tensor]):
    """Weights that are made when asked for; counts the bytes of those that somebody still holds."""

    def __init__(self, model: Decoder) -> None:
        self.state, self.held, self.peak, self.asked = model.state_dict(), 0, 0, []

    def __getitem__(self, name: str) -> Tensor:
        value = self.state[name].clone()
        self.asked.append(name)
        self.held += value.nbytes
        self.peak = max(self.peak, self.held)
        weakref.finalize(value, self._back, value.nbytes)
        return value

    def _back(self, size: int) -> None:
        self.held -= size

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def test_shards_are_small_and_one_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import torch as library
    from transformers import AutoModelForCausalLM

    sizes: list[int] = []
    save_file = library.save_file

    def record(tensors: dict[str, Tensor], *rest: Any, **options: Any) -> None:
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, *rest, **options)

    monkeypatch.setattr(library, "save_file", record)
    model = decoder(n_layers=6, tie_embeddings=False, attention={"backend": "sdpa"})
    lent = Lent(model)
    limit, whole = 60_000, sum(value.nbytes for value in lent.state.values())
    options = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "bos_id": 1, "eos_id": None, "dtype": torch.float32}
    write_pretrained(tmp_path, model.config, lent, max_shard_gb=limit / 1e9, **options)
    assert lent.asked == [name for name, _ in model.named_parameters()]
    largest = max(value.nbytes for value in lent.state.values())
    assert lent.peak <= largest + limit < whole / 2
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(sizes):05d}.safetensors" for n in range(1, len(sizes) + 1)]
    assert len(sizes) > 3
    assert max(sizes) <= limit
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    assert theirs.largest_difference(model, exported, tokens()) < 1e-4
    assert theirs.largest_difference(theirs.ours(tmp_path), exported, tokens()) < 1e-4


def test_bf16_halves_the_bytes_and_config_json_says_so(tmp_path: Path) -> None:
    model = decoder(tie_embeddings=False)
    export(model, tmp_path, dtype=torch.bfloat16)
    written = theirs.stored(tmp_path)
    assert {value.dtype for value in written.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    norm = model.state_dict()["final_norm.weight"].bfloat16()
    assert torch.equal(written["model.norm.weight"], norm)


def test_padding_of_the_vocabulary_is_neither_written_nor_read(tmp_path: Path) -> None:
    model = decoder()
    assert export(model, tmp_path)
    assert theirs.stored(tmp_path)["model.embed_tokens.weight"].shape == (VOCAB, 32)
    back = theirs.ours(tmp_path)
    assert torch.equal(back.embedding.weight[:VOCAB], model.embedding.weight[:VOCAB])
    assert not back.embedding.weight[VOCAB:].any()


@pytest.mark.parametrize("name", ["Llama GQA", "BLOOM"])
@pytest.mark.parametrize("form", ["shards", "pickled", "pickled, without a prefix"])
def test_every_form_of_weights_is_read(tmp_path: Path, name: str, form: str) -> None:
    model = theirs.build(name)
    if form == "shards":
        theirs.save(model, tmp_path, max_shard_size="20KB")
        assert len([*tmp_path.glob("*.safetensors")]) > 3
    else:
        theirs.save(model, tmp_path)
        prefix = f"{model.base_model_prefix}." if "without" in form else ""
        theirs.pickled(tmp_path, {k.removeprefix(prefix): v for k, v in model.state_dict().items()})
    assert theirs.largest_difference(theirs.ours(tmp_path), model, tokens()) < 1e-4


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    theirs.pickled(theirs.save(theirs.build("Llama GQA"), tmp_path), {"x": Path("code")})  # type: ignore[dict-item]
    with pytest.raises(Exception, match=r"Weights only|weights_only|PosixPath"):
        theirs.ours(tmp_path)


def test_a_config_of_transformers_4_is_read(tmp_path: Path) -> None:
    directory = theirs.save(theirs.build("Llama 3.1"), tmp_path)
    new = Pretrained.open(directory)
    keys = json.loads((directory / "config.json").read_text())
    rope = keys.pop("rope_parameters")
    old = keys | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(old))
    assert Pretrained.open(directory) == new


def test_code_beside_a_config_does_not_run(tmp_path: Path) -> None:
    """As the hub's Falcon and MPT still have it; this one would end in an error."""
    file = theirs.save(theirs.build("Falcon 7B"), tmp_path) / "config.json"
    (tmp_path / "configuration_falcon.py").write_text("raise SystemExit('code ran')")
    auto_map = {"AutoConfig": "configuration_falcon.FalconConfig"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto_map}))
    assert Pretrained.open(tmp_path).shape["residual"] == "parallel_one_norm"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("Llama GQA", {"model_type": "gpt2"}, "model_type=gpt2: none of llama, mistral"),
        ("Llama GQA", {"attention_bias": True}, "attention_bias and mlp_bias that differ"),
        ("Llama GQA", {"hidden_act": "relu"}, "hidden_act=relu .silu, gelu are known"),
        ("Llama GQA", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "=yarn"),
        ("Qwen3", {"attention_bias": True}, "attention_bias"),
        ("MPT", {"attn_config": {"clip_qkv": 6.0}}, "attn_config.clip_qkv=6.0"),
        ("MPT", {"attn_config": {"alibi": False}}, "attn_config.alibi=False"),
        ("MPT", {"logit_scale": 0.5}, "logit_scale=0.5"),
        ("BLOOM", {"slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact with pretraining_tp=2"),
        ("BLOOM", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection"),
    ],
    ids=str,
)
def test_models_that_this_decoder_is_not(
    tmp_path: Path, name: str, changes: dict[str, Any], words: str
) -> None:
    file = theirs.save(theirs.build(name), tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=words) as caught:
        Pretrained.open(tmp_path)
    assert str(file) in str(caught.value)


QUIET = """
import sys
from pathlib import Path

import torch

from llmtrain.config import UserError
from llmtrain.model.fp8 import check_fp8
from llmtrain.model.huggingface import Pretrained
from llmtrain.model.huggingface.checking import logits_there

directory, other = map(Path, sys.argv[1:])
logits_there(directory, torch.zeros(1, 4, dtype=torch.long))
try:
    Pretrained.open(other)
except UserError:
    check_fp8("rowwise")
"""


def test_libraries_tell_nothing_of_themselves(tmp_path: Path) -> None:
    """torchao of its missing extensions, transformers of a scaling that our own line refuses."""
    pytest.importorskip("torchao")
    directory = theirs.save(theirs.build("Llama GQA"), tmp_path / "llama")
    keys = json.loads((directory / "config.json").read_text())
    keys["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    (tmp_path / "yarn").mkdir()
    (tmp_path / "yarn" / "config.json").write_text(json.dumps(keys))
    command = [sys.executable, "-c", QUIET, str(directory), str(tmp_path / "yarn")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_directories_that_are_not_whole(tmp_path: Path) -> None:
    model = theirs.build("Llama GQA")
    with pytest.raises(UserError, match=r"config.json: No such file"):
        Pretrained.open(tmp_path)
    theirs.save(model, tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=f"names {gone.name}, not there"):
        theirs.ours(tmp_path)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(UserError, match="no weights"):
        theirs.ours(tmp_path)


def test_weights_that_are_missing_or_too_many(tmp_path: Path) -> None:
    model = theirs.build("Llama GQA")
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    theirs.save(model, tmp_path)
    theirs.pickled(tmp_path, weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    theirs.ours(tmp_path)
    theirs.pickled(tmp_path, weights | {"model.layers.0.adapter.weight": torch.ones(8)})
    with pytest.raises(UserError, match=r"hold model.layers.0.adapter.weight, which a Llama"):
        theirs.ours(tmp_path)
    theirs.pickled(tmp_path, {key: value for key, value in weights.items() if "layers.1.mlp" not in key})
    with pytest.raises(UserError, match=r"hold no model.layers.1.mlp.down_proj.weight, "):
        theirs.ours(tmp_path)
    theirs.pickled(tmp_path, weights | {"model.norm.weight": torch.ones(31)})
    with pytest.raises(UserError, match=r"model.norm.weight has the shape \[31\], .* says \[32\]"):
        theirs.ours(tmp_path)


@pytest.mark.parametrize(
    ("ids", "fits"), [(VOCAB, True), (VOCAB - 3, True), (VOCAB - 4, False), (VOCAB + 1, False)]
)
def test_the_vocabulary_must_be_the_tokenizers(tmp_path: Path, ids: int, fits: bool) -> None:
    theirs.save(theirs.build("Llama GQA"), tmp_path)
    if fits:
        model = theirs.ours(tmp_path, vocab_size=ids)
        assert not model.embedding.weight[ids:].any()
        return
    with pytest.raises(UserError, match=rf"vocab_size={VOCAB}, the tokenizer {ids} ids: .*tokenizer.path="):
        theirs.ours(tmp_path, vocab_size=ids)


def without_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets transformers' Falcon keep its ALiBi in fp32."""
    import inspect

    from transformers.models.falcon import modeling_falcon as falcon

    source = inspect.getsource(falcon.build_alibi_tensor)
    assert source.count(".bfloat16()") == 1
    names: dict[str, Any] = {**vars(falcon)}
    exec(source.replace(".bfloat16()", ""), names)
    monkeypatch.setattr(falcon, "build_alibi_tensor", names["build_alibi_tensor"])


@pytest.mark.parametrize("heads", [4, 6, 32])
def test_falcons_alibi_is_theirs_but_for_their_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: int
) -> None:
    """transformers rounds slopes and slope * position to bf16."""
    changes = {"num_attention_heads": heads, "hidden_size": 8 * heads}
    monkeypatch.setitem(theirs.MODELS, "here", ("falcon", theirs.FALCON_RW | changes))
    model = theirs.build("here")
    ours = theirs.ours(theirs.save(model, tmp_path))
    assert rounding_there(ours.config) is not None
    assert theirs.largest_difference(ours, model, tokens(length=1000)) > 1e-3
    without_rounding(monkeypatch)
    assert theirs.largest_difference(ours, model, tokens(length=1000)) < 1e-4


@pytest.mark.parametrize("name", ["Llama GQA", "Falcon 7B", "BLOOM", "MPT"])
def test_no_other_family_rounds(tmp_path: Path, name: str) -> None:
    assert rounding_there(theirs.ours(theirs.save(theirs.build(name), tmp_path)).config) is None
