"""GPTQ: columns are rounded one after another, and each column's error is made up for in the columns still to come.

    minimise  |X W^T - X W'^T|^2 = tr((W - W') H (W - W')^T) / 2,   H = 2 X^T X
    for column i:  w'_i = round(w_i);  e_i = (w_i - w'_i) / U_ii;  W_{:, i+1:} -= e_i U_{i, i+1:}     (eq. 2 and 3)
    with U upper triangular and U^T U = (H + damping * mean(diag H) * I)^-1                           (section 3, step 3)

All linears that read one tensor share H, so they are stacked and solved at once. Weights that an earlier stage has pruned stay
zero: what they would have become is an error like any other, made up for in the columns to come.

Source: Frantar, Ashkboos, Hoefler, Alistarh (2023), "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv:2210.17323, algorithm 1. Differs from the paper's code: the grid of a group is always fitted to weights
that carry the errors of *all* columns before it; where H cannot be factorised the damping is doubled, and if that does not
help either the weights are rounded without feedback: both are written down with the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import torch
from torch import Tensor

from pare.methods.contract import Context, InputGroup, LayerMethod, check, method
from pare.methods.ops.grids import IntegerGrid
from pare.methods.ops.precision import full_float32
from pare.methods.ops.second_order import finite, inverse_factor, without_dead
from pare.methods.ops.sparsity import left_by
from pare.methods.ops.statistics import Gram
from pare.methods.parts.formula import Formula


@method("gptq", source="Frantar et al. (2023), arXiv:2210.17323, algorithm 1", needs=(Gram,))
@dataclass
class Gptq(IntegerGrid, LayerMethod):
    mse: bool = True
    """Search for each group the range that makes the summed |error|^2.4 smallest, instead of taking [min, max]. Most of the
    time, and most of the gain at 3 bits: without it the largest weight of a group is half a step off, and a large error of
    one weight that meets large inputs cannot be made up for."""

    damping: float = 0.01
    """Added to the diagonal of H, as a fraction of its mean, > 0. Doubled, and reported, where H cannot be factorised."""

    act_order: str = "static"
    """Order of the columns: "none", as they stand; "static", largest diagonal of H first, with the groups and grids of the
    original weights; "group", the same order with groups of columns that are consecutive in it, which costs a stored
    index (not exportable to compressed-tensors)."""

    block_size: int = 64
    """Columns that are finished before the columns behind them are updated, >= 1. Changes speed and rounding noise only."""

    inputs: str = "dense"
    """Inputs of a block under calibration: those of the "dense" model, shared with other trials, or those that the
    "compressed" blocks before it put out, as in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "damping", above=0)
        check(self, "act_order", one_of=("none", "static", "group"))
        check(self, "block_size", at_least=1)
        check(self, "inputs", one_of=("dense", "compressed"))

    def compress(self, group: InputGroup, context: Context) -> dict[str, Formula]:
        gram = finite(group.statistics["gram"], self.name, group.name)
        weight = torch.cat(list(group.weights.values()))  # (all rows, in)
        gram, weight = without_dead(gram, weight)
        left = {name: left_by(group.formulas.get(name)) for name in group.weights}
        keep = None
        if any(left.values()):
            everything = {name: torch.ones_like(w, dtype=torch.bool) for name, w in group.weights.items()}
            keep = torch.cat([part.keep() if part else everything[name] for name, part in left.items()])

        order = torch.arange(len(gram), device=gram.device)
        if self.act_order != "none":
            order = gram.diagonal().argsort(descending=True, stable=True)
        with full_float32():
            factor, damping = inverse_factor(gram[order][:, order], self.damping)
            context.report("gptq/fallbacks", float(factor is None))
            if factor is None:
                context.report(f"gptq/fallback/{group.name}", 1.0)
                return {name: Formula([self.round_to_nearest(w, left[name])]) for name, w in group.weights.items()}
            if damping != self.damping:
                context.report(f"gptq/damping/{group.name}", damping)
            codes, scale, zero, error = self.solve(weight, order, factor, keep)
        context.report("gptq/output_error", error)

        g_idx = None
        if self.act_order == "group" and self.group_size != -1:
            g_idx = (order.argsort() // self.group_size).int()
        rows = [len(w) for w in group.weights.values()]
        pieces = zip(group.weights, codes.split(rows), scale.split(rows), zero.split(rows), strict=True)
        return {name: Formula([self.codes(q, s, z, g_idx, left[name])]) for name, q, s, z in pieces}

    def solve(
        self, weight: Tensor, order: Tensor, factor: Tensor, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """weight (out, in), the order (in,) in which its columns are rounded, U (in, in) in that order, which weights are not
        to be zero (out, in; None: any) ->

        codes (out, in), columns as they stand; scale (out, groups) as stored; zero (out, groups); tr((W - W') H (W - W')^T).
        """
        n, g = weight.shape[1], self.width_of_group(weight.shape[1])
        static = self.act_order == "static"
        w = weight.T[order]  # (in, out): what is one column of the weight lies together
        stays = None if keep is None else keep.T[order]
        codes, errors, loss = torch.empty_like(w), torch.empty_like(w[: self.block_size]), w.new_zeros(())
        scale, zero = (w.new_empty(ceil(n / g), w.shape[1]) for _ in range(2))
        if static:
            for out, grid in zip((scale, zero), self.fit(self.split(weight)), strict=True):
                out.copy_(grid.T)
        group_of = ((order if static else torch.arange(n)) // g).tolist()
        unit = factor / factor.diagonal()[:, None]  # so that an error need not be divided by its U_ii

        # A block ends where a group starts, so that the group's grid is fitted to weights which carry all errors before it.
        edges = sorted({n, *range(0, n, self.block_size), *(() if static else range(0, n, g))})
        for start, stop in pairwise(edges):
            if not static and start % g == 0:
                columns = w[start : start + g]
                scale[start // g], zero[start // g] = self.fit(
                    (columns if stays is None else columns * stays[start : start + g]).T
                )
            for i in range(start, stop):
                s, z, q, e = scale[group_of[i]], zero[group_of[i]], codes[i], errors[i - start]
                torch.div(w[i], s, out=q).round_().add_(z).clamp_(self.bottom, self.top)
                if stays is not None:
                    torch.where(stays[i], q, z, out=q)
                torch.addcmul(w[i], torch.sub(q, z, out=e), s, value=-1, out=e)
                w[i + 1 : stop].addr_(unit[i, i + 1 : stop], e, alpha=-1)
            done = errors[: stop - start]
            w[stop:].addmm_(unit[start:stop, stop:].T, done, alpha=-1)
            loss += (done / factor.diagonal()[start:stop, None]).square().sum()
        stored = scale.T.contiguous().to(getattr(torch, self.scale_dtype))
        return codes[order.argsort()].T, stored, zero.T, loss.item()
