"""RTN: every weight rounded to the nearest point of an integer grid, which is scaled to its group of columns.

    s = (max - min) / (2^bits - 1)                           z = round(-min / s)
    q = clamp(round(w / s) + z, 0, 2^bits - 1)               w' = s * (q - z)

Needs no data. Weights that an earlier stage has pruned stay zero, and where all groups keep as many their codes are not
stored. Source: Nagel et al. (2021), "A White Paper on Neural Network Quantization", arXiv:2106.08295, eq. 4 to 8;
with groups of columns as in Frantar et al. (2023), arXiv:2210.17323, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from pare.methods.contract import Context, InputGroup, LayerMethod, method
from pare.methods.ops.grids import IntegerGrid
from pare.methods.ops.sparsity import left_by
from pare.methods.parts.formula import Formula


@method("rtn", source="Nagel et al. (2021), arXiv:2106.08295, eq. 4 to 8")
@dataclass
class Rtn(IntegerGrid, LayerMethod):
    def compress(self, group: InputGroup, context: Context) -> dict[str, Formula]:
        return {n: Formula([self.round_to_nearest(w, left_by(group.formulas.get(n)))]) for n, w in group.weights.items()}
