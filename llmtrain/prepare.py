"""Turn the sources' text into token shards ahead of training, and show what they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmtrain.config.hydra import hydra_door
from llmtrain.training import train_config

if TYPE_CHECKING:
    from llmtrain.data.prepare import Prepared
    from llmtrain.training.config import TrainConfig


def run(config: TrainConfig) -> int:
    """Prepare every source of the config and print one line each."""
    from llmtrain.data.prepare import prepare

    prepared = prepare(config.data, config.tokenizer, config.cache_dir)
    if _is_main():
        show(prepared)
    return 0


def show(prepared: Prepared) -> None:
    """Print a table of the prepared sources, and below it where their shards are."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"prepared with a tokenizer of {prepared.tokenizer.vocab_size:,} ids")
    for number, heading in enumerate(("source", "documents", "tokens", "bytes", "bytes a token", "held out")):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows(prepared):
        table.add_row(*row)
    console = Console(soft_wrap=True)
    console.print(table)
    for name, source in prepared.sources.items():
        console.print(f"{name}: {source.train.resolve()}", highlight=False)


def rows(prepared: Prepared) -> list[list[str]]:
    """Source, training documents, tokens and bytes of text, bytes a token, and held-out documents."""
    from llmtrain.data.shards import ShardedSource

    table = []
    for name, source in prepared.sources.items():
        index: dict[str, Any] = ShardedSource.open(source.train).index
        held_out = ShardedSource.open(source.validation).documents if source.validation else 0
        ratio = index["text_bytes"] / index["tokens"]
        counts = [f"{index[key]:,}" for key in ("documents", "tokens", "text_bytes")]
        table.append([name, *counts, f"{ratio:.2f}", f"{held_out:,}"])
    return table


def _is_main() -> bool:
    from llmtrain.distributed import World

    return World.from_environment().is_main


def main(argv: list[str] | None = None) -> int:
    """The door of `llmtrain prepare` and `python -m llmtrain.prepare`."""
    return hydra_door(train_config, run, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
