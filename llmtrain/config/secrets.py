"""What must not be written down: by the name of a key, by the look of a value, or because the environment
keeps it under such a name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LEFT_OUT = "<left out>"
"""What stands in every file, and on the console, where a secret stood."""

SHORTEST = 8
"""Characters of a secret of the environment that is looked for in texts."""

_WORD = (
    r"(?:token|secret|passw(?:or)?d|passphrase|credentials?|authorization"
    r"|api_?key|(?:access|auth|private|secret|account)_?key)"
)
# `text_key` and `max_new_tokens` are no secrets: only whole words count, and a bare "key" only after a
# word that makes it one.
SECRET_NAME = re.compile(rf"(?:^|[_.-]){_WORD}$|^key$", re.IGNORECASE)

SECRET_VARIABLE = re.compile(rf"{SECRET_NAME.pattern}|passw(?:or)?d$|_(?:key|pass|pat|pwd)$", re.IGNORECASE)
"""Of a variable of the environment, KAGGLE_KEY and PGPASSWORD too: its value is left out of texts."""

SECRET_SHAPE = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:hf|api_org)_\w{20,}|wandb_v1_\w{20,}"
    r"|sk-(?=[\w-]*\d)[\w-]{20,}|[rs]k_(?:live|test)_\w{16,}|xai-\w{30,}|gsk_\w{30,}|pplx-\w{30,}|r8_\w{30,}"
    r"|nvapi-[\w-]{30,}|dapi[0-9a-f]{32}"
    r"|gh[pousr]_\w{20,}|github_pat_\w{20,}|gl(?:pat|ptt|dt)-[\w-]{20,}|npm_\w{36}|pypi-[\w-]{16,}"
    r"|dckr_pat_[\w-]{20,}"
    r"|A(?:KIA|SIA)[0-9A-Z]{16}|AIza[\w-]{35}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,}|dop_v1_\w{40,}"
    r"|hv[sb]\.[\w-]{20,}|SG\.[\w-]{16,}\.[\w-]{16,}|xox[abeoprs]-[\w-]{10,}|xapp-[\w-]{10,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
    r"|AGE-SECRET-KEY-1[0-9A-Z]{50,}"
    r")|-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----[\s\S]*?(?:-----END (?:[A-Z]+ )*PRIVATE KEY-----|\Z)"
)
"""Keys and tokens that vendors give a shape: no value of a config has any business with one."""

# A password inside a URL, which may hold an @ itself; what signs a URL; `name=value`, `"name": "value"` and
# HTTP's header. The name (`kept`) stays.
_SECRET_IN_TEXT = re.compile(
    rf"(?<=://)(?:{LEFT_OUT}|[^/\s:@]*):[^/\s]+(?=@)"
    r"|(?P<kept>(?i:[?&;](?:[\w.-]*[_.-])?(?:sig|signature|token|secret|passw(?:or)?d|credentials?|api_?key)="
    r"|[?&;](?:key|(?:access|auth|private|secret|account)[_-]key)=))[^&;#\s\"'<]+"
    r"|(?P<header>(?i:\bauthorization\s*[:=]\s*(?:\w+\s+)?|\bbearer\s+(?=\S*\d)))[^\s\"'<]{8,}"
    rf"|(?P<named>(?i:(?<![A-Za-z0-9]){_WORD}[\"']?\s*(?:=\s*[\"']?|:\s*[\"'])))[^\s\"',;&}}<]+"
    r"|(?P<hook>(?i:https://hooks\.slack\.com/services/|https://discord(?:app)?\.com/api/webhooks/))[\w/-]+"
)

_VARIABLES = {
    "hf_": "HF_TOKEN",
    "hub": "HF_TOKEN",
    "huggingface": "HF_TOKEN",
    "wandb": "WANDB_API_KEY",
    "AKIA": "AWS_ACCESS_KEY_ID",
    "ASIA": "AWS_ACCESS_KEY_ID",
    "aws_secret": "AWS_SECRET_ACCESS_KEY",
}
"""What a secret's key or value begins with or holds, and the variable that its library reads."""


def redact(value: Any, name: str = "") -> Any:
    """A copy of plain nested values without secrets, by the names of keys too."""
    return _redact(value, name, _of_environment())


def without_secrets(text: str) -> str:
    """A text in which nothing is left that looks like a key, a password or a signature, or is one of ours."""
    return _clean(text, _of_environment())


def refusal(key: str, value: str) -> str | None:
    """The mistake of a secret in a config, in a line without it; None where there is none.

    The password or the signature of a URL is needed where the URL is: it stays, and is left out everywhere
    that it would be written.
    """
    if not (SECRET_NAME.search(key) or SECRET_SHAPE.search(value)):
        return None
    told = f"{key}={value}".lower()
    variable = next((name for part, name in _VARIABLES.items() if part.lower() in told), None)
    where = f"set {variable} in the environment" if variable else "keep it in the environment"
    return (
        f"{without_secrets(key)}={LEFT_OUT}: this is, or looks like, a secret, and a config is written down: "
        f"{where}, where the library that needs it looks, and leave it out here"
    )


def texts_of(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in plain nested values."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from texts_of(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_of(inner, key)
    elif isinstance(value, str):
        yield key, value


def _redact(value: Any, name: str, ours: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        cleaned = {key: _clean(key, ours) if isinstance(key, str) else key for key in value}
        return {cleaned[key]: _redact(inner, str(key), ours) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(inner, name, ours) for inner in value]
    if isinstance(value, str) and value:
        return LEFT_OUT if SECRET_NAME.search(name) else _clean(value, ours)
    return value


def _clean(text: str, ours: Sequence[str]) -> str:
    for secret in ours:
        text = text.replace(secret, LEFT_OUT)
    return _SECRET_IN_TEXT.sub(_keep_name, SECRET_SHAPE.sub(LEFT_OUT, text))


def _of_environment() -> list[str]:
    """Values that the environment keeps under the name of a secret, the longest first."""
    found = {value for name, value in os.environ.items() if SECRET_VARIABLE.search(name)}
    return sorted((value for value in found if len(value) >= SHORTEST), key=len, reverse=True)


def _keep_name(found: re.Match[str]) -> str:
    if found[0].endswith(LEFT_OUT):
        return found[0]
    return next(filter(None, found.groups()), "") + LEFT_OUT
