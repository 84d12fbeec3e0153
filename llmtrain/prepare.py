"""Turn the sources' text into token shards ahead of training, and show what they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmtrain.config.door import sigterm_is_like_ctrl_c
from llmtrain.config.hydra import hydra_door
from llmtrain.config.table import print_lines, print_table

if TYPE_CHECKING:
    from llmtrain.data.prepare import Prepared
    from llmtrain.training.config import PrepareConfig


def run(config: PrepareConfig) -> int:
    """Prepare every source of the config, or one share of them, and print one line each."""
    from llmtrain.data.prepare import parse_part, prepare

    part = parse_part(config.part)
    try:
        prepared = prepare(
            config.data, config.tokenizer, config.cache_dir, part=part, workers=config.data.workers
        )
    except KeyboardInterrupt as stop:
        stop.add_note("finished shards are kept, the same command goes on")
        raise
    if _is_main():
        show(prepared)
    return 0


def show(prepared: Prepared) -> None:
    """Print a table of the prepared sources, and below it where their shards are."""
    title = f"prepared with a tokenizer of {prepared.tokenizer.vocab_size:,} ids"
    headings = "source", "documents", "tokens", "bytes", "bytes a token", "held out", "rejected"
    print_table(title, headings, rows(prepared))
    for name, source in prepared.sources.items():
        print_lines(f"{name}: {where(source.train)}", *_reasons(prepared, name))


def rows(prepared: Prepared) -> list[list[str]]:
    """Source, training documents, tokens and bytes of text, bytes a token, held-out and rejected documents.

    Of a source of which other shares are still to be made: how many of its shards are there.
    """
    complete = prepared.complete_sources()
    train, held_out = complete.open()
    table = []
    for name in prepared.sources:
        if name not in train:
            table.append([name, prepared.progress(name), *[""] * 5])
            continue
        index: dict[str, Any] = train[name].index
        ratio = index["text_bytes"] / max(1, index["tokens"])
        counts = [f"{index[key]:,}" for key in ("documents", "tokens", "text_bytes")]
        others = held_out[name].documents if name in held_out else 0
        rejected = sum(prepared.rejected(name).values())
        table.append([name, *counts, f"{ratio:.2f}", f"{others:,}", f"{rejected:,}"])
    return table


def _reasons(prepared: Prepared, name: str) -> list[str]:
    """What was wrong with records, and where they are kept."""
    reasons = [f"{count:,} {reason}" for reason, count in sorted(prepared.rejected(name).items())]
    kept = prepared.quarantine(name)
    lines = [f"  rejected: {', '.join(reasons)}"] if reasons else []
    return [*lines, f"  kept in {kept[0].parent}"] if kept else lines


def where(place: Any) -> str:
    """A directory's absolute path, or a URL."""
    return place if isinstance(place, str) else str(place.resolve())


def _is_main() -> bool:
    from llmtrain.distributed import World

    return World.from_environment().is_main


def _config() -> type[PrepareConfig]:
    from llmtrain.training.config import PrepareConfig

    return PrepareConfig


def main(argv: list[str] | None = None) -> int:
    """The door of `llmtrain prepare` and `python -m llmtrain.prepare`."""
    with sigterm_is_like_ctrl_c():
        return hydra_door(_config, run, __doc__, argv, primary="prepare")


if __name__ == "__main__":
    raise SystemExit(main())
