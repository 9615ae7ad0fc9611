"""AWQ: input features that meet large activations are scaled up before the weights are rounded, and down again before them.

    W' = round(W diag(s)) diag(s)^-1,    s = a^r / sqrt(max(a^r) min(a^r)),    a_j = mean |x_j|              (eq. 4 and 5)
    r: of 0, 1/n, ... (n-1)/n the one that makes  tr((W - W') H (W - W')^T),  H = 2 X^T X / N,  smallest
    then, for each row and group, the range [-c, c] to which weights are cut, c = max|w| (1 - i/20), i < 10, likewise

1 / s goes into what stands before the linears (a norm, or the linear whose outputs they read), so nothing is computed for it
when the model runs, and nothing stored. r = 0 leaves all as it is, so no group is worse off than with plain rounding.

Source: Lin et al. (2023), "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv:2306.00978.
Differs from the paper's code: what is compared are the outputs of the linears themselves, through H, not those of the whole
attention or MLP on stored activations; grouped-query attention is not left out: the query heads that read one head of v
share the geometric mean of their factors; features that no token excites keep s = 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from pare.methods.contract import Context, InputGroup, LayerMethod, method
from pare.methods.ops.grids import IntegerGrid
from pare.methods.ops.precision import full_float32
from pare.methods.ops.second_order import finite
from pare.methods.ops.sparsity import left_by
from pare.methods.ops.statistics import Gram, MeanMagnitude
from pare.methods.parts.formula import Dense, Formula
from pare.methods.settings import check

SMALLEST = 1e-4
"""Added to, or the least of, what is raised to a power or divided by."""

CUTS, DEEPEST_CUT = 20, 0.5
"""Ranges are tried in steps of 1/20 down to above half of the largest magnitude."""


@method("awq", source="Lin et al. (2023), arXiv:2306.00978, eq. 4 and 5", needs=(Gram, MeanMagnitude))
@dataclass
class Awq(IntegerGrid, LayerMethod):
    folds: ClassVar[bool] = True

    symmetric: bool = False
    """True: no zero point, one scale for both signs. False: the grid spans [min, max] of its group, zero included."""

    exponents: int = 20
    """How many exponents r are tried, >= 1: 0, 1/n, ... (n-1)/n. 1: no factors at all."""

    duo: bool = False
    """Divide a^r by w^(1-r) as well, w_j being the mean magnitude of a column relative to the largest weights of its groups."""

    clip: bool = True
    """Search the range to which the weights of a row and group are cut."""

    no_clip: list[str] = field(default_factory=lambda: ["q_proj", "k_proj"])
    """Weights whose name holds one of these are not cut: the softmax behind them makes more of what is lost."""

    scale_only: bool = False
    """Leave the rounding on this grid to a stage to come, say `gptq`. Until then the weights are float32."""

    inputs: str = "dense"
    """Inputs of a block under calibration: those of the "dense" model, shared with other trials, or those that the
    "compressed" blocks before it put out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "exponents", at_least=1)
        check(self, "inputs", one_of=("dense", "compressed"))

    def bits_per_weight(self, width: int) -> float:
        return 32.0 if self.scale_only else super().bits_per_weight(width)

    def fold(self, group: InputGroup, context: Context) -> Tensor | None:
        gram = finite(group.statistics["gram"], self.name, group.name)
        magnitude = group.statistics["mean_magnitude"]
        if group.fold is None or not magnitude.any():  # nothing can be said of inputs that were never seen
            context.report("awq/not_scaled", 1.0)
            return None
        weight = torch.cat(list(group.weights.values()))
        best, least, first = None, float("inf"), float("inf")
        for s in self.candidates(weight, magnitude):
            s = group.fold.shared(s)
            lost = output_error(self.round_to_nearest(weight * s).materialise() / s - weight, gram)
            if best is None:
                first = lost
            if lost < least:
                best, least = s, lost
        context.report("awq/error_without_scaling", first)
        context.report("awq/error_with_scaling", least)
        return best

    def candidates(self, weight: Tensor, magnitude: Tensor) -> Iterator[Tensor]:
        """weight (out, in), mean |x| (in,) -> factors (in,), all ones first, whose largest times smallest is 1."""
        live = magnitude > 0
        a = magnitude.where(live, 1.0)
        yield torch.ones_like(a)
        relative = self.split(weight).abs()
        relative = relative / relative.amax(-1, keepdim=True).clamp(min=SMALLEST)
        w = relative.flatten(1)[:, : len(a)].mean(0)
        for k in range(0 if self.duo else 1, self.exponents):
            r = k / self.exponents
            s = a**r / (w ** (1 - r) + SMALLEST) if self.duo else (a**r).clamp(min=SMALLEST)
            s = s / (s[live].amax() * s[live].amin()).sqrt()
            yield s.where(live, 1.0)

    def compress(self, group: InputGroup, context: Context) -> dict[str, Formula]:
        if self.scale_only:
            return {name: Formula([Dense(weight)]) for name, weight in group.weights.items()}
        made = {}
        for name, weight in group.weights.items():
            if self.clip and not any(part in name for part in self.no_clip):
                weight = self.cut(weight, group.statistics["gram"])
            made[name] = Formula([self.round_to_nearest(weight, left_by(group.formulas.get(name)))])
        return made

    def cut(self, weight: Tensor, gram: Tensor) -> Tensor:
        """weight (out, in) with each row and group cut to the range that gives its part of the outputs the least error."""
        groups = self.split(weight)  # (out, groups, g)
        blocks = self.diagonal_blocks(gram, groups.shape[1])
        largest = groups.abs().amax(-1, keepdim=True)
        best, least = groups, torch.full_like(largest, torch.inf)
        for step in range(round(CUTS * (1 - DEEPEST_CUT))):
            c = largest * (1 - step / CUTS)
            narrowed = groups.clamp(-c, c)
            scale, zero = (t.unsqueeze(-1) for t in self.fit(narrowed))
            error = (self.encode(narrowed, scale, zero) - zero) * scale.float() - groups
            with full_float32():
                lost = (torch.einsum("ogi,gij->ogj", error, blocks) * error).sum(-1, keepdim=True)
            better = lost < least
            best, least = torch.where(better, narrowed, best), torch.where(better, lost, least)
        return best.flatten(1)[:, : weight.shape[1]]

    def diagonal_blocks(self, gram: Tensor, n: int) -> Tensor:
        """H (in, in) -> (groups, g, g): of each group's features among themselves; a short last one filled up with zeros."""
        g = self.width_of_group(len(gram))
        blocks = gram.new_zeros(n, g, g)
        for i, start in enumerate(range(0, len(gram), g)):
            own = gram[start : start + g, start : start + g]
            blocks[i, : len(own), : len(own)] = own
        return blocks


def output_error(error: Tensor, gram: Tensor) -> float:
    """E (out, in), H (in, in) -> tr(E H E^T)."""
    with full_float32():
        return float((error @ gram * error).sum())
