"""One file of named tensors, in the layout of safetensors: eight bytes of length, a JSON header, the bytes.

Written by a writer of our own, because that of safetensors wants all bytes in one place and hashes nothing.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.config import UserError
from llmtrain.training.checkpoint.manifest import Stamp

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TYPES = {name: dtype for dtype, name in NAMES.items()}

CHUNK = 8 << 20
"""Bytes that are copied from a device, hashed and written at a time."""
AHEAD = 4
"""Chunks that may be written and not hashed yet."""


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], tick: Callable[[], None] = lambda: None
) -> Stamp:
    """Write 1-d tensors to a new file and make it durable; returns its size and digest.

    The digest is that of the bytes in memory, taken by a second thread. Tensors are read where they are, a
    chunk at a time: nothing may change them meanwhile. `tick` is called after each chunk.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # keeps all aligned
    digest, hashing = hashlib.sha256(), deque[Future[None]]()
    size = 0
    with file.open("xb") as stream, ThreadPoolExecutor(1, thread_name_prefix="llmtrain-hash") as pool:
        for chunk in _chunks(ordered):
            hashing.append(pool.submit(digest.update, chunk))
            stream.write(chunk)
            size += len(chunk)
            if len(hashing) > AHEAD:
                hashing.popleft().result()
            tick()
        stream.flush()
        os.fsync(stream.fileno())
    return size, digest.hexdigest()


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    yield memoryview(_header(tensors))
    for tensor in tensors.values():
        step = CHUNK // tensor.element_size()
        for part in tensor.detach().split(step) if len(tensor) else ():
            yield memoryview(part.cpu().contiguous().view(torch.uint8).numpy())


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": [len(tensor)], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def map_tensors(file: Path) -> dict[str, Tensor]:
    """The 1-d tensors of a file that was verified, mapped: bytes are read when they are used.

    A change of such a tensor stays in this process's memory.
    """
    try:
        return dict(_map(file))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: no file of tensors, although its digest holds: {error!r}") from error


def _map(file: Path) -> Iterator[tuple[str, Tensor]]:
    with file.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    length = int.from_bytes(mapped[:8], "little")
    room = len(mapped) - 8 - length
    if room < 0:
        raise ValueError(f"a header of {length:,} bytes in a file of {len(mapped):,}")
    entries = json.loads(mapped[8 : 8 + length])
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        dtype = TYPES[entry["dtype"]]
        if not 0 <= begin <= end <= room:
            raise ValueError(f"{name} at {begin} to {end} of {room} bytes")
        count = (end - begin) // dtype.itemsize
        if count:
            yield name, torch.frombuffer(mapped, dtype=dtype, count=count, offset=8 + length + begin)
        else:
            yield name, torch.empty(0, dtype=dtype)
