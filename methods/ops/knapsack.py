"""The multiple-choice knapsack: one level for each layer, least summed error, summed cost within a budget.

    minimise  sum_lk e_lk x_lk   subject to   sum_k x_lk = 1 for every layer l,   sum_lk c_lk x_lk <= budget,   x binary

as an integer linear program (Hubara et al., 2020, arXiv:2006.10518, section 3.4), solved by HiGHS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def cheapest_error(cost: Sequence[Sequence[int]], error: Sequence[Sequence[float]], budget: int) -> list[int]:
    """cost and error (layers, levels) -> for each layer the index of its level.

    cost: whole numbers, e.g. bytes. error: finite and additive over layers; only differences within a layer count.

    Raises:
        ValueError: not even the cheapest levels fit the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    c, e = np.array(cost, dtype=np.int64), np.array(error, dtype=np.float64)
    if not np.isfinite(e).all():
        raise ValueError("an error of the level table is not finite")
    least = c.min(1)
    if least.sum() > budget:
        raise ValueError(f"a budget of {budget} is below {least.sum()}, the cost of the cheapest levels")
    # HiGHS works to absolute tolerances: what is above the cheapest level in whole steps, and errors of order one.
    extra = c - least[:, None]
    step = math.gcd(*extra.ravel().tolist()) or 1
    room = int(min((budget - least.sum()) // step, extra.max(1).sum() // step))
    scale = np.ptp(e, axis=1).max() or 1.0
    layers, levels = c.shape
    one_each = csr_array((np.ones(c.size), np.arange(c.size), np.arange(0, c.size + 1, levels)), shape=(layers, c.size))
    found = milp(
        c=((e - e.min(1, keepdims=True)) / scale).ravel(),
        integrality=np.ones(c.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(csr_array((extra // step).reshape(1, -1)), ub=room)],
        options={"mip_rel_gap": RELATIVE_GAP},
    )
    if not found.success:
        raise ValueError(f"HiGHS found no solution: {found.message}")
    chosen: list[int] = found.x.reshape(layers, levels).argmax(1).tolist()
    if sum(cost[layer][level] for layer, level in enumerate(chosen)) > budget:
        raise ValueError("HiGHS returned a solution above the budget, within its tolerance")
    return chosen


RELATIVE_GAP = 1e-6
"""A solution is taken for the best once it is proven to be so close to it."""
