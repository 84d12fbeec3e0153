"""Files that are tokens already: Megatron-LM's .bin/.idx pairs and nanoGPT's .bin, a slice each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from llmtrain.config import UserError
from llmtrain.data.config import SourceConfig
from llmtrain.data.megatron import megatron_documents, nanogpt_documents
from llmtrain.data.readers.files import InputFile, is_url, list_files
from llmtrain.data.records import Slice, TokenDocument

FORMATS = ("megatron", "nanogpt")


def input_files(source: SourceConfig) -> list[InputFile]:
    """The .bin files of a source, which may be named by a prefix or, Megatron-LM's, by their .idx."""
    where = source.location
    if is_url(where):
        raise UserError(f"{where}: {source.format} files are read from this machine's disks: copy them here")
    if source.format == "nanogpt":
        return list_files(where, lambda name: name.endswith(".bin"))
    found = list_files(where, lambda name: name.endswith(".idx")) or list_files(
        f"{where}.idx", lambda _: True
    )
    prefixes = list(dict.fromkeys(file.name.removesuffix(".idx").removesuffix(".bin") for file in found))
    return [_pair(prefix) for prefix in prefixes]


def _pair(prefix: str) -> InputFile:
    both = [list_files(prefix + suffix, lambda _: True) for suffix in (".bin", ".idx")]
    for files, suffix in zip(both, (".bin", ".idx"), strict=True):
        if not files:
            raise UserError(f"{prefix}{suffix}: no such file; a Megatron-LM dataset is a .bin and an .idx")
    (tokens, *_), (index, *_) = both
    return InputFile(tokens.name, tokens.size, f"{tokens.mark} {index.mark}", tokens.stamp)


def read_tokens(
    format_: str, piece: Slice, eos_id: int | None, vocab_size: int | None
) -> Iterator[TokenDocument]:
    """The documents of a slice; nanoGPT's are told apart by `eos_id`, and named by their first token."""
    path = Path(piece.file)
    if format_ == "megatron":
        yield from megatron_documents(path).read(piece.start, piece.stop)
        return
    if eos_id is None or vocab_size is None:
        raise UserError(f"{path}: nanogpt files need a tokenizer with an eos id, which ends their documents")
    stop = sys.maxsize if piece.stop is None else piece.stop
    for document in nanogpt_documents(path, eos_id, vocab_size, piece.start):
        if document.position >= stop:
            return
        yield document
