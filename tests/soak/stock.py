"""The same trainer with DeepSpeed's own checkpoints: what kills during a save leave behind.

`patch` stands in each rank for what llmtrain does: `save_checkpoint` with `latest`, and a load by `latest`.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.ranks import PATCH, RankServer
from tests.soak.lives import Kill, Life

STOCK = "stock"
"""In the run directory, where DeepSpeed writes."""


def patch() -> None:
    """Let the trainer save and load as DeepSpeed's tutorial has it."""
    from llmtrain.training import trainer

    begin = trainer.begin

    def save(run: Any, **_: Any) -> bool:
        began = run.directory.checkpoints / f".tmp-{run.step}"  # what a `Life` looks for
        if run.world.is_main:
            began.mkdir(parents=True, exist_ok=True)
        place = str(run.directory.path / STOCK)
        run.engine.deepspeed.save_checkpoint(place, tag=f"step{run.step}", client_state={"step": run.step})
        if run.world.is_main:
            began.rmdir()
            for path in sorted((run.directory.path / STOCK).glob("step*"), key=lambda p: int(p.name[4:]))[
                :-2
            ]:
                shutil.rmtree(path)
        return True

    def begin_by_latest(run: Any) -> None:
        begin(run)
        place = run.directory.path / STOCK
        if (place / "latest").exists():  # else killed in its first save
            path, state = run.engine.deepspeed.load_checkpoint(str(place))
            assert path is not None, "DeepSpeed found nothing to load and would begin anew"
            run.step = state["step"]

    trainer.save, trainer.begin = save, begin_by_latest


def unresumable(
    server: RankServer, directory: Path, arguments: Sequence[str], kills: int, rng: random.Random
) -> dict[str, Any]:
    """Kill all ranks during `kills` saves; how many of these left a run whose next start fails, and how."""
    broken: list[str] = []
    number = made = 0
    run = directory / "run0"
    while made < kills:
        number += 1
        life = Life(
            server,
            [*arguments, f"output_dir={run}", "checkpoint.every=1"],
            run,
            directory / f"life{number}",
            launcher=False,
            patch={PATCH: f"{__name__}:patch"},
            save_seconds=0.3,
        )
        death = life.kill(Kill("all", "save", launcher=False), rng)
        if death is not None:
            made += death.mid_save
            shutil.rmtree(life.place)
            shutil.rmtree(run / "checkpoints")
            continue
        if not (run / "DONE").exists():
            broken.append(_reason(life.output()))
        shutil.rmtree(life.place)
        shutil.rmtree(run)
    return {"mid_save_kills": made, "unresumable": len(broken), "reasons": broken}


def _reason(output: str) -> str:
    """The last line that names an error."""
    lines = [line for line in output.splitlines() if "Error" in line]
    return lines[-1].strip()[:200] if lines else "no message"
