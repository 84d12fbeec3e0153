"""What a node has and is; it comes to its Python through standard input, so the code there may be any."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = "torch", "deepspeed", "numpy", "tokenizers", "sentencepiece"
CODE = ("llmtrain", "*.py"), ("conf", "*.yaml"), ("launch", "*.py")


def facts(directory: str, search: list[str], root: str) -> dict[str, Any]:
    """Versions, digests of the code in `root` (and of llmtrain, wherever Python finds it), GPUs, network.

    `search` is the head's PYTHONPATH; `directory` is where the job is to run.
    """
    sys.path[:0] = [directory, *search]
    address = os.environ.get("SSH_CONNECTION", "").split()[2:3]
    return {
        "directory": Path(directory).is_dir(),
        "versions": {"Python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "code": code(Path(root)),
        "gpus": gpus(),
        "port": free_port(),
        **network(address[0] if address else ""),
    }


def version(name: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def code(root: Path) -> dict[str, str]:
    """{file: digest} of what the job runs, by its path in the repository."""
    places = {name: root / name for name, _ in CODE}
    package = importlib.util.find_spec("llmtrain")
    if package and package.origin:
        places["llmtrain"] = Path(package.origin).parent
    return {
        f"{name}/{path.relative_to(places[name])}": hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for name, pattern in CODE
        for path in sorted(places[name].rglob(pattern))
    }


def gpus() -> int:
    """As nvidia-smi counts them; 0 without it."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return len(re.findall(r"^GPU \d+:", done.stdout, re.MULTILINE))


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def network(reached: str) -> dict[str, str]:
    """The address that other nodes know this one by, and its interface.

    That is the one by which ssh came, unless that is of this host or link alone: then the first that is not.
    """
    import psutil

    found = {
        entry.address: interface
        for interface, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }
    outside = [address for address in found if not address.startswith(("127.", "::1", "fe80:", "169.254."))]
    address = reached if reached in outside else (outside or [reached])[0]
    return {"address": address, "interface": found.get(address, "")}
