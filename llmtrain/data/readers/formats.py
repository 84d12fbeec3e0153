"""Which format a source has, and which format each of its files."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from llmtrain.config import UserError
from llmtrain.data.config import CustomSourceConfig, SourceConfig
from llmtrain.data.readers import files, token_files

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSED = (".gz", ".zst")
CUSTOM = "custom"
"""The format of a source that another package reads."""
INDEX = "index.json"
"""What a directory of prepared shards holds."""


def resolve_format(source: SourceConfig) -> str:
    """The format of a source; `files` where each file tells its own by its suffix.

    UserError where the source sets a key that this format does not look at, or its URL cannot be reached.
    """
    if isinstance(source, CustomSourceConfig):
        return _checked(CUSTOM, source)
    if source.format != "auto":
        return source.format
    where = source.location
    if files.is_url(where):
        found = plain_suffix(where) not in SUFFIXES and files.holds(where, INDEX)
    else:
        found = _is_prepared(Path(where).expanduser())
    if found:
        return _checked("shards", source)
    return _checked("huggingface", source) if is_saved_dataset(where) else "files"


def _is_prepared(directory: Path) -> bool:
    """Whether its index is one of prepared shards: people have files of that name too."""
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and {"shards", "manifest_hash"} <= index.keys()


def is_saved_dataset(where: str) -> bool:
    """Whether this is a directory that `datasets` saved, as far as it can be looked at."""
    path = Path(where).expanduser()
    with suppress(OSError):
        return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
    return False


def plain_suffix(name: str) -> str:
    """The suffix that tells the format: that below .gz and .zst; a URL's query is no part of it."""
    path = PurePosixPath(urlsplit(name).path if name.startswith(("http://", "https://")) else name)
    return PurePosixPath(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def compression(name: str) -> str:
    """`.gz`, `.zst` or nothing."""
    path = PurePosixPath(urlsplit(name).path if name.startswith(("http://", "https://")) else name)
    return path.suffix if path.suffix in COMPRESSED else ""


def file_format(name: str, source: SourceConfig) -> str:
    """The format of one file; UserError where its suffix is unknown or a key does not suit it."""
    if source.format != "auto":
        return source.format
    kind = SUFFIXES.get(plain_suffix(name))
    if kind is None:
        raise UserError(
            f"{source.path}: {name} has an unknown suffix; known are {', '.join(SUFFIXES)}"
            " (each also with .gz or .zst), or set format to jsonl, json, parquet, text, megatron or nanogpt"
        )
    return _checked(kind, source)


def input_files(source: SourceConfig) -> list[files.InputFile]:
    """The files of a source, sorted; of a directory those that suit. UserError where there is none."""
    if source.format in token_files.FORMATS:
        found = token_files.input_files(source)
    else:
        found = files.list_files(source.location, lambda name: _suits(name, source))
    if not found:
        raise UserError(_nothing_found(source))
    return found


def _suits(name: str, source: SourceConfig) -> bool:
    """Whether a file of a directory belongs to the source."""
    kind = SUFFIXES.get(plain_suffix(name))
    return source.format == "text" or (kind is not None and source.format in ("auto", kind))


def _nothing_found(source: SourceConfig) -> str:
    where = source.location
    if files.is_directory(where):
        known = f"{', '.join(SUFFIXES)} file" if source.format == "auto" else f"{source.format} file"
        return f"{where}: the directory holds no {known}"
    if files.is_url(where):
        return f"{where}: no file matches"
    hub = "; a dataset on the Hugging Face Hub needs format=huggingface" if "*" not in where else ""
    return f"{where}: no file matches (looked in {Path.cwd()}){hub}"


def _checked(kind: str, source: SourceConfig) -> str:
    if unused := source.keys_without_meaning(kind):
        raise UserError(f"{source.path}: {unused[0]} means nothing for format={kind}; leave it out")
    return kind
