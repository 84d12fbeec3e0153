"""A real Slurm on this machine; each node has a host name, process ids and a $TMPDIR of its own."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil

from tests.ranks import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "srun", "scancel")
NODES = ("n1", "n2", "n3")
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={place}/munge.socket
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmdPidFile={place}/slurmd-%n.pid
SlurmctldPidFile={place}/slurmctld.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""

NODE = 'hostname "$0" && mount --bind "$1" "$2" && mount --bind "$3" /etc/hosts && exec slurmd -D -N "$0"'
"""In namespaces of its own: the node's name, its directory, where it is seen, the names of all nodes."""


def missing() -> str:
    """What this machine lacks, empty if it can hold a cluster."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"no {', '.join(absent)}: install slurm-wlm and munge"
    if (
        os.getuid()
        or subprocess.run(["unshare", "--mount", "--uts", "--pid", "--fork", "true"], check=False).returncode
    ):
        return "nodes need namespaces of their own: only root may make them"
    return ""


class Cluster:
    """`with Cluster() as cluster:`; all that it started ends with it, or with this process."""

    def __init__(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path has 108 characters at most
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
            "PATH": PATH,
            "SLURM_CONF": str(self.place / "slurm.conf"),
        }

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-c")
            for node in NODES:
                self.start_node(node)
            self.wait_until(self.is_idle, 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()
        left = self.processes()  # slurmctld's helper
        for process in left:
            process.kill()
        psutil.wait_procs(left)
        shutil.rmtree(self.place)

    def _configure(self) -> None:
        host = socket.gethostname().partition(".")[0]
        text = CONFIGURATION.format(host=host, control=free_port(), user=getpass.getuser(), place=self.place)
        for node in NODES:
            text += f"NodeName={node} NodeAddr=127.0.0.1 Port={free_port()} "
            text += "CPUs=16 Gres=gpu:8\n"  # as many as are asked for in the documentation
        for name in ("state", "tmp", *(f"{kind}-{node}" for kind in ("spool", "tmp") for node in NODES)):
            (self.place / name).mkdir()
        (self.place / "slurm.conf").write_text(text)
        (self.place / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(NODES)}\n")
        (self.place / "gres.conf").write_text(f"Name=gpu File={self.place}/gpu[0-7]\n")
        for number in range(8):
            (self.place / f"gpu{number}").symlink_to(os.devnull)

    def _start_munge(self) -> None:
        key = self.place / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        words = [f"--{option}={self.place}/munge.{name}" for option, name in files.items()]
        self._start("munged", "munged", "--foreground", "--force", f"--key-file={key}", *words)
        self.wait_until(lambda: (self.place / "munge.socket").exists())

    def start_node(self, node: str) -> None:
        """Whatever runs on it dies with its first process, as if its power was cut."""
        own = [str(self.place / name) for name in (f"tmp-{node}", "tmp", "hosts")]
        namespaces = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._start(node, *namespaces, "bash", "-c", NODE, node, *own)

    def _start(self, name: str, *command: str) -> None:
        with (self.place / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def ask(self, *command: str, **options: Any) -> str:
        """What a command of Slurm prints; AssertionError with its complaint if it fails."""
        options = {"env": self.environment, "capture_output": True, "text": True, "timeout": 60} | options
        done = subprocess.run(command, check=False, **options)
        assert done.returncode == 0, f"{command}: {done.stderr}\n{self.logs()}"
        return str(done.stdout).strip()

    def submit(self, *words: str | Path, directory: Path, **variables: str) -> str:
        """sbatch in `directory`; returns the job's id."""
        environment: Mapping[str, str] = self.environment | {"TMPDIR": str(self.place / "tmp")} | variables
        return self.ask("sbatch", "--parsable", *map(str, words), cwd=directory, env=environment)

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of it: JobState, Restarts, ExitCode, ..."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def hurry(self, job: str) -> str:
        """The job's state; one that was queued again waits for seconds, not for Slurm's two minutes.

        In the second in which it ended nodes would refuse it.
        """
        state = self.state(job)
        if (state["JobState"], state["Reason"]) == ("PENDING", "BeginTime"):
            begins = datetime.fromisoformat(state["EligibleTime"])
            if begins > datetime.now() + timedelta(seconds=60):
                self.ask("scontrol", "update", f"JobId={job}", "StartTime=now+3")
        return state["JobState"]

    def ends(self, job: str, seconds: float = 240) -> dict[str, str]:
        """Wait until it is over for good; its last state."""
        running = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "NODE_FAIL", "PREEMPTED")
        self.wait_until(lambda: self.hurry(job) not in running and not self.processes(job), seconds)
        return self.state(job)

    def is_idle(self) -> bool:
        """Whether every node waits for work."""
        return self.ask("sinfo", "-h", "-p", "all", "-t", "idle", "-o", "%D") == str(len(NODES))

    def cut_power(self, node: str) -> None:
        """All that runs there is gone, and the next thing anybody hears is `mark_down`."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def mark_down(self, node: str) -> None:
        """As an operator does, or Slurm itself after SlurmdTimeout."""
        self.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def repair(self, node: str) -> None:
        """Bring a node back that was marked down, and wait for it."""
        if node not in self._daemons:
            self.start_node(node)
        self.ask("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.wait_until(self.is_idle, 60)

    def wait_until(self, is_so: Callable[[], object], seconds: float = 240) -> None:
        """Look until `is_so()`."""
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)

    def logs(self) -> str:
        """The last lines of every daemon."""
        files = sorted(self.place.glob("*.out"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    def processes(self, job: str = "") -> list[psutil.Process]:
        """All that live and know this cluster; of a job alone if it is named."""
        wanted = {"SLURM_CONF": self.environment["SLURM_CONF"]} | ({"SLURM_JOB_ID": job} if job else {})
        return [process for process in psutil.process_iter() if _has(process, wanted)]


def _has(process: psutil.Process, wanted: Mapping[str, str]) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and wanted.items() <= process.environ().items()
    except psutil.Error:
        return False
