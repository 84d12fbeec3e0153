"""Text to ids and back: one small protocol, and the tokenizers that speak it."""

from llmtrain.tokenizer.base import Tokenizer, TokenizerConfig
from llmtrain.tokenizer.huggingface import HuggingFaceConfig, HuggingFaceTokenizer
from llmtrain.tokenizer.loading import load_tokenizer, vocab_size_of
from llmtrain.tokenizer.raw_bytes import BytesConfig, BytesTokenizer
from llmtrain.tokenizer.sentencepiece import SentencePieceConfig, SentencePieceTokenizer

__all__ = [
    "BytesConfig",
    "BytesTokenizer",
    "HuggingFaceConfig",
    "HuggingFaceTokenizer",
    "SentencePieceConfig",
    "SentencePieceTokenizer",
    "Tokenizer",
    "TokenizerConfig",
    "load_tokenizer",
    "vocab_size_of",
]
