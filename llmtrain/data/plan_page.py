"""The page of a plan: the mixture with a slider a weight, in one file without any address in it.

plan_page.html is the page. Its script computes what `llmtrain.data.mixture` computes, to the window: decimals
become whole weights, and these a period of Tijdeman's chairman assignment. Its state stands in the address
behind `#`, such as `#web=0.5&tokens=3e11`; `web@2=0.5` is the weight in the second stage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path

from llmtrain import __version__
from llmtrain.data.config import DataConfig
from llmtrain.data.mixture import LONGEST_PERIOD, Weight
from llmtrain.data.plan import HAIR, MANY_EPOCHS, TOO_MANY_EPOCHS, Plan


def plan_page(name: str, plan: Plan, data: DataConfig, presets: Mapping[str, Mapping[str, Weight]]) -> str:
    """The whole document; `presets` are weights by a label, each a button."""
    facts = {
        "seqLen": plan.run.seq_len,
        "rows": plan.run.global_batch_size,
        "steps": plan.run.steps,
        "skip": data.skip,
        "longest": LONGEST_PERIOD,
        "many": MANY_EPOCHS,
        "tooMany": TOO_MANY_EPOCHS,
        "hair": HAIR,
        "sources": [
            {
                "name": key,
                "size": source.size,
                "exact": source.exact,
                "how": source.how,
                "byEpochs": data.sources[key].epochs is not None,
            }
            for key, source in plan.sources.items()
        ],
        "stages": [{"from": stage.from_step, "weights": _written(stage.weights)} for stage in plan.stages],
        "presets": {label: _written(weights) for label, weights in presets.items()},
    }
    fields = {
        "TITLE": escape(name),
        "NOTES": "".join(f"<p class=soft>As given: {escape(note)}.</p>" for note in plan.notes),
        "VERSION": escape(__version__),
        # "<" would let a string in the data end the script element; JSON may say it in another way.
        "FACTS": json.dumps(facts, allow_nan=False).replace("<", "\\u003c"),
    }
    page = Path(__file__).with_name("plan_page.html").read_text(encoding="utf-8")
    return re.sub("@([A-Z]+)@", lambda found: fields[found[1]], page)


def _written(weights: Mapping[str, Weight]) -> dict[str, str]:
    """Decimals as the mixture reads them: as they are written."""
    return {name: str(weight) for name, weight in weights.items()}
