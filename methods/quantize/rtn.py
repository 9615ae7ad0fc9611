"""RTN: every weight rounded to the nearest point of an integer grid, which is scaled to its group of columns.

    s = (max - min) / (2^bits - 1)                           z = round(-min / s)
    q = clamp(round(w / s) + z, 0, 2^bits - 1)               w' = s * (q - z)

Needs no data. Source: Nagel et al. (2021), "A White Paper on Neural Network Quantization", arXiv:2106.08295, eq. 4 to 8;
with groups of columns as in Frantar et al. (2023), arXiv:2210.17323, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pare.methods.contract import Context, LayerMethod, method
from pare.methods.ops.grids import IntegerGrid
from pare.methods.parts.formula import Formula


@method("rtn", source="Nagel et al. (2021), arXiv:2106.08295, eq. 4 to 8")
@dataclass
class Rtn(IntegerGrid, LayerMethod):
    def compress_weight(self, name: str, weight: Tensor, statistics: Mapping[str, Tensor], context: Context) -> Formula:
        return Formula([self.round_to_nearest(weight)])
