"""Typed configuration: the base class of every config, and its errors."""

from llmtrain.config.base import Config, choice, label
from llmtrain.config.errors import ExitCode, UserError, describe

__all__ = ["Config", "ExitCode", "UserError", "choice", "describe", "label"]
