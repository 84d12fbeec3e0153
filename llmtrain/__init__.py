"""llmtrain: distributed pretraining of language models from raw text."""

__version__ = "0.1.0"
