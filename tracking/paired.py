"""Whether two trials differ by more than chance: a paired bootstrap over the test windows.

Both trials were measured on the same windows, so windows are drawn in pairs and the difference is taken within each
draw. What makes one window harder than another then cancels, and differences show that lie far inside the intervals of
the two perplexities. Source: Koehn (2004), "Statistical Significance Tests for Machine Translation Evaluation".
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from pare.tracking.record import Trial

DRAWS = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Relative change of perplexity from one trial to another, with its interval: 0.1 is 10 % higher."""

    change: float
    low: float
    high: float

    @property
    def beyond_noise(self) -> bool:
        return self.low > 0 or self.high < 0


def compare(trial: Trial, reference: Trial) -> Difference | None:
    """ppl(trial) / ppl(reference) - 1; None where the two were not measured on the same windows."""
    a, b = trial.get("windows") or {}, reference.get("windows") or {}
    if not a.get("nll") or a.get("tokens") != b.get("tokens") or len(a["nll"]) != len(b.get("nll", [])) or len(a["nll"]) < 2:
        return None
    pairs = list(zip(a["nll"], b["nll"], a["tokens"], strict=True))

    def change(drawn: list[tuple[float, float, float]]) -> float:
        return math.expm1(sum(x - y for x, y, _ in drawn) / sum(n for _, _, n in drawn))

    chance = random.Random(0)  # the same draws for every pair of trials
    draws = sorted(change(chance.choices(pairs, k=len(pairs))) for _ in range(DRAWS))
    tail = round((1 - LEVEL) / 2 * DRAWS)
    return Difference(change(pairs), draws[tail], draws[-1 - tail])
