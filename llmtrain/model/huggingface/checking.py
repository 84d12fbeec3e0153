"""What `transformers` computes from a directory, to compare with."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.importing import quiet_libraries


def versions() -> dict[str, str]:
    """Of what an export was written and compared with."""
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


@torch.no_grad()
def logits_there(directory: Path, input_ids: Tensor) -> Tensor:
    """Logits [rows, T, V] of ids [rows, T] by the model that `transformers` loads in fp32, on the CPU."""
    with quiet_libraries():
        import_module("transformers.modeling_utils")  # torchao with it, where that is installed
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return model.eval()(input_ids).logits
