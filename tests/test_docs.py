"""docs/ runs: its commands are tried, its YAML composes, its keys are keys."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from llmtrain.cli import main as llmtrain
from llmtrain.config.hydra import compose
from llmtrain.training.config import TrainConfig
from tests.training.test_keys import keys

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {page.stem: page.read_text() for page in DOCS.glob("*.md")}
ELSEWHERE = {
    # pages whose commands have a test of their own
    "benchmarks": "tests/test_bench.py",
    "docker": "tests/launch/test_docker.py",
    "extending": "tests/test_extending.py",
    "kubernetes": "tests/launch/test_kubernetes.py",
}
YAML = re.findall(r"```yaml\n(.*?)```", PAGES["data"], re.S)
SMALL = [
    "seq_len=32",
    "global_batch_size=4",
    "micro_batch_size=2",
    "precision=fp32",
    "model.d_model=32",
    "model.d_ff=64",
    "callbacks.sample.max_new_tokens=4",
    "callbacks.evaluation.documents=2",
]


def commands(page: str) -> list[str]:
    """The lines of a page's bash blocks, without their comments."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", PAGES[page].replace("\\\n", ""), re.S)).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def test_every_command_about_data_answers(ranks, tiny, tmp_path, corpus, monkeypatch):
    ranks.run([*tiny, "max_steps=2", f"output_dir={tmp_path}/runs/quickstart"], 1, tmp_path)
    shutil.copytree(corpus, tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    for command in commands("data"):
        if "<key>" in command:
            (prepared,) = Path(".cache/llmtrain/shards").glob("*/train")
            command = command.replace(".cache/llmtrain/shards/<key>/train", str(prepared))
        words = shlex.split(command)
        assert words[0] == "llmtrain"
        small = ["tokenizer=bytes"] if words[1] == "prepare" else []
        assert llmtrain([*words[1:], *small]) == 0, command
    assert (tmp_path / "megatron/text.idx").is_file()


def test_every_command_about_the_model_answers(ranks, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranks.run([*tiny, "max_steps=2", "output_dir=runs/run"], 1, tmp_path)
    for command in commands("model"):
        name, *words = shlex.split(command)[1:]
        if name == "train":
            ranks.run([*tiny, "output_dir=runs/${name}", *words], 1, tmp_path)
        else:
            assert llmtrain([name, *words]) == 0, command
    profile = json.loads((tmp_path / "runs/run/profile/kernels.json").read_text())
    assert profile["steps"] == 3
    assert (tmp_path / "runs/continued/DONE").is_file()


def test_every_command_about_reliability_answers(ranks, tiny, tmp_path, monkeypatch):
    """Those of llmtrain; scripts have tests of their own."""
    monkeypatch.chdir(tmp_path)
    ranks.run([*tiny, "max_steps=2", "output_dir=runs/quickstart"], 1, tmp_path)
    for command in commands("reliability"):
        program, name, *words = shlex.split(command)
        if program == "llmtrain" and name == "train":
            ranks.run([*tiny, "max_steps=2", "output_dir=runs/${name}", *words], 1, tmp_path)
        elif program == "llmtrain":
            assert llmtrain([name, *words]) == 0, command


def test_every_command_about_watching_answers(ranks, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranks.run([*tiny, "max_steps=2", "output_dir=runs/quickstart"], 1, tmp_path)
    shutil.copytree("runs/quickstart", "runs/longer")
    for command in commands("watching"):
        program, *words = shlex.split(command)
        runs = [str(run) for run in Path().glob("runs/*")]
        words = [path for word in words for path in (runs if word == "runs/*" else [word])]
        assert (program, llmtrain(words)) == ("llmtrain", 0), command
    assert (tmp_path / "compare.html").is_file()


def test_every_command_about_many_nodes_is_valid():
    """tests/launch runs the scripts; of a sweep this takes the first job."""
    for command in commands("multinode"):
        program, script, *words = shlex.split(command)
        assert program == "bash"
        assert (DOCS.parent / script).is_file()
        compose(TrainConfig, [word.partition(",")[0] for word in words if "=" in word])


def try_command(command: str, ranks, base: list[str], directory: Path) -> None:
    """A run is tried small, in one rank; of a script the overrides are composed."""
    program, name, *words = shlex.split(command)
    if program == "bash":
        assert (DOCS.parent / name).is_file()
        compose(TrainConfig, ["experiment=quickstart", *words])
    elif program == "llmtrain" and name == "train":
        ranks.run([*base, *words], 1, directory)
    elif program == "llmtrain":
        assert llmtrain([name, *words]) == 0, command
    else:
        assert command == "source .venv/bin/activate"


def test_every_command_of_the_first_run_answers(ranks, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = [*tiny, "max_steps=2", "data.validation_fraction=0.3", "output_dir=runs/${name}"]
    ranks.run([*base, "name=quickstart"], 1, tmp_path)
    shutil.copytree("runs/quickstart", "runs/alibi")
    for command in commands("first-run"):
        try_command(command, ranks, base, tmp_path)
    assert (tmp_path / "exported/config.json").is_file()


def test_every_command_about_text_of_ones_own_answers(ranks, tmp_path, corpus, monkeypatch):
    shutil.copytree(corpus, tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    (mixture,) = re.findall(r"```yaml\n(.*?)```", PAGES["own-text"], re.S)
    Path("mine/data").mkdir(parents=True)
    Path("mine/data/corpus.yaml").write_text(mixture)
    for command in commands("own-text"):
        try_command(command, ranks, [*SMALL, "max_steps=8"], tmp_path)
    realised = json.loads(Path("runs/mixed/data.json").read_text())["sources"]
    assert set(realised) == {"prose", "code"}


def test_every_command_about_going_on_answers(ranks, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = [*tiny, "output_dir=runs/${name}", "data.validation_fraction=0"]
    for command in commands("resume"):
        try_command(command, ranks, base, tmp_path)
    events = [json.loads(line) for line in Path("runs/mine/events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [20, 30]
    branch = [json.loads(line) for line in Path("runs/branch/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in branch] == list(range(31, 41))


def conversations() -> list[tuple[str, str]]:
    """(command, what it answers) of the page of messages; `...` stands for any text."""
    blocks = "".join(re.findall(r"```console\n(.*?)```", PAGES["faq"], re.S))
    return re.findall(r"^\$ (.+)\n(error: .+)$", blocks, re.M)


@pytest.mark.parametrize(("command", "answer"), conversations())
def test_every_message_of_the_page_is_what_is_printed(command, answer, corpus, tmp_path, monkeypatch, capfd):
    shutil.copytree(corpus, tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    assert llmtrain(shlex.split(command)[1:]) == 78
    pattern = ".*".join(re.escape(part) for part in answer.split("..."))
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(pattern, line), line


def test_the_other_messages_are_those_of_the_tests_named():
    rows = re.findall(r"^\| `([^`]+)` \| [^|]+ \| (tests/[^ ]+) \|$", PAGES["faq"], re.M)
    assert len(rows) > 10
    for message, test in rows:
        assert message in (DOCS.parent / test).read_text().replace('\\"', '"'), message


def test_every_page_with_commands_is_tried():
    tests = Path(__file__).read_text()
    for page in PAGES:
        if commands(page) and page not in ELSEWHERE:
            assert f'commands("{page}")' in tests, page
    for test in ELSEWHERE.values():
        assert (DOCS.parent / test).is_file()


def test_the_index_has_every_page_and_every_link_leads_somewhere():
    listed = re.findall(r"\]\(([\w-]+)\.md[)#]", PAGES["README"])
    assert set(PAGES) - {"README"} == set(listed)
    for page, text in PAGES.items():
        for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text):
            target = DOCS / file if file else DOCS / f"{page}.md"
            assert target.exists(), f"{page}: {file}"
            assert not anchor or anchor in anchors(target.read_text()), f"{page}: {file}#{anchor}"


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_command_about_slurm_composes_and_the_job_names_its_run(monkeypatch):
    """tests/launch/test_slurm.py hands them to sbatch."""
    monkeypatch.setenv("SLURM_JOB_NAME", "job")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    names = []
    for _, *words in map(shlex.split, commands("slurm")):
        overrides = [word for word in words if "=" in word and not word.startswith("--")]
        config = compose(TrainConfig, overrides)
        if "hardware=slurm" in overrides:
            names.append(config.name)
            assert config.hardware.gpus_per_node == 4
    assert names == ["mine", "job"]


def test_the_yaml_composes(tmp_path):
    sources, stages = YAML
    (tmp_path / "data").mkdir()
    (tmp_path / "data/corpus.yaml").write_text(f"{sources}{stages}")
    config = compose(TrainConfig, ["data=corpus"], config_dir=tmp_path)
    assert set(config.data.sources) == {"web", "wudao", "questions"}
    assert config.data.stages[0].weights == {"web": 0.3, "wudao": 0.3, "questions": 0.4}
    assert yaml.safe_load(sources)["sources"]["wudao"]["template"] == "{title}\n{content}"


@pytest.mark.parametrize("key", sorted(set(re.findall(r"`(data\.[a-z_.]+)", PAGES["data"]))))
def test_every_key_that_is_named_exists(key):
    fields = set(keys(TrainConfig))
    if key != "data.json":
        assert key in fields or any(field.startswith(f"{key}.") for field in fields)
