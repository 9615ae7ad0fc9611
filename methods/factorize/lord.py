"""LoRD: a linear becomes two thin ones, through the directions in which its outputs vary most on calibration data.

    C = W H W^T = E diag(l) E^T, l descending,   H = 2 X^T X       the outputs' second moments, from those of the inputs
    U = E_{:, :r};   W' = U (U^T W):   B = U (out, r),   A = U^T W (r, in)

No other matrix of rank r has a smaller |(W - W') X^T|_F; what is left is the sum of the l_i for i > r.

Source: Kaushal, Vaidhya, Rish (2023), "LORD: Low Rank Decomposition Of Monolingual Code LLMs For One-Shot Compression",
arXiv:2309.14021, section 3. Outputs are not centred, for that would give every linear a bias; q, k and v (gate and up) do not
share their A; and the rank follows from a fraction of the weights, the same for all linears.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pare.methods.contract import Context, InputGroup, LayerMethod, method
from pare.methods.ops.second_order import finite, square_root
from pare.methods.ops.statistics import Gram
from pare.methods.parts.formula import Formula, LowRank
from pare.methods.settings import SettingsError, check


@method("lord", source="Kaushal et al. (2023), arXiv:2309.14021, section 3", needs=(Gram,))
@dataclass
class Lord(LayerMethod):
    ratio: float = 0.8
    """Numbers of A and B together as a fraction of those of W, in (0, 1): the rank is ratio * out * in / (out + in)."""

    multiple_of: int = 16
    """Ranks are rounded down to a multiple of it, for the sake of fast kernels, >= 1."""

    value_dtype: str = "bfloat16"
    """Dtype in which A and B are stored: "bfloat16", "float16" or "float32"."""

    inputs: str = "dense"
    """Inputs of a block under calibration: those of the "dense" model, as in the paper, shared with other trials, or those
    that the "compressed" blocks before it put out, which is better where much is left out."""

    def __post_init__(self) -> None:
        check(self, "ratio", above=0, below=1)
        check(self, "multiple_of", at_least=1)
        check(self, "value_dtype", one_of=("bfloat16", "float16", "float32"))
        check(self, "inputs", one_of=("dense", "compressed"))

    def check_shapes(self, widths: Mapping[str, tuple[int, int]]) -> None:
        for name, shape in widths.items():
            if not self.rank(shape):
                most = int(self.ratio * shape[0] * shape[1] / sum(shape))
                allowed = f"at most {most}, the rank that ratio={self.ratio:g} leaves for {name}"
                raise SettingsError(self.name, "multiple_of", self.multiple_of, allowed)

    def rank(self, shape: tuple[int, ...]) -> int:
        """Of a weight (out, in)."""
        out, width = shape
        return int(self.ratio * out * width / (out + width)) // self.multiple_of * self.multiple_of

    def compress(self, group: InputGroup, context: Context) -> dict[str, Formula]:
        gram = finite(group.statistics["gram"], self.name, group.name)
        seen = bool(gram.diagonal().any())
        context.report("lord/fallbacks", float(not seen))
        if not seen:  # plain SVD of the weight
            context.report(f"lord/fallback/{group.name}", 1.0)
            gram = torch.eye(len(gram), device=gram.device)
        gram, root = gram.double(), None
        if any(weight.shape[0] > weight.shape[1] for weight in group.weights.values()):
            root, _ = square_root(gram)
        dtype, formulas = getattr(torch, self.value_dtype), {}
        for name, narrow in group.weights.items():
            weight = narrow.double()
            directions, lost = principal(weight, gram, root, self.rank(tuple(weight.shape)))
            context.report("lord/output_error", lost)
            a = directions.T @ weight
            formulas[name] = Formula([LowRank(a.to(dtype), directions.to(dtype).contiguous())])
        return formulas


def principal(weight: Tensor, gram: Tensor, root: Tensor | None, rank: int) -> tuple[Tensor, float]:
    """W (out, in), H (in, in), float64 -> U (out, rank) with orthonormal columns, and the l_i beyond the rank, summed.

    root: S with S S^T = H, by which a weight with out > in goes, whose C would be larger than H; such weights need it.
    """
    if root is None or weight.shape[0] <= weight.shape[1]:
        values, vectors = torch.linalg.eigh(weight @ gram @ weight.T)
        return vectors[:, -rank:], float(values[:-rank].clamp(min=0).sum())
    u, s, _ = torch.linalg.svd(weight @ root, full_matrices=False)
    if u.shape[1] < rank:  # inputs of fewer directions than that: further ones change nothing, and may be any
        u = torch.linalg.qr(torch.cat([u, weight.new_zeros(len(weight), rank - u.shape[1])], 1))[0]
    return u[:, :rank], float(s[rank:].square().sum())
