"""What second-order methods make of a Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_factor(gram: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """H (n, n) -> U upper triangular with U^T U = (H + d * mean(diag H) * I)^-1, and d: `damping`, doubled until U exists.

    None where even d > 1 does not help. With J the reversal of all indices and J H J = L L^T, U is the inverse of J L J.
    """
    eye, mean = torch.eye(len(gram), dtype=gram.dtype, device=gram.device), gram.diagonal().mean()
    while damping <= 1:
        lower, info = torch.linalg.cholesky_ex((gram + damping * mean * eye).flip(0, 1))
        if info.item() == 0:
            return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True), damping
        damping *= 2
    return None, damping


def square_root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """H (n, n) symmetric, float64 -> S (n, k) with S S^T = H, and its pseudo-inverse (k, n). k: directions that count.

    Below the smallest of them an eigenvalue of what was a float32 matrix is noise, and one over its root would be large noise.
    """
    values, vectors = torch.linalg.eigh(gram)
    used = values > values.max() * len(gram) * torch.finfo(torch.float32).eps
    roots, vectors = values[used].sqrt(), vectors[:, used]
    return vectors * roots, (vectors / roots).T
