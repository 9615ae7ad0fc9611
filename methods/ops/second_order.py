"""What second-order methods make of a Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

SOLVED_AT_ONCE = 96
"""Side of the largest triangle that is not halved."""


def finite(statistic: Tensor, method: str, group: str) -> Tensor:
    """The statistic of an input group as it is; ValueError where calibration has met what is no number."""
    if not statistic.isfinite().all():
        raise ValueError(f"{method}: {group} met infinite or NaN inputs under calibration; try dtype=float32")
    return statistic


def without_dead(gram: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """H (in, in), W (out, in) -> both with features that are always zero out of the way: 1 on the diagonal, no weight."""
    dead = gram.diagonal() == 0
    gram = gram.clone()
    gram.diagonal().masked_fill_(dead, 1)
    return gram, weight.masked_fill(dead, 0)


def inverse_factor(gram: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """H (n, n) -> U upper triangular with U^T U = (H + d * mean(diag H) * I)^-1, and d: `damping`, doubled until U exists.

    None where even d > 1 does not help. With J the reversal of all indices and J H J = L L^T, U is the inverse of J L J.
    """
    mean = gram.diagonal().mean()
    while damping <= 1:
        damped = gram.flip(0, 1)
        damped.diagonal().add_(damping * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped
        if info.item() == 0:
            upper = lower.flip(0, 1)
            del lower
            return inverse_of_upper(upper), damping
        damping *= 2
    return None, damping


def inverse_of_upper(u: Tensor) -> Tensor:
    """U (n, n) upper triangular -> its inverse, by halves: the products are faster than solving against n unit vectors."""
    n, half = len(u), len(u) // 2
    if n <= SOLVED_AT_ONCE:
        return torch.linalg.solve_triangular(u, torch.eye(n, dtype=u.dtype, device=u.device), upper=True)
    first, last = inverse_of_upper(u[:half, :half]), inverse_of_upper(u[half:, half:])
    out = torch.zeros_like(u)
    out[:half, :half], out[half:, half:] = first, last
    out[:half, half:] = -(first @ u[:half, half:]) @ last
    return out


def square_root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """H (n, n) symmetric, float64 -> S (n, k) with S S^T = H, and its pseudo-inverse (k, n). k: directions that count.

    Below the smallest of them an eigenvalue of what was a float32 matrix is noise, and one over its root would be large noise.
    """
    values, vectors = torch.linalg.eigh(gram)
    used = values > values.max() * len(gram) * torch.finfo(torch.float32).eps
    roots, vectors = values[used].sqrt(), vectors[:, used]
    return vectors * roots, (vectors / roots).T
