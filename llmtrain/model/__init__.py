"""The decoder: token ids in, logits or losses out. Knows nothing of ranks, logs or optimizers."""

from llmtrain.model.decoder import Decoder, DecoderConfig
from llmtrain.model.loss import Losses

__all__ = ["Decoder", "DecoderConfig", "Losses"]
