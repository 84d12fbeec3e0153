"""Checkpoints that are damaged, in every way that disks and people know: found before anything is read."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmtrain.distributed import World
from llmtrain.training.checkpoint import choose
from tests.ranks import PATCH, RankServer
from tests.soak.lives import RANKS, beginnings, curve
from tests.soak.stock import STOCK

PAGE = 4096

Damage = Callable[[Path, Path, random.Random], None]
"""(file, the same file of another step, rng): changes the file so that it differs."""


def flip(file: Path, other: Path, rng: random.Random) -> None:
    """One bit, anywhere."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def zero_page(file: Path, other: Path, rng: random.Random) -> None:
    """4 KiB that never reached the disk; the whole file where it is smaller."""
    content = bytearray(file.read_bytes())
    pages = [at for at in range(0, len(content), PAGE) if any(content[at : at + PAGE])]
    at = rng.choice(pages)
    content[at : at + PAGE] = bytes(len(content[at : at + PAGE]))
    file.write_bytes(content)


def truncate(file: Path, other: Path, rng: random.Random) -> None:
    """The end is missing, one byte or nearly all."""
    content = file.read_bytes()
    file.write_bytes(content[: rng.choice((len(content) - 1, rng.randrange(len(content))))])


def grow(file: Path, other: Path, rng: random.Random) -> None:
    """Bytes that nobody wrote are at the end."""
    with file.open("ab") as stream:
        stream.write(rng.randbytes(rng.choice((1, PAGE))))


def swap(file: Path, other: Path, rng: random.Random) -> None:
    """The file of another step, whole and of the same size."""
    shutil.copyfile(other, file)


def remove(file: Path, other: Path, rng: random.Random) -> None:
    """It is not there."""
    file.unlink()


DAMAGES: dict[str, Damage] = {
    "bit flip": flip,
    "zero page": zero_page,
    "truncation": truncate,
    "growth": grow,
    "file of another step": swap,
    "missing file": remove,
}
MANIFEST = "MANIFEST.json"


def spoil(checkpoint: Path, other: Path, kind: str, rng: random.Random) -> str:
    """Damage one file, every third time the manifest; returns its name. What it was is never left."""
    files = sorted(path.name for path in checkpoint.iterdir() if path.name != MANIFEST)
    name = MANIFEST if rng.random() < 1 / 3 else rng.choice(files)
    before = (checkpoint / name).read_bytes()
    DAMAGES[kind](checkpoint / name, other / name, rng)
    assert not (checkpoint / name).exists() or (checkpoint / name).read_bytes() != before
    return name


def detect(older: Path, newer: Path, place: Path, count: int, rng: random.Random) -> dict[str, Any]:
    """Damage a copy of `newer` so many times; would a run load it, or say why not."""
    detected, loaded, tried = 0, [], Counter[str]()
    for number in range(count):
        kind = list(DAMAGES)[number % len(DAMAGES)]
        directory = place / f"damaged{number}" / "checkpoints"
        for checkpoint in (older, newer):
            shutil.copytree(checkpoint, directory / checkpoint.name)
        name = spoil(directory / newer.name, older, kind, rng)
        chosen = choose("auto", directory, World())
        assert chosen is not None
        named = [(found.path.name, found.file) for found in chosen.rejected]
        if chosen.path.name == older.name and named == [(newer.name, name)]:
            detected += 1
        else:
            loaded.append(f"{kind} of {name}: {chosen.path.name}, {named}")
        tried[kind] += 1
        shutil.rmtree(directory.parent)
    return {"tried": count, "kinds": dict(tried), "detected": detected, "loaded": loaded}


def fall_back(
    server: RankServer, directory: Path, arguments: Sequence[str], count: int, rng: random.Random
) -> dict[str, Any]:
    """Damage the newest checkpoint of real runs: they go on from the one before, bit for bit."""
    words = [*arguments, "max_steps=8", "checkpoint.every=3"]
    whole = directory / "whole"
    server.run([*words, f"output_dir={whole}"], RANKS, directory)
    equal, kinds = 0, list(DAMAGES)
    for number in range(count):
        run = directory / f"run{number}"
        shutil.copytree(whole, run)
        (run / "DONE").unlink()
        newer, older = run / "checkpoints" / "step_00000008", run / "checkpoints" / "step_00000006"
        spoil(newer, older, kinds[number % len(kinds)], rng)
        server.run([*words, f"output_dir={run}"], RANKS, directory)
        rows, first = curve(run), curve(whole)
        again = {step: lines[1:] for step, lines in rows.items() if lines[1:]}
        equal += beginnings(run)[-1] == 6 and again == {step: first[step] for step in (7, 8)}
        shutil.rmtree(run)
    return {"runs": count, "bit_equal": equal}


def stock_loads(
    server: RankServer, directory: Path, arguments: Sequence[str], count: int, rng: random.Random
) -> dict[str, Any]:
    """The same damages to DeepSpeed's files: what `torch.load` makes of them, by kind."""
    words = [*arguments, "max_steps=2", "checkpoint.every=1", f"output_dir={directory / 'run'}"]
    server.run(words, RANKS, directory, {PATCH: "tests.soak.stock:patch"})
    newer, older = directory / "run" / STOCK / "step2", directory / "run" / STOCK / "step1"
    files = sorted(path.name for path in newer.glob("*.pt"))
    kinds = [kind for kind in DAMAGES if kind not in ("missing file", "file of another step")]
    found = {kind: Counter[str]() for kind in kinds}
    for number in range(count):
        kind, name = kinds[number % len(kinds)], rng.choice(files)
        copy = directory / name
        shutil.copyfile(newer / name, copy)
        DAMAGES[kind](copy, older / name, rng)
        found[kind][_loads(copy, newer / name)] += 1
    return {"files": files, "kinds": {kind: dict(counts) for kind, counts in found.items()}}


def _loads(damaged: Path, good: Path) -> str:
    """refused; equal: loads as if nothing were; silent: loads something else."""
    import torch

    try:
        state = torch.load(damaged, weights_only=False)
    except Exception:  # torch.load raises whatever the damaged bytes lead to
        return "refused"
    return "equal" if _equal(state, torch.load(good, weights_only=False)) else "silent"


def _equal(a: Any, b: Any) -> bool:
    import torch

    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(vars(a) == vars(b) if hasattr(a, "__dict__") else a == b)


def _bits(tensor: Any) -> Any:
    """So that NaN equals itself."""
    import torch

    return tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor
