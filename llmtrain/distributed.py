"""Ranks and what they say to each other: who am I, start, end, and the few collectives the trainer needs.

torch and deepspeed are imported by the functions that use them, so that asking for the rank costs nothing.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.config import UserError

if TYPE_CHECKING:
    import torch

BF16_FLAGS = ("avx512_bf16", "amx_bf16")
"""Instructions that make bf16 matrix products several times faster than fp32 ones on a CPU."""

FOREVER = timedelta(days=365)


@dataclass(frozen=True)
class World:
    """This process's place among the job's processes, and on its machine; alone unless told otherwise."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that talks to the user and writes the run's files."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Reads what torchrun, deepspeed, srun, mpirun or Kubernetes say; a world of 1 without them.

        A pod of an Indexed Job is a rank only with WORLD_SIZE: a Job may as well hold several runs.
        """
        if "RANK" not in environment and {"JOB_COMPLETION_INDEX", "WORLD_SIZE"} <= set(environment):
            environment = {**environment, "RANK": environment["JOB_COMPLETION_INDEX"]}
        if "RANK" in environment:
            return _from_torch(environment)
        if _is_srun_task(environment):
            return _from_slurm(environment)
        if "OMPI_COMM_WORLD_RANK" in environment:
            names = (f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
            return cls(*(_number(environment, name) for name in names))._checked()
        return cls()

    def export(self, environment: Any = os.environ) -> None:
        """Writes the names that torch and deepspeed read; an address and port that are there already stay."""
        address, port = _meeting_point(self, environment)
        environment.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_WORLD_SIZE=str(self.local_world_size),
            MASTER_ADDR=address,
            MASTER_PORT=port,
        )

    def _checked(self) -> World:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size):
            raise UserError(
                f"the launcher's environment does not fit together: rank {self.rank} of {self.world_size}, "
                f"local rank {self.local_rank} of {self.local_world_size}; start from a clean environment"
            )
        return self


def _from_torch(environment: Mapping[str, str]) -> World:
    """torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE, a Kubernetes operator neither."""
    world_size, local_rank = _number(environment, "WORLD_SIZE"), _number(environment, "LOCAL_RANK", 0)
    here = environment.get("MASTER_ADDR") in ("localhost", "127.0.0.1")
    local = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environment else "LOCAL_SIZE"
    local_world_size = _number(environment, local, world_size if here else local_rank + 1)
    return World(_number(environment, "RANK"), world_size, local_rank, local_world_size)._checked()


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, default)
    try:
        return int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        state = "is not set, although this looks like one rank of several" if text is None else f"is {text!r}"
        raise UserError(f"environment variable {name} {state}; it must be a number") from None


def _is_srun_task(environment: Mapping[str, str]) -> bool:
    """A batch script has SLURM_PROCID and SLURM_NTASKS too, but is one process: srun's marks decide."""
    started = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_LAUNCH_NODE_IPADDR")
    return "SLURM_PROCID" in environment and any(name in environment for name in started)


def _from_slurm(environment: Mapping[str, str]) -> World:
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    world_size = _number(environment, tasks, 1)
    counts = _tasks_per_node(per_node) if per_node else [world_size]
    node = _number(environment, "SLURM_NODEID", 0)
    return World(
        _number(environment, "SLURM_PROCID"),
        world_size,
        _number(environment, "SLURM_LOCALID", 0),
        counts[node] if node < len(counts) else counts[-1],
    )._checked()


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's `2(x3),1` as [2, 2, 2, 1]."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def _meeting_point(world: World, environment: Mapping[str, str]) -> tuple[str, str]:
    """Address and port where rank 0 listens; only a world of 1 may choose its port, others must agree."""
    if world.world_size == 1:
        return environment.get("MASTER_ADDR", "127.0.0.1"), environment.get("MASTER_PORT") or str(free_port())
    address = environment.get("MASTER_ADDR") or _first_node(environment)
    if address is None and world.local_world_size == world.world_size:
        address = "127.0.0.1"
    port = environment.get("MASTER_PORT") or _port_of_step(environment)
    for name, value, example in (
        ("MASTER_ADDR", address, "the host name of rank 0"),
        ("MASTER_PORT", port, "29500"),
    ):
        if not value:
            raise UserError(
                f"{name} is not set, and {world.world_size} ranks must agree on it: export it in the script "
                f"that starts them (in an sbatch script, before srun: `export {name}=...`, {example})"
            )
    return str(address), str(port)


def _first_node(environment: Mapping[str, str]) -> str | None:
    """Where task 0 of an srun runs, or else, where that name is not known, srun itself."""
    nodes = re.sub(r"\[(\d+)[^]]*\]", r"\1", environment.get("SLURM_STEP_NODELIST", ""))  # node[03-07,9],big1
    first = nodes.partition(",")[0]
    with suppress(OSError):
        if first and socket.getaddrinfo(first, None):
            return first
    return environment.get("SLURM_LAUNCH_NODE_IPADDR")


def _port_of_step(environment: Mapping[str, str]) -> str | None:
    """A port below the ephemeral ones, the same for all tasks of an srun and another for the next one."""
    if "SLURM_JOB_ID" not in environment or not _is_srun_task(environment):
        return None
    job, step, restarts = (
        _number(environment, f"SLURM_{name}", 0) for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")
    )
    return str(10000 + (263 * job + 16 * restarts + step) % 20000)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# Start and end


def initialize(world: World, timeout: float | None = None) -> torch.device:
    """Joins all ranks in one process group (NCCL, or gloo without GPUs) and returns this rank's device.

    A rank that waits for others longer than `timeout` seconds (None: as libraries have it) gets an error.
    Also sets this process's threads, and the environment names torch reads. A second call changes nothing.
    """
    import torch

    device = _device(world)
    if torch.distributed.is_initialized():
        return device
    world.export()
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:  # NVML has counted the GPUs, which works with any driver
            raise UserError(
                f"{device} cannot be used by torch {torch.__version__} with CUDA {torch.version.cuda}: "
                f"{str(error).splitlines()[0]}; where the driver is too old for this torch, install another "
                "with LLMTRAIN_TORCH (launch/setup.sh tells how)"
            ) from error
        # DeepSpeed takes this as the index of the device: 0 where Slurm shows a task only its own GPU.
        os.environ["LOCAL_RANK"] = str(device.index)
    # Stages 2 and 3 of DeepSpeed 0.19.8 call what torch 2.13 renames, and hear of it at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if "OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun sets 1 whatever the machine; anybody else's number is a wish.
        torch.set_num_threads(max(1, usable_cores() // world.local_world_size))
    _init_deepspeed("nccl" if device.type == "cuda" else "gloo", timeout)
    return device


def finalize() -> None:
    """Waits for all ranks and leaves the process group: a live one can abort the interpreter at exit."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    barrier()
    import deepspeed.comm

    deepspeed.comm.destroy_process_group()


def _device(world: World) -> torch.device:
    import torch

    gpus = visible_accelerators()
    if gpus == 0:
        return torch.device("cpu")
    if gpus == 1 and "SLURM_PROCID" in os.environ:
        return torch.device("cuda", 0)  # --gpus-per-task: each task sees its own GPU, and calls it 0
    if world.local_rank >= gpus:
        raise UserError(
            f"{world.local_world_size} ranks were started on a machine with {gpus} visible GPU(s), and each "
            f"needs its own: start at most {gpus}, or set CUDA_VISIBLE_DEVICES='' to run on the CPU"
        )
    return torch.device("cuda", world.local_rank)


def _init_deepspeed(backend: str, timeout: float | None) -> None:
    """deepspeed.init_distributed without its habits on CPU, and without its chatter."""
    os.environ["LOCAL_SIZE"] = "0"
    quiet_deepspeed()
    import deepspeed
    import deepspeed.ops

    if backend == "gloo":
        # The op serves only inference. It is compiled at start (a minute; for ever if a killed process left
        # its lock) and leaves 66 MiB in /dev/shm for each rank and port. Nothing else reads this table, and
        # filling it as DeepSpeed does would run a compiler.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    limit = {}
    if timeout is not None:
        from torch.distributed import distributed_c10d

        limit = {"timeout": timedelta(seconds=timeout)}
        # DeepSpeed makes groups of its own without a time-out: they take these.
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit["timeout"]
    if backend == "nccl" and timeout is not None:
        # NCCL connects here without a limit, with no watchdog yet, and maybe with the interpreter's lock.
        faulthandler.dump_traceback_later(timeout + 60, exit=True)
    try:
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, **limit)
    finally:
        if backend == "nccl":
            faulthandler.cancel_dump_traceback_later()


def leave_failed(code: int) -> None:
    """End a GPU rank that failed at once: its end as Python's would wait in NCCL for ranks that do not come.

    Their launcher would see nothing of it until they hang. Does nothing after `finalize`.
    """
    if code and "torch" in sys.modules and _is_grouped():
        import torch.distributed as dist

        if dist.get_backend() == "nccl":
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def quiet_threads() -> None:
    """Called before torch is imported: OpenMP's threads sleep while they wait instead of spinning.

    With a core taken by somebody else, spinning made each of our small kernels wait for the scheduler: a step
    took ten times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def quiet_deepspeed() -> None:
    """Called before anything imports deepspeed, which else warns on standard output that it found no GPU."""
    if visible_accelerators() == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


# Collectives. In a world of one without a process group they return what they were given.


def _is_grouped() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank in the process group."""
    import torch.distributed as dist

    return dist.get_rank() if _is_grouped() else 0


def world_size() -> int:
    """How many ranks the process group has."""
    import torch.distributed as dist

    return dist.get_world_size() if _is_grouped() else 1


def barrier() -> None:
    """Returns when every rank has called it."""
    import torch
    import torch.distributed as dist

    if _is_grouped():
        gpu = dist.get_backend() == "nccl"
        dist.barrier(device_ids=[torch.cuda.current_device()] if gpu else None)


def broadcast_object(value: Any, source: int = 0) -> Any:
    """`value` of rank `source`, on every rank."""
    if not _is_grouped():
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in the order of ranks, on every rank."""
    if not _is_grouped():
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums `tensor` over all ranks, in place, and returns it."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def collectives() -> int:
    """How many collectives this rank has begun in groups of all ranks, whoever made the groups."""
    if not _is_grouped():
        return 0
    from torch.distributed import distributed_c10d

    groups: list[Any] = list(distributed_c10d._world.pg_map)
    return sum(g._get_sequence_number_for_group() for g in groups if g.size() == world_size())


@contextmanager
def patience() -> Iterator[None]:
    """Within, ranks wait for each other as long as it takes."""
    if not _is_grouped():
        yield
        return
    import torch
    from torch.distributed import distributed_c10d, get_backend

    everyone: Any = distributed_c10d.group.WORLD
    device = torch.device("cuda" if get_backend() == "nccl" else "cpu")
    before = everyone._get_backend(device).options._timeout
    distributed_c10d._set_pg_timeout(FOREVER, everyone)
    try:
        yield
    finally:
        distributed_c10d._set_pg_timeout(before, everyone)


# The machine


def visible_accelerators() -> int:
    """GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


def choose_ranks(visible_gpus: int, global_batch_size: int, micro_batch_size: int = 1) -> int:
    """How many ranks to start on one machine: the most, up to one a GPU, that share the global batch evenly.

    A rank's share must also be whole micro batches; where no number allows that, the global batch decides.
    """
    fitting = [n for n in range(1, max(1, visible_gpus) + 1) if global_batch_size % n == 0]
    whole = [n for n in fitting if global_batch_size // n % micro_batch_size == 0]
    return max(whole or fitting)


def usable_cores() -> int:
    """CPU cores this process may use: its affinity, and the container's quota if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2 here, or "max": no quota
        return cores


def fast_bf16_cpu() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (avx512_bf16, amx_bf16)."""
    import torch

    try:
        found: Mapping[str, Any] = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):  # a torch that cannot tell: the kernel can
        info = Path("/proc/cpuinfo")
        words = set(info.read_text().split()) if info.is_file() else set()
        found = {flag: flag in words for flag in BF16_FLAGS}
    return any(found.get(flag) for flag in BF16_FLAGS)
