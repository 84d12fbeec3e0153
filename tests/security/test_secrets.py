"""Canaries of every shape are planted wherever a user may put them, and searched for in every sink."""

from __future__ import annotations

import functools
import http.server
import json
import logging
import sys
import threading

import pytest

from llmtrain.config.door import rank_door
from llmtrain.config.secrets import LEFT_OUT, SECRET_NAME, redact, without_secrets
from llmtrain.plan import main as plan
from llmtrain.train import main as train
from llmtrain.training.config import PrepareConfig
from llmtrain.training.planning import PlanConfig
from tests.ranks import PATCH
from tests.security.canaries import ENVIRONMENT, IN_TEXT, SHAPES, hits
from tests.training.test_keys import keys


@pytest.mark.parametrize("text", [*SHAPES.values(), *IN_TEXT.values()])
def test_no_shape_is_left_in_a_text(text):
    for around in ("{}", "before {} after", "path_{}", "'{}'", "({})"):
        clean = without_secrets(around.format(text))
        assert "CANARY" not in clean and LEFT_OUT in clean, clean
        assert without_secrets(clean) == clean, "it is left out once"
    assert "CANARY" not in json.dumps(redact({"a": [{text: 1}, text], "b": {"c": text}}))


@pytest.mark.parametrize(
    "text",
    [
        "data.max_tokens=3, text_key=title, eos_token, sig=nothing, tokenizer.path=/a/b",
        "runs/sk-learn-comparison-of-many-things/config.yaml task-runs/desk-0123456789-0123456789",
        "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "shard-00017/tokens.bin: token 12 is 70000, outside the vocabulary of 65536",
        "https://x.net:80/a?b=me@home&design=7&tokens=3",
        "step_00000100 rank_00001.safetensors hf_datasets pypi npm_config",
    ],
)
def test_what_is_no_secret_stays(text):
    assert without_secrets(text) == text


def test_the_environment_s_secrets_are_left_out_whatever_they_look_like(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
        assert without_secrets(f"login with {value} failed") == f"login with {LEFT_OUT} failed"
    monkeypatch.setenv("SOME_TOKEN", "short")
    assert without_secrets("a short word") == "a short word"


def test_no_key_of_ours_is_named_like_a_secret():
    for root in (PlanConfig, PrepareConfig):
        assert not [key for key in keys(root) if SECRET_NAME.search(key)]


@pytest.mark.parametrize("secret", SHAPES.values(), ids=SHAPES)
def test_a_config_with_a_secret_is_refused_before_anything_is_written(secret, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    value = "'" + secret + "'"
    for words in ([f"name={value}"], ["--cfg", "job", f"name={value}"], ["--cfg", "hydra", f"name={value}"]):
        assert train(words) == 78
        out, err = capfd.readouterr()
        assert err.startswith(f"error: name={LEFT_OUT}: this is, or looks like, a secret") and not out
        assert err.count("\n") == 1 and "CANARY" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("+logger.wandb.api_key=CANARY", "set WANDB_API_KEY in the environment"),
        ("+data.hub.token=CANARY", "set HF_TOKEN in the environment"),
        (f"logger.wandb.project={SHAPES['huggingface']}", "set HF_TOKEN in the environment"),
        ("+storage.aws_secret_access_key=CANARY", "set AWS_SECRET_ACCESS_KEY in the environment"),
        ("+password=CANARY", "keep it in the environment"),
        ("callbacks.sample.prompts=[a," + SHAPES["openai"] + "]", "callbacks.sample.prompts"),
        ("logger.wandb.project='${oc.env:SECRET_HERE}'", f"logger.wandb.project={LEFT_OUT}"),
        ("+optimizer.auth_tokn=1", "no such key"),
    ],
)
def test_the_refusal_names_the_variable(override, told, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET_HERE", SHAPES["github"])
    assert train([override]) == 78
    _, err = capfd.readouterr()
    assert told in err and "CANARY" not in err and err.count("\n") == 1


def test_a_wrong_value_is_repeated_without_its_secret(capfd):
    """The message cuts a long value: what was cut off must not be what made the secret one."""
    url = "https://somebody:CANARYCANARYCANARYCANARYCANARYCANARYCANARY@example.net/deep/in/there"
    assert train([f"max_steps={url}"]) == 78
    _, err = capfd.readouterr()
    assert "max_steps=https://" in err and "CANARY" not in err


def test_what_composition_shows_has_no_secret(monkeypatch, capfd):
    monkeypatch.setenv("TEXT_AT", "https://me:CANARY@example.net/a.jsonl?sig=CANARY")
    path = "data.sources.text.path='${oc.env:TEXT_AT}'"
    for options, shown in (([], "${oc.env:TEXT_AT}"), (["--resolve"], f"://{LEFT_OUT}@example.net/a.jsonl")):
        assert train(["--cfg", "job", *options, "data=files", path]) == 0
        out, err = capfd.readouterr()
        assert shown in out and "CANARY" not in out + err


def test_a_crash_and_a_log_record_are_told_without_secrets(monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", ENVIRONMENT["HF_TOKEN"])

    def crash(_):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.getLogger().handlers[0].formatter)
        try:
            raise RuntimeError(IN_TEXT["signed url"])
        except RuntimeError:
            record = logging.LogRecord("x", logging.ERROR, "", 0, "at %s", (SHAPES["aws"],), sys.exc_info())
            handler.emit(record)
        raise ValueError(f"{SHAPES['private key']} {ENVIRONMENT['HF_TOKEN']}")

    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert rank_door(crash) == 1
    _, err = capfd.readouterr()
    assert "RuntimeError: GET" in err and "ValueError: " in err and "in crash" in err
    assert "CANARY" not in err


class Guarded(http.server.SimpleHTTPRequestHandler):
    """Files for who says the password."""

    def do_GET(self):
        if "Authorization" not in self.headers or "sig=CANARY" not in self.path:
            self.send_error(403)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def guarded(corpus):
    """The prose of the corpus behind a URL with a password and a signature."""
    handler = functools.partial(Guarded, directory=str(corpus))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://me:CANARYpassword@127.0.0.1:{server.server_port}/prose.jsonl?a=b&sig=CANARYsig"
        server.shutdown()


SINKS = [
    "config.yaml",
    "events.jsonl",
    "metrics.jsonl",
    "report.html",
    "data.json",
    "data/prepared.json",
    "tokenizer/*",
    "crashes/crash-rank0.json",
    "heartbeats/*",
    "checkpoints/*/*",
    "wandb/*/*.wandb",
    "wandb/*/logs/debug.log",
    "tensorboard/*",
]
"""What a run writes and its test must have looked at."""


def crash_after_three_steps() -> None:
    """In a rank: the fourth step fails, with everything in the message that must not be told."""
    from llmtrain.training.engine.engine import Engine

    step, done = Engine.train_step, [0]

    def train_step(self, *arguments, **named):
        done[0] += 1
        if done[0] == 4:
            raise RuntimeError("\n".join([*SHAPES.values(), *IN_TEXT.values(), *ENVIRONMENT.values()]))
        return step(self, *arguments, **named)

    Engine.train_step = train_step


def test_nothing_that_a_run_leaves_behind_holds_a_secret(ranks, tiny, guarded, tmp_path, capfd):
    """A URL with its password, keys in the environment, a crash that tells them all, and the run after it."""
    overrides = [
        *tiny,
        f"data.sources.prose.path='{guarded}'",
        "max_steps=5",
        "checkpoint.every=2",
        "logger.progress=lines",
        "logger=tensorboard",
        "logger.wandb.mode=offline",
        "callbacks.evaluation.every=5",
        "data.validation_fraction=0.2",
        f"cache_dir={tmp_path}/cache",
    ]
    crash = {PATCH: "tests.security.test_secrets:crash_after_three_steps"}
    job = ranks.start(overrides, 1, tmp_path, {**ENVIRONMENT, **crash})
    assert job.wait() == [1], job.output()
    assert "RuntimeError" in job.output()
    ranks.run(overrides, 1, tmp_path, ENVIRONMENT)
    run = tmp_path / "run"
    assert plan([*overrides, f"output_dir={tmp_path}/plan"]) == 0
    (tmp_path / "plan.txt").write_text("".join(capfd.readouterr()))

    looked_at = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert {"run", "plan", "plan.txt", "cache"} < looked_at and (run / "report.html").exists()
    assert all(list(run.glob(sink)) for sink in SINKS)
    assert LEFT_OUT in (run / "crashes" / "crash-rank0.json").read_text()
    assert LEFT_OUT in (run / "config.yaml").read_text()
    assert hits(tmp_path) == []
