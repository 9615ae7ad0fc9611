"""SparseGPT: weights are pruned column by column, and each column's error is made up for in the columns still to come.

    minimise  tr((W - W') H (W - W')^T),   H = 2 X^T X;   U upper triangular, U^T U = (H + damping * mean(diag H) * I)^-1
    for column i:  e_i = (w_i - w'_i) / U_ii;  W_{:, i+1:} -= e_i U_{i, i+1:}                          (eq. 3, algorithm 1)
    w'_ri = 0 for the smallest  w_ri^2 / U_ii^2,  which is what it costs to do without the weight       (eq. 4)

They are looked for in windows of `block_size` columns over all rows of a linear, so rows may differ; with a pattern N:M in
every row of every M consecutive columns, when the errors of all columns before these have arrived.

Source: Frantar, Alistarh (2023), "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv:2301.00774,
algorithm 1. Differs from the paper's code: exactly as many weights go as were asked for; values are rounded to the dtype that
they are stored in while errors can still be made up for; where H cannot be factorised the damping is doubled, and if that does
not help either the same weights go without any made up for: both are written down with the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pare.methods.contract import Context, InputGroup, LayerMethod, method
from pare.methods.ops.precision import full_float32
from pare.methods.ops.second_order import finite, inverse_factor, without_dead
from pare.methods.ops.sparsity import all_but_smallest, check_pattern, count, part_of, pattern_of
from pare.methods.ops.statistics import Gram
from pare.methods.parts.formula import Formula
from pare.methods.settings import SettingsError, check


@method("sparsegpt", source="Frantar, Alistarh (2023), arXiv:2301.00774, algorithm 1", needs=(Gram,))
@dataclass
class SparseGpt(LayerMethod):
    sparsity: float = 0.5
    """Fraction of the weights that become zero, in (0, 1). With a pattern it is the pattern's."""

    pattern: str = "unstructured"
    """Which weights may go: "unstructured", or N:M, where N of every M consecutive columns of a row stay: "2:4", "4:8"."""

    damping: float = 0.01
    """Added to the diagonal of H, as a fraction of its mean, > 0. Doubled, and reported, where H cannot be factorised."""

    block_size: int = 128
    """Columns of the window in which weights are compared, a multiple of 8. Columns behind it are updated when it is done."""

    value_dtype: str = "bfloat16"
    """Dtype in which what stays is stored: "bfloat16", "float16" or "float32"."""

    inputs: str = "compressed"
    """Inputs of a block under calibration: those that the "compressed" blocks before it put out, as in the paper, or those
    of the "dense" model, shared with other trials."""

    def __post_init__(self) -> None:
        check(self, "sparsity", above=0, below=1)
        check(self, "damping", above=0)
        if self.block_size < 8 or self.block_size % 8:
            raise SettingsError(self.name, "block_size", self.block_size, "a multiple of 8")
        check(self, "value_dtype", one_of=("bfloat16", "float16", "float32"))
        check(self, "inputs", one_of=("compressed", "dense"))
        check_pattern(self, self.pattern, self.sparsity)

    def check_shapes(self, widths: Mapping[str, tuple[int, int]]) -> None:
        check_pattern(self, self.pattern, self.sparsity, widths)

    def compress(self, group: InputGroup, context: Context) -> dict[str, Formula]:
        gram = finite(group.statistics["gram"], self.name, group.name)
        weight = torch.cat(list(group.weights.values()))  # (all rows, in)
        rows = [len(w) for w in group.weights.values()]
        gram, weight = without_dead(gram, weight)
        with full_float32():
            factor, damping = inverse_factor(gram, self.damping)
            context.report("sparsegpt/fallbacks", float(factor is None))
            if factor is None:  # of a diagonal H this is the factor: nothing can be made up for, and the ranking stays
                context.report(f"sparsegpt/fallback/{group.name}", 1.0)
                factor = torch.diag(gram.diagonal().rsqrt())
            elif damping != self.damping:
                context.report(f"sparsegpt/damping/{group.name}", damping)
            keep, values, error = self.solve(weight, rows, factor)
        context.report("sparsegpt/output_error", error)
        pieces, dtype = zip(group.weights, keep.split(rows), values.split(rows), strict=True), getattr(torch, self.value_dtype)
        return {name: Formula([part_of(k, v[k].to(dtype), pattern_of(self.pattern))]) for name, k, v in pieces}

    def solve(self, weight: Tensor, rows: list[int], factor: Tensor) -> tuple[Tensor, Tensor, float]:
        """weight (out, in), the rows of each linear in it, U (in, in) -> which weights stay (out, in), their new values
        (out, in) as stored, tr((W - W') H (W - W')^T)."""
        w = weight.T.contiguous()  # (in, out): what is one column of the weight lies together
        keep, loss, n = torch.ones_like(w, dtype=torch.bool), w.new_zeros(()), len(w)
        errors = torch.empty_like(w[: self.block_size])
        pivots, dtype, pattern = factor.diagonal(), getattr(torch, self.value_dtype), pattern_of(self.pattern)
        for start in range(0, n, self.block_size):
            stop = min(start + self.block_size, n)
            if pattern is None:
                cost = (w[start:stop] / pivots[start:stop, None]).square()
                for mask, of_linear in zip(keep[start:stop].split(rows, 1), cost.split(rows, 1), strict=True):
                    row_by_row = of_linear.T.reshape(-1)
                    mask.copy_(all_but_smallest(row_by_row, count(len(row_by_row), self.sparsity)).view(mask.T.shape).T)
            for i in range(start, stop):
                if pattern and i % pattern.of == 0:
                    cost = (w[i : i + pattern.of] / pivots[i : i + pattern.of, None]).square()
                    keep[i : i + pattern.of] = all_but_smallest(cost.T, pattern.of - pattern.kept).T
                value = torch.where(keep[i], w[i], 0.0).to(dtype).float()
                error = errors[i - start]
                torch.sub(w[i], value, out=error).div_(pivots[i])
                w[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
                w[i] = value
            done = errors[: stop - start]
            w[stop:].addmm_(factor[start:stop, stop:].T, done, alpha=-1)
            loss += done.square().sum()
        return keep.T, w.T, loss.item()
