"""Whatever is loaded is data: pickles and code that are planted where files are read are never executed."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llmtrain.config import UserError
from llmtrain.config.hydra import compose
from llmtrain.data.megatron import MegatronIndex
from llmtrain.data.shards import ShardedSource
from llmtrain.evaluate import main as evaluate
from llmtrain.model.huggingface.stored import stored_in
from llmtrain.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from llmtrain.train import main as train
from llmtrain.training.checkpoint.choosing import newest_verified, verified_checkpoint
from llmtrain.training.checkpoint.manifest import MANIFEST, Manifest
from llmtrain.training.checkpoint.reading import CheckpointTensors, CheckpointWeights
from llmtrain.training.checkpoint.tensors import map_tensors
from llmtrain.training.config import TrainConfig
from tests.model import huggingface_models as theirs
from tests.security.pickles import FORMS, HEADERS, with_length

each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture
def marker(tmp_path):
    """A file that must not be there at the end."""
    marker = tmp_path / "executed"
    yield marker
    assert not marker.exists(), "it was executed"


def test_every_form_executes_where_it_is_trusted(tmp_path):
    """The canary's canary: each form works in the loader that it is meant for."""
    loaders = {
        "plain": lambda file: __import__("pickle").loads(file.read_bytes()),
        "torch_zip": lambda file: torch.load(file, weights_only=False),
        "torch_legacy": lambda file: torch.load(file, weights_only=False),
        "numpy_objects": lambda file: np.load(file, allow_pickle=True),
        "numpy_zip": lambda file: np.load(file, allow_pickle=True)["arr_0"],
        "in_a_safetensors_header": lambda file: __import__("pickle").loads(file.read_bytes()[8:]),
    }
    assert loaders.keys() == FORMS.keys()
    for name, load in loaders.items():
        marker = tmp_path / f"executed-{name}"
        (tmp_path / name).write_bytes(FORMS[name](marker))
        load(tmp_path / name)
        assert marker.exists()


# Checkpoints


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory, corpus):
    """A run of three steps with two checkpoints."""
    directory = tmp_path_factory.mktemp("trained")
    ranks.run([*_tiny(corpus, directory), "max_steps=3", "checkpoint.every=2"], 1, directory)
    return directory / "run"


def _tiny(corpus: Path, directory: Path) -> list[str]:
    return [
        "tokenizer=bytes", "data=files", f"data.sources.text.path={corpus}/prose.jsonl", "model.d_model=32",
        "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1", "model.d_ff=64", "seq_len=32",
        "global_batch_size=2", "micro_batch_size=2", "precision=fp32", "logger.progress=none",
        "callbacks.sample.every=0", "callbacks.evaluation.every=0", f"cache_dir={directory}/cache",
        f"output_dir={directory}/run",
    ]  # fmt: skip


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def sign(checkpoint: Path) -> None:
    """Write the manifest that fits the files: an attacker can."""
    manifest = Manifest.read(checkpoint)
    files = {}
    for name in manifest.files:
        data = (checkpoint / name).read_bytes()
        files[name] = len(data), hashlib.sha256(data).hexdigest()
    replace(manifest, files=files).write(checkpoint)


@each_form
@pytest.mark.parametrize("name", ["rank_00000.safetensors", "checkpoint.json", MANIFEST])
def test_a_pickle_in_a_checkpoint_is_passed_over(run, marker, form, name):
    newest = run / "checkpoints" / "step_00000003"
    (newest / name).write_bytes(form(marker))
    assert newest_verified(run / "checkpoints").name == "step_00000002"
    with pytest.raises(UserError, match="step_00000003"):
        verified_checkpoint(newest)


@each_form
def test_a_pickle_in_a_checkpoint_that_is_signed_is_refused(run, marker, form):
    newest = run / "checkpoints" / "step_00000003"
    file = newest / "rank_00000.safetensors"
    file.write_bytes(form(marker).ljust(file.stat().st_size, b"\0"))
    sign(newest)
    assert newest_verified(run / "checkpoints") == newest
    with pytest.raises(UserError, match="no file of tensors"):
        CheckpointTensors(newest)


@each_form
def test_pickles_beside_a_checkpoint_s_files_are_not_looked_at(run, marker, form):
    """Where older versions, and DeepSpeed itself, would have read them."""
    newest = run / "checkpoints" / "step_00000003"
    for name in ("rank_00000.pt", "engine/mp_rank_00_model_states.pt", "latest", "tokenizer.pkl"):
        (newest / name).parent.mkdir(exist_ok=True)
        (newest / name).write_bytes(form(marker))
    assert {*CheckpointWeights(verified_checkpoint(newest))} == {*CheckpointTensors(newest).shapes}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_is_a_bomb_is_one_line(tmp_path, header):
    file = tmp_path / "x.safetensors"
    file.write_bytes(with_length(header))
    with pytest.raises(UserError, match="no file of tensors"):
        map_tensors(file)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **theirs.LLAMA}))
    file.rename(tmp_path / "model.safetensors")
    with pytest.raises(UserError):
        theirs.ours(tmp_path)


def test_yaml_that_would_run_code_is_refused(run, marker, capfd):
    text = (run / "config.yaml").read_text()
    for tag in ("!!python/object/apply:os.mknod", "!!python/object/new:os.mknod", "!!python/name:os.mknod"):
        (run / "config.yaml").write_text(f"{text}\nextra: {tag} [{marker}]\n")
        assert evaluate([str(run)]) == 78
        assert "could not determine a constructor" in capfd.readouterr().err
    options = run / "options" / "optimizer"
    options.mkdir(parents=True)
    (options / "evil.yaml").write_text(f"lr: !!python/object/apply:os.mknod [{marker}]\n")
    assert train(["--config-dir", str(run / "options"), "optimizer=evil"]) == 78


# Models, tokenizers, text


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return theirs.save(theirs.build("Llama GQA"), tmp_path_factory.mktemp("llama"))


@each_form
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "sharded.bin", "config.json"])
def test_a_pickle_in_a_model_s_directory_is_refused(llama, tmp_path, marker, form, name):
    directory = Path(shutil.copytree(llama, tmp_path / "model"))
    (directory / "model.safetensors").unlink()
    if name == "sharded.bin":
        index = {"weight_map": {"model.embed_tokens.weight": "sharded.bin"}}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (directory / name).write_bytes(form(marker))
    with pytest.raises(UserError, match=name.split(".")[0]):
        theirs.ours(directory)


def test_bytes_that_are_no_weights_are_one_line_whatever_they_begin_with(tmp_path, marker):
    """Each opcode of pickle, and none: torch's reader runs into IndexError, AttributeError, KeyError, ..."""
    rest = FORMS["in_a_safetensors_header"](marker)[1:]
    for first in range(256):
        (tmp_path / "pytorch_model.bin").write_bytes(bytes([first]) + rest)
        with pytest.raises(UserError, match="cannot be read as weights"):
            stored_in(tmp_path)


@each_form
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_a_pickle_in_a_tokenizer_s_directory_is_refused(tmp_path, marker, form, name):
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / name).write_bytes(form(marker))
    with pytest.raises(UserError):
        if name == "tokenizer.model":
            SentencePieceTokenizer.from_file(tmp_path / name)
        else:
            HuggingFaceTokenizer.from_path(tmp_path)


TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    }
)


def test_code_beside_a_tokenizer_is_not_executed(tmp_path, marker):
    evil = f"open({str(marker)!r}, 'w')\n"
    for name in ("tokenizer.py", "tokenization_evil.py", "__init__.py", "setup.py"):
        (tmp_path / name).write_text(evil)
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    side = {"auto_map": {"AutoTokenizer": ["tokenizer.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(side))
    assert HuggingFaceTokenizer.from_path(tmp_path).encode_batch(["ab"])[0].tolist() == [2]


def test_code_beside_a_model_is_not_executed(llama, tmp_path, marker):
    directory = Path(shutil.copytree(llama, tmp_path / "model"))
    file = directory / "config.json"
    config = json.loads(file.read_text())
    for name in ("modeling_evil.py", "configuration_evil.py"):
        (directory / name).write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    auto_map = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    file.write_text(json.dumps({**config, "auto_map": auto_map}))
    model = theirs.ours(directory)  # of a known kind: the shape and the weights are read, the code is not
    assert next(model.parameters()).isfinite().all()
    file.write_text(json.dumps({**config, "auto_map": auto_map, "model_type": "evil"}))
    with pytest.raises(UserError, match="evil"):
        theirs.ours(directory)


@pytest.mark.parametrize("format_", ["auto", "huggingface"])
def test_a_dataset_s_loading_script_is_not_executed(tmp_path, marker, format_, capfd):
    dataset = tmp_path / "evil"
    dataset.mkdir()
    (dataset / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (dataset / "dataset_infos.json").write_text("{}")
    words = [f"data.sources.text.path={dataset}", f"data.sources.text.format={format_}"]
    arguments = ["tokenizer=bytes", "data=files", *words, f"output_dir={tmp_path}/run"]
    assert train([*arguments, f"cache_dir={tmp_path}/cache"]) == 78
    err = capfd.readouterr().err
    assert "evil" in err and "Traceback" not in err


@pytest.fixture(scope="module")
def shards(trained):
    prepared = json.loads((trained / "data" / "prepared.json").read_text())
    return Path(prepared["text"]["train"])


@each_form
@pytest.mark.parametrize("name", ["index.json", "index.npy", "shard-00000/*.npy", "shard-00000/tokens.bin"])
def test_a_pickle_among_shards_is_refused(shards, tmp_path, marker, form, name):
    directory = Path(shutil.copytree(shards, tmp_path / "shards"))
    files = list(directory.glob(name))
    for file in files:
        file.write_bytes(form(marker))
    assert files
    with pytest.raises(UserError, match=str(directory)):
        source = ShardedSource.open(directory)
        source.offsets(0), source.read(0, 0, 1)


@each_form
@pytest.mark.parametrize("name", ["text.idx", "text.bin"])
def test_a_pickle_as_a_megatron_dataset_is_refused(tmp_path, marker, form, name):
    from tests.data.test_megatron import write_by_hand

    write_by_hand(tmp_path / "text", [[[1, 2, 3] * 1000]])
    (tmp_path / name).write_bytes(form(marker))
    with pytest.raises(UserError, match="text"):
        list(MegatronIndex(tmp_path / "text").read())


# `_target_`


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "antigravity.webbrowser",
        "this.s",
        "evil_module.run",
        "evil_module.Effects",
        "evil_module.Evil",
        "../../evil_module.Evil",
        "/tmp/evil_module.Evil",
        "evil_module:Evil",
        "evil_module\0.Evil",
        "..evil_module.Evil",
        "evil_module.Evil()",
        "llmtrain.config.base.pkgutil.os.system",
        "pickle.loads",
        "",
    ],
)
def test_a_target_that_is_no_config_class_is_refused_before_it_is_called(
    target, tmp_path, marker, monkeypatch, capfd
):
    (tmp_path / "evil_module.py").write_text(EVIL.format(marker=str(marker)))
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("antigravity", "this", "evil_module"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    text = target.replace("\0", "\\0")
    for key in ("optimizer", "scheduler", "tokenizer", "model.position"):
        override = f'{key}={{_target_: "{text}"}}' if "." in key else f"++{key}._target_='{target}'"
        assert train([override]) == 78
        err = capfd.readouterr().err
        assert err.startswith("error: ") and "Traceback" not in err
    assert not {"antigravity", "this"} & set(sys.modules), "imported, which alone has effects"


@pytest.mark.parametrize("key", ["data.sources.x", "model.attention", "callbacks.extra.x", "logger.extra.x"])
def test_so_it_is_everywhere(key):
    with pytest.raises(UserError, match="is not the name of a config class"):
        compose(TrainConfig, [f"+{key}={{_target_: os.system, weight: 1}}"])


EVIL = """
def run(*_, **__):
    open({marker!r}, "w")

class Effects:
    __init__ = __new__ = __init_subclass__ = run

class Evil:
    def __new__(cls, *_, **__):
        run()
    @classmethod
    def model_validate(cls, *_):
        run()
"""
