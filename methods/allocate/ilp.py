"""ILP: the allocation with the least summed error among all that fit the bytes, found exactly and without a forward pass.

    minimise  sum_l e_l(level_l)   subject to   sum_l bytes_l(level_l) <= bytes of the target              (eq. 8)

It is as good as the errors are: they must be comparable between layers and add up.

Source: Hubara, Nahshan, Hanani, Banner, Soudry (2020), "Improving Post Training Neural Quantization: Layer-wise Calibration
and Integer Programming", arXiv:2006.10518, section 3.4. Differs in the errors, which are not measured for every level of
every layer (see `methods/ops/level_errors.py`), and in the budget, which counts bytes as stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pare.methods.contract import AllocateMethod, Problem, Question, State, method
from pare.methods.ops.knapsack import cheapest_error


@method("ilp", source="Hubara et al. (2020), arXiv:2006.10518, section 3.4")
@dataclass
class Ilp(AllocateMethod):
    def start(self, problem: Problem) -> State:
        table = problem.table
        return {"choice": cheapest_error(table.cost, table.error, self.budget(table)), "trace": []}

    def ask(self, problem: Problem, state: State, n: int) -> list[Question]:
        return []

    def tell(self, problem: Problem, state: State, kl: Sequence[float], tokens: int) -> State:
        raise ValueError("ilp asks nothing and can be told nothing")

    def answer(self, problem: Problem, state: State) -> list[int]:
        choice: list[int] = state["choice"]
        return choice
