"""Attention kernels, one file a backend: what they compute is the same, what they need is not."""

from llmtrain.model.kernels.base import Kernel, Prepared
from llmtrain.model.kernels.choose import AttentionConfig, Shape, Use

__all__ = ["AttentionConfig", "Kernel", "Prepared", "Shape", "Use"]
