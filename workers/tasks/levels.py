"""The level table of a search: for each linear of a model and each level its bytes and its output error.

inputs: `model`, `statistics` (of the model's linears, with `gram`), and for each value of the varied setting
`level.<value>`, an ordinary `compress` of the model. spec: `vary` (the setting), `values`.
File: `table.json`, with lists in the order of the linears: `linears` (parameter names), `blocks` (index), `sizes`
(weights), `levels` (values, fewest bytes first), `cost` [linear][level] (bytes), `error` [linear][level]
(tr((W - W') H (W - W')^T)), `energy` (tr(W H W^T)). Result: `linears`, `levels`.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pare.methods.anatomy.describe import describe
from pare.methods.ops.precision import full_float32
from pare.workers.models import load_skeleton
from pare.workers.search import linears_of, open_levels
from pare.workers.task import TaskContext, TaskError


@torch.inference_mode()
def run(ctx: TaskContext) -> dict[str, Any]:
    model, levels = open_levels(ctx, ctx.spec["values"])
    anatomy = describe(load_skeleton(model.dense.directory))
    linears, blocks = linears_of(anatomy)
    cost: dict[str, list[int]] = {}
    error: dict[str, list[float]] = {}
    energy: dict[str, float] = {}
    for index, block in enumerate(anatomy.blocks):
        with safe_open(ctx.inputs["statistics"] / f"block_{index:03d}.safetensors", framework="pt") as file:
            for group in block.groups:
                if f"{group.name}:gram" not in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    raise TaskError("the levels of a search are compared by the Gram matrix, which these statistics lack")
                gram = file.get_tensor(f"{group.name}:gram").to(ctx.device)
                for name in group.weights:
                    weight = model.materialise(name).to(ctx.device)
                    formulas = [level.effective(name) for level in levels.values()]
                    cost[name] = [formula.nbytes for formula in formulas]
                    error[name] = [output_energy(weight - f.to(ctx.device).materialise(), gram) for f in formulas]
                    energy[name] = output_energy(weight, gram)
        ctx.progress(index + 1, len(anatomy.blocks), "blocks")
    values = list(levels)
    order = sorted(range(len(values)), key=lambda k: (sum(of[k] for of in cost.values()), values[k]))
    table = {
        "linears": linears,
        "blocks": blocks,
        "sizes": [anatomy.widths[name][0] * anatomy.widths[name][1] for name in linears],
        "levels": [values[k] for k in order],
        "cost": [[cost[name][k] for k in order] for name in linears],
        "error": [[error[name][k] for k in order] for name in linears],
        "energy": [energy[name] for name in linears],
    }
    (ctx.out / "table.json").write_text(json.dumps(table))
    return {"linears": len(linears), "levels": len(values)}


def output_energy(weight: Tensor, gram: Tensor) -> float:
    """tr(W H W^T) of weight (out, in) and gram (in, in), float32."""
    with full_float32():
        return ((weight @ gram) * weight).sum(dtype=torch.float64).item()
