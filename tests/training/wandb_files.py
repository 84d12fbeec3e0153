"""The files that wandb writes offline, read back."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: a LevelDB log of 32 KiB blocks after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    place, record = 7, b""
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:  # a header does not cross blocks
            place += room
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind == 0:
            break
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            yield message
            record = b""


def offline_files(path: Path) -> list[Path]:
    return sorted(path.glob("wandb/offline-run-*/run-*.wandb"))


def history(file: Path) -> list[dict[str, Any]]:
    """The logged lines of a .wandb file, wandb's own keys left out."""
    lines = []
    for record in read_records(file):
        if record.WhichOneof("record_type") == "history":
            items = {
                (".".join(item.nested_key) or item.key): json.loads(item.value_json)
                for item in record.history.item
            }
            lines.append({key: value for key, value in items.items() if not key.startswith("_")})
    return lines


def step_numbers(file: Path) -> list[int]:
    return [one.history.step.num for one in read_records(file) if one.WhichOneof("record_type") == "history"]
