"""4-bit NormalFloat weights, as QLoRA keeps its frozen base."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from pare.methods.parts.codebooks import Table, dynamic8
from pare.methods.parts.codebooks import nf4 as nf4_table
from pare.methods.parts.codes import Codes, Flat


def nf4(weight: Tensor, block: int = 64, double: bool = True) -> Codes:
    """weight (out, in) -> NF4 codes in flat blocks (Dettmers et al., 2023, arXiv:2305.14314, sections 2 and 3).

    Each block of `block` weights is divided by its largest magnitude. With `double`, these magnitudes, less their mean, are
    8-bit codes in blocks of 256: 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight. bitsandbytes reads
    these operands back bit for bit; its own CPU code sometimes takes a magnitude code that is not quite the nearest.
    """
    codes, absmax = blockwise(weight.float().flatten(), nf4_table(), block)
    scale: Tensor | Codes = absmax
    if double:
        mean = absmax.mean()
        inner, inner_scale = blockwise(absmax - mean, dynamic8(), 256)
        scale = Codes.of(inner.view(1, -1), dynamic8(), Flat(256), inner_scale, offset=mean)
    return Codes.of(codes.view(weight.shape), nf4_table(), Flat(block), scale)


def blockwise(values: Tensor, table: Table, block: int) -> tuple[Tensor, Tensor]:
    """values (n,) float32 -> (codes uint8 (n,), largest magnitude of each block float32 (ceil(n / block),))."""
    blocks = pad(values, (0, -len(values) % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    # The reciprocal, not a division: bitsandbytes rounds so, and a block of zeros stays zero.
    scaled = blocks * (1 / absmax.clamp(min=1e-38)).unsqueeze(1)
    return table.nearest(scaled).flatten()[: len(values)], absmax
