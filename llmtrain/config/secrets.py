"""What must not be written down: by the name of a key, or by the look of a value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

LEFT_OUT = "<left out>"
"""What stands in config.yaml and in wandb where a secret stood."""

# `text_key` and `max_new_tokens` are no secrets: only whole words count, and a bare "key" only after a
# word that makes it one.
SECRET_NAME = re.compile(
    r"(^|_)(token|secret|password|passwd|credentials?|apikey|(api|access|auth|private|secret|account)_key)$|^key$",
    re.IGNORECASE,
)
# Hugging Face, OpenAI, GitHub, AWS and wandb tokens; a password inside a URL, which may hold an @ itself; and
# what signs a URL, of which the name (`kept`) stays.
SECRET_VALUE = re.compile(
    r"\b(?:hf_\w{20,}|sk-[\w-]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}|wandb_v1_\w{20,})"
    r"|(?<=://)[^/\s:@]*:[^/\s]+(?=@)"
    r"|(?P<kept>(?i:[?&;](?:[\w.-]*[_.-])?(?:sig|signature|token|secret|passw(?:or)?d|credentials?|api_?key)="
    r"|[?&;](?:key|(?:access|auth|private|secret|account)[_-]key)=))[^&;#\s\"'<]+"
)


def redact(value: Any, name: str = "") -> Any:
    """A copy of plain nested values without secrets: by the name of a key, or by the look of a value."""
    if isinstance(value, Mapping):
        return {key: redact(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner, name) for inner in value]
    if isinstance(value, str) and value:
        return LEFT_OUT if SECRET_NAME.search(name) else without_secrets(value)
    return value


def without_secrets(text: str) -> str:
    """A text in which nothing is left that looks like a key, a password or a signature."""
    return SECRET_VALUE.sub(_without_secret, text)


def _without_secret(found: re.Match[str]) -> str:
    return (found["kept"] or "") + LEFT_OUT
