"""Errors of levels in one unit for all linears, which exact solvers need.

A linear's own output error tr((W - W') H (W - W')^T) says well how one level of it compares with another, and badly how
one linear compares with another: what an error does to the model differs by orders of magnitude from layer to layer. So
each linear is measured once, at its lowest level, and its output errors carry the measurement to the other levels.
"""

from __future__ import annotations

from collections.abc import Sequence

DENSE = -1
"""In place of the index of a level: the weight as it is."""


def one_lowered(linears: int) -> list[list[int]]:
    """For each linear the choice in which it stands at the lowest level and every other one is dense."""
    return [[0 if i == lowered else DENSE for i in range(linears)] for lowered in range(linears)]


def measured_errors(kl: Sequence[float], output: Sequence[Sequence[float]]) -> list[list[float]]:
    """kl: of each linear, of its choice in `one_lowered`, in nats; output (linears, levels): output errors ->

    errors (linears, levels) in nats: to second order KL grows with the square of what is added to a linear's output.
    """
    return [[max(d, 0.0) * e / own[0] if own[0] else 0.0 for e in own] for d, own in zip(kl, output, strict=True)]


def relative_errors(output: Sequence[Sequence[float]], energy: Sequence[float]) -> list[list[float]]:
    """Output errors (linears, levels) as a share of each linear's output energy tr(W H W^T)."""
    return [[e / of if of else 0.0 for e in own] for own, of in zip(output, energy, strict=True)]
