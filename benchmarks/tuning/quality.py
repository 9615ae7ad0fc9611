"""What tuning is worth: real sweeps by the command line, compared on the test windows by the report's own paired bootstrap.

Each reading is named by its sweep, and its argument is the number of optimizer steps; by hand, further overrides may follow:

    soup    six LoRA members, the greedy and the uniform soup of them, and the base
    heal    GPTQ at 3 and 2 bits, and the same healed by QLoRA
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.core.inputs import progress_to_stderr
from pare.tracking.paired import PPL, compare
from pare.tracking.record import Record, Trial
from pare.workers.store import Store

EXPERIMENTS = Path(__file__).parent / "experiments"


@contextmanager
def swept(experiment: str, *overrides: str) -> Iterator[tuple[Record, Store]]:
    """Runs one of the experiments in a home of its own: what `pare report --json` says of it, and the store."""
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "PARE_HOME": home}

        def pare(*words: str, output: int | None = None) -> str:
            command = [sys.executable, "-m", "pare", *words]
            return subprocess.run(command, env=environment, cwd=home, check=True, text=True, stdout=output).stdout

        pare("run", "--config-dir", str(EXPERIMENTS), f"experiment={experiment}", *overrides)
        yield json.loads(pare("report", "--json", output=subprocess.PIPE)), Store(Path(home, "store"))


def of_block(report: Record, block: str) -> list[Trial]:
    return [trial for trial in report["trials"] if trial["block"] == block]


def apart(name: str, trial: Trial, reference: Trial) -> dict[str, float]:
    """By how many per cent the perplexity of a trial is above that of another, with the interval."""
    found = compare(trial, reference)
    if found is None:
        raise SystemExit(f"{trial['trial']} and {reference['trial']} were not measured on the same windows")
    return {name: 100 * found.change, f"{name}_low": 100 * found.low, f"{name}_high": 100 * found.high}


def ppl(**trials: Trial) -> dict[str, float]:
    return {f"{name}_ppl": trial["metrics"][PPL] for name, trial in trials.items()}


def soup(steps: str, *overrides: str) -> dict[str, float]:
    with swept("tuning_soup", f"recipe.tune.steps={steps}", *overrides) as (report, store):
        members = {trial["trial"]: trial for trial in of_block(report, "lora")}
        (base,), (greedy,), (uniform,) = (of_block(report, block) for block in ("base", "greedy", "uniform"))
        said = json.loads((store.path(uniform["artifact"]) / "soup.json").read_text())["members"]
    best = members[min(said, key=lambda member: member["score"])["name"]]
    return {
        **ppl(base=base, best=best, greedy=greedy, uniform=uniform),
        **apart("greedy_to_best", greedy, best),
        **apart("uniform_to_best", uniform, best),
        **apart("best_to_base", best, base),
        "members": len(said),
        "taken": greedy["metrics"]["merge/accepted"],
    }


def heal(steps: str, *overrides: str) -> dict[str, float]:
    with swept("tuning_heal", f"recipe.heal.steps={steps}", *overrides) as (report, _):
        (base,) = of_block(report, "base")
        found = ppl(base=base)
        for bits in (3, 2):
            plain, healed = (
                next(t for t in of_block(report, block) if t["overrides"]["recipe.quantize.bits"] == bits)
                for block in ("gptq", "healed")
            )
            found |= ppl(**{f"gptq{bits}": plain, f"healed{bits}": healed}) | apart(f"healed{bits}_to_gptq", healed, plain)
    return found


if __name__ == "__main__":
    answer = os.dup(1)
    progress_to_stderr()
    work: Callable[..., dict[str, float]] = {"soup": soup, "heal": heal}[sys.argv[1]]
    os.write(answer, f"{json.dumps(work(*sys.argv[2:]))}\n".encode())
