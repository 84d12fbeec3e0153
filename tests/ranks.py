"""Real ranks of a real run, forked from one warm process.

A launcher starts a fresh interpreter a rank, which costs seconds of imports on a small machine. `RankServer`
imports once in a clean process of its own (no threads, no process group) and forks a process a rank for each
run. What a rank then does is what `python -m llmtrain.train` does: the door's `main` with its arguments,
under the environment that torchrun would set. Its output goes to a file. Modules of the tests that have such
a `main` are run in the same way.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.distributed import visible_accelerators

SERVER = "tests.ranks"
WARM = (
    "llmtrain.train",
    "llmtrain.training.trainer",
    "hydra",
    "plotly.offline",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # comes with the first engine, and dynamo with it
)

EAGER = "LLMTRAIN_TEST_EAGER"
"""Set: nothing is compiled, libraries' functions included."""

RECORD = "LLMTRAIN_TEST_RECORD"
"""A directory in which each rank then records what it trains on."""

PATCH = "LLMTRAIN_TEST_PATCH"
"""`module:function`, which each rank calls before it begins."""


def free_port() -> int:
    """A TCP port that nobody listens on, below those that systems give to clients."""
    while True:
        port = 10_000 + secrets.randbelow(22_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


@dataclass
class Job:
    """Ranks that were started together: their process ids and the files that hold what they printed."""

    server: RankServer
    pids: list[int]
    outputs: list[Path]

    def wait(self, timeout: float = 240) -> list[int]:
        """Exit codes by rank (negative: the signal), once every rank has ended."""
        deadline = time.monotonic() + timeout
        codes = self.server.poll(self.pids)
        while any(code is None for code in codes):
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"ranks still ran after {timeout} s\n{self.output()}")
            time.sleep(0.02)
            codes = self.server.poll(self.pids)
        return [code for code in codes if code is not None]

    def codes(self) -> list[int | None]:
        """Exit codes by rank; None of one that still runs."""
        return self.server.poll(self.pids)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to every rank that still runs."""
        for pid, code in zip(self.pids, self.server.poll(self.pids), strict=True):
            if code is None:
                os.kill(pid, number)

    def output(self) -> str:
        """Everything the ranks printed, rank after rank."""
        return "\n".join(f"--- rank {i}\n{path.read_text()}" for i, path in enumerate(self.outputs))


class RankServer:
    """A warm process that forks ranks on request; where two GPUs are they take NCCL, unless `cpu`."""

    def __init__(self, cpu: bool = False) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.cpu = cpu or visible_accelerators() < 2
        if self.cpu:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        self._pids: set[int] = set()
        self._process = subprocess.Popen(
            [sys.executable, "-m", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parent.parent,
        )

    def start(
        self,
        arguments: Sequence[str],
        ranks: int,
        directory: Path,
        env: Mapping[str, str] | None = None,
        door: str = "llmtrain.train",
    ) -> Job:
        """Start `ranks` processes of a door (a module with `main`) with these arguments, in `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        port = free_port()
        pids, outputs = [], []
        for rank in range(ranks):
            output = directory / f"output-{port}-{rank}.txt"
            output.touch()
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                **(env or {}),
            }
            request = {
                "door": door,
                "argv": [*arguments],
                "env": variables,
                "output": str(output),
                "cwd": str(directory),
            }
            pids.append(self._ask(request))
            outputs.append(output)
        self._pids |= {*pids}
        return Job(self, pids, outputs)

    def run(
        self,
        arguments: Sequence[str],
        ranks: int,
        directory: Path,
        env: Mapping[str, str] | None = None,
        door: str = "llmtrain.train",
        timeout: float = 240,
    ) -> Job:
        """`start`, and wait; AssertionError with what was printed if a rank did not end well."""
        job = self.start(arguments, ranks, directory, env, door)
        codes = job.wait(timeout)
        assert codes == [0] * ranks, f"exit codes {codes}\n{job.output()}"
        return job

    def poll(self, pids: Sequence[int]) -> list[int | None]:
        """Exit codes, None for a process that still runs."""
        return self._ask({"poll": list(pids)})

    def end(self) -> None:
        """Kill the ranks of every job that still run: a test that fails leaves some."""
        job = Job(self, [*self._pids], [])
        job.kill()
        job.wait()
        self._pids.clear()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def serve() -> None:
    """Read requests from standard input until it closes; nothing here starts a thread before the forks."""
    answers = os.fdopen(os.dup(1), "w")  # what libraries print at import must not get between the answers
    os.dup2(2, 1)
    for module in WARM:
        importlib.import_module(module)
    gc.freeze()  # what is here now is looked through by no collection of a rank
    codes: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            answer: Any = [_poll(pid, codes) for pid in request["poll"]]
        else:
            answer = _fork(request)
            codes[answer] = None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _poll(pid: int, codes: dict[int, int | None]) -> int | None:
    if codes[pid] is None:
        done, status = os.waitpid(pid, os.WNOHANG)
        codes[pid] = os.waitstatus_to_exitcode(status) if done else None
    return codes[pid]


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, source in ((0, null), (1, output), (2, output)):
        os.dup2(source, descriptor)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    code = 1
    try:
        main = importlib.import_module(request["door"]).main

        adapt()
        code = main(request["argv"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def adapt() -> None:
    """Do in this rank what EAGER, RECORD and PATCH ask for."""
    if os.environ.get(EAGER):
        import torch

        torch.compiler.set_stance("force_eager")
    if directory := os.environ.get(RECORD):
        record_batches(Path(directory) / f"rank{os.environ['RANK']}.npy")
    if patch := os.environ.get(PATCH):
        import importlib

        module, _, function = patch.partition(":")
        getattr(importlib.import_module(module), function)()


def record_batches(file: Path) -> None:
    """Append input_ids and labels [2, rows, L] of every batch that the model trains on to a file."""
    import numpy as np
    import torch

    from llmtrain.model import Decoder

    forward = Decoder.forward

    def recorded(self: Decoder, input_ids: torch.Tensor, labels: Any = None, *rest: Any) -> torch.Tensor:
        if self.training and torch.is_grad_enabled() and labels is not None:
            with file.open("ab") as stream:
                np.save(stream, torch.stack([input_ids, labels]).cpu().numpy())
        return forward(self, input_ids, labels, *rest)

    Decoder.forward = recorded  # type: ignore[method-assign]


if __name__ == "__main__":
    serve()
