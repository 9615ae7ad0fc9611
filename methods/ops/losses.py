"""Losses over a vocabulary, computed without a second copy of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 2**22
"""Logits worked on at a time: 16 MiB of float32, which the C library serves again from memory that it holds."""


def next_token_loss_(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every token given those before it -> (sum in nats, float32; number of predicted tokens).

    logits (sequences, length, vocabulary), any float dtype; labels (sequences, length) int64: the tokens, negative where one is
    not to be predicted. Works in float32 whatever the dtype of the logits, and *overwrites* them: with their gradient where
    one is wanted, with scratch otherwise.
    """
    targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -1)], dim=1)
    total: Tensor = _CrossEntropy.apply(logits.flatten(0, 1), targets.flatten())
    return total, (targets >= 0).sum()


class _CrossEntropy(torch.autograd.Function):
    """Sum over rows z of `logsumexp(z) - z[target]`; its gradient is `softmax(z) - onehot(target)`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (rows, vocabulary), targets (rows,) int64, negative where nothing is predicted."""
        total = torch.zeros((), device=logits.device)
        rows = max(1, PIECE // logits.shape[1])
        for piece, target in zip(logits.split(rows), targets.split(rows), strict=True):
            z = piece.float()  # the piece itself where it is float32 already
            predicted, index = target >= 0, target.clamp(min=0).unsqueeze(1)
            z.sub_(z.amax(1, keepdim=True))
            of_target = z.gather(1, index)
            partition = z.exp_().sum(1, keepdim=True)
            total += (partition.log() - of_target)[predicted].sum()
            if ctx.needs_input_grad[0]:
                z.div_(partition).scatter_add_(1, index, -torch.ones_like(of_target))
                piece.copy_(z.masked_fill_(~predicted.unsqueeze(1), 0))
        ctx.gradient = logits.detach()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        if ctx.gradient is None:
            raise RuntimeError("next_token_loss_ keeps its gradient for one backward pass; compute the loss again for another")
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad_output), None
