"""Attention kernels, one file a backend: what they compute is the same, what they need is not."""

from llmtrain.model.kernels.base import Kernel, Prepared
from llmtrain.model.kernels.choose import AttentionConfig, KernelConfig, Shape, Use

__all__ = ["AttentionConfig", "Kernel", "KernelConfig", "Prepared", "Shape", "Use"]
