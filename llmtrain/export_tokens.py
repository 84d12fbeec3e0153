"""Write prepared tokens for Megatron-LM: llmtrain export_tokens <prepared directory> <prefix>."""

from __future__ import annotations

import sys
from pathlib import Path

from llmtrain.config.door import Parser, plain_door


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="llmtrain export_tokens", description=__doc__)
    parser.add_argument("prepared", type=Path, help="a directory with an index.json of `llmtrain prepare`")
    parser.add_argument("prefix", type=Path, help="<prefix>.bin and <prefix>.idx are written")
    a = parser.parse_args(argv)

    def run() -> None:
        from llmtrain.data.megatron import write_megatron
        from llmtrain.data.shards import ShardedSource

        written = write_megatron(ShardedSource.open(a.prepared), a.prefix)
        sys.stdout.write(
            f"{a.prefix}.bin, {a.prefix}.idx: {written.documents:,} documents,"
            f" {written.tokens:,} tokens, {written.dtype}\n"
            f"In Megatron-LM: --data-path {a.prefix}, with the tokenizer of {a.prepared}\n"
        )

    return plain_door(run)


if __name__ == "__main__":
    raise SystemExit(main())
