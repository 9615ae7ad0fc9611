"""EoRA: a low-rank term beside a compressed weight, fitted to what its outputs have lost; the compressed weight stays as it is.

    D = W - W'    the original weight less what stands in its place, whatever that is made of
    C = X^T X = Q diag(l) Q^T,   S = Q diag(sqrt l)                                                    (section 3.2)
    D S = U diag(s) V^T;   B = U_r diag(sqrt s_r),   A = diag(sqrt s_r) V_r^T S^+                       (eq. 5 and 6)

B A is the matrix of rank r that makes |(D - B A) X^T|_F smallest; what is left is sqrt(sum of s_i^2 over i > r).

Source: Liu et al. (2024), "EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
arXiv:2410.21271. Differs from the paper's code: directions in which the inputs (almost) never point are left out instead of
being given the smallest eigenvalue, and every token counts alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pare.methods.contract import Context, InputGroup, LayerMethod, method
from pare.methods.ops.second_order import finite, square_root
from pare.methods.ops.statistics import Gram
from pare.methods.parts.formula import Formula, LowRank
from pare.methods.settings import SettingsError, check


@method("eora", source="Liu et al. (2024), arXiv:2410.21271, eq. 5 and 6", needs=(Gram,))
@dataclass
class EoRA(LayerMethod):
    reads_original: ClassVar[bool] = True

    rank: int = 64
    """Rank of the term, >= 1 and at most the smaller side of every weight."""

    space: str = "eigen"
    """In which the error is measured: "eigen", that of the inputs, as in the paper; "scale", each input feature weighted by
    its norm; "plain", all features alike, which needs no data to speak of and is there to be compared with."""

    value_dtype: str = "bfloat16"
    """Dtype in which A and B are stored: "bfloat16", "float16" or "float32"."""

    inputs: str = "compressed"
    """Inputs of a block under calibration: those that the "compressed" and repaired blocks before it put out, as in the
    paper, or those of the model as it stands before this stage ("dense"), shared with other trials."""

    def __post_init__(self) -> None:
        check(self, "rank", at_least=1)
        check(self, "space", one_of=("eigen", "scale", "plain"))
        check(self, "value_dtype", one_of=("bfloat16", "float16", "float32"))
        check(self, "inputs", one_of=("compressed", "dense"))

    def check_shapes(self, widths: Mapping[str, tuple[int, int]]) -> None:
        for name, shape in widths.items():
            if self.rank > min(shape):
                allowed = f"at most {min(shape)}, the smaller side of {name}"
                raise SettingsError(self.name, "rank", self.rank, allowed)

    def compress(self, group: InputGroup, context: Context) -> dict[str, Formula]:
        gram = finite(group.statistics["gram"], self.name, group.name)
        seen = bool(gram.diagonal().any())
        context.report("eora/fallbacks", float(not seen))
        if not seen:  # nothing can be said of the inputs
            context.report(f"eora/fallback/{group.name}", 1.0)
            gram = torch.eye(len(gram), device=gram.device)
        forth, back = self.root(gram.double())
        dtype, formulas = getattr(torch, self.value_dtype), {}
        for name, weight in group.weights.items():
            a, b, lost = low_rank((group.original[name] - weight).double() @ forth, back, self.rank)
            context.report("eora/output_error", lost)
            formulas[name] = Formula([LowRank(a.to(dtype), b.to(dtype))], "add")
        return formulas

    def root(self, gram: Tensor) -> tuple[Tensor, Tensor]:
        """H (in, in) float64 -> S (in, k) with S S^T = H, and its pseudo-inverse (k, in)."""
        if self.space == "plain":
            gram = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return square_root(gram.diagonal().diag() if self.space == "scale" else gram)


def low_rank(error: Tensor, back: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """D S (out, k) and S^+ (k, in) -> A (rank, in), B (out, rank), and what of |D S|_F^2 they leave.

    Rows of A beyond the rank of D S are zero.
    """
    u, s, vt = torch.linalg.svd(error, full_matrices=False)
    r = min(rank, len(s))
    root = s[:r].sqrt()
    a, b = error.new_zeros(rank, back.shape[1]), error.new_zeros(len(error), rank)
    a[:r], b[:, :r] = (root[:, None] * vt[:r]) @ back, u[:, :r] * root
    return a, b, float(s[r:].square().sum())
