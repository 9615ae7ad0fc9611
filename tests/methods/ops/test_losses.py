from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pare.methods.ops import losses
from pare.methods.ops.losses import next_token_loss_


@pytest.fixture(autouse=True)
def several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "PIECE", 37 * 5)  # 5 rows of the 37 logits below


def example(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(3, 7, 37, generator=generator)
    return logits.to(dtype).requires_grad_(), torch.randint(37, (3, 7), generator=generator)


def plainly(logits: Tensor, ids: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_value_and_gradient_are_those_of_cross_entropy(dtype: torch.dtype, tolerance: float) -> None:
    logits, ids = example(dtype)
    wanted = plainly(logits, ids)
    (wanted_gradient,) = torch.autograd.grad(wanted / 5, logits)

    total, tokens = next_token_loss_(logits * 1, ids)
    (gradient,) = torch.autograd.grad(total / 5, logits)

    assert tokens == 18
    assert torch.allclose(total, wanted, rtol=1e-6)
    assert gradient.dtype == dtype
    assert torch.allclose(gradient, wanted_gradient, rtol=tolerance, atol=tolerance / 100)


def test_logits_of_any_size_are_summed_without_overflow() -> None:
    logits, ids = example(torch.float32)

    total, _ = next_token_loss_(logits * 100, ids)

    assert torch.allclose(total, plainly(logits * 100, ids), rtol=1e-6)
    assert torch.autograd.grad(total, logits)[0].isfinite().all()


def test_the_last_position_predicts_nothing_and_gets_no_gradient() -> None:
    logits, ids = example(torch.float32)

    total, _ = next_token_loss_(logits * 1, ids)
    (gradient,) = torch.autograd.grad(total, logits)

    assert not gradient[:, -1].any()
    assert gradient[:, :-1].any(-1).all()


def test_logits_that_another_gradient_needs_are_refused_rather_than_spoilt() -> None:
    logits, ids = example(torch.float32)

    total, _ = next_token_loss_(torch.tanh(logits), ids)  # the gradient of tanh is computed from its output

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_second_backward_pass_is_refused() -> None:
    logits, ids = example(torch.float32)
    total, _ = next_token_loss_(logits * 1, ids)
    total.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="one backward pass"):
        total.backward()


def test_a_logit_that_is_no_number_shows_in_the_loss() -> None:
    logits, ids = example(torch.float32)
    spoilt = (logits * 1).detach()
    spoilt[1, 2, 3] = float("nan")

    assert next_token_loss_(spoilt, ids)[0].isnan()
