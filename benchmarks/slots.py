"""`make bench-slots`: where the slot time of a finished run went, from its ledger. 90 % is to be inside methods and evaluation.
It also says how near the estimates came that were made before.

Slot time is slots x the wall time of the run. Of an attempt its task's own clock tells the time in the task, and how much
of that went into loading and saving; what is left of the time that the driver saw is the way there and back: start of the
worker, publication, Ray, the driver's turn. A search holds no slot, but its probes do: they are counted by what they cost.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from pare.orchestrator import hardware
from pare.orchestrator.costs import attempts_of, estimated
from pare.orchestrator.engine import ALONE, COORDINATED
from pare.orchestrator.estimate import accuracy
from pare.orchestrator.ledger import Ledger

RESULT = Path(__file__).parent / "results" / "slots.json"
TARGET = 0.9

WHERE = {
    "work": "in methods and evaluation",
    "load": "loading, saving and imports in tasks",
    "hand_over": "start of workers, publication, Ray, driver",
    "failed": "in attempts that failed",
    "before": "idle before the first task",
    "waiting": "idle while tasks waited for others",
    "tail": "idle after the last task had started",
}


@dataclass(frozen=True)
class Attempt:
    type: str
    started: float
    """Seconds since 1970, as the driver saw it."""
    finished: float
    ok: bool
    cost: dict[str, float]


def account(started: float, finished: float, slots: int, attempts: Sequence[Attempt]) -> dict[str, float]:
    """Slot seconds of a run from `started` to `finished`, by where they went (see `WHERE`)."""
    spent: dict[str, float] = defaultdict(float, dict.fromkeys(WHERE, 0.0))
    held: list[tuple[float, float, int]] = []  # from, to, slots
    probing = 0.0
    together: dict[float, list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        load = attempt.cost.get("load_s", 0.0)
        if attempt.type in COORDINATED:
            probes = attempt.cost.get("slot_s", attempt.cost.get("cpu_s", 0.0))
            probing += probes
            spent["work" if attempt.ok else "failed"] += probes
        elif attempt.type in ALONE and attempt.ok:
            together[round(attempt.finished, 1)].append(attempt)
        else:
            held.append((attempt.started, attempt.finished, 1))
            span = attempt.finished - attempt.started
            inside = min(attempt.cost.get("wall_s", 0.0), span)
            spent["work" if attempt.ok else "failed"] += inside - (load if attempt.ok else 0.0)
            spent["load"] += load if attempt.ok else 0.0
            spent["hand_over"] += span - inside
    for batch in together.values():  # one job on all slots; each attempt tells its share
        start, end = min(a.started for a in batch), max(a.finished for a in batch)
        inside, load = (sum(a.cost.get(name, 0.0) for a in batch) for name in ("wall_s", "load_s"))
        held.append((start, end, slots))
        spent["work"] += slots * (inside - load)
        spent["load"] += slots * load
        spent["hand_over"] += slots * (end - start - inside)
    first, last = min((h[0] for h in held), default=finished), max((h[0] for h in held), default=finished)
    for name, start, end in (("before", started, first), ("waiting", first, last), ("tail", last, finished)):
        used = sum(n * max(0.0, min(to, end) - max(since, start)) for since, to, n in held)
        spent[name] += slots * max(0.0, end - start) - used
    spent["waiting"] -= probing
    return dict(spent)


def read(home: Path, sweep: str | None) -> tuple[dict[str, Any], list[Attempt]]:
    """The latest run of a sweep in which something ran and that came to its end, and its attempts."""
    with closing(Ledger(home)) as ledger:
        found = ledger.find_sweep(sweep)["id"]
        query = "SELECT * FROM run WHERE sweep = ? AND executed AND status IN ('done', 'failed') ORDER BY started DESC"
        runs = ledger.rows(query, found)
        if not runs:
            raise SystemExit(f"no run of sweep {found} in {home} has finished. Try: make demo")
        query = "SELECT attempt.*, type FROM attempt JOIN task USING (fingerprint) WHERE run = ? AND attempt.finished > 0"
        rows = ledger.rows(query, runs[0]["id"])
    attempts = [
        Attempt(row["type"], row["started"], row["finished"], row["status"] == "done", json.loads(row["cost"] or "{}"))
        for row in rows
    ]
    return dict(runs[0]), attempts


def how_near(home: Path, sweep: str) -> dict[str, Any]:
    """How near what `pare plan` would have said of the sweep came to what it cost."""
    with closing(Ledger(home)) as ledger:
        return accuracy(*estimated(attempts_of(ledger, sweep)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", nargs="?", help="id or name; default: the latest")
    parser.add_argument("--home", type=Path, default=Path(os.environ.get("PARE_HOME", ".pare")))
    parser.add_argument("--slots", type=int, default=hardware.cores())
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    run, attempts = read(given.home, given.sweep)
    spent = account(run["started"], run["finished"], given.slots, attempts)
    total = given.slots * (run["finished"] - run["started"])
    for name, text in WHERE.items():
        print(f"{spent[name]:9.1f} s {spent[name] / total:6.1%}  {text}")
    if not any("load_s" in attempt.cost for attempt in attempts):
        print("this ledger does not tell loading from work", file=sys.stderr)
    by_type: dict[str, float] = defaultdict(float)
    for attempt in attempts:
        by_type[attempt.type] += attempt.cost.get("wall_s", 0.0)
    result = {
        "schema_version": 1,
        **provenance("benchmarks.slots", "torch", "ray", "transformers"),
        "sweep": run["sweep"],
        "slots": given.slots,
        "wall_s": run["finished"] - run["started"],
        "slot_s": total,
        "share": {name: spent[name] / total for name in WHERE},
        "target": TARGET,
        "reached": spent["work"] / total >= TARGET,
        "estimates": how_near(given.home, run["sweep"]),
        "task_s": dict(sorted(by_type.items(), key=lambda item: -item[1])),
    }
    given.result.parent.mkdir(parents=True, exist_ok=True)
    given.result.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
