"""ComPEFT: of a task vector only the signs of its largest entries are kept, all with one magnitude.

    d' = alpha * std(d) * sign(d)  where |d| is among the k largest over all weights, else 0          (algorithm 1)

It makes an ingredient small: the entries that stay take a bit each for the sign, and either a bit for every weight or the
column of each that stays, whichever is less. Several members are compressed each for itself and added up. What is compressed is
the update of the dense weight, dW = s B A of a low-rank one, not A and B: A holds the random numbers that it started with, and
its scale against that of B means nothing.

Source: Yadav, Choshen, Raffel, Bansal (2023), "ComPEFT: Compression for Communicating Parameter Efficient Updates via
Sparsification and Quantization", arXiv:2311.13171. Differs from the paper's code: see above on A and B; of entries equal to the
smallest that stays all do, as there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pare.methods.contract import Context, Member, MergeMethod, method, weight_by_weight
from pare.methods.ops.task_vectors import Base, Formulas, TaskVectorFields, edges, shared, task_vectors
from pare.methods.parts.codebooks import binary
from pare.methods.parts.codes import Codes, Rows
from pare.methods.parts.formula import Formula, Part
from pare.methods.parts.masked import Indexed, Masked, column_bits
from pare.methods.settings import check


@method("compeft", source="Yadav et al. (2023), ComPEFT, arXiv:2311.13171, algorithm 1")
@dataclass
class Compeft(TaskVectorFields, MergeMethod):
    keeps_updates = False

    density: float = 0.2
    """k: fraction of all entries of a member's task vector that are kept, in (0, 1]."""

    alpha: float = 1.0
    """Magnitude of what is kept, in standard deviations of the task vector, > 0. The paper tries 0.5 to 10: small models want
    it chosen, large ones less."""

    def __post_init__(self) -> None:
        check(self, "density", above=0, at_most=1)
        check(self, "alpha", above=0)

    def check_members(self, names: Sequence[str], most: int | None = None) -> None:
        super().check_members(names, most)
        self.check_names(names)

    def survey(self, members: Sequence[Member], base: Base, context: Context) -> dict[str, tuple[float, float]]:
        """Member -> (the smallest magnitude that stays, the magnitude that all get)."""

        def vectors() -> Iterator[dict[str, Tensor]]:
            return (task_vectors(name, found, base)[1] for name, found in weight_by_weight(members, context.device))

        sums = {member.name: torch.zeros(3, dtype=torch.float64) for member in members}  # n, sum, sum of squares
        for own in vectors():
            for member, vector in own.items():
                wide = vector.double()
                sums[member] += torch.stack([wide.new_tensor(wide.numel()), wide.sum(), wide.square().sum()]).cpu()
        smallest = edges(vectors, self.density)
        kept = {}
        for member, (n, total, squares) in ((name, row.tolist()) for name, row in sums.items()):
            deviation = math.sqrt(max(0.0, squares - total**2 / n) / max(n - 1, 1)) if n else 0.0
            kept[member] = smallest.get(member, math.inf), self.alpha * deviation
        k, entries = self.density, sum(float(row[0]) for row in sums.values())
        entropy = -k * math.log2(k / 2) - ((1 - k) * math.log2(1 - k) if k < 1 else 0.0)
        context.report("compeft/entropy_bytes", entries * entropy / 8)
        return kept

    def merge_weight(self, name: str, formulas: Formulas, base: Base, known: Any, context: Context) -> Formula | None:
        shares, vectors = self.shares(list(formulas)), task_vectors(name, formulas, base)[1]
        parts = []
        for member, vector in vectors.items():
            edge, magnitude = known[member]
            keep = (vector.abs() >= edge) & (vector != 0)
            scale = self.scaling * shares[member] * magnitude
            if keep.any() and scale:
                parts.append(signs(vector, keep, scale))
        codes = shared(formulas) or []
        if not parts and not codes:
            return None
        return Formula([*codes, *parts], "replace" if codes else "add")


def signs(vector: Tensor, keep: Tensor, scale: float) -> Part:
    """scale * sign(vector) where `keep`, bool (out, in), has it, else 0; in the form that takes fewer bits."""
    codes = Codes.of(
        (vector[keep] > 0).to(torch.uint8)[None],
        binary(),
        Rows(),
        vector.new_tensor(scale),
    )
    rows, columns = vector.shape
    by_column = int(keep.sum()) * column_bits(columns) + 32 * rows
    return Indexed.of(keep, codes) if columns <= 2**16 and by_column < rows * columns else Masked.of(keep, codes)
