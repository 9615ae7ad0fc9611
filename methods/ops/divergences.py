"""How far a student's distribution over the vocabulary is from a teacher's, and sums over tokens a piece at a time.

With p the teacher's distribution and q the student's, both softmax(z / temperature), and m = beta p + (1 - beta) q:

    forward KL  sum p (log p - log q)           gradient with respect to z_q / temperature: q - p
    reverse KL  sum q (log q - log p)                                                       q (r - sum q r), r = log q - log p
    JSD         beta KL(p || m) + (1 - beta) KL(q || m)                        (1 - beta) q (r - sum q r), r = log q - log m

The gradients are those of the sums above through q = softmax; that of the JSD is short because the terms through m cancel.
Source: the generalised JSD is that of Agarwal et al. (2023), "On-Policy Distillation of Language Models" (GKD),
arXiv:2306.13649, section 2, eq. 1; JSD / beta goes to the forward KL as beta goes to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def divergence_(kind: str, log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """Divergence of each row in nats (rows,), and its gradient with respect to the logits of q (rows, vocabulary).

    log_p, log_q: (rows, vocabulary), float32, of the teacher and of the student; log_p is *overwritten*. kind: one of
    `DIVERGENCES`; beta: in (0, 1), for the JSD alone.
    """
    if kind == "forward_kl":
        p = log_p.exp()
        gradient = log_q.exp().sub_(p)
        return p.mul_(log_p.sub_(log_q)).sum(-1), gradient
    if kind == "reverse_kl":
        return of_student(log_q, log_p.neg_().add_(log_q))
    log_m = log_p + math.log(beta)
    torch.logaddexp(log_m, log_q + math.log1p(-beta), out=log_m)
    of_teacher = log_p.exp().mul_(log_p.sub_(log_m)).sum(-1)
    value, gradient = of_student(log_q, log_m.neg_().add_(log_q))
    return beta * of_teacher + (1 - beta) * value, gradient.mul_(1 - beta)


def of_student(log_q: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """sum q r and q (r - sum q r); the ratio r (rows, vocabulary) is overwritten."""
    q = log_q.exp()
    value = (q * ratio).sum(-1)
    return value, q.mul_(ratio.sub_(value[:, None]))


def log_softmax_(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature), in place of the logits (rows, vocabulary)."""
    if temperature != 1:
        logits.div_(temperature)
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def cross_entropy(log_q: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the negative log-likelihood of `targets` (rows,) int64."""
    index = targets[:, None]
    gradient = log_q.exp()
    gradient.scatter_add_(1, index, torch.full_like(index, -1, dtype=gradient.dtype))
    return -log_q.gather(1, index)[:, 0], gradient


OfLogits = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(logits (rows, vocabulary), which rows) -> (sum of a loss over them, its gradient with respect to the logits). May overwrite
the logits."""


def sum_over_logits(
    head: Callable[[Tensor], Tensor], hidden: Tensor, parameters: Sequence[nn.Parameter], of_logits: OfLogits, chunk: int
) -> Tensor:
    """Sum of a loss over the rows of `hidden` (rows, width), of whose logits only `chunk` rows exist at a time.

    head: hidden states -> logits, float32; parameters: those of it that are trained. The gradients are worked out with the
    loss, so that the backward pass needs no logits: what is kept is as large as `hidden` and `parameters`.
    """
    trained = [p for p in parameters if p.requires_grad]
    total: Tensor = _Sum.apply(head, of_logits, chunk, torch.is_grad_enabled(), hidden, *trained)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[Tensor], Tensor],
        of_logits: OfLogits,
        chunk: int,
        is_trained: bool,
        hidden: Tensor,
        *parameters: nn.Parameter,
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        of_hidden = torch.empty_like(hidden)
        of_parameters = [torch.zeros_like(p) for p in parameters]
        is_trained = is_trained and (hidden.requires_grad or bool(parameters))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            with torch.set_grad_enabled(is_trained):
                piece = hidden[rows].detach().requires_grad_(is_trained)
                logits = head(piece)
            value, gradient = of_logits(logits.detach(), rows)
            total += value
            if is_trained:
                found, *more = torch.autograd.grad(logits, [piece, *parameters], gradient)
                of_hidden[rows] = found
                for whole, part in zip(of_parameters, more, strict=True):
                    whole += part
        ctx.gradients = (of_hidden, *of_parameters) if is_trained else None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("sum_over_logits keeps its gradients for one backward pass; compute the loss again for another")
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, None, *(gradient.mul_(grad_output) for gradient in gradients)
