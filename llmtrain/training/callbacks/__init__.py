"""What happens beside the training: evaluation, samples and predictions; one behaviour a file."""

from llmtrain.training.callbacks.base import Callback, CallbackConfig, Engine, Run

__all__ = ["Callback", "CallbackConfig", "Engine", "Run"]
