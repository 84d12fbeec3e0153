"""Which kernel a run gets."""

from __future__ import annotations

import logging
from typing import Literal

from llmtrain.config import Config
from llmtrain.model.kernels import eager, sdpa
from llmtrain.model.kernels.base import Kernel

log = logging.getLogger(__name__)


class AttentionConfig(Config):
    """How attention is computed; never what it computes."""

    backend: Literal["auto", "eager", "sdpa"]
    """eager is the readable reference, sdpa torch's fused attention, auto the fastest exact one here."""

    def kernel(self) -> Kernel:
        """The kernel that `backend` names. `auto` says in the log which one it took and why."""
        if self.backend == "eager":
            return eager.KERNEL
        if self.backend == "auto":
            log.info(
                "model.attention.backend=auto: sdpa (exact on every device; documents and ALiBi as one mask "
                "a forward, and no mask at all where each row is one document)"
            )
        return sdpa.KERNEL
