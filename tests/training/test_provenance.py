"""What `where` says against the tokens that a run really trained on, recorded at the model's door."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.config import UserError
from llmtrain.config.hydra import compose
from llmtrain.data.batch import IGNORED
from llmtrain.data.prepare import look
from llmtrain.data.readers import cutting
from llmtrain.data.tokenizing import is_held_out, make
from llmtrain.training.build import build_dataset
from llmtrain.training.config import TrainConfig
from llmtrain.training.finished import open_text, read_config
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.where import find_document, find_text, open_data, rows_at, steps_with
from llmtrain.where import where
from tests.data.test_prepare import some_texts, write_texts
from tests.ranks import RECORD

L, G = 64, 8


def recorded(directory: Path, ranks: int) -> np.ndarray:
    """[steps, G, L + 1] tokens of every step that the recording's process made, in the order of the rows.

    The last label is IGNORED where it is no target; then its token is not known and stands as IGNORED.
    """
    per_rank = []
    for rank in range(ranks):
        batches = []
        with (directory / f"rank{rank}.npy").open("rb") as file:
            while file.peek(1):
                try:
                    batches.append(np.load(file))
                except ValueError:  # killed while it was written
                    break
        inputs, labels = np.concatenate(batches, axis=1)
        tokens = np.concatenate([inputs, labels[..., -1:]], axis=-1)
        whole = len(tokens) // (G // ranks)
        per_rank.append(tokens[: whole * G // ranks].reshape(whole, G // ranks, L + 1))
    steps = min(map(len, per_rank))
    return np.concatenate([tokens[:steps] for tokens in per_rank], axis=1)


def named_by_where(data, step: int, row: int) -> np.ndarray:
    """The tokens [L + 1] of a row, put together from the documents that `where` names."""
    (answer,) = rows_at(data, step, row)
    tokens = np.full(L + 1, IGNORED)
    source = data.sources[answer["source"]]
    for document in answer["documents"]:
        offset = int(source.offsets(document["shard"])[document["document"]])
        first, last = offset + document["first_token"], offset + document["last_token"]
        ids = source.read(document["shard"], first, last + 1)
        tokens[document["place"] : document["place"] + len(ids)] = ids
    return tokens


def assert_same(data, tokens: np.ndarray, first_step: int) -> None:
    for number, rows in enumerate(tokens):
        for row, mine in enumerate(rows):
            named = named_by_where(data, first_step + number, row)
            known = mine != IGNORED
            padding = named[:L] == IGNORED  # of a best-fit row: it belongs to no document
            assert not mine[:L][padding].any() and not padding.all()
            known[:L] &= ~padding
            np.testing.assert_array_equal(named[known], mine[known])


@pytest.mark.parametrize("ranks_", [1, 2])
@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_where_names_the_tokens_that_were_trained_on(ranks, tiny, tmp_path, ranks_, packing):
    record = tmp_path / "record"
    record.mkdir()
    options = [f"data.packing={packing}", "data.shuffle_span=7", "data.skip=[[4,5]]", "max_steps=6"]
    stages = "data.stages=[{from_step: 3, weights: {code: 0.2, prose: 0.8}}]"
    ranks.run([*tiny, *options, stages], ranks_, tmp_path, {RECORD: str(record)})
    tokens = recorded(record, ranks_)
    assert len(tokens) == 6
    assert_same(open_data(tmp_path / "run"), tokens, 1)


def test_the_inverse_names_every_row_that_saw_a_document(ranks, tiny, tmp_path):
    ranks.run([*tiny, "max_steps=4"], 1, tmp_path)
    data = open_data(tmp_path / "run")
    seen: dict[tuple[str, int, int], set[tuple[int, int]]] = {}
    for step in range(1, 41):
        for answer in rows_at(data, step):
            for document in answer["documents"]:
                if document["place"] == 0 and document["first_token"] == document["last_token"]:
                    continue  # context only: this token is a label in another row
                key = (answer["source"], document["shard"], document["document"])
                seen.setdefault(key, set()).add((step, answer["row"]))
    assert len(seen) > 40
    for key, places in list(seen.items())[::3]:
        (answer,) = steps_with(data, iter([key]), until=40)
        assert {(place["step"], place["row"]) for place in answer["steps"]} == places


def test_a_text_and_a_document_lead_to_the_same_steps(ranks, tiny, tmp_path, corpus):
    ranks.run([*tiny, "max_steps=4"], 1, tmp_path)
    run = tmp_path / "run"
    data = open_data(run)
    line = "def dedent(text):"
    (by_text,) = steps_with(data, find_text(data, line, 10), 100)
    assert by_text["file"].endswith("textwrap.py")
    (by_name,) = steps_with(data, find_document(data, f"{by_text['file']}:{by_text['byte']}"), 100)
    assert by_name == by_text
    for place in by_text["steps"][:3]:
        (row,) = where(run, {"step": str(place["step"]), "row": str(place["row"])})
        assert by_text["file"] in {document["file"] for document in row["documents"]}


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"step": "0"}, "count from 1"),
        ({"step": "x"}, "step=x"),
        ({"step": "1", "row": "8"}, "rows 0 to 7"),
        ({"step": "1", "text": "x"}, "one of"),
        ({"document": "nowhere.jsonl:3"}, "nowhere.jsonl"),
        ({"text": "no such text in it, surely"}, "no training document"),
    ],
)
def test_a_question_without_an_answer_says_why(ranks, tiny, tmp_path_factory, question, message):
    directory = tmp_path_factory.getbasetemp() / "asked"
    if not (directory / "run").exists():
        ranks.run([*tiny, "max_steps=2", f"output_dir={directory}/run"], 1, directory)
    with pytest.raises(UserError, match=message):
        list(where(directory / "run", question))


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"step": "1", "loss": "yes"}, r"loss=yes: must be true or false"),
        ({"step": "1", "until": "9"}, r"until=9: goes with document= or text=, not with step="),
        ({"step": "1", "most": "9"}, r"most=9: goes with text=, not with step="),
        ({"document": "a:1", "row": "2"}, r"row=2: goes with step=, not with document="),
        ({"text": "a", "row": "2"}, r"row=2: goes with step=, not with text="),
        ({"document": "a:1", "loss": "true"}, r"loss=true: goes with step=, not with document="),
        ({"text": "a", "loss": "false"}, r"loss=false: goes with step=, not with text="),
        ({"document": "a:1", "most": "2"}, r"most=2: goes with text=, not with document="),
    ],
)
def test_keys_that_do_not_go_together_are_refused(tmp_path, question, message):
    """Before anything is opened: there is no run here."""
    with pytest.raises(UserError, match=message):
        list(where(tmp_path, question))


def test_the_command_answers_with_losses_as_json(ranks, tiny, tmp_path):
    ranks.run([*tiny, "max_steps=2"], 1, tmp_path)
    command = [sys.executable, "-m", "llmtrain.where", str(tmp_path / "run"), "step=2", "row=3"]
    lines = subprocess.run(
        [*command, "loss=true", "format=json"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    (answer,) = map(json.loads, lines)
    targets = [document for document in answer["documents"] if document["loss"] is not None]
    assert targets
    assert all(0 < document["loss"] < 10 for document in targets)
    readable = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert readable.startswith(f"step 2 row 3: {answer['source']}, pass 0")


def trained_tokens(data, steps: int) -> dict[str, list[np.ndarray]]:
    """How often each token of each source was at home in a window, by shard, from what `where` names.

    A token is at home where it is a label, or where its document begins: in one window a pass.
    """
    cut = data.config.data.packing == "cut"
    times = {
        name: [np.zeros(length, int) for length in source.lengths(np.arange(source.shards))]
        for name, source in data.sources.items()
    }
    for step in range(1, steps + 1):
        for row in rows_at(data, step):
            source = data.sources[row["source"]]
            for document in row["documents"]:
                begin = int(source.offsets(document["shard"])[document["document"]])
                first, last = begin + document["first_token"], begin + document["last_token"]
                if cut:  # the first token of a row is the last label of the row before it, in the text
                    first += document["place"] == 0 and row["window"] > 0
                else:
                    first += document["first_token"] > 0
                times[row["source"]][document["shard"]][first : last + 1] += 1
    return times


def inputs_trained(rows: list[dict[str, Any]]) -> tuple[int, int]:
    """Inputs of these rows that hold a token, and that hold none."""
    tokens = sum(
        min(sum(one["last_token"] - one["first_token"] + 1 for one in row["documents"]), L) for row in rows
    )
    return tokens, len(rows) * L - tokens


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_stop_change_weights_add_and_remove_sources_kill_resume_and_nothing_is_repeated_or_lost(
    ranks, tiny, tmp_path, corpus, packing
):
    """Every token of a source comes once a pass, in four lives of a run of which one is killed."""
    lives: list[np.ndarray] = []
    more = [
        f"+data.sources.extra.path={corpus}/prose.jsonl",
        "+data.sources.extra.text_key=title",
        "+data.sources.extra.weight=0.5",
        "data.sources.code.weight=0.2",
    ]
    run = tmp_path / "run"

    def live(name: str, *options: str) -> tuple[Path, list[str], dict[str, str]]:
        directory = tmp_path / name
        directory.mkdir()
        always = ["checkpoint.every=3", f"data.packing={packing}", "data.shuffle_span=7"]
        return directory, [*tiny, *always, *options], {RECORD: str(directory)}

    directory, options, env = live("first", "max_steps=6")
    ranks.run(options, 2, tmp_path, env)
    lives.append(recorded(directory, 2))

    directory, options, env = live("second", "max_steps=400", *more)
    job = ranks.start(options, 2, tmp_path, env)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints/step_00000012").exists():
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.01)
    job.kill(signal.SIGKILL)
    job.wait()
    saved = max(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))
    lives.append(recorded(directory, 2)[: saved - 6])

    directory, options, env = live("third", f"max_steps={saved + 4}", *more)
    job = ranks.run(options, 2, tmp_path, env)
    lives.append(recorded(directory, 2))
    assert f"code: 20.0% of the stream from step {saved + 1} on;" in job.output()
    three = json.loads((run / "data.json").read_text())["sources"]

    steps = saved + 10
    directory, options, env = live("fourth", f"max_steps={steps}", *more, "~data.sources.prose")
    job = ranks.run(options, 2, tmp_path, env)
    lives.append(recorded(directory, 2))
    assert "prose:" not in job.output()

    tokens = np.concatenate(lives)
    assert len(tokens) == steps
    data = open_data(run)
    assert_same(data, tokens, 1)
    rows: dict[str, list[dict[str, Any]]] = {}
    for step in range(1, steps + 1):
        for answer in rows_at(data, step):
            rows.setdefault(answer["source"], []).append(answer)
    ledger = json.loads((run / "data.json").read_text())["sources"]
    assert set(rows) == {"code", "prose", "extra"}
    for name, served in rows.items():
        order = [row["served_before"] for row in served]
        assert order == list(range(len(served))), f"{name}: its order has a gap or a repeat"
        assert len({row["window"] for row in served}) == len(served), f"{name}: a window came twice"
        assert (ledger[name]["tokens"], ledger[name]["padding"]) == inputs_trained(served)
    for name, shards in trained_tokens(data, steps).items():
        times = np.concatenate(shards)
        assert times.max() - times.min() <= 1, f"{name}: a token came again before the pass had ended"
        assert times.max() >= 1
    assert sum(row["tokens"] + row["padding"] for row in ledger.values()) == steps * G * L
    assert any(row["padding"] for row in ledger.values()) == (packing == "best_fit")
    for key in ("tokens", "padding", "trained", "skipped", "epochs", "to_come", "input"):
        assert ledger["prose"][key] == three["prose"][key] is not None, key
    page = re.sub(r"<[^>]+>", "", (run / "report.html").read_text()).replace("&nbsp;", " ")
    assert f"unread: out of the mixture since step {saved + 5}" in page
    assert f"{three['prose']['input']['documents']} documents in =" in page
    assert "does not add up" not in page
    assert (run / "data/order.json").stat().st_size < 2048


# A run whose text is still being tokenised

MADE = {"web": 3, "books": 5}
"""Shards that are made, the first ones of the order; there are about ten of each."""
BAD = 40
"""A line of web.jsonl that is no JSON."""


@pytest.fixture
def half_made(tiny, tmp_path, monkeypatch) -> Iterator[RunDirectory]:
    """A run at work that has trained five steps, and has made the text of some more."""
    monkeypatch.setattr(cutting, "SMALLEST", 4000)
    options = [word for word in tiny if not word.startswith(("+data.", "cache_dir="))]
    for seed, name in enumerate(MADE):
        file = write_texts(tmp_path / f"{name}.jsonl", some_texts(500, seed))
        options += [f"+data.sources.{name}.path={file}", f"+data.sources.{name}.weight=0.5"]
    lines = (tmp_path / "web.jsonl").read_text().splitlines(keepends=True)
    lines[BAD] = "{broken\n"
    (tmp_path / "web.jsonl").write_text("".join(lines))
    options += ["data.max_bad_fraction=0.1", "data.validation_fraction=0.1", "data.shuffle_span=4"]
    config = compose(TrainConfig, [*options, f"cache_dir={tmp_path}/cache"])
    directory, tokenizer = RunDirectory(tmp_path / "run"), config.tokenizer.load()
    prepared = look(config.data, tokenizer, config.cache_dir)
    dataset = build_dataset(config, prepared.open()[0])
    directory.lock()
    directory.write_config(config)
    tokenizer.save(directory.path / "tokenizer")
    directory.write_json("data/prepared.json", prepared.as_dict())
    directory.write_json("data/order.json", dataset.state(0))
    directory.append_metrics({"step": 5})
    for name, count in MADE.items():
        preparation = prepared.sources[name].preparation
        assert preparation is not None
        preparation.begin()
        for number in dataset.streams[name].first_order[:count]:
            assert make(preparation.task(number), tokenizer, lambda *_: None)
    yield directory
    directory.unlock()


def shards_made(run: RunDirectory, name: str) -> int:
    prepared = json.loads((run.path / "data/prepared.json").read_text())
    return len(list(Path(prepared[name]["train"]).glob("shard-*")))


def asked(run: RunDirectory, **question: str) -> tuple[list[dict[str, Any]], str]:
    """The answers, and the error that came after them."""
    answers: list[dict[str, Any]] = []
    try:
        answers.extend(where(run.path, question))
    except UserError as error:
        return answers, str(error)
    return answers, ""


@pytest.mark.timeout(60)
def test_a_step_is_answered_as_far_as_its_text_is_made(half_made):
    there = open_data(half_made.path)
    ends = {  # the window of each source that ends in text which is not made
        name: int(
            there.sources[name].lengths(np.array(there.dataset.streams[name].first_order[:count])).sum()
        )
        // L
        for name, count in MADE.items()
    }
    steps = range(1, 91, 3)
    partly = {step: asked(half_made, step=str(step)) for step in steps}
    assert [shards_made(half_made, name) for name in MADE] == [*MADE.values()]
    half_made.unlock()
    whole = {step: asked(half_made, step=str(step)) for step in steps}
    for step, (answers, error) in partly.items():
        assert (len(answers) == G) == (not error)
        assert step > 5 or not error, "it was trained"
        expected, _ = whole[step]
        assert answers == [row for row in expected if row in answers]
        for row in expected:
            assert (row in answers) or row["window"] + 4 >= ends[row["source"]], row
    some = next(step for step, (answers, _) in partly.items() if 0 < len(answers) < G)
    answers, error = partly[some]
    total = there.sources["web"].shards
    assert {row["source"] for row in answers} == {"books"}
    assert error == (
        f"step={some}: {G - len(answers)} of its rows are of web, of which 3 of {total} shards are made; the "
        "run makes them in the order of its training: ask again later"
    )
    assert partly[88][0] == []
    assert "books, of which 5 of" in partly[88][1]
    assert all(len(answers) == G and not error for answers, error in whole.values())


def a_document(run: RunDirectory, name: str, *, made: bool) -> tuple[str, str]:
    """The place (file:byte) of a training document whose shard is made, or not, and its last word."""
    data = open_data(run.path)
    first, last = (0, MADE[name]) if made else (MADE[name], None)
    numbers = data.dataset.streams[name].first_order[first:last]
    preparation = data.prepared.sources[name].preparation
    assert preparation is not None
    (piece,) = preparation.parts[numbers[0]].slices
    at = 0
    for line in Path(piece.file).read_text().splitlines(keepends=True):
        if (
            at > piece.start
            and line.startswith('{"')
            and not is_held_out(json.loads(line)["text"].encode(), 0.1)
        ):
            return f"{piece.file}:{at}", json.loads(line)["text"].split()[-1] + "\n"
        at += len(line)
    raise AssertionError


@pytest.mark.timeout(60)
def test_a_text_is_searched_in_what_is_made(half_made, caplog):
    caplog.set_level(logging.INFO)
    total = open_data(half_made.path).sources["web"].shards
    place, word = a_document(half_made, "web", made=True)
    ((answer,), error) = asked(half_made, text=f" {word}")
    assert (f"{answer['file']}:{answer['byte']}", error) == (place, "")
    assert caplog.messages.count(f"web: 3 of {total} shards are made; the rest is not searched") == 1
    place, word = a_document(half_made, "web", made=False)
    assert "contains it in the shards that the run has made so far" in asked(half_made, text=f" {word}")[1]
    assert shards_made(half_made, "web") == 3
    half_made.unlock()
    ((answer,), error) = asked(half_made, text=f" {word}")
    assert (f"{answer['file']}:{answer['byte']}", error) == (place, "")


@pytest.mark.timeout(60)
def test_a_document_is_searched_in_what_is_made(half_made, caplog):
    caplog.set_level(logging.INFO)
    place, _ = a_document(half_made, "books", made=True)
    ((answer,), error) = asked(half_made, document=place)
    assert (f"{answer['file']}:{answer['byte']}", error) == (place, "")
    assert "books: 5 of" in caplog.text
    place, _ = a_document(half_made, "books", made=False)
    assert "in the shards that the run has made so far; ask again" in asked(half_made, document=place)[1]
    assert shards_made(half_made, "books") == 5
    half_made.unlock()
    assert [f"{one['file']}:{one['byte']}" for one in asked(half_made, document=place)[0]] == [place]


@pytest.mark.timeout(60)
def test_steps_until_one_whose_text_is_not_made(half_made):
    place, word = a_document(half_made, "web", made=True)
    total = open_data(half_made.path).sources["web"].shards
    for question in ({"document": place}, {"text": f" {word}"}):
        ((answer,), error) = asked(half_made, **question, until="5")
        assert (answer["until_step"], error) == (5, "")
        answers, error = asked(half_made, **question, until="1000")
        assert answers == []
        assert error == (
            f"until=1000: 3 of {total} shards of web are made, and it needs others; the run is at step 5:"
            " lower until=, or ask again later"
        )
    assert shards_made(half_made, "web") == 3


def test_a_document_that_no_step_has_is_told_why(half_made, tmp_path):
    half_made.unlock()
    file = tmp_path / "web.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    places = np.cumsum([0, *map(len, lines)])
    texts = [json.loads(line)["text"] if number != BAD else "" for number, line in enumerate(lines)]
    held_out = [number for number, text in enumerate(texts) if text and is_held_out(text.encode(), 0.1)]
    trained = [number for number, text in enumerate(texts) if text and number not in held_out]

    def why(place: int) -> str:
        return asked(half_made, document=f"{file}:{place}")[1]

    for number in (held_out[0], held_out[-1]):
        assert why(places[number]) == f"document={file}:{places[number]}: is held out, so no step has it"
    assert "is a bad record (malformed JSON, see" in why(places[BAD])
    after = trained[100]
    before = trained[99]
    assert why(places[after] - 1).endswith(f"are {file}:{places[before]} and {file}:{places[after]}")
    assert why(10**9).endswith(f"the nearest are {file}:{places[trained[-1]]}")
    everything, error = asked(half_made, document=str(file))
    assert ([one["byte"] for one in everything], error) == ([places[number] for number in trained], "")
    assert "did you mean" in asked(half_made, document=f"{file}x:0")[1]


@pytest.mark.timeout(60)
def test_text_that_no_run_makes_any_more_is_made_here_and_that_is_said_once(half_made, caplog):
    caplog.set_level(logging.INFO)
    half_made.unlock()  # as kill -9 leaves it
    answers, error = asked(half_made, step="1")
    assert (len(answers), error) == (G, "")
    assert "tokenised now" not in caplog.text
    answers, error = asked(half_made, step="60")
    assert (len(answers), error) == (G, "")
    said = sorted(message for message in caplog.messages if "tokenised now, in this process" in message)
    assert [message.partition(" of ")[0] for message in said] == ["books: 5", "web: 3"]
    assert MADE["web"] < shards_made(half_made, "web") < open_data(half_made.path).sources["web"].shards


@pytest.mark.timeout(60)
def test_a_reader_that_waits_hears_that_the_run_has_ended(half_made):
    config = read_config(half_made.path)
    train, _ = open_text(half_made.path, config, config.tokenizer.load(), waits=True).open()
    missing = open_data(half_made.path).dataset.streams["web"].first_order[-1]
    heard: list[str] = []

    def wait() -> None:
        try:
            train["web"].offsets(missing)
        except UserError as error:
            heard.append(str(error))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    time.sleep(0.5)
    assert waiting.is_alive(), heard
    half_made.unlock()
    waiting.join(timeout=10)
    assert not waiting.is_alive()
    assert "the run ended before it had tokenised" in heard[0]
