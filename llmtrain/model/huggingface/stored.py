"""The weights of a Hugging Face directory: what the files' headers say of them, and one tensor at a time."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmtrain.config import UserError

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes that weights are read in: safetensors' names, and torch's."""


class Stored(NamedTuple):
    """A tensor in a file, before it is read."""

    file: Path
    name: str
    """What the file calls it."""
    shape: tuple[int, ...]
    dtype: str
    """torch's name where it is one of DTYPES, else the file's."""


class Reader:
    """Reads tensors, and keeps the last pickled file mapped."""

    def __init__(self) -> None:
        self._pickled: tuple[Path, dict[str, Tensor]] | None = None

    def read(self, stored: Stored) -> Tensor:
        """On the CPU, in the dtype of the file; UserError where the file is damaged."""
        file, name = stored.file, stored.name
        if file.suffix == ".bin":
            if self._pickled is None or self._pickled[0] != file:
                self._pickled = file, _load_pickled(file)
            return self._pickled[1][name]
        from safetensors import safe_open

        with _readable(file), safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)


def stored_in(path: Path) -> dict[str, Stored]:
    """{name: tensor} of a directory: an index first, then a single file; safetensors before pickled weights.

    Only headers are read; of pickled weights in the format before torch 1.6 all of it.
    """
    for name in (SAFETENSORS, PICKLED):
        index = path / f"{name}.index.json"
        if index.is_file():
            return _by_index(index)
        if (path / name).is_file():
            return _header(path / name)
    raise UserError(f"{path}: no weights: neither {SAFETENSORS} nor {PICKLED}, nor an index of many files")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file; UserError where there is none."""
    try:
        value = json.loads(file.read_text())
    except OSError as error:
        raise UserError(
            f"{file}: {error.strerror}; a directory as Hugging Face writes it is needed"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds a {type(value).__name__}, not an object of keys")
    return value


def some(names: set[str]) -> str:
    """The first three, and how many more."""
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _by_index(index: Path) -> dict[str, Stored]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, Mapping):
        raise UserError(f"{index}: no weight_map in it, which says the file of each weight; fetch it again")
    if away := {str(file) for file in files.values() if file != Path(str(file)).name}:
        raise UserError(f"{index} names {some(away)}: not a file beside it, as weights are; fetch it again")
    if gone := {file for file in {*files.values()} if not (index.parent / file).is_file()}:
        raise UserError(f"{index} names {some(gone)}, not there: the download is not complete")
    headers = {file: _header(index.parent / file) for file in {*files.values()}}
    if gone := {name for name, file in files.items() if name not in headers[file]}:
        raise UserError(f"{index}: {some(gone)}: not in the file that it names; fetch the directory again")
    return {name: headers[file][name] for name, file in files.items()}


def _header(file: Path) -> dict[str, Stored]:
    if file.suffix == ".bin":
        return {
            name: Stored(file, name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in _load_pickled(file).items()
        }
    from safetensors import safe_open

    with _readable(file), safe_open(file, framework="pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - it is no mapping
        return {
            name: Stored(file, name, tuple(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype()))
            for name, part in slices.items()
        }


def _load_pickled(file: Path) -> dict[str, Tensor]:
    """Read as data only; mapped, where the file's format allows it."""
    with _readable(file):
        value = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        if not isinstance(value, dict) or not all(isinstance(x, Tensor) for x in value.values()):
            raise ValueError("it holds something else than tensors by their names")
    return value


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """UserError where a library cannot read the file."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # torch's reader runs into whatever the bytes make of it: IndexError, KeyError
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{file}: cannot be read as weights ({reason}): it is damaged, a part, or git-lfs's pointer to "
            "it; fetch it again"
        ) from error
