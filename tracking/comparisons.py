"""Every finished trial against the base and against the best, metric by metric, as far as the same was measured of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pare.tracking import units
from pare.tracking.paired import DRAWS, PPL, SEED, Difference, compare
from pare.tracking.record import Record, Trial, base_trial, direction, labels, measured

MOST_TRIALS = 100
"""Trials whose differences are spelt out: the front and the first; each takes thousands of draws."""

HOW = (
    f"Differences with 95 % intervals by paired bootstrap over the same windows or questions ({DRAWS:,} draws, seed {SEED}). "
    "Where the interval holds zero, the two are not distinguishable."
)


@dataclass(frozen=True)
class Row:
    trial: str
    """What the trial is called in tables and sentences."""
    metric: str
    base: str
    """The difference to the base, in words."""
    best: str
    """The difference to the best."""
    winner: str
    """Which trial is the best."""


def metrics_to_compare(record: Record) -> list[str]:
    """Perplexity, and every metric of which two trials have kept their answers."""
    kept = [name for t in measured(record) for name in (t.get("answers") or {})]
    return [PPL, *sorted({name for name in kept if kept.count(name) > 1})]


def rows(record: Record) -> list[Row]:
    """Perplexity of all trials first. Empty where there are not two finished trials to compare."""
    name_of, base = labels(record), base_trial(record)
    found = []
    for metric in metrics_to_compare(record):
        trials = measured(record, metric)
        if len(trials) < 2:
            continue
        pick: Callable[..., Trial] = min if direction(record, metric) == "lower" else max
        best = pick(trials, key=lambda t: t["metrics"][metric])
        shown = {t["trial"] for t in sorted(trials, key=lambda t: not t["pareto"])[:MOST_TRIALS]}
        for t in (t for t in trials if t["trial"] in shown):
            to_base, to_best = (
                "is the " + role if t is other else words(compare(t, other, metric)) if other else units.MISSING
                for role, other in (("base", base), ("best", best))
            )
            found.append(Row(name_of[t["trial"]], metric.removeprefix("quality/"), to_base, to_best, name_of[best["trial"]]))
    return found if any("%" in row.base + row.best or "points" in row.base + row.best for row in found) else []


def words(difference: Difference | None) -> str:
    """`+1.2 % (+0.4 % to +2.0 %)`, and that it is none where its interval holds zero."""
    if difference is None:
        return units.MISSING
    show = units.percent if difference.relative else points
    change, low, high = (show(x, signed=True) for x in (difference.change, difference.low, difference.high))
    return f"{change} ({low} to {high})" + ("" if difference.beyond_noise else ", not distinguishable")


def points(share: float, signed: bool = True) -> str:
    """
    >>> points(0.0312), points(-0.5), points(0.0)
    ('+3.1 points', '−50.0 points', '±0.0 points')
    """
    if signed and abs(100 * share) < 0.05:
        return "±0.0 points"
    return f"{100 * share:{'+' if signed else ''}.1f} points".replace("-", "−")
