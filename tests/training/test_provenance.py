"""What `where` says against the tokens that a run really trained on, recorded at the model's door."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config import UserError
from llmtrain.data.batch import IGNORED
from llmtrain.training.where import find_document, find_text, open_data, rows_at, steps_with
from llmtrain.where import where
from tests.ranks import RECORD

L, G, MICRO = 64, 8, 2


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
        per_step = G // ranks // MICRO
        whole = len(batches) // per_step
        inputs, labels = np.stack(batches[: whole * per_step], axis=1)
        tokens = np.concatenate([inputs, labels[..., -1:]], axis=-1)
        per_rank.append(tokens.reshape(whole, G // ranks, L + 1))
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
            known[:L] &= named[:L] != IGNORED  # padding of a best-fit row belongs to no document
            assert known.sum() > L // 2
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


def test_stop_change_weights_add_a_source_kill_resume_and_nothing_is_repeated_or_lost(
    ranks, tiny, tmp_path, corpus
):
    """Every window of a source is trained in its order, without a gap, over three lives of the run."""
    lives: list[np.ndarray] = []
    more = [
        f"+data.sources.extra.path={corpus}/prose.jsonl",
        "+data.sources.extra.text_key=title",
        "+data.sources.extra.weight=0.5",
        "data.sources.code.weight=0.2",
    ]

    def live(name: str, *options: str) -> tuple[Path, list[str], dict[str, str]]:
        directory = tmp_path / name
        directory.mkdir()
        return directory, [*tiny, "checkpoint.every=3", *options], {RECORD: str(directory)}

    directory, options, env = live("first", "max_steps=6")
    ranks.run(options, 2, tmp_path, env)
    lives.append(recorded(directory, 2))

    directory, options, env = live("second", "max_steps=400", *more)
    job = ranks.start(options, 2, tmp_path, env)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/checkpoints/step_00000012").exists():
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.01)
    job.kill(signal.SIGKILL)
    job.wait()
    saved = max(
        int(path.name.removeprefix("step_")) for path in (tmp_path / "run/checkpoints").glob("step_*")
    )
    lives.append(recorded(directory, 2)[: saved - 6])

    directory, options, env = live("third", f"max_steps={saved + 4}", *more)
    ranks.run(options, 2, tmp_path, env)
    lives.append(recorded(directory, 2))

    tokens = np.concatenate(lives)
    assert len(tokens) == saved + 4
    data = open_data(tmp_path / "run")
    assert_same(data, tokens, 1)
    windows: dict[str, list[tuple[int, int]]] = {}
    for step in range(1, saved + 5):
        for answer in rows_at(data, step):
            windows.setdefault(answer["source"], []).append((answer["served_before"], answer["window"]))
    ledger = json.loads((tmp_path / "run/data.json").read_text())["sources"]
    assert set(windows) == {"code", "prose", "extra"}
    for name, served in windows.items():
        assert [k for k, _ in served] == list(range(len(served))), f"{name}: its order has a gap or a repeat"
        assert len({window for _, window in served}) == len(served), f"{name}: a window came twice"
        assert ledger[name]["tokens"] == len(served) * L
    assert sum(entry["tokens"] for entry in ledger.values()) == (saved + 4) * G * L
    assert (tmp_path / "run/data/order.json").stat().st_size < 2048
