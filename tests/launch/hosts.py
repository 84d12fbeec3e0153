"""Two hosts on this machine: network namespaces with a cable between them, and a real sshd in each.

They share the file system, as nodes share a run directory; `b` may be given other code by `instead`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.launch.conftest import LAUNCH

PROGRAMS = "ip", "ssh", "ssh-keygen", "/usr/sbin/sshd", "pdsh"
SSHD = """
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
SetEnv PATH={folder}/{name}-bin:/usr/bin:/bin:/usr/sbin:/sbin
"""
SSH = """
Host a
 HostName 10.77.0.1
Host b
 HostName 10.77.0.2
Host gone
 HostName 10.77.0.9
Host *
 IdentityFile {folder}/key
 UserKnownHostsFile /dev/null
 StrictHostKeyChecking no
 LogLevel ERROR
"""


def missing() -> str:
    """What keeps this machine from being two hosts; "" if nothing."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    lacking = [program for program in PROGRAMS if not shutil.which(program)]
    if lacking:
        return f"needs {', '.join(lacking)}"
    name = f"lt{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return "" if tried.returncode == 0 else f"no network namespaces: {tried.stderr.strip()}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@dataclass
class Hosts:
    """Hosts `a` (10.77.0.1, fd77::1) and `b` (.2, ::2); `gone` is an address that nobody has."""

    folder: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def space(self, name: str) -> str:
        """The network namespace of a host."""
        return f"lt{os.getpid()}-{name}"

    def open(self) -> None:
        """Make them, with nobody logged in."""
        for key in ("key", "host"):
            subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", self.folder / key], check=True)
        (self.folder / "ssh.conf").write_text(SSH.format(folder=self.folder))
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in "ab":
            ip("netns", "add", self.space(name))
            (self.folder / f"{name}-bin").mkdir()
        peer = ["peer", "name", "eth0", "netns", self.space("b")]
        ip("link", "add", "name", "eth0", "netns", self.space("a"), "type", "veth", *peer)
        for number, name in enumerate("ab", 1):
            ip("-n", self.space(name), "link", "set", "lo", "up")
            ip("-n", self.space(name), "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", self.space(name), "addr", "add", f"fd77::{number}/64", "dev", "eth0", "nodad")
            ip("-n", self.space(name), "link", "set", "eth0", "up")
            self.listen(name)

    def listen(self, name: str, before: str = "") -> None:
        """Start a host's sshd, after the shell's `before` in its mount namespace."""
        config = self.folder / f"{name}.conf"
        config.write_text(SSHD.format(folder=self.folder, name=name))
        sshd = f"{before} exec /usr/sbin/sshd -D -f {config} -E {self.folder}/{name}.log"
        self.daemons.append(subprocess.Popen(["ip", "netns", "exec", self.space(name), "sh", "-c", sshd]))

    def instead(self, name: str, ours: Path, theirs: Path) -> None:
        """On this host alone `theirs` stands where `ours` is, from now on."""
        self.end(name)
        self.listen(name, f"mount --bind {theirs} {ours} &&")

    def end(self, name: str) -> None:
        """End everything on a host."""
        for process in self.processes(name):
            process.kill()
        psutil.wait_procs(self.processes(name), timeout=10)

    def close(self) -> None:
        """Take them away, with all that runs there."""
        for name in "ab":
            if Path("/run/netns", self.space(name)).exists():
                self.end(name)
                ip("netns", "del", self.space(name))
        for daemon in self.daemons:
            daemon.wait()

    def cut(self) -> None:
        """Pull the cable."""
        ip("-n", self.space("a"), "link", "set", "eth0", "down")

    def mend(self) -> None:
        ip("-n", self.space("a"), "link", "set", "eth0", "up")

    def processes(self, name: str, word: str = "") -> list[psutil.Process]:
        """Those that live on a host and have the word in their command line."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.space(name)], check=True, capture_output=True, text=True
        ).stdout
        found = []
        for pid in map(int, listed.split()):
            try:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE and any(
                    word in part for part in process.cmdline()
                ):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def left(self) -> list[str]:
        """What still runs of a job, on both hosts."""
        there = [process for name in "ab" for process in self.processes(name, "llmtrain")]
        return [" ".join(process.cmdline())[:200] for process in there]

    def nobody_left(self, seconds: float) -> bool:
        """Whether every process of a job ends within so many seconds."""
        deadline = time.monotonic() + seconds
        while self.left():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def start(
        self, lines: Sequence[str], words: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        """`launch/hostfile.sh` on host a, over these lines of a hostfile."""
        file = self.folder / "hosts.txt"
        file.write_text("\n".join(lines))
        return subprocess.Popen(
            ["ip", "netns", "exec", self.space("a"), "bash", str(LAUNCH / "hostfile.sh"), str(file), *words],
            env=environment | {"PDSH_SSH_ARGS_APPEND": f"-F {self.folder}/ssh.conf"},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def killed(process: subprocess.Popen[str]) -> None:
    """End it, however far it is."""
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
