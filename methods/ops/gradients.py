"""What is accumulated over the gradients of the loss with respect to a weight."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor


class GradientStatistic:
    """Something that is accumulated over the gradients of one weight, sequence after sequence.

    The loss of a sequence is the mean over its predicted tokens, in nats. A method names the classes it needs beside those of
    `statistics`; one may be defined in the method's own file. Of each weight one object is made; it is called as theirs are.
    """

    name: ClassVar[str]

    def start(self, shape: tuple[int, int], device: torch.device) -> None:
        raise NotImplementedError

    def add(self, gradient: Tensor) -> None:
        """gradient (out, in) float32, of the loss of one sequence; not to be kept."""
        raise NotImplementedError

    def finish(self) -> Tensor:
        """The statistic as one tensor."""
        raise NotImplementedError


class MeanOverSequences(GradientStatistic):
    """Mean over the sequences of a function of their gradients, float32 (out, in)."""

    def start(self, shape: tuple[int, int], device: torch.device) -> None:
        self.total = torch.zeros(shape, device=device)
        self.sequences = 0

    def of(self, gradient: Tensor) -> Tensor:
        raise NotImplementedError

    def add(self, gradient: Tensor) -> None:
        self.total += self.of(gradient)
        self.sequences += 1

    def finish(self) -> Tensor:
        if not self.sequences:
            raise ValueError(f"{self.name} of no sequences")
        return self.total / self.sequences


class Fisher(MeanOverSequences):
    """F_ij = mean over the sequences of g_ij^2: diagonal of the empirical Fisher matrix with a sequence as the sample.

    With labels from the data, not drawn from the model (Kunstner et al., 2019, arXiv:1905.12558). A sequence's squared
    gradient is that of its tokens' mean, so values shrink as sequences grow: compare only such of one length.
    """

    name = "fisher"

    def of(self, gradient: Tensor) -> Tensor:
        return gradient.square()


class GradientMagnitude(MeanOverSequences):
    """G_ij = mean over the sequences of |g_ij|; of one sequence what Shao et al. (2024), arXiv:2411.00850, rank weights by."""

    name = "gradient_magnitude"

    def of(self, gradient: Tensor) -> Tensor:
        return gradient.abs()
