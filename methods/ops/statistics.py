"""What calibration accumulates over the inputs of a group of linears."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pare.methods.ops.precision import full_float32

NARROWEST_BLOCK, MOST_BLOCKS = 192, 8
"""Columns of a block of `Gram` at least, and blocks at most: narrower products take longer for each number."""


class Statistic:
    """Something that is accumulated over the inputs of one input group while calibration data flows past.

    A method names the classes it needs; one may be defined in the method's own file. Calibration makes one object per
    input group, calls `start` once, `add` for every batch, `finish` at the end.
    """

    name: ClassVar[str]

    def start(self, n_features: int, device: torch.device) -> None:
        raise NotImplementedError

    def add(self, x: Tensor) -> None:
        """x (tokens, n_features): the inputs that the group's linears read, in the dtype of the forward pass."""
        raise NotImplementedError

    def finish(self) -> Tensor:
        """The statistic as one tensor."""
        raise NotImplementedError

    @classmethod
    def of_divided(cls, value: Tensor, s: Tensor) -> Tensor:
        """What `finish` would have given for inputs x / s, s (n_features,). Only for methods that fold."""
        raise NotImplementedError(f"{cls.__name__} does not say what it is of inputs that are divided feature by feature")


class Gram(Statistic):
    """H = (2 / N) * sum over the N tokens of x x^T, float32 (in, in) (Frantar et al., 2023, arXiv:2210.17323, section 3).

    H is symmetric, so only the blocks on and above its diagonal are worked out: little more than half the products.
    """

    name = "gram"

    def start(self, n_features: int, device: torch.device) -> None:
        self.total = torch.zeros(n_features, n_features, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        x = x.to(self.total.device, torch.float32)
        step = max(NARROWEST_BLOCK, -(-x.shape[1] // MOST_BLOCKS))
        with full_float32():
            for start in range(0, x.shape[1], step):
                self.total[start : start + step, start:].addmm_(x[:, start : start + step].T, x[:, start:])
        self.tokens += len(x)

    def finish(self) -> Tensor:
        if not self.tokens:
            raise ValueError("a Gram matrix of no tokens: the linears of this group were never called")
        upper = self.total.triu()
        return (upper + upper.triu(1).T) * (2 / self.tokens)

    @classmethod
    def of_divided(cls, value: Tensor, s: Tensor) -> Tensor:
        return value / s / s[:, None]


class OfFeatures(Statistic):
    """A number for each feature, float32 (in,), over all tokens."""

    def start(self, n_features: int, device: torch.device) -> None:
        self.total = torch.zeros(n_features, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        if len(x):
            self.take(x.to(self.total.device, torch.float32))
        self.tokens += len(x)

    def take(self, x: Tensor) -> None:
        """x (tokens, in) float32, at least one: into `total`."""
        raise NotImplementedError

    def finish(self) -> Tensor:
        if not self.tokens:
            raise ValueError(f"{self.name} of no tokens: the linears of this group were never called")
        return self.result()

    def result(self) -> Tensor:
        """Of `total`: the mean, unless it says otherwise."""
        return self.total / self.tokens


class MeanSquare(OfFeatures):
    """a_j = mean over the tokens of x_j^2: what stands on the diagonal of `Gram`, halved."""

    name = "mean_square"

    def take(self, x: Tensor) -> None:
        self.total += x.square().sum(0)

    @classmethod
    def of_divided(cls, value: Tensor, s: Tensor) -> Tensor:
        return value / s.square()


class MeanMagnitude(OfFeatures):
    """a_j = mean over the tokens of |x_j|."""

    name = "mean_magnitude"

    def take(self, x: Tensor) -> None:
        self.total += x.abs().sum(0)

    @classmethod
    def of_divided(cls, value: Tensor, s: Tensor) -> Tensor:
        return value / s


class LargestMagnitude(OfFeatures):
    """a_j = max over the tokens of |x_j|: what a static grid for the inputs has to span."""

    name = "largest_magnitude"

    def take(self, x: Tensor) -> None:
        self.total = torch.maximum(self.total, x.abs().amax(0))

    def result(self) -> Tensor:
        return self.total

    @classmethod
    def of_divided(cls, value: Tensor, s: Tensor) -> Tensor:
        return value / s
