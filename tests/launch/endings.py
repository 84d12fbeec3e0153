"""How a job of two ranks under the real `deepspeed` launcher ends: exit code, seconds, processes left.

    python -m tests.launch.endings      prints the table of docs/reliability.md; takes some minutes

`stock` is a trainer with a handler that takes 0.3 s to save and exits with 85, under `deepspeed` alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from tests.launch.conftest import LAUNCH, TRAIN
from tests.ranks import free_port

Job = Literal["wrapper", "deepspeed", "stock"]
Target = Literal["wrapper", "deepspeed", "launch.py", "rank 1"]

MARK = "LLMTRAIN_TEST_ENDING"
EVENTS: list[tuple[signal.Signals, Target]] = [
    (signal.SIGTERM, "wrapper"),
    (signal.SIGUSR1, "wrapper"),
    (signal.SIGINT, "wrapper"),
    (signal.SIGKILL, "wrapper"),
    (signal.SIGTERM, "deepspeed"),
    (signal.SIGINT, "deepspeed"),
    (signal.SIGUSR1, "deepspeed"),
    (signal.SIGKILL, "deepspeed"),
    (signal.SIGTERM, "launch.py"),
    (signal.SIGUSR1, "launch.py"),
    (signal.SIGKILL, "launch.py"),
    (signal.SIGTERM, "rank 1"),
    (signal.SIGUSR1, "rank 1"),
    (signal.SIGKILL, "rank 1"),
]
SMALL = [
    "tokenizer=bytes", "model.d_model=64", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=1",
    "model.d_ff=128", "seq_len=64", "global_batch_size=8", "micro_batch_size=2", "precision=fp32",
    "log_every=1", "callbacks.evaluation.every=0", "callbacks.sample.every=0", "logger.progress=none",
    "max_steps=100000", "checkpoint.every=100000",
]  # fmt: skip


@dataclass(frozen=True)
class Ending:
    """What came of an event."""

    code: int
    """Of the process that was started, as a shell says it."""
    seconds: float
    """From the event to the end of the last process."""
    left: int
    """Ranks that were still there a minute later."""
    lost: int | None
    """Steps that were trained and not saved; None where nothing is trained."""
    output: str

    def row(self) -> str:
        lost = "-" if self.lost is None else str(self.lost)
        return f"{self.code} | {self.seconds:.1f} s | {self.left} | {lost}"


def ending(
    job: Job,
    number: signal.Signals,
    target: Target,
    folder: Path,
    arguments: Sequence[str] = SMALL,
    patience: float = 60,
) -> Ending:
    """Start the job, let it train some steps, send the signal, and see it to its end."""
    mark = uuid.uuid4().hex
    command = [str(Path(sys.executable).parent / "deepspeed"), "--hostfile=/dev/null", "--num_gpus=2"]
    command += ["--log_level=critical", f"--master_port={free_port()}", "--module", "llmtrain.train"]
    if job == "wrapper":
        command = [sys.executable, str(LAUNCH / "supervise.py"), *command]
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [*command, *arguments, f"output_dir={folder}/run", f"cache_dir={folder}/cache"],
            env=clean_environment(job, folder) | {MARK: mark},
            cwd=folder,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        begun = folder / ("started-1" if job == "stock" else "run/metrics.jsonl")
        _until(lambda: begun.exists() and len(marked(mark, "rank 1")) == 1, 240)
        (victim,) = marked(mark, target)
        victim.send_signal(number)
        began = time.monotonic()
        code = process.wait(timeout=240)
        _until(lambda: not marked(mark), patience, must=False)
        seconds, left = time.monotonic() - began, len(marked(mark, "rank"))
    finally:
        for member in marked(mark):
            member.kill()
    lost = None if job == "stock" else lost_steps(folder / "run")
    return Ending(code if code >= 0 else 128 - code, seconds, left, lost, (folder / "output").read_text())


def marked(mark: str, target: str = "") -> list[psutil.Process]:
    """The living processes of one job: all, or the one that plays a part, or every `rank`."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
            if ours and _part(process).startswith(target):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _part(process: psutil.Process) -> str:
    words = process.cmdline()
    if "llmtrain.train" in words[2:4]:
        return f"rank {process.environ()['RANK']}"
    if "deepspeed.launcher.launch" in words[:4]:
        return "launch.py"
    names = [Path(word).name for word in words[:2]]
    if "deepspeed" in names:
        return "deepspeed"
    is_guard = process.ppid() != os.getpid()
    return "wrapper" if "supervise.py" in names and not is_guard else "other"


def clean_environment(job: Job, folder: Path) -> dict[str, str]:
    """As it is where a job is started by hand; a `stock` job finds its trainer there."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LLMTRAIN_", "CUDA_"))}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        kept.pop(key, None)
    kept |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
    if job != "stock":
        return kept | {"PYTHONPATH": str(LAUNCH.parent)}
    package = folder / "stock" / "llmtrain"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "train.py").write_text(TRAIN)
    return kept | {"PYTHONPATH": str(package.parent), "STAND_IN": str(folder), "MODE": "orderly"}


def lost_steps(run: Path) -> int:
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    saved = [int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*")]
    return max(steps) - max(saved, default=0)


def _until(come: Callable[[], bool], seconds: float, must: bool = True) -> None:
    deadline = time.monotonic() + seconds
    while not come():
        if time.monotonic() > deadline:
            assert not must, f"waited for {seconds} s"
            return
        time.sleep(0.1)


def main() -> None:
    """Print a row for each event and each kind of job."""
    print(
        "| event | job | exit code | until all is over | ranks left | steps lost |\n|---|---|---|---|---|---|"
    )
    for number, target in EVENTS:
        for job in ("wrapper", "deepspeed", "stock"):
            if target == "wrapper" and job != "wrapper":
                continue
            with tempfile.TemporaryDirectory() as folder:
                row = ending(job, number, target, Path(folder), patience=15).row()  # type: ignore[arg-type]
            print(f"| {number.name} to {target} | {job} | {row} |", flush=True)


if __name__ == "__main__":
    main()
