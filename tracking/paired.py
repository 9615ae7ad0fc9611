"""Whether two trials differ by more than chance: a paired bootstrap over the test windows, or over the questions.

Both trials were measured on the same windows and asked the same questions, so these are drawn in pairs and the difference is
taken within each draw. What makes one window harder than another then cancels, and differences show that lie far inside the
intervals of the two figures. Source: Koehn (2004), "Statistical Significance Tests for Machine Translation Evaluation".
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

import numpy as np

from pare.tracking.record import Trial

PPL = "quality/ppl"
DRAWS = 2000
LEVEL = 0.95
SEED = 0
"""The same draws for every pair of trials."""

WORTH = {"0": 0.0, "1": 1.0, "5": 0.5}
"""What a character of `answers` stands for."""


@dataclass(frozen=True)
class Difference:
    """How far one trial is from another, with the interval: of perplexity as a fraction (0.1 is 10 % higher), of a share of
    right answers as the difference of the shares."""

    change: float
    low: float
    high: float
    relative: bool

    @property
    def beyond_noise(self) -> bool:
        return self.low > 0 or self.high < 0


def compare(trial: Trial, reference: Trial, name: str = PPL) -> Difference | None:
    """The difference of a metric: ppl(trial) / ppl(reference) - 1, or share(trial) - share(reference); None where the two were
    not measured on the same windows or questions, or nothing is kept of each of them."""
    return of_perplexity(trial, reference) if name == PPL else of_answers(trial, reference, name)


def of_perplexity(trial: Trial, reference: Trial) -> Difference | None:
    """expm1(sum over windows of the difference in nll / sum of their tokens), windows drawn with replacement."""
    a, b = trial.get("windows") or {}, reference.get("windows") or {}
    if not a.get("nll") or a.get("tokens") != b.get("tokens") or len(a["nll"]) != len(b.get("nll", [])) or len(a["nll"]) < 2:
        return None
    apart, tokens, times = np.subtract(a["nll"], b["nll"]), np.asarray(a["tokens"]), times_drawn(len(a["nll"]))
    draws = np.expm1((times @ apart) / (times @ tokens))
    return interval(float(np.expm1(apart.sum() / tokens.sum())), draws, relative=True)


@functools.lru_cache(maxsize=4)
def times_drawn(n: int) -> np.ndarray:
    """How often each of n windows is drawn in each of the draws of n, (draws, n)."""
    return np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), DRAWS).astype(np.float64)


def of_answers(trial: Trial, reference: Trial, name: str) -> Difference | None:
    """Mean over questions of the difference in answers. A question's difference has one of five values, so that drawing
    questions with replacement is one multinomial draw of how often each value comes."""
    a, b = (str((t.get("answers") or {}).get(name, "")) for t in (trial, reference))
    if len(a) != len(b) or len(a) < 2:
        return None
    counted = Counter(WORTH[x] - WORTH[y] for x, y in zip(a, b, strict=True))
    values = sorted(counted)
    shares = np.array([counted[value] for value in values]) / len(a)
    draws = np.random.default_rng(SEED).multinomial(len(a), shares, DRAWS) @ np.array(values) / len(a)
    return interval(float(shares @ np.array(values)), draws, relative=False)


def interval(change: float, draws: np.ndarray, relative: bool) -> Difference:
    tail = round((1 - LEVEL) / 2 * DRAWS)
    ordered = np.sort(draws)
    return Difference(change, float(ordered[tail]), float(ordered[-1 - tail]), relative)
