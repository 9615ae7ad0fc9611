"""A sweep as a data frame, for a person's own analysis."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas


def results(sweep: str | None = None, home: str | os.PathLike[str] | None = None) -> pandas.DataFrame:
    """One row for each trial: trial, block, recipe, status, pareto, a column for each override and each metric.

    sweep: id or name, None the latest; home: a PARE_HOME, None that of the environment, else ./.pare. What a trial cost are
    its metrics `cost/...`; `cost/alone_s` is the time of all its tasks had it run alone.
    """
    import pandas

    from pare.orchestrator import places
    from pare.orchestrator.record import build_record

    place = Path(home or os.environ.get("PARE_HOME") or ".pare")
    ledger = places.ledger_of(place)
    row = ledger.find_sweep(sweep)
    record = build_record(ledger, places.store_of(place, row), row["id"])
    told = ("trial", "block", "recipe", "status", "pareto")
    alone = {name: cost["alone_s"] for name, cost in record["cost"]["trials"].items()}
    return pandas.DataFrame(
        [
            {**{key: t[key] for key in told}, **t["overrides"], **t["metrics"], "cost/alone_s": alone[t["trial"]]}
            for t in record["trials"]
        ]
    )
