"""Measure a trained model on held-out text: llmtrain evaluate runs/quickstart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.config.door import Parser, plain_door, step_or_best
from llmtrain.config.table import print_table

if TYPE_CHECKING:
    from llmtrain.training.finished import Step


def evaluate(run: Path, step: Step) -> dict[str, Any]:
    """Loss and bits per byte a source beside the unigram and shuffled-context baselines.

    Writes eval/heldout.json and the report anew. The held-out documents are those the run was trained
    without: they are prepared again if they are no longer in the run's cache.
    """
    from llmtrain.distributed import World
    from llmtrain.training.build import build_dataset
    from llmtrain.training.evaluation import Unigram, evaluate_model, open_held_out
    from llmtrain.training.finished import LocalModel, open_finished
    from llmtrain.training.report import write_report
    from llmtrain.training.run_directory import RunDirectory

    finished = open_finished(run, step)
    config = finished.config
    train_sources, held_out = finished.sources()
    dataset = build_dataset(config, train_sources).resumed(finished.record["data"])
    results = evaluate_model(
        LocalModel(finished.model).loss,
        open_held_out(held_out, config, config.callbacks.evaluation.documents),
        world=World(),
        unigram=Unigram.of(dataset, finished.step, finished.tokenizer.vocab_size),
        shuffle_seed=config.seed,
    )
    RunDirectory(run).write_json("eval/heldout.json", {"step": finished.step, **results})
    write_report(run)
    return results


def show(results: dict[str, Any]) -> None:
    """Print the scores as a table."""
    rows = []
    for name, scores in [*results["sources"].items(), ("all", results["all"])]:
        keys = ("loss", "bits_per_byte", "shuffled_bits_per_byte", "unigram_bits_per_byte")
        numbers = ["-" if scores[key] is None else f"{scores[key]:.4f}" for key in keys]
        rows.append([name, *numbers, f"{scores['bytes']:,}"])
    headings = "source", "loss", "bits per byte", "shuffled context", "unigram", "bytes"
    print_table("held-out text", headings, rows)


def main(argv: list[str] | None = None) -> int:
    """The door of `llmtrain evaluate`."""
    parser = Parser(prog="llmtrain evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument(
        "--step", type=step_or_best, help="the checkpoint of this step, or `best` (default: the newest)"
    )
    a = parser.parse_args(argv)
    return plain_door(lambda: show(evaluate(a.run, a.step)))


if __name__ == "__main__":
    raise SystemExit(main())
