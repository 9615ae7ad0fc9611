"""Weights of the tokens over which calibration accumulates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pare.methods.ops.statistics import Gram, Statistic

Attention = Callable[[], Tensor]
"""Gives (sequences, length) float32: the attention that each token receives in the block, summed over heads and queries. Asking
for it costs one more pass of the block."""


@dataclass(frozen=True)
class TokenWeights:
    """How much each token counts in a block. Equal objects are worked out once for each block and batch."""

    def importance(self, hidden: Tensor, attention: Attention) -> Tensor:
        """hidden (sequences, length, width): what the block reads, in the dtype of the forward pass -> (sequences, length),
        >= 0, in any unit."""
        raise NotImplementedError

    def of(self, hidden: Tensor, attention: Attention) -> Tensor:
        """Weights (sequences, length), float32, that come to `length` in every sequence, so that no sequence counts for more
        than another."""
        found = self.importance(hidden, attention).float()
        total = found.sum(1, keepdim=True)
        if found.shape != hidden.shape[:2] or not (found.isfinite().all() and (found >= 0).all() and (total > 0).all()):
            raise ValueError(
                f"{self} must give each of {tuple(hidden.shape[:2])} tokens a finite number >= 0, and not 0 to all of a "
                f"sequence; got {tuple(found.shape)} from {found.min().item():g} to {found.max().item():g}"
            )
        return found * (found.shape[1] / total)


@dataclass(frozen=True)
class Uniform(TokenWeights):
    """All tokens count the same."""

    def importance(self, hidden: Tensor, attention: Attention) -> Tensor:
        return torch.ones(hidden.shape[:2], device=hidden.device)


@dataclass(frozen=True)
class FirstTokens(TokenWeights):
    """The first tokens of each sequence count the same, the others nothing."""

    count: int
    """How many, >= 1."""

    def importance(self, hidden: Tensor, attention: Attention) -> Tensor:
        first = torch.arange(hidden.shape[1], device=hidden.device) < self.count
        return first.expand(hidden.shape[:2])


@dataclass(frozen=True)
class Spread(TokenWeights):
    """Something about each token, put on a straight line from `lowest` to 1 in each sequence (Sung et al., 2025,
    arXiv:2503.01820)."""

    lowest: float = 0.005
    """Weight of the least token beside 1 for the greatest, in (0, 1]."""


@dataclass(frozen=True)
class ActivationNorm(Spread):
    """By the norm of the hidden state."""

    def importance(self, hidden: Tensor, attention: Attention) -> Tensor:
        return spread(torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32), self.lowest)


@dataclass(frozen=True)
class AttentionReceived(Spread):
    """By the attention that is paid to it. In a causal model early tokens are seen by more queries, and the first by all."""

    def importance(self, hidden: Tensor, attention: Attention) -> Tensor:
        return spread(attention(), self.lowest)


def spread(importance: Tensor, lowest: float) -> Tensor:
    """importance (sequences, length) -> the same on a line from `lowest` to 1 in each sequence; 1 where all are equal."""
    least, most = importance.amin(1, keepdim=True), importance.amax(1, keepdim=True)
    return torch.where(most > least, lowest + (1 - lowest) * (importance - least) / (most - least), 1.0)


class WeighedStatistic(Statistic):
    """A statistic in which some tokens count for more than others. Not for experts: which tokens one reads is not known."""

    token_weights: ClassVar[TokenWeights]

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """x (tokens, n_features); weights (tokens,) float32, >= 0; None: all are 1."""
        raise NotImplementedError


class WeighedGram(Gram, WeighedStatistic):
    """H = 2 sum over the tokens of r_t x_t x_t^T / sum of r_t, float32 (in, in) (Sung et al., 2025, arXiv:2503.01820): second
    derivative of the mean squared output error in which token t counts r_t times.

    With equal weights it is `Gram` to the bit. A subclass names its `token_weights`, and itself.
    """

    def start(self, n_features: int, device: torch.device) -> None:
        super().start(n_features, device)
        self.weight = 0.0

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        weights = torch.ones(len(x), device=x.device) if weights is None else weights
        super().add(x.float() * weights.sqrt()[:, None])
        self.weight += weights.sum(dtype=torch.float64).item()

    def finish(self) -> Tensor:
        mean = super().finish()
        if not self.weight:
            raise ValueError("a weighed Gram matrix of tokens that count nothing")
        return mean * (self.tokens / self.weight)
