"""RTN on floating-point grids: every weight rounded to the nearest number of 3 to 8 bits, scaled to its group of columns.

    s = max|w| / largest value of the format, as it is stored          w' = s * nearest(w / s)

Needs no data. Source: Aggarwal et al. (2023), "Post-Training Quantization with Low-precision Minifloats and Integers on
FPGAs", arXiv:2311.12359, section 3, for the E/M grids; Rouhani et al. (2023), "Microscaling Data Formats for Deep Learning",
arXiv:2310.10537, section 3, for scales that are powers of two; Dettmers et al. (2023), arXiv:2305.14314, section 3, for NF4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pare.methods.contract import Context, LayerMethod, method
from pare.methods.ops.float_grids import FloatGrid
from pare.methods.parts.formula import Formula


@method("rtn_float", source="Aggarwal et al. (2023), arXiv:2311.12359, section 3; Rouhani et al. (2023), arXiv:2310.10537")
@dataclass
class RtnFloat(FloatGrid, LayerMethod):
    def compress_weight(self, name: str, weight: Tensor, statistics: Mapping[str, Tensor], context: Context) -> Formula:
        return Formula([self.round_to_nearest(weight)])
