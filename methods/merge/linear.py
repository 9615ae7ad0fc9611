"""Linear merges: the base plus a weighted sum of what training has added to it.

    task_arithmetic   theta_0 + lambda * sum of w_i d_i                          (Ilharco et al., section 2)
    wise_ft           (1 - alpha) theta_0 + alpha * mean of theta_i              (Wortsman et al., eq. 1)

Members that are low-rank updates stay so, exactly (see `ops/task_vectors.py`). One pass over the selection windows, to say what
the result scores.

Sources: Ilharco et al. (2022), "Editing Models with Task Arithmetic", arXiv:2212.04089; Wortsman et al. (2021), "Robust
fine-tuning of zero-shot models", arXiv:2109.01903. Differs from the second paper: with several members it is their mean that is
interpolated with the base; of one member it is the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pare.methods.contract import Context, MergeMethod, method
from pare.methods.ops.task_vectors import Base, Formulas, TaskVectorFields, combine
from pare.methods.parts.formula import Formula
from pare.methods.settings import check


@method("task_arithmetic", source="Ilharco et al. (2022), arXiv:2212.04089, section 2")
@dataclass
class TaskArithmetic(TaskVectorFields, MergeMethod):
    scaling: float = 0.4
    """Lambda: by how much the sum of the task vectors is multiplied before it is added to the base. 0.3 to 0.4 is the paper's
    for members of unlike tasks; members of one sweep point the same way and want normalise=true with 1."""

    normalise: bool = False
    """Divide by the sum of the weights, so that the result is a mean of the members and not their sum."""

    def check_members(self, names: Sequence[str], most: int | None = None) -> None:
        super().check_members(names, most)
        self.check_names(names)

    def merge_weight(self, name: str, formulas: Formulas, base: Base, known: Any, context: Context) -> Formula | None:
        shares = {member: self.scaling * share for member, share in self.shares(list(formulas)).items()}
        return combine(name, formulas, shares, base)


@method("wise_ft", source="Wortsman et al. (2021), WiSE-FT, arXiv:2109.01903, eq. 1")
@dataclass
class WiseFt(MergeMethod):
    alpha: float = 0.5
    """Share of the members, the rest being the base's, in [0, 1]: 0 is the base, 1 the mean of the members."""

    def __post_init__(self) -> None:
        check(self, "alpha", at_least=0, at_most=1)

    def shares(self, members: Sequence[str]) -> dict[str, float]:
        return dict.fromkeys(members, self.alpha / len(members))

    def merge_weight(self, name: str, formulas: Formulas, base: Base, known: Any, context: Context) -> Formula | None:
        return combine(name, formulas, self.shares(list(formulas)), base)
