from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

from pare.methods.ops.divergences import DIVERGENCES, cross_entropy, divergence_, log_softmax_, sum_over_logits

every = pytest.mark.parametrize("kind", DIVERGENCES)


def random(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


P, Q = random(7, 50).log_softmax(-1), random(7, 50, seed=1).log_softmax(-1)


def divergence(kind: str, log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    return divergence_(kind, log_p.clone(), log_q, beta)


def by_torch(kind: str, log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    p, q = Categorical(logits=log_p), Categorical(logits=log_q)
    if kind == "forward_kl":
        return kl_divergence(p, q)
    if kind == "reverse_kl":
        return kl_divergence(q, p)
    m = Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
    return beta * kl_divergence(p, m) + (1 - beta) * kl_divergence(q, m)


@every
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_values_and_gradients_are_those_of_torch_distributions(kind: str, beta: float) -> None:
    logits = Q.clone().requires_grad_()
    expected = by_torch(kind, P, logits.log_softmax(-1), beta)
    (slope,) = torch.autograd.grad(expected.sum(), logits)

    value, gradient = divergence(kind, P, Q, beta)

    torch.testing.assert_close(value, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, slope, atol=1e-5, rtol=1e-4)


@every
def test_a_model_is_nowhere_from_itself_and_feels_no_pull(kind: str) -> None:
    value, gradient = divergence(kind, P, P.clone())

    assert value.abs().max() <= 1e-6
    assert gradient.abs().max() <= 1e-7


@every
def test_it_is_never_negative_and_leaves_the_student_as_it_was(kind: str) -> None:
    q = Q.clone()

    assert (divergence(kind, P, q)[0] > 0).all()
    assert torch.equal(q, Q)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_log_softmax_is_that_of_torch_in_place(temperature: float) -> None:
    logits = 10 * random(7, 50, seed=3)
    expected = (logits / temperature).log_softmax(-1)

    found = log_softmax_(logits, temperature)

    torch.testing.assert_close(found, expected)
    assert found is logits


def test_the_jsd_is_symmetric_at_one_half_and_nowhere_else() -> None:
    torch.testing.assert_close(divergence("jsd", P, Q, 0.5)[0], divergence("jsd", Q, P, 0.5)[0])
    torch.testing.assert_close(divergence("jsd", P, Q, 0.2)[0], divergence("jsd", Q, P, 0.8)[0])
    assert (divergence("jsd", P, Q, 0.2)[0] - divergence("jsd", Q, P, 0.2)[0]).abs().max() > 1e-2


def test_the_jsd_over_beta_goes_to_the_forward_kl() -> None:
    p, q = ((log / 3).double().log_softmax(-1) for log in (P, Q))  # of tamer tails
    forward = divergence("forward_kl", p, q)[0]

    errors = [((divergence("jsd", p, q, beta)[0] / beta / forward) - 1).abs().max() for beta in (1e-2, 1e-4, 1e-6)]

    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.01


def test_cross_entropy_is_that_of_torch() -> None:
    targets = torch.tensor([3, 0, 49, 7, 7, 1, 20])
    logits = Q.clone().requires_grad_()
    expected = nn.functional.cross_entropy(logits, targets, reduction="none")
    (slope,) = torch.autograd.grad(expected.sum(), logits)

    value, gradient = cross_entropy(Q, targets)

    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, slope)


def parts(kind: str) -> tuple[nn.Linear, Tensor, Callable[[Tensor, slice], tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    head = nn.Linear(8, 50)

    def of_logits(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        value, gradient = divergence(kind, P[rows], logits.log_softmax(-1))
        return value.sum(), gradient

    return head, random(7, 8, seed=2).requires_grad_(), of_logits


@every
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_pieces_of_any_size_give_the_loss_and_gradients_of_the_whole(kind: str, chunk: int) -> None:
    head, hidden, of_logits = parts(kind)
    expected = by_torch(kind, P, head(hidden).log_softmax(-1), 0.5).sum()
    wanted = torch.autograd.grad(2.5 * expected, [hidden, *head.parameters()])

    total = sum_over_logits(head, hidden, list(head.parameters()), of_logits, chunk)
    found = torch.autograd.grad(2.5 * total, [hidden, *head.parameters()])

    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_frozen_head_gets_no_gradient_and_no_rows_are_no_loss() -> None:
    head, hidden, of_logits = parts("forward_kl")
    head.requires_grad_(False)

    total = sum_over_logits(head, hidden, list(head.parameters()), of_logits, 2)
    total.backward()
    empty = sum_over_logits(head, hidden[:0], list(head.parameters()), of_logits, 2)

    assert hidden.grad is not None
    assert hidden.grad.any()
    assert all(p.grad is None for p in head.parameters())
    assert empty == 0


def test_without_gradients_none_are_worked_out() -> None:
    head, hidden, of_logits = parts("forward_kl")
    calls: list[bool] = []

    def watched(x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return head(x)  # type: ignore[no-any-return]

    with torch.no_grad():
        total = sum_over_logits(watched, hidden, list(head.parameters()), of_logits, 3)

    assert not any(calls)
    assert not total.requires_grad


def test_a_second_backward_pass_is_refused_with_what_to_do() -> None:
    head, hidden, of_logits = parts("forward_kl")
    total = sum_over_logits(head, hidden, list(head.parameters()), of_logits, 3)
    again = partial(torch.autograd.grad, total, hidden, retain_graph=True)
    again()

    with pytest.raises(RuntimeError, match="compute the loss again"):
        again()
