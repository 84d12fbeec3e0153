"""Worlds read from launchers' environments, the choice of ranks, and two real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain import distributed
from llmtrain.config import UserError
from llmtrain.distributed import World, choose_ranks, fast_bf16_cpu
from tests.ranks import free_port

ROOT = Path(__file__).parents[1]

NEEDS_GPU = pytest.mark.skipif(distributed.visible_accelerators() == 0, reason="needs a CUDA device")

ENVIRONMENTS = {
    "alone": ({}, World(0, 1, 0, 1)),
    "torchrun": (
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
        World(5, 8, 1, 4),
    ),
    "deepspeed": (
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1"},
        World(5, 8, 1, 4),
    ),
    "one process a pod": ({"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "head"}, World(2, 3, 0, 1)),
    "one process a pod of an Indexed Job": (
        {"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "llmtrain-0.llmtrain"},
        World(2, 3, 0, 1),
    ),
    "a run a pod of an Indexed Job": ({"JOB_COMPLETION_INDEX": "2"}, World(0, 1, 0, 1)),
    "by hand on one machine": (
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"},
        World(1, 2, 1, 2),
    ),
    "srun": (
        {
            "SLURM_PROCID": "5",
            "SLURM_NTASKS": "9",
            "SLURM_STEP_NUM_TASKS": "6",
            "SLURM_LOCALID": "1",
            "SLURM_NODEID": "2",
            "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
        },
        World(5, 6, 1, 2),
    ),
    "srun, uneven": (
        {
            "SLURM_PROCID": "4",
            "SLURM_NTASKS": "5",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "2",
            "SLURM_TASKS_PER_NODE": "2(x2),1",
            "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
        },
        World(4, 5, 0, 1),
    ),
    "a batch script without srun": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, World(0, 1, 0, 1)),
    "torchrun inside a Slurm job": (
        {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "1",
            "LOCAL_WORLD_SIZE": "2",
            "SLURM_PROCID": "0",
            "SLURM_STEP_ID": "0",
            "SLURM_NTASKS": "1",
        },
        World(1, 2, 1, 2),
    ),
    "mpirun": (
        {
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
        World(3, 4, 1, 2),
    ),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_world_that_a_launcher_describes(name: str) -> None:
    environment, expected = ENVIRONMENTS[name]
    assert World.from_environment(environment) == expected


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "environment variable RANK is 'x'"),
        ({"RANK": "0"}, "environment variable WORLD_SIZE is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "does not fit together: rank 2 of 2"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"},
            "local rank 3 of 2",
        ),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE is not set"),
    ],
)
def test_an_impossible_environment_is_a_user_error(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        World.from_environment(environment)


def test_export_gives_what_torch_reads_and_reads_back() -> None:
    environment: dict[str, str] = {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "MASTER_PORT": "29501"}
    World(5, 6, 1, 2).export(environment)
    assert environment["MASTER_ADDR"] == "10.0.0.1"
    assert environment["MASTER_PORT"] == "29501"
    assert World.from_environment(environment) == World(5, 6, 1, 2)


def test_an_address_that_was_given_stays() -> None:
    environment = {"SLURM_LAUNCH_NODE_IPADDR": "login", "MASTER_ADDR": "head", "MASTER_PORT": "1"}
    World(5, 6, 1, 2).export(environment)
    assert environment["MASTER_ADDR"] == "head"


def srun(**variables: str) -> dict[str, str]:
    """What a task of an srun that began on another machine sees, after World.export."""
    step = {
        "SLURM_PROCID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "4711",
        "SLURM_LAUNCH_NODE_IPADDR": "login",
    }
    environment = {**step, **variables}
    World(1, 2, 0, 1).export(environment)
    return environment


@pytest.mark.parametrize(
    ("nodes", "address"),
    [("localhost,b[1-2]", "localhost"), ("127.0.0.[1-3,7],b", "127.0.0.1"), ("no.such[03-04]", "login")],
)
def test_the_tasks_of_an_srun_meet_on_its_first_node_if_that_has_a_name(nodes: str, address: str) -> None:
    assert srun(SLURM_STEP_NODELIST=nodes)["MASTER_ADDR"] == address


def test_each_srun_has_a_port_of_its_own() -> None:
    other = ({}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "4712"}, {"SLURM_RESTART_COUNT": "1"})
    ports = [int(srun(**variables)["MASTER_PORT"]) for variables in other]
    assert len(set(ports)) == 4 and all(10000 <= port < 30000 for port in ports)
    assert srun()["MASTER_PORT"] == srun(SLURM_PROCID="0")["MASTER_PORT"]
    assert srun(MASTER_PORT="29501")["MASTER_PORT"] == "29501"


def test_several_ranks_must_be_told_where_to_meet() -> None:
    with pytest.raises(UserError, match=r"MASTER_PORT is not set.*in an sbatch script, before srun"):
        World(0, 4, 0, 2).export({"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"})
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        World(0, 4, 0, 2).export({"MASTER_PORT": "29500"})


def test_one_machine_meets_at_home_and_a_world_of_one_takes_a_free_port() -> None:
    together = {"MASTER_PORT": "29500"}
    World(1, 2, 1, 2).export(together)
    assert together["MASTER_ADDR"] == "127.0.0.1"
    ports = set()
    for _ in range(3):
        alone: dict[str, str] = {}
        World().export(alone)
        ports.add(alone["MASTER_PORT"])
    assert len(ports) > 1


# The choice of ranks


@given(st.integers(0, 8), st.integers(1, 512), st.integers(1, 64))
def test_choose_ranks_equals_brute_force(gpus: int, batch: int, micro: int) -> None:
    chosen = choose_ranks(gpus, batch, micro)
    assert 1 <= chosen <= max(1, gpus)
    assert batch % chosen == 0
    for more in range(chosen + 1, gpus + 1):
        assert batch % more or (batch // more) % micro, f"{more} ranks fit as well"
    if batch % micro == 0:
        assert batch // chosen % micro == 0


@pytest.mark.parametrize(
    ("gpus", "expected"), [(0, 1), (1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (7, 4), (8, 8)]
)
def test_choose_ranks_for_a_batch_of_32(gpus: int, expected: int) -> None:
    assert choose_ranks(gpus, 32, 4) == expected


def test_choose_ranks_by_hand() -> None:
    assert choose_ranks(8, 24, 4) == 6  # 8 would leave 3 rows a rank: no whole micro batch of 4
    assert choose_ranks(8, 24, 1) == 8
    assert choose_ranks(8, 7, 1) == 7
    assert choose_ranks(8, 11, 1) == 1
    assert choose_ranks(4, 10, 4) == 2  # no number gives whole micro batches: the global batch decides


# The machine


def test_fast_bf16_is_what_the_kernel_says() -> None:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        pytest.skip("no /proc/cpuinfo to compare with")
    flags = set(info.read_text().split())
    assert fast_bf16_cpu() == bool(flags & {"avx512_bf16", "amx_bf16"})


def test_fast_bf16_asks_the_kernel_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    known = fast_bf16_cpu()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert fast_bf16_cpu() == known


def test_usable_cores_follow_the_affinity() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from llmtrain.distributed import usable_cores; print(usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "1\n"
    assert 1 <= distributed.usable_cores() <= len(os.sched_getaffinity(0))


# Ranks


def test_without_a_process_group_collectives_give_back_what_they_got() -> None:
    import torch

    tensor = torch.ones(3)
    distributed.barrier()
    distributed.finalize()
    assert distributed.all_reduce_sum(tensor) is tensor
    assert tensor.tolist() == [1, 1, 1]
    assert distributed.broadcast_object({"a": 1}) == {"a": 1}
    assert distributed.gather_objects("x") == ["x"]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


RANK_PROGRAM = """
import json, sys
from llmtrain import distributed as d
assert "torch" not in sys.modules and "deepspeed" not in sys.modules
world = d.World.from_environment()
device = d.initialize(world)
assert d.initialize(world) == device
import torch
rank = d.rank()
total = d.all_reduce_sum(torch.tensor([rank + 1.0, 10.0], device=device))
said = {
    "rank": rank,
    "world_size": d.world_size(),
    "device": str(device),
    "backend": torch.distributed.get_backend(),
    "threads": torch.get_num_threads(),
    "sum": total.tolist(),
    "broadcast": d.broadcast_object({"from": rank}, source=world.world_size - 1),
    "gathered": d.gather_objects(f"rank {rank}"),
    "again": d.World.from_environment() == world,
}
d.finalize()
assert not torch.distributed.is_initialized()
d.finalize()
print(json.dumps(said))
"""


def run_ranks(count: int, **extra: str) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of each of `count` processes that run RANK_PROGRAM."""
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("RANK", "SLURM_", "OMP_"))
    }
    processes = []
    for rank in range(count):
        names = {
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_RANK": str(rank),
            "LOCAL_SIZE": str(count),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK_PROGRAM],
                env={**clean, **(names if count > 1 else {}), **extra},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    results = [process.communicate(timeout=120) for process in processes]
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, results, strict=True)]


def test_two_ranks_talk_and_leave_nothing_behind(tmp_path: Path) -> None:
    port = free_port()
    results = run_ranks(
        2,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_VISIBLE_DEVICES="",
        TORCH_EXTENSIONS_DIR=str(tmp_path),
    )
    assert [code for code, _, _ in results] == [0, 0], results
    said = [json.loads(out) for _, out, _ in results]
    for rank, words in enumerate(said):
        assert words == {
            "rank": rank,
            "world_size": 2,
            "device": "cpu",
            "backend": "gloo",
            "threads": max(1, distributed.usable_cores() // 2),
            "sum": [3.0, 20.0],
            "broadcast": {"from": 1},
            "gathered": ["rank 0", "rank 1"],
            "again": True,
        }
    assert list(tmp_path.iterdir()) == [], "the shared-memory op was compiled"
    assert list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer*_{port}_*")) == []


def test_a_process_alone_is_a_world_of_one_and_a_wish_for_threads_is_kept() -> None:
    ((code, out, err),) = run_ranks(1, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    assert code == 0, err
    words = json.loads(out)
    assert (words["world_size"], words["sum"], words["threads"]) == (1, [1.0, 10.0], 1)
    assert err == "", "a quiet start"


@pytest.mark.gpu
@NEEDS_GPU
def test_a_gpu_is_taken_by_local_rank() -> None:
    ((code, out, err),) = run_ranks(1)
    assert code == 0, err
    words = json.loads(out)
    assert (words["device"], words["backend"], words["sum"]) == ("cuda:0", "nccl", [1.0, 10.0])


@pytest.mark.gpu
@NEEDS_GPU
def test_more_ranks_than_gpus_is_a_user_error() -> None:
    gpus = distributed.visible_accelerators()
    with pytest.raises(UserError, match=f"machine with {gpus} visible GPU"):
        distributed.initialize(World(gpus, gpus + 1, gpus, gpus + 1))
