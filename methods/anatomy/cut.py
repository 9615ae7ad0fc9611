"""What is to be kept of a model, in the numbers of its anatomy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from pare.methods.anatomy.types import Anatomy, Tie


@dataclass(frozen=True)
class Cut:
    """What is kept of a model. Numbers are ascending, from 0."""

    blocks: tuple[int, ...] | None = None
    """None: all."""

    units: Mapping[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    """(block, position of the tie in `Block.ties`) -> units kept: FFN features, KV groups or channels. All of the others."""

    hidden: tuple[int, ...] | None = None
    """Channels of the residual stream. None: all."""


def ties(anatomy: Anatomy, kind: str) -> dict[tuple[int, int], Tie]:
    """The ties of a kind, as `Cut.units` names them."""
    found = {(b, t): tie for b, block in enumerate(anatomy.blocks) for t, tie in enumerate(block.ties)}
    return {key: tie for key, tie in found.items() if tie.kind == kind}


def widest(tie: Tie) -> int:
    """Features of the heads of q that one head of k serves."""
    return max(side.width for side in tie.sides)


def narrowest(tie: Tie) -> int:
    """Features of a head of k."""
    return min(side.width for side in tie.sides)


def check(anatomy: Anatomy, cut: Cut) -> None:
    """Raises ValueError for a cut that does not fit."""

    def among(kept: Sequence[int], count: int, what: str) -> None:
        if not kept or any(a >= b for a, b in pairwise(kept)) or kept[0] < 0 or kept[-1] >= count:
            raise ValueError(f"{what}: kept {list(kept)[:8]}; allowed: at least one of 0 to {count - 1}, ascending, each once")

    if cut.blocks is not None:
        among(cut.blocks, len(anatomy.blocks), "blocks")
    for (b, t), kept in cut.units.items():
        if not 0 <= b < len(anatomy.blocks) or not 0 <= t < len(anatomy.blocks[b].ties):
            there = [len(block.ties) for block in anatomy.blocks]
            raise ValueError(f"there is no tie {t} in block {b}; number of ties in each block: {there}")
        tie = anatomy.blocks[b].ties[t]
        among(kept, tie.units, f"{anatomy.blocks[b].name}, tie {t} ({tie.kind})")
    if cut.hidden is None:
        return
    norms = {block.norm for block in anatomy.blocks}
    if norms == {"layer"}:
        raise ValueError(
            "no hidden channel can be taken out of a model with layer norms exactly: the mean that they subtract runs over all "
            "channels, also over those that are zero. Take out blocks, FFN features or KV groups"
        )
    if anatomy.hidden is None or not norms <= {"rms", "rms_plus_one"}:
        raise ValueError(
            "no hidden channel can be taken out of this model: its anatomy does not say who writes to the residual stream and "
            "reads it, through what norms (Anatomy.hidden, Block.norm). Take out blocks, or describe its family"
        )
    among(cut.hidden, anatomy.hidden.units, "hidden")
