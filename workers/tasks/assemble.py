"""The model that an allocation means: each linear as it is in the artifact of its level.

inputs: `model`, `allocation` (from an `allocate` task), `level.<value>` for each of the spec's `values`.
Result: as of `compress`: `size/linear_bits_per_weight`, `size/linear_bytes`.
"""

from __future__ import annotations

import json
from typing import Any

from pare.methods.parts.formula import Formula
from pare.workers.models import write_formulas
from pare.workers.search import open_levels
from pare.workers.task import TaskContext


def run(ctx: TaskContext) -> dict[str, Any]:
    _, levels = open_levels(ctx, ctx.spec["values"])
    allocation = json.loads((ctx.inputs["allocation"] / "allocation.json").read_text())
    formulas: dict[str, Formula] = {name: levels[value].effective(name) for name, value in allocation.items()}
    write_formulas(ctx.out, ctx.fingerprint_of["model"], formulas)
    weights = sum(formula.shape[0] * formula.shape[1] for formula in formulas.values())
    return {
        "size/linear_bits_per_weight": sum(formula.logical_bits for formula in formulas.values()) / weights,
        "size/linear_bytes": sum(formula.nbytes for formula in formulas.values()),
    }
