"""Wanda: of every row, the weights go whose magnitude times the norm of their input is smallest. No weight is changed.

    S_ij = |W_ij| * |X_j|_2        the k = floor(in * sparsity) smallest S_ij of row i become zero        (eq. 1, algorithm 1)

What is compared is the key: within a row all weights serve one output, so norms of other rows do not matter. With a pattern
N:M the N largest of every M consecutive columns of a row stay.

Source: Sun, Liu, Bair, Kolter (2023), "A Simple and Effective Pruning Approach for Large Language Models", arXiv:2306.11695.
Differs from the paper's code: N counts the weights that stay; rows of an input that was never anything but zero are ranked by
magnitude, which is written down with the result; the variant that chooses k for each row is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pare.methods.contract import Context, LayerMethod, method
from pare.methods.ops.precision import narrowest
from pare.methods.ops.second_order import finite
from pare.methods.ops.sparsity import all_but_smallest, check_pattern, count, part_of, pattern_of
from pare.methods.ops.statistics import MeanSquare
from pare.methods.parts.formula import Formula
from pare.methods.settings import check


@method("wanda", source="Sun et al. (2023), arXiv:2306.11695, eq. 1", needs=(MeanSquare,))
@dataclass
class Wanda(LayerMethod):
    sparsity: float = 0.5
    """Fraction of the weights that become zero, in (0, 1). With a pattern it is the pattern's."""

    pattern: str = "unstructured"
    """Which weights may go: "unstructured", or N:M, where N of every M consecutive columns of a row stay: "2:4", "4:8"."""

    compare: str = "row"
    """Among which weights the smallest are looked for: those of a "row", of the whole "layer" or of a "column". The paper's
    is the row; the others are there to be compared with it. Without meaning for a pattern."""

    inputs: str = "compressed"
    """Inputs of a block under calibration: those that the "compressed" blocks before it put out, as in the paper, or those
    of the "dense" model, shared with other trials."""

    def __post_init__(self) -> None:
        check(self, "sparsity", above=0, below=1)
        check(self, "compare", one_of=("row", "layer", "column"))
        check(self, "inputs", one_of=("compressed", "dense"))
        check_pattern(self, self.pattern, self.sparsity)

    def check_shapes(self, widths: Mapping[str, tuple[int, int]]) -> None:
        check_pattern(self, self.pattern, self.sparsity, widths)

    def compress_weight(self, name: str, weight: Tensor, statistics: Mapping[str, Tensor], context: Context) -> Formula:
        squares = finite(statistics["mean_square"], self.name, name)
        silent = not squares.any()
        context.report("wanda/fallbacks", float(silent))
        if silent:
            context.report(f"wanda/fallback/{name}", 1.0)
        keep = self.keep(weight.abs() if silent else weight.abs() * squares.sqrt())
        return Formula([part_of(keep, narrowest(weight[keep]), pattern_of(self.pattern))])

    def keep(self, score: Tensor) -> Tensor:
        """score (out, in) >= 0 -> which weights stay, bool (out, in). Of equal scores those further left go first."""
        rows, columns = score.shape
        if pattern := pattern_of(self.pattern):
            return all_but_smallest(score.view(rows, -1, pattern.of), pattern.of - pattern.kept).view(rows, columns)
        if self.compare == "layer":
            return all_but_smallest(score.view(1, -1), count(rows * columns, self.sparsity)).view(rows, columns)
        if self.compare == "column":
            return all_but_smallest(score.T.contiguous(), count(rows, self.sparsity)).T
        return all_but_smallest(score, count(columns, self.sparsity))
