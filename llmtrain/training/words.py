"""Numbers, times and models in the words of people, as console, report and doors write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def duration(seconds: float) -> str:
    """`1:05` (minutes) or `3:01:05` (hours), `2d 03:01:05` above a day."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def short(number: float) -> str:
    """`950`, `12.3k`, `4.56M`, `1.23B`: three digits."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size * 0.9995:
            scaled = number / size
            return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f}{letter}"
    return f"{number:.0f}" if abs(number) >= 9.95 or number == int(number) else f"{number:.2g}"


def span(seconds: float) -> str:
    """`45 s`, `2 min 22 s`, `3 h 12 min` or `2 d 3 h`: the two largest units."""
    rest, parts = round(seconds), list[str]()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def one_line(error: BaseException) -> str:
    """What an error says, and its type, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def percent(share: float) -> str:
    """`41.2 %` of 0.412."""
    return f"{100 * share:.1f} %"


def count(number: int, thing: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


SPELLING = {
    "rope": "RoPE",
    "alibi": "ALiBi",
    "learned": "learned positions",
    "none": "no positions",
    "swiglu": "SwiGLU",
    "gelu": "GELU",
    "rmsnorm": "RMSNorm",
    "layernorm": "LayerNorm",
}


def describe_model(model: Mapping[str, Any]) -> list[str]:
    """`4 layers`, `d_model 256`, `4 heads (MQA)`, ... of a model's config; missing keys are left out."""
    parts = [count(model["n_layers"], "layer")] if "n_layers" in model else []
    parts += [f"d_model {model['d_model']}"] if "d_model" in model else []
    heads, shared = model.get("n_heads"), model.get("n_kv_heads")
    if heads and shared:
        kind = "MQA" if shared == 1 else "MHA" if shared == heads else f"GQA, {shared} for keys and values"
        parts.append(f"{heads} heads ({kind})")
    chosen = [(model.get("position") or {}).get("kind"), model.get("feed_forward"), model.get("norm")]
    return parts + [SPELLING.get(name, name) for name in chosen if isinstance(name, str)]
