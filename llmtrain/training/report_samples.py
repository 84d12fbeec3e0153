"""The section of report.html on samples: what the model wrote, with the prompts set apart."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

MOST_SAMPLES = 12


def samples_section(directory: Path) -> str:
    """The newest samples, and a few earlier ones folded away; empty where there are none."""
    files = sample_files(directory)
    if not files:
        return ""
    *earlier, last = files
    few = spread(earlier, MOST_SAMPLES)
    inner = "".join(
        f"<p class=soft>step {step_of(file)}</p><div class=card>{_sample(file)}</div>" for file in few
    )
    what = "Earlier samples" if few == earlier else f"{len(few)} of {len(earlier)} earlier samples"
    more = f"<details><summary>{what}</summary>{inner}</details>" if few else ""
    return f"<h2>Samples after step {step_of(last)}</h2><div class=card>{_sample(last)}</div>{more}"


def sample_files(directory: Path) -> list[Path]:
    """The files of samples in the order of their steps."""
    return sorted(directory.glob("step_*.txt"), key=step_of)


def spread(items: Sequence[Path], most: int) -> list[Path]:
    """At most `most` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def read_samples(file: Path) -> list[tuple[str, str]]:
    """(prompt, continuation) of each block of a file of samples; without blocks, the text after no prompt."""
    blocks = re.split(r"^--- prompt \d+: (.*)\n", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if len(blocks) == 1:
        return [("", blocks[0])]
    return [_parted(*pair) for pair in zip(blocks[1::2], blocks[2::2], strict=True)]


def _parted(quoted: str, text: str) -> tuple[str, str]:
    try:
        prompt = str(ast.literal_eval(quoted))
    except (ValueError, SyntaxError):
        prompt = ""
    begin = prompt if text.startswith(prompt) else ""
    return begin, text[len(begin) :].rstrip()


def _sample(file: Path) -> str:
    """A file of samples as HTML: a block a prompt, the prompt itself set apart."""
    return "".join(f"<pre><b>{escape(prompt)}</b>{escape(text)}</pre>" for prompt, text in read_samples(file))


def step_of(file: Path) -> int:
    return int(re.sub(r"\D", "", file.stem) or 0)
