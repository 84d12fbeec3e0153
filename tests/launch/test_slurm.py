"""launch/slurm.sbatch on a real Slurm: jobs queue again, and no step is lost or trained otherwise."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch.conftest import LAUNCH
from tests.launch.slurm_cluster import Cluster, missing
from tests.ranks import RECORD, RankServer
from tests.soak.lives import beginnings, curve, hashes, metrics
from tests.test_docs import commands
from tests.training.test_preemption import events

MISSING = missing()
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
    pytest.mark.timeout(900),
]
TRAIN, PREPARE = LAUNCH / "slurm.sbatch", LAUNCH / "slurm_prepare.sbatch"
STEPS = 200
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")

RECORDING = f"""
import os, sys
from pathlib import Path

if sys.orig_argv[1:3] == ["-m", "llmtrain.train"]:
    from tests.ranks import record_batches

    place = Path(os.environ["{RECORD}"]) / os.environ.get("SLURM_RESTART_COUNT", "0")
    place.mkdir(parents=True, exist_ok=True)
    record_batches(place / f"rank{{os.environ['SLURM_PROCID']}}.npy")
"""

PREPARES = """#!/bin/bash
share=${3#part=}
printf '%s\\n' "$@" >>"share-${share/\\//of}"
[[ $SLURM_RESTART_COUNT ]] || exec sleep 600
"""
"""llmtrain: notes its words, and is done in the job's second life."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as started:
        yield started


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Where sbatch is called: what the script needs of the repository, and none of its clutter."""
    (tmp_path / "launch").symlink_to(LAUNCH)
    return tmp_path


@pytest.fixture
def variables(tmp_path) -> dict[str, str]:
    """The environment of sbatch: the real door, and each rank records what it trains on."""
    (tmp_path / "sitecustomize.py").write_text(RECORDING)
    path = f"{tmp_path}:{LAUNCH.parent}"
    return {"LLMTRAIN_SKIP_SETUP": "1", "PYTHONPATH": path, RECORD: str(tmp_path / "record")}


def printed(checkout: Path, job: str) -> str:
    file = checkout / f"slurm-{job}.out"
    return file.read_text(errors="replace") if file.exists() else ""


def is_rank(process: psutil.Process, rank: int) -> bool:
    """Whether it is this one, and none of the programs that started it."""
    trains = "llmtrain.train" in process.cmdline()[2:4]
    return trains and process.environ().get("SLURM_PROCID") == str(rank)


def has_trained(run: Path, steps: int) -> bool:
    """A step of that number has been logged."""
    try:
        return any(json.loads(line)["step"] >= steps for line in (run / "metrics.jsonl").open())
    except (FileNotFoundError, ValueError):
        return False


@pytest.mark.parametrize(
    ("lost", "lives"),
    [
        ("n2", False),
        pytest.param("n1", False, marks=pytest.mark.slow),
        pytest.param("n2", True, marks=pytest.mark.slow),
    ],
)
def test_preempted_and_without_a_node_a_run_is_the_one_that_never_stopped(
    cluster: Cluster,
    checkout: Path,
    variables: dict[str, str],
    tiny: list[str],
    ranks: RankServer,
    lost: str,
    lives: bool,
):
    """`n1` has the script, srun and rank 0; a node that `lives` is marked down by hand alone.

    Begun anew, the older run there is set aside once.
    """
    common = [*tiny, f"max_steps={STEPS}", "deepspeed=zero2", "checkpoint.every=20"]
    whole, run = checkout / "whole", checkout / "run"
    ranks.run([*common, f"checkpoint.every={STEPS}", f"output_dir={whole}"], 2, whole, {RECORD: str(whole)})
    run.mkdir()
    (run / "older").touch()

    job = cluster.submit(*TWO_NODES, TRAIN, *common, "resume=never", directory=checkout, **variables)
    cluster.wait_until(lambda: has_trained(run, 25))
    cluster.ask("scancel", "--batch", "--signal=USR1", job)  # as Slurm does --signal seconds before the end
    cluster.wait_until(lambda: cluster.hurry(job) == "RUNNING" and len(beginnings(run)) == 2)
    cluster.wait_until(lambda: has_trained(run, beginnings(run)[1] + 25))
    if not lives:
        cluster.cut_power(lost)
    cluster.mark_down(lost)
    state = cluster.ends(job)
    cluster.repair(lost)
    others = {"n1": "n[2-3]", "n2": "n[1,3]"}[lost]
    assert (state["JobState"], state["Restarts"], state["NodeList"]) == ("COMPLETED", "2", others)

    assert (checkout / "run.1" / "older").exists() and not (checkout / "run.2").exists()
    assert (run / "DONE").exists() and not list((checkout / ".cache").glob("slurm-*"))
    expected, rows = curve(whole), curve(run)
    assert rows.keys() == expected.keys()
    assert all(line == expected[step][0] for step, lines in rows.items() for line in lines)
    asked = events(run, "signal")[0]
    first, second, third = beginnings(run)
    assert (first, second) == (0, asked["step"]) and len(rows[second]) == 1, "a step was lost"
    assert third > second and events(run, "start")[0]["job"] == f"test {job}"
    for rank in (0, 1):
        tokens = hashes(whole / f"rank{rank}.npy")
        size = len(tokens) // STEPS
        for life, begin in enumerate((first, second, third)):
            trained = hashes(checkout / "record" / str(life) / f"rank{rank}.npy")
            assert trained and trained == tokens[begin * size :][: len(trained)]


@pytest.mark.slow
def test_a_job_that_slurm_takes_is_saved_preempted_it_goes_on_and_cancelled_it_is_over(
    cluster: Cluster, checkout: Path, variables: dict[str, str], tiny: list[str]
):
    """An urgent job gets all nodes. `ends` waits until no process of the cancelled one is left."""
    run = checkout / "run"
    words = [*tiny, "max_steps=100000", "checkpoint.every=100000"]
    job = cluster.submit(*TWO_NODES, TRAIN, *words, directory=checkout, **variables)
    cluster.wait_until(lambda: has_trained(run, 5))
    everything = ("--partition=urgent", "--nodes=3", "--exclusive", "--wrap=true")
    assert cluster.ends(cluster.submit(*everything, directory=checkout))["JobState"] == "COMPLETED"
    cluster.wait_until(lambda: cluster.hurry(job) == "RUNNING" and len(beginnings(run)) == 2)
    goes_on = beginnings(run)[1]
    cluster.wait_until(lambda: has_trained(run, goes_on + 5))

    assert [sum(is_rank(process, rank) for process in cluster.processes(job)) for rank in (0, 1)] == [1, 1]
    cluster.ask("scancel", job)
    state = cluster.ends(job)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "1"), printed(checkout, job)
    preempted, cancelled = (asked["step"] for asked in events(run, "signal"))
    assert goes_on == preempted, "a step was lost"
    assert (run / "checkpoints" / f"step_{cancelled:08d}").is_dir(), printed(checkout, job)


@pytest.mark.parametrize("world", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_srun_needs_no_script(
    cluster: Cluster,
    checkout: Path,
    variables: dict[str, str],
    tiny: list[str],
    ranks: RankServer,
    world: int,
):
    """Its tasks write the metrics.jsonl of as many ranks, and it ends with their code."""
    words = [*tiny, "max_steps=3"]
    environment = cluster.environment | variables | {"TMPDIR": str(cluster.place / "tmp")}
    ranks.run([*words, f"output_dir={checkout}/whole"], world, checkout)
    srun = ["srun", f"--nodes={world}", "--ntasks-per-node=1", "python", "-m", "llmtrain.train"]
    cluster.ask(*srun, *words, cwd=checkout, env=environment, timeout=240)
    assert metrics(checkout / "run") == metrics(checkout / "whole")
    mistaken = subprocess.run(
        [*srun, "max_step=3"], cwd=checkout, env=environment, capture_output=True, text=True, timeout=240
    )
    assert mistaken.returncode == 78, mistaken.stderr


# What the script makes of exit codes; a stand-in says them.


@pytest.fixture
def answers(stand_in: Path) -> dict[str, str]:
    """The environment in which `llmtrain.train` is the stand-in."""
    return {"LLMTRAIN_SKIP_SETUP": "1", "PYTHONPATH": str(stand_in), "STAND_IN": str(stand_in)}


def test_the_overrides_and_the_environment_arrive_unchanged(
    cluster: Cluster, checkout: Path, answers: dict[str, str], stand_in: Path
):
    words = [
        "data.sources={web: {path: /a, weight: 1}}",
        "name=${model.d_model}-x y",
        'k="q\'s" $HOME `ls` \\n',
        "",
    ]
    answers |= {"WANDB_MODE": "offline", "HF_HOME": "/somewhere/with a space"}
    job = cluster.submit(*TWO_NODES, "--job-name=a name", TRAIN, *words, directory=checkout, **answers)
    assert cluster.ends(job)["JobState"] == "COMPLETED", printed(checkout, job)
    note = json.loads((stand_in / "started-1").read_text())
    assert note["argv"] == words
    seen = note["environment"]
    assert (seen["WANDB_MODE"], seen["HF_HOME"]) == ("offline", "/somewhere/with a space")
    assert (seen["SLURM_NTASKS"], seen["SLURM_JOB_NAME"]) == ("2", "a name")


def test_a_job_that_slurm_takes_goes_on_and_one_that_is_cancelled_is_over(
    cluster: Cluster, checkout: Path, answers: dict[str, str], stand_in: Path
):
    """An urgent job gets all nodes. `ends` waits until no process of the cancelled one is left."""
    started = [stand_in / f"started-{rank}" for rank in (0, 1)]
    job = cluster.submit(*TWO_NODES, TRAIN, directory=checkout, **answers, MODE="orderly")
    cluster.wait_until(lambda: all(file.exists() for file in started))
    for file in started:
        file.unlink()
    everything = ("--partition=urgent", "--nodes=3", "--exclusive", "--wrap=true")
    assert cluster.ends(cluster.submit(*everything, directory=checkout))["JobState"] == "COMPLETED"
    for rank in (0, 1):
        heard = stand_in / f"signals-{rank}"
        assert set(json.loads(heard.read_text())) == {signal.SIGTERM}
        heard.unlink()
    cluster.wait_until(lambda: cluster.hurry(job) == "RUNNING" and all(file.exists() for file in started))
    cluster.ask("scancel", job)
    state = cluster.ends(job)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "1"), printed(checkout, job)
    assert all((stand_in / f"signals-{rank}").exists() for rank in (0, 1))


def test_what_another_start_would_not_mend_is_not_queued_again(
    cluster: Cluster, checkout: Path, answers: dict[str, str]
):
    jobs = {}
    for code in ("73", "78", "87", "88"):  # each with notes of its own
        (checkout / code).mkdir()
        told = answers | {"CODE": code, "STAND_IN": str(checkout / code)}
        jobs[code] = cluster.submit(*TWO_NODES, TRAIN, directory=checkout, **told)
    for code, job in jobs.items():
        state = cluster.ends(job)
        assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", f"{code}:0", "0")


def test_a_hang_is_queued_again_so_many_times(cluster: Cluster, checkout: Path, answers: dict[str, str]):
    job = cluster.submit(*TWO_NODES, TRAIN, directory=checkout, **answers, CODE="86", LLMTRAIN_FAILURES="2")
    state = cluster.ends(job)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "86:0", "2")
    assert "failure 2 in a row" in printed(checkout, job) and not list((checkout / ".cache").iterdir())


def test_a_directory_that_another_life_of_the_job_may_hold_is_tried_again(
    cluster: Cluster, checkout: Path, answers: dict[str, str], stand_in: Path
):
    """A node that Slurm gave up can be at work for a while."""
    answers |= {"MODE": "orderly", "STOPPED": "73", "LLMTRAIN_FAILURES": "1"}
    job = cluster.submit("--nodes=1", TRAIN, directory=checkout, **answers)
    usr1 = ("scancel", "--batch", "--signal=USR1")
    for command in (("scontrol", "requeue"), usr1, usr1):
        cluster.wait_until(lambda: cluster.hurry(job) == "RUNNING" and (stand_in / "started-0").exists())
        (stand_in / "started-0").unlink()
        cluster.ask(*command, job)
    state = cluster.ends(job)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "73:0", "2")


@pytest.mark.slow
def test_a_rank_that_is_killed_is_a_failure_that_the_others_do_not_outlast(
    cluster: Cluster, checkout: Path, answers: dict[str, str], stand_in: Path
):
    """They hear nothing of it, and Slurm ends them after a minute."""
    answers |= {"MODE": "stubborn", "LLMTRAIN_FAILURES": "0"}
    job = cluster.submit(*TWO_NODES, TRAIN, directory=checkout, **answers)
    cluster.wait_until(lambda: all((stand_in / f"started-{rank}").exists() for rank in (0, 1)))
    (killed,) = (p for p in cluster.processes(job) if is_rank(p, 1))
    killed.kill()
    state = cluster.ends(job)
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "137:0")


def test_a_rewind_is_started_again_at_once(cluster: Cluster, checkout: Path, answers: dict[str, str]):
    job = cluster.submit("--nodes=1", TRAIN, directory=checkout, **answers, MODE="rewind", REWINDS="2")
    state = cluster.ends(job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "0"), printed(checkout, job)


REFUSED = {
    ("--nodes=2", "--gpus-per-node=8"): "8 GPUs and 1 tasks a node, and each task trains on one: ",
    (
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus=9",
    ): "gpu:1 and gpu:8 a node, and all nodes must ",
    ("--nodes=2", "--ntasks=3"): "2,1 tasks a node, and all nodes must ",
    ("--nodes=1", ":", "--nodes=1"): "2 components (sbatch ... : ...), and all nodes must ",
}


def test_nodes_that_are_not_alike_are_refused(cluster: Cluster, checkout: Path, answers: dict[str, str]):
    """No GPU of a node stays unused unnoticed, and no task is without one."""
    jobs = [cluster.submit(*words, TRAIN, directory=checkout, **answers) for words in REFUSED]
    for job, says in zip(jobs, REFUSED.values(), strict=True):
        assert cluster.ends(job)["ExitCode"] == "78:0", printed(checkout, job)
        output = printed(checkout, job)
        assert output.startswith(f"slurm: {says}") and output.count("\n") == 1


def test_elsewhere_than_in_the_repository(cluster: Cluster, tmp_path: Path, answers: dict[str, str]):
    job = cluster.submit(TRAIN, directory=tmp_path, **answers)
    assert cluster.ends(job)["ExitCode"] == "78:0"
    assert f"{tmp_path} is not the repository" in printed(tmp_path, job)


def test_sbatch_takes_the_commands_of_the_page(cluster: Cluster, checkout: Path):
    found = [shlex.split(command) for command in commands("slurm")]
    found = [words for words in found if words[0] == "sbatch"]
    assert len(found) >= 3
    for _, *words in found:
        cluster.ask("sbatch", "--test-only", *words, cwd=checkout)


@pytest.mark.slow
def test_before_the_time_limit_a_run_saves_and_queues_again(
    cluster: Cluster, checkout: Path, variables: dict[str, str], tiny: list[str]
):
    """Slurm itself sends the signal; it looks at limits about every half minute.

    On a slow machine the second life may get it before it has begun, and a third one goes on.
    """
    run = checkout / "run"
    limits = [*TWO_NODES, "--time=2", "--signal=B:USR1@60"]
    words = [*tiny, "max_steps=1000000", "checkpoint.every=1000000", "grace_seconds=30"]
    job = cluster.submit(*limits, TRAIN, *words, directory=checkout, **variables)
    cluster.wait_until(lambda: cluster.hurry(job) and run.exists() and len(beginnings(run)) > 1, seconds=400)
    asked = events(run, "signal")[0]
    assert (asked["signal"], asked["step"]) == ("SIGUSR1", beginnings(run)[1])
    cluster.ask("scancel", job)
    assert cluster.ends(job)["JobState"] == "CANCELLED"


def test_an_array_prepares_its_shares(
    cluster: Cluster, checkout: Path, variables: dict[str, str], tiny: list[str]
):
    """In two tasks; the run that follows finds every shard."""
    words = [f"cache_dir={checkout}/cache" if word.startswith("cache_dir=") else word for word in tiny]
    job = cluster.submit("--array=1-2", PREPARE, *words, directory=checkout, **variables)
    cluster.wait_until(lambda: not cluster.ask("squeue", "--noheader", "--jobs", job))
    outputs = [(checkout / f"slurm-{job}-{task}.out").read_text() for task in (1, 2)]
    assert len(list(checkout.glob("cache/shards/*/train/index.json"))) == 2, outputs


def test_a_share_that_is_not_done_when_its_time_is_over_is_queued_again(
    cluster: Cluster, checkout: Path, answers: dict[str, str]
):
    program = checkout / "bin" / "llmtrain"
    program.parent.mkdir()
    program.write_text(PREPARES)
    program.chmod(0o755)
    path = f"{program.parent}:{cluster.environment['PATH']}"
    job = cluster.submit("--array=3-4", PREPARE, "a=b c", directory=checkout, **answers, PATH=path)
    noted = [checkout / f"share-{share}of2" for share in (1, 2)]
    cluster.wait_until(lambda: all(file.exists() for file in noted))
    assert cluster.state(f"{job}_3")["JobState"] == "RUNNING"
    cluster.ask("scancel", "--batch", "--signal=USR1", f"{job}_3")
    state = cluster.ends(f"{job}_3")
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1")
    cluster.ask("scancel", f"{job}_4")
    assert cluster.ends(f"{job}_4")["Restarts"] == "0"
    assert noted[0].read_text() == "prepare\na=b c\npart=1/2\n" * 2
