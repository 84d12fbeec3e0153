"""Small decoders whose attention is far from uniform, and batches of documents for them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from llmtrain.model import Decoder, DecoderConfig

VOCAB = 300  # not a multiple of 128: the tables have 84 rows of padding
SEQ_LEN = 24
POSITIONS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "rope": {"kind": "rope", "theta": 100.0, "layout": "half", "scaling": None},
    "alibi": {"kind": "alibi", "scaled": False},
    "learned": {"kind": "learned"},
}
KV_HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}

PACKED = [0, 5, 6, 24, 31, 48]
"""Two rows of 24 positions: documents of 5, 1 and 18 tokens, then of 7 and 17."""


def config(**changes: Any) -> DecoderConfig:
    """Two layers, width 32, four heads; MQA, RoPE, RMSNorm, SwiGLU, tied, eager."""
    keys: dict[str, Any] = {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 1,
        "head_dim": None,
        "d_ff": 48,
        "norm": "rmsnorm",
        "norm_eps": 1e-5,
        "embedding_norm": False,
        "qk_norm": False,
        "residual": "sequential",
        "bias": "none",
        "feed_forward": "swiglu",
        "tie_embeddings": True,
        "position": POSITIONS["rope"],
        "attention": {"backend": "eager"},
    }
    return DecoderConfig.model_validate(keys | changes)


def decoder(sharp: bool = True, vocab_size: int = VOCAB, seed: int = 0, **changes: Any) -> Decoder:
    """A decoder; `sharp` scales its weights until attention prefers some keys and every part matters."""
    model = config(**changes).build(vocab_size=vocab_size, seq_len=SEQ_LEN, seed=seed)
    if sharp:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm." in name or name.endswith("bias"):
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
                else:
                    parameter.mul_(10)
    return model


def tokens(rows: int = 2, length: int = SEQ_LEN, seed: int = 1) -> Tensor:
    """Random ids [rows, length]."""
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def packed_batch() -> dict[str, Tensor]:
    """`input_ids`, `labels`, `position_ids` and `cu_seqlens` of PACKED, in the batch's dtypes."""
    ids, labels = tokens(), tokens(seed=2)
    labels[0, 3] = labels[1, 20] = -100
    positions = [torch.arange(b - a) for a, b in itertools.pairwise(PACKED)]
    return {
        "input_ids": ids.int(),
        "labels": labels.int(),
        "position_ids": torch.cat(positions).view(2, SEQ_LEN).int(),
        "cu_seqlens": torch.tensor(PACKED, dtype=torch.int32),
    }


def plain_batch() -> dict[str, Tensor]:
    """The same rows, each one document."""
    batch = packed_batch()
    return {
        **batch,
        "position_ids": torch.arange(SEQ_LEN, dtype=torch.int32).expand(2, -1),
        "cu_seqlens": torch.tensor([0, 24, 48], dtype=torch.int32),
    }


def relative_error(value: Tensor, reference: Tensor) -> float:
    """The largest difference over the largest reference."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).abs().max() / reference.abs().max())
