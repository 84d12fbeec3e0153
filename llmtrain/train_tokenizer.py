"""Train the SentencePiece tokenizer of a config on its training documents, and say how well it fits them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from llmtrain.config.hydra import hydra_door
from llmtrain.training import train_config

if TYPE_CHECKING:
    from llmtrain.training.config import TrainConfig


def run(config: TrainConfig) -> int:
    """Train (or find) the tokenizer and print its path, vocabulary size and bytes a token."""
    from llmtrain.config import UserError
    from llmtrain.data.prepare import build_tokenizer, sample_documents

    tokenizer, directory = build_tokenizer(config.data, config.tokenizer, config.cache_dir)
    if directory is None:
        raise UserError(
            "train_tokenizer: the config brings a tokenizer along, so there is nothing to train; set"
            " tokenizer=sentencepiece and tokenizer.path=null"
        )
    texts = [document.text for document in sample_documents(config.data)]
    text_bytes = sum(len(text.encode()) for text in texts)
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    sys.stdout.write(
        f"tokenizer: {directory.resolve() / 'tokenizer.model'}\n"
        f"vocabulary size: {tokenizer.vocab_size:,}\n"
        f"bytes a token: {text_bytes / tokens:.2f} (on {text_bytes / 1e6:.1f} MB of its training text)\n"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """The door of `llmtrain train_tokenizer` and `python -m llmtrain.train_tokenizer`."""
    return hydra_door(train_config, run, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
