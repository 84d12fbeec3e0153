"""Pickles that would write a file if anybody unpickled them, in every container that a loader may meet."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


class Payload:
    """Unpickled, it creates the file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def plain(marker: Path) -> bytes:
    return pickle.dumps({"weight": Payload(marker)})


def torch_zip(marker: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"weight": torch.ones(2), "more": Payload(marker)}, file)
    return file.getvalue()


def torch_legacy(marker: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"weight": Payload(marker)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def numpy_objects(marker: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    return file.getvalue()


def numpy_zip(marker: Path) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0.npy", numpy_objects(marker))
    return file.getvalue()


def in_a_safetensors_header(marker: Path) -> bytes:
    return len(plain(marker)).to_bytes(8, "little") + plain(marker)


FORMS: dict[str, Callable[[Path], bytes]] = {
    form.__name__: form
    for form in (plain, torch_zip, torch_legacy, numpy_objects, numpy_zip, in_a_safetensors_header)
}

HEADERS = {
    "longer than the file": (2**62).to_bytes(8, "little") + b"{}",
    "all of 64 bits": b"\xff" * 16,
    "as deep as a stack": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "an end before a beginning": b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[8,0]}}',
    "one element before it begins": b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
    "beyond the file": b'{"x":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}',
    "no dtype": b'{"x":{"dtype":"__import__","shape":[1],"data_offsets":[0,4]}}',
    "no object": b"[1, 2, 3]",
}
"""What a header must not be; without a length of its own it gets the right one."""


def with_length(header: bytes) -> bytes:
    """A safetensors file with this header."""
    return len(header).to_bytes(8, "little") + header + bytes(8) if header[:1] in b"{[" else header
