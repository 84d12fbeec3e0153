"""Start the ranks of many nodes over ssh and pdsh, signal them all, and answer with what became of them.

    python launch/hostfile.py hosts.txt [overrides]

`deepspeed --hostfile` writes the job into a command line that each node's shell reads again: braces and
`${}` become something else, and every exported key is in the process list. Here DeepSpeed's launcher for a
node runs under the wrapper (node.py), and what it runs comes through ssh's standard input. Before anything
starts all nodes are asked at once (probe.py); what is wrong is a line a node, exit code 78.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from supervise import (
    FAILURES,
    PREEMPTED,
    RANK,
    REQUEUES,
    TO_RANKS,
    Job,
    Told,
    guarded,
    listen,
    say,
    shell_code,
)

CONFIG = 78  # of llmtrain.config.ExitCode
LOST = 255  # ssh: no connection, or none any more
LAUNCH = Path(__file__).resolve().parent
ASKED_AT_ONCE = 64
ANSWER_SECONDS = 60.0
SIGNAL_SECONDS = 30
LAST_WORD_SECONDS = 10.0  # a failed node's peers may say more than that they were stopped
SSH = "-oBatchMode=yes", "-oConnectTimeout=10", "-oServerAliveInterval=10", "-oServerAliveCountMax=3"
EXPORTED = (
    "AWS_", "DS_", "FI_", "GLOO_", "HF_", "LD_LIBRARY_PATH", "LLMTRAIN_", "MKL_", "MLFLOW_", "NCCL_", "OMP_",
    "PATH", "PYTHON", "PYTORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "TORCH_", "TRITON_", "UCX_", "WANDB_",
)  # fmt: skip
PROXIES = {"http_proxy", "https_proxy", "all_proxy", "no_proxy"}
LOCAL = re.compile(r"(TORCH_EXTENSIONS|TORCHINDUCTOR|TRITON)_\w*(DIR|HOME)")
"""How kernels are compiled must be the same everywhere; where they are kept is each host's own, as TMPDIR."""
HOST = re.compile(
    r"(?P<user>[\w.-]+@)?((?P<name>[\w.-]+)|(?P<left>\[)?(?P<address>[\da-fA-F:.]+(%[\w.-]+)?)(?(left)\]))"
    r"\s+slots=(?P<slots>[1-9]\d*)"
)
CODE = re.compile(r"pdsh@\S+: (?P<host>\S+): ssh exited with exit code (?P<code>\d+)")
V = TypeVar("V")


class HostsError(Exception):
    """What the user can repair, a line each."""

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines


def read_line(text: str) -> tuple[str, int]:
    """Host, an IPv6 address without its brackets, and ranks; ValueError if these are not what it says."""
    found = HOST.fullmatch(text)
    if found is None:
        raise ValueError(text)
    name = found["name"] or str(ipaddress.IPv6Address(found["address"]))
    return (found["user"] or "") + name, int(found["slots"])


def read_hosts(file: Path) -> dict[str, int]:
    """{host: ranks} in the order of the file."""
    hosts: dict[str, int] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            host, slots = read_line(text)
        except ValueError:
            raise HostsError(f"{file}, line {number}: {text!r} must be `<host> slots=<ranks>`") from None
        if host in hosts:
            raise HostsError(f"{file}, line {number}: {host} is there already; add up its slots")
        hosts[host] = slots
    if not hosts:
        raise HostsError(f"{file}: no hosts; a line is `<host> slots=<ranks>`")
    return hosts


# Before the start


def ssh_words() -> list[str]:
    """ssh with our options; the user's, which are pdsh's too, come first and so win."""
    return ["ssh", *shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")), *SSH]


def on_each(hosts: Mapping[str, int], ask: Callable[[str], V]) -> list[V | HostsError]:
    """What `ask` returns for each host, or how it failed; all at once."""

    def safe(host: str) -> V | HostsError:
        try:
            return ask(host)
        except HostsError as mistake:
            return mistake

    with ThreadPoolExecutor(min(ASKED_AT_ONCE, len(hosts))) as pool:
        return list(pool.map(safe, hosts))


def answer(host: str, command: list[str], text: str) -> str:
    """What `command` prints, with `text` on its standard input; HostsError says of `host` why it does not."""
    try:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_SECONDS,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise HostsError(f"{host}: no answer within {ANSWER_SECONDS:.0f} s") from None
    last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    if done.returncode == LOST:
        raise HostsError(f"{host}: cannot be reached by `ssh {host}` without a password: {last}")
    if done.returncode in (126, 127):
        raise HostsError(f"{host}: no {sys.executable} there; set up the project at the same path: {last}")
    if done.returncode:
        raise HostsError(f"{host}: {last}")
    return done.stdout


def facts(host: str, command: list[str]) -> dict[str, Any]:
    """What probe.py finds where `command` runs it."""
    search = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    arguments = f"{str(Path.cwd())!r}, {search!r}, {str(LAUNCH.parent)!r}"
    program = f"{(LAUNCH / 'probe.py').read_text()}\nimport json\nprint(json.dumps(facts({arguments})))\n"
    said = answer(host, command, program).splitlines()
    found = [line for line in said if line.startswith('{"directory": ')]  # start-up files may say more
    if not found:
        raise HostsError(
            f"{host}: `{command[-1]}` printed {said[-1] if said else 'nothing'!r} there, not what was asked: "
            "does a start-up file of the shell, or sshd's ForceCommand, end or replace it?"
        )
    return json.loads(found[-1])


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """What a node lacks, or has in another version or wording than this machine; "" if nothing."""
    found = [] if theirs["directory"] else [f"no directory {Path.cwd()}"]
    for name, version in ours["versions"].items():
        if theirs["versions"][name] != version:
            found.append(f"{name} {theirs['versions'][name]}, here {version}")
    here, there = ours["code"], theirs["code"]
    other = sorted(file for file in here.keys() | there.keys() if here.get(file) != there.get(file))
    if other and not there:
        found.append(f"no code of llmtrain in {LAUNCH.parent}")
    elif other:
        found.append(
            f"other code than here in {other[0]}" + f" and {len(other) - 1} more files" * (len(other) > 1)
        )
    return "; ".join(found)


def wrong_slots(slots: int, gpus: int, any_gpus: bool) -> str:
    """Why a node cannot take so many ranks; on CPUs it can."""
    if not any_gpus or slots <= gpus:
        return ""
    return f"slots={slots}, but nvidia-smi lists {gpus} GPU(s)"


def wrong_torch(theirs: Mapping[str, Any]) -> str:
    """Why a node's GPUs would stay idle: set up where there was none, its torch is one for CPUs."""
    torch = theirs["versions"]["torch"]
    if not theirs["gpus"] or not torch.endswith("+cpu") or os.environ.get("DS_ACCELERATOR") == "cpu":
        return ""
    return (
        f"torch {torch} cannot use its {theirs['gpus']} GPU(s): "
        "LLMTRAIN_TORCH='torch>=2.11' bash launch/setup.sh (or DS_ACCELERATOR=cpu)"
    )


def look(hosts: Mapping[str, int]) -> list[dict[str, Any]]:
    """The facts of every host; HostsError has a line for each that cannot take part."""
    ours = facts("this machine", [sys.executable, "-"])
    remote = shlex.join([sys.executable, "-"])
    answers = on_each(hosts, lambda host: facts(host, [*ssh_words(), host, remote]))
    found = {
        host: theirs
        for host, theirs in zip(hosts, answers, strict=True)
        if not isinstance(theirs, HostsError)
    }
    any_gpus = any(theirs["gpus"] for theirs in found.values())
    lines = [line for theirs in answers if isinstance(theirs, HostsError) for line in theirs.lines]
    for host, theirs in found.items():
        wrong = [
            differences(ours, theirs),
            wrong_slots(hosts[host], theirs["gpus"], any_gpus),
            wrong_torch(theirs),
        ]
        if any(wrong):
            lines.append(f"{host}: {'; '.join(filter(None, wrong))}")
    if lines:
        raise HostsError(*lines)
    if not any_gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return list(found.values())


def is_exported(key: str) -> bool:
    """Whether the ranks of all hosts get this variable without being asked."""
    return key.lower() in PROXIES or (key.startswith(EXPORTED) and not LOCAL.fullmatch(key))


def exported() -> dict[str, str]:
    """What of this environment the ranks get, and what the files say that DeepSpeed's launcher reads."""
    named = set(os.environ.get("LLMTRAIN_EXPORT", "").split())
    chosen = {key: value for key, value in os.environ.items() if is_exported(key) or key in named}
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for file in (Path.home() / name, Path(name)):
        lines = file.read_text().splitlines() if file.is_file() else []
        for number, line in enumerate(lines, 1):
            key, equals, value = line.partition("=")
            if line.strip() and not equals:
                raise HostsError(f"{file}, line {number}: must be KEY=VALUE")
            chosen |= {key.strip(): value.strip()} if equals else {}
    return chosen


# The job


@dataclass
class Nodes:
    """The hosts of a job, the folder that each has for it, and how they ended."""

    hosts: Mapping[str, int]
    folder: str = field(default_factory=lambda: f"/tmp/llmtrain-{secrets.token_hex(8)}")
    codes: list[int] = field(default_factory=list)
    """Other than 0, in the order in which they came."""
    failed: float | None = None
    """When a node said that its ranks failed."""

    def hand_over(self, nodes: list[dict[str, Any]], overrides: list[str]) -> None:
        """Put into each host's folder, for its user alone, what it is to run."""
        address = os.environ.get("MASTER_ADDR") or nodes[0]["address"]
        port = os.environ.get("MASTER_PORT") or str(nodes[0]["port"])
        world = json.dumps({host: list(range(slots)) for host, slots in self.hosts.items()})
        environment, order = exported(), list(self.hosts)

        def hand(host: str) -> None:
            number = order.index(host)
            command = [
                *(sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--node_rank={number}"),
                f"--world_info={base64.urlsafe_b64encode(world.encode()).decode()}",
                *(f"--master_addr={address}", f"--master_port={port}", "--log_level=critical"),
                *("--no_local_rank", "--module", RANK, *overrides),
            ]
            # Without it gloo listens where the host's own name points to, which may be the loopback.
            network = {"GLOO_SOCKET_IFNAME": nodes[number]["interface"]} if nodes[number]["interface"] else {}
            job = {"command": command, "environment": network | environment, "directory": str(Path.cwd())}
            folder = f"{self.folder}-{number}"
            write = f"umask 077 && mkdir {folder} && cat >{folder}/job.json"
            answer(host, [*ssh_words(), host, write], json.dumps(job))

        failed = [mistake for mistake in on_each(self.hosts, hand) if mistake]
        if failed:
            self.pdsh(f"rm -rf {self.folder}-%n").wait()
            raise HostsError(*(line for mistake in failed for line in mistake.lines))
        end_point = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        say(f"{len(order)} hosts, {sum(self.hosts.values())} ranks, rank 0 on {order[0]} at {end_point}")

    def words(self, remote: str, *options: str) -> list[str]:
        """pdsh that runs `remote` in sh on each host, a child of sshd; %n is the host's number."""
        hosts = ",".join(f"ssh:{host}" for host in self.hosts)  # else `me@fd00::1` has a colon too many
        word = f"exec {shlex.join(['sh', '-c', remote])}"  # the user's own shell may be another
        return ["pdsh", "-R", "ssh", "-f", "1024", *options, "-w", hosts, word]

    def pdsh(self, remote: str) -> subprocess.Popen[bytes]:
        """Run something short on each host, beside the job."""
        words = self.words(remote, "-u", str(SIGNAL_SECONDS))
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def send(self, number: signal.Signals) -> subprocess.Popen[bytes]:
        """Signal each node's wrapper, once it is there."""
        folder = f"{self.folder}-%n"
        wait = f"while [ -d {folder} ] && [ ! -s {folder}/pid ]; do sleep 0.1; done"
        return self.pdsh(f"{wait}; kill -{number} $(cat {folder}/pid)")

    def read(self, lines: Any) -> None:
        """Take the codes from what pdsh says, and pass on the rest."""
        for line in lines:
            text = line.decode(errors="replace")
            found = CODE.fullmatch(text.strip())
            if found is None:
                sys.stderr.write(text)
                continue
            code = shell_code(int(found["code"]))
            self.codes.append(code)
            say(f"{found['host']}: " + ("the connection is lost" if code == LOST else f"exit code {code}"))
            if code not in (LOST, PREEMPTED):
                self.failed = self.failed or time.monotonic()


def follow(job: Job, nodes: Nodes, received: list[signal.Signals]) -> None:
    """Pass signals on until the job is over; stop the nodes that are left when one has failed."""
    sent, stopped, short = 0, False, list[subprocess.Popen[bytes]]()
    while job.is_alive():
        for number in received[sent:]:
            say(f"{number.name}: stopping (Ctrl-C again to kill)")
            short.append(nodes.send(TO_RANKS[number]))
        sent = len(received)
        if nodes.failed and not stopped and time.monotonic() > nodes.failed + LAST_WORD_SECONDS:
            stopped = True
            short.append(nodes.send(signal.SIGTERM))
        if job.process.returncode is not None or received.count(signal.SIGINT) > 2:
            job.kill()  # what pdsh has left of ssh; the nodes stop when it is gone
    for process in short:
        process.wait()


def verdict(codes: list[int], asked: bool, pdsh: int) -> int:
    """One exit code for all nodes: what ranks said first, then "nothing is lost", then whoever failed first.

    A node's peers fail of its failure, with 1, or leave with 85 when they are stopped for it.
    """
    said = [code for code in FAILURES if code in codes]
    if said:
        return said[0]
    if PREEMPTED in codes and (asked or codes[0] in (PREEMPTED, LOST)):
        return PREEMPTED
    failed = [code for code in codes if code not in (LOST, PREEMPTED)]
    return failed[0] if failed else (1 if codes else shell_code(pdsh))


def run(file: Path, overrides: list[str]) -> int:
    """Check, start and follow the job; its exit code."""
    received, hosts = listen(), read_hosts(file)
    for program in ("ssh", "pdsh"):
        if not shutil.which(program):
            raise HostsError(
                f"{program} is not installed (Debian, Ubuntu: apt-get install openssh-client pdsh)"
            )
    config = subprocess.Popen(
        [sys.executable, "-m", "llmtrain.ranks", *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        found = look(hosts)
    finally:
        _, errors = config.communicate()
        if config.returncode:  # told beside what is wrong with the hosts
            sys.stderr.write(errors.decode())
    if config.returncode:
        return config.returncode
    asked = bool(REQUEUES.intersection(received))
    if received:
        return PREEMPTED if asked else shell_code(-received[0])
    nodes = Nodes(hosts)
    nodes.hand_over(found, overrides)
    os.environ["PDSH_SSH_ARGS_APPEND"] = shlex.join(ssh_words()[1:])
    remote = f"exec {shlex.join([sys.executable, str(LAUNCH / 'node.py')])} {nodes.folder}-%n $PPID"
    with closing(Told()) as told:
        job = Job(nodes.words(remote, "-S"), told, time.time(), stderr=subprocess.PIPE)
        reader = threading.Thread(target=nodes.read, args=(job.process.stderr,))
        with guarded(job):
            reader.start()
            follow(job, nodes, received)
            reader.join()
    return verdict(nodes.codes, bool(REQUEUES.intersection(received)), job.process.returncode)


def main() -> int:
    """Run the job of argv: the file of hosts, then overrides."""
    try:
        return run(Path(sys.argv[1]), sys.argv[2:])
    except HostsError as mistake:
        for line in mistake.lines:
            say(line)
        return CONFIG


if __name__ == "__main__":
    sys.exit(main())
