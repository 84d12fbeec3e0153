"""Say what a run will read and what it will cost: shares and epochs, parameters, memory, time."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from llmtrain.config.hydra import hydra_door
from llmtrain.config.table import print_lines, print_table

if TYPE_CHECKING:
    from llmtrain.data.plan import Plan
    from llmtrain.training.planning import PlanConfig
    from llmtrain.training.sizing.choose import Sizing


def plan_config() -> type[PlanConfig]:
    """The class of the root config. Imported when asked for: torch comes with it, `--help` does without."""
    from llmtrain.training.planning import PlanConfig

    return PlanConfig


def run(config: PlanConfig) -> int:
    """Measure the sources, print the table, write plan.json and the page into the run directory."""
    from llmtrain.distributed import World
    from llmtrain.training.planning import measure, plan_json, plan_of, size_of, write_plan

    if not World.from_environment().is_main:
        return 0
    sizing = size_of(config)
    sizes = measure(config)
    plan = plan_of(config, sizes)
    file, page = write_plan(config, plan, sizes, sizing)
    if config.format == "json":
        sys.stdout.write(json.dumps(plan_json(config, plan, sizing), indent=2, ensure_ascii=False) + "\n")
        return 0
    show(plan)
    show_sizing(sizing, plan.run.tokens)
    if config.weights != "given":
        show_weights(config, plan)
    sys.stdout.write(f"\n{file}\n{page}: the same with sliders, in a browser\n")
    return 0


def show(plan: Plan) -> None:
    """Print the table, and below it the totals and everything that needs saying."""
    from llmtrain.training.planning import HEADINGS, remarks, rows

    print_table(f"{plan.run.tokens:,} tokens in {plan.run.steps:,} steps", HEADINGS, rows(plan))
    print_lines(*remarks(plan))


def show_sizing(sizing: Sizing, tokens: int) -> None:
    """Print every way to train, and below it what the run costs as configured and at its cheapest."""
    from llmtrain.training.sizing.words import HEADINGS, remarks, rows, title

    sys.stdout.write("\n")
    print_table(title(sizing), HEADINGS, rows(sizing, tokens))
    print_lines(*remarks(sizing, tokens))


def show_weights(config: PlanConfig, plan: Plan) -> None:
    """Print the helper's weights as YAML."""
    from llmtrain.data.plan import weights_yaml

    weights = {name: source.weight for name, source in plan.sources.items()}
    sys.stdout.write(f"\n# weights={config.weights}, to be copied\n{weights_yaml(weights, config.data)}")


def main(argv: list[str] | None = None) -> int:
    """The door of `llmtrain plan` and `python -m llmtrain.plan`."""
    return hydra_door(plan_config, run, __doc__, argv, primary="plan")


if __name__ == "__main__":
    raise SystemExit(main())
