"""The decoder: token ids in, logits or a loss a row out. Knows nothing of ranks, logs or optimizers."""

from llmtrain.model.decoder import Decoder, DecoderConfig

__all__ = ["Decoder", "DecoderConfig"]
