"""One slice of a source to its records."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.config import UserError
from llmtrain.data.config import CustomSourceConfig, SourceConfig
from llmtrain.data.readers import token_files
from llmtrain.data.readers.custom import read_custom
from llmtrain.data.readers.embedded import read_embedded
from llmtrain.data.readers.fields import Fields
from llmtrain.data.readers.files import stamp_of
from llmtrain.data.readers.formats import compression, file_format, is_saved_dataset
from llmtrain.data.readers.huggingface import read_dataset
from llmtrain.data.readers.json_array import read_json_array
from llmtrain.data.readers.jsonl import read_jsonl
from llmtrain.data.readers.parquet import read_parquet
from llmtrain.data.readers.text import read_text
from llmtrain.data.records import Record, Slice


def read(
    source: SourceConfig,
    piece: Slice,
    max_document_bytes: int,
    *,
    eos_id: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[Record]:
    """The records of a slice that `parts` gave, in their order.

    Any stretch of a slice can be read too: start = position and stop = position + 1 give the record that is
    there. `eos_id` ends a document of a nanoGPT file, whose ids are below `vocab_size`. UserError where the
    file cannot be read on, or, at the end, if it is no longer the one that was cut.
    """
    records = _records(source, piece, max_document_bytes, eos_id, vocab_size)
    return _watched(records, piece) if piece.mark else records


def _watched(records: Iterator[Record], piece: Slice) -> Iterator[Record]:
    """The same records; UserError if the file changed before the last was read, also for what it broke."""
    try:
        yield from records
    except UserError as error:
        _check_mark(piece, error)
        raise
    _check_mark(piece)


def _check_mark(piece: Slice, cause: UserError | None = None) -> None:
    now = stamp_of(piece.file)
    if now != piece.mark:
        how = "is gone" if not now else f"size and time in ns were {piece.mark}, are {now}"
        raise UserError(
            f"{piece.file} has changed while it was prepared: {how}; start again, and leave it as it is"
        ) from cause


def _records(
    source: SourceConfig, piece: Slice, max_document_bytes: int, eos_id: int | None, vocab_size: int | None
) -> Iterator[Record]:
    fields = Fields(source, max_document_bytes)
    if isinstance(source, CustomSourceConfig):
        return read_custom(source, piece, fields)
    kind = _format_of(source, piece)
    packed = compression(piece.file)
    match kind:
        case "jsonl":
            return read_jsonl(piece, packed, fields)
        case "json":
            return read_json_array(piece, packed, fields)
        case "text":
            return read_text(piece, packed, fields)
        case "parquet":
            return read_parquet(piece, fields)
        case "huggingface":
            return read_dataset(source, piece, fields)
        case "embedded":
            return read_embedded(source.location, piece, fields)
        case "megatron" | "nanogpt":
            return token_files.read_tokens(kind, piece, eos_id, vocab_size)
    raise AssertionError(f"{kind} has no reader")


def _format_of(source: SourceConfig, piece: Slice) -> str:
    """As resolve_format says, but nothing remote is asked again for every slice."""
    if source.format == "auto" and is_saved_dataset(source.location):
        return "huggingface"
    return file_format(piece.file, source)
