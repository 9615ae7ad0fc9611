"""Merges whose shares follow from the angles between the members, for each weight anew.

    slerp         of two members: sin((1 - t) a) / sin(a) * u + sin(t a) / sin(a) * v,  a the angle between u and v
    model_stock   theta_0 + r * mean of d_i,  r = n c / (1 + (n - 1) c),  c the mean cosine of two task vectors     (eq. 6)

Both are linear combinations, so low-rank updates stay low rank (but for slerp on whole weights).

Sources: Shoemake (1985), "Animating rotation with quaternion curves", section 3.3; Jang, Yun, Han (2024), "Model Stock: All we
need is just a few fine-tuned models", arXiv:2403.19522. Differs: a mean cosine below 0 counts as 0, for which the paper's
formula has no meaning; slerp is of task vectors by default, as whole weights of one base have almost no angle between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import Tensor

from pare.methods.contract import Context, MergeMethod, method
from pare.methods.ops.task_vectors import Base, Formulas, combine, task_vectors
from pare.methods.parts.formula import Dense, Formula
from pare.methods.settings import check

PARALLEL = 0.9995
"""Cosine from which on two directions count as one, and a straight line is drawn."""


@method("slerp", source="Shoemake (1985), Animating rotation with quaternion curves, section 3.3")
@dataclass
class Slerp(MergeMethod):
    takes = (2, 2)

    t: float = 0.5
    """How far from the better of the two members, by its selection score, to the other one, in [0, 1]."""

    on: str = "deltas"
    """What is interpolated: "deltas", what training has added to the base; or "weights", which is all but a straight line."""

    def __post_init__(self) -> None:
        check(self, "t", at_least=0, at_most=1)
        check(self, "on", one_of=("deltas", "weights"))

    def shares(self, members: Sequence[str]) -> dict[str, float]:
        first, second = members
        return {first: 1 - self.t, second: self.t}

    def merge_weight(self, name: str, formulas: Formulas, base: Base, known: Any, context: Context) -> Formula | None:
        start, vectors = task_vectors(name, formulas, base)
        if self.on == "deltas":
            return combine(name, formulas, dict(zip(formulas, self.factors(*vectors.values()), strict=True)), base)
        u, v = (start + vector for vector in vectors.values())
        of_u, of_v = self.factors(u, v)
        return Formula([Dense(of_u * u + of_v * v)])

    def factors(self, u: Tensor, v: Tensor) -> tuple[float, float]:
        cosine = cosine_of(u, v)
        if abs(cosine) > PARALLEL or not u.any() or not v.any():
            return 1 - self.t, self.t
        angle = math.acos(cosine)
        return math.sin((1 - self.t) * angle) / math.sin(angle), math.sin(self.t * angle) / math.sin(angle)


@method("model_stock", source="Jang et al. (2024), Model Stock, arXiv:2403.19522, eq. 6")
@dataclass
class ModelStock(MergeMethod):
    takes = (2, None)

    def merge_weight(self, name: str, formulas: Formulas, base: Base, known: Any, context: Context) -> Formula | None:
        vectors = list(task_vectors(name, formulas, base)[1].values())
        n, pairs = len(vectors), list(combinations(vectors, 2))
        cosine = max(0.0, sum(cosine_of(u, v) for u, v in pairs) / len(pairs))
        ratio = n * cosine / (1 + (n - 1) * cosine)
        return combine(name, formulas, dict.fromkeys(formulas, ratio / n), base)


def cosine_of(u: Tensor, v: Tensor) -> float:
    """In [-1, 1]; 0 where one of them is zero."""
    dot, of_u, of_v = ((a.double() * b).sum().item() for a, b in ((u, v), (u, u), (v, v)))
    return max(-1.0, min(1.0, dot / math.sqrt(of_u * of_v))) if of_u and of_v else 0.0
