"""Perplexity, KL and multiple choice against slow computations of the same by other means."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pare.methods.ops import heads
from pare.workers import evaluation
from pare.workers.models import load_dense, load_in_memory
from pare.workers.task import TaskError
from pare.workers.tasks import score


@pytest.fixture
def model(random_llama: Path) -> nn.Module:
    return load_dense(random_llama, torch.float32)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(7))


def noisy(model: nn.Module) -> nn.Module:
    """The same model with other weights."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def slow_distributions(model: nn.Module, window: Tensor) -> list[list[float]]:
    """Softmax in Python floats, one prefix at a time: entry i is the distribution of token i + 1."""
    out = []
    for end in range(1, len(window)):
        with torch.no_grad():
            logits = model(input_ids=window[None, :end]).logits[0, -1].tolist()
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        out.append([w / sum(weights) for w in weights])
    return out


def test_likelihood_kl_and_agreement_are_those_of_a_slow_computation_prefix_by_prefix(
    model: nn.Module, random_llama: Path, ids: Tensor
) -> None:
    base = load_dense(random_llama, torch.float32)
    student = noisy(model)
    _, hidden = evaluation.predict(base, ids, keep_hidden=True)
    assert hidden is not None
    teacher = evaluation.Teacher(hidden, evaluation.body_and_head(base)[1])

    got, _ = evaluation.predict(student, ids, teacher)

    assert got.kl is not None
    assert got.agree is not None
    for i, window in enumerate(ids):
        p, q = slow_distributions(base, window), slow_distributions(student, window)
        nll = [-math.log(q[t][window[t + 1]]) for t in range(len(q))]
        kl = [sum(a * math.log(a / b) for a, b in zip(p[t], q[t], strict=True)) for t in range(len(q))]
        agree = [float(p[t].index(max(p[t])) == q[t].index(max(q[t]))) for t in range(len(q))]
        assert got.nll[i].tolist() == pytest.approx(nll, rel=1e-4)
        assert got.kl[i].tolist() == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert got.agree[i].tolist() == agree
    assert 0 < got.agree.mean() < 1
    assert got.kl.mean() > 0.01


def test_perplexity_is_that_of_the_loss_of_transformers(model: nn.Module, ids: Tensor) -> None:
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()

    predictions, _ = evaluation.predict(model, ids)

    assert evaluation.summary(predictions)["quality/ppl"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert evaluation.summary(predictions)["eval/tokens"] == 3 * 19


def test_slices_of_positions_and_batches_of_windows_do_not_change_the_result(
    model: nn.Module, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, hidden = evaluation.predict(model, ids, keep_hidden=True)
    assert hidden is not None
    teacher = evaluation.Teacher(hidden, evaluation.body_and_head(model)[1])
    student = noisy(model)
    whole, _ = evaluation.predict(student, ids, teacher)

    monkeypatch.setattr(evaluation, "LOGIT_BYTES", 7 * 4 * 258)
    monkeypatch.setattr(evaluation, "FORWARD_TOKENS", 20)
    assert [s.stop - s.start for s in evaluation.slices(19, 258)] == [7, 7, 7]
    pieces, _ = evaluation.predict(student, ids, teacher)

    assert pieces.kl is not None
    torch.testing.assert_close(pieces.nll, whole.nll, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pieces.kl, whole.kl, rtol=1e-4, atol=1e-6)


def test_the_base_is_at_no_distance_from_itself_also_by_way_of_the_disk(workshop: Any) -> None:
    tokens = workshop.tokens()
    teacher, base = workshop.run(
        score, "teacher", {"dtype": "float32", "keep_hidden": True}, model=workshop.base, tokens=tokens
    )

    _, again = workshop.run(
        score, "again", {"dtype": "float32", "keep_hidden": False}, model=workshop.base, tokens=tokens, teacher=teacher
    )

    assert again["quality/kl"] == pytest.approx(0, abs=1e-7)
    assert again["quality/top1_agreement"] == 1
    assert again["quality/ppl"] == base["quality/ppl"]
    assert base["tokens"] == 4 * 31
    assert not (workshop.root / "again" / "hidden.safetensors").exists()


def test_a_compressed_artifact_is_scored_from_its_parts(workshop: Any, codes: Callable[..., Any]) -> None:
    tokens = workshop.tokens()
    teacher, _ = workshop.run(score, "teacher", {"dtype": "float32", "keep_hidden": True}, model=workshop.base, tokens=tokens)
    artifact = workshop.artifact("rtn2", lambda name, weight: codes(weight, 2, 32))

    _, result = workshop.run(
        score, "score", {"dtype": "float32", "keep_hidden": False}, model=artifact, tokens=tokens, teacher=teacher
    )

    model = load_in_memory(workshop.open(artifact), torch.float32)
    ids = evaluation.read_windows(tokens)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert result["quality/ppl"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert result["quality/kl"] > 1e-4


def test_a_teacher_of_other_windows_is_refused(model: nn.Module, ids: Tensor) -> None:
    _, hidden = evaluation.predict(model, ids[:2], keep_hidden=True)
    assert hidden is not None
    teacher = evaluation.Teacher(hidden, evaluation.body_and_head(model)[1])

    with pytest.raises(ValueError, match=r"\(2, 20\), not of \(3, 20\)"):
        evaluation.predict(model, ids, teacher)


def test_logits_that_do_not_come_from_the_head_alone_are_refused(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "get_output_embeddings", lambda: lambda hidden: 2 * model.lm_head(hidden))

    with pytest.raises(TaskError, match="more between its hidden states and its logits"):
        evaluation.body_and_head(model)


def test_logits_are_made_in_float32_also_by_a_head_of_lower_precision(random_llama: Path) -> None:
    model = load_dense(random_llama, torch.bfloat16)
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact = hidden.double() @ model.get_output_embeddings().weight.double().T

    found = evaluation.head_of(model)(hidden)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    rounded = model.get_output_embeddings()(hidden)
    assert (rounded.double() - exact).abs().max() > 1e-3, "in bfloat16 they would not be exact"


def test_rows_of_a_head_that_are_taken_in_pieces_and_its_bias_all_count(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, hidden = (torch.randn(n, generator=generator).bfloat16() for n in ((9, 4), (9,), (3, 4)))  # type: ignore[arg-type]
    monkeypatch.setattr(heads, "HEAD_ROWS", 4)

    found = evaluation.in_float32(weight, bias)(hidden)

    torch.testing.assert_close(found, hidden.float() @ weight.float().T + bias.float())


def test_the_metrics_say_how_many_windows_of_what_length_and_how_many_tokens_were_predicted(
    model: nn.Module, ids: Tensor
) -> None:
    metrics = evaluation.summary(evaluation.predict(model, ids)[0])

    assert (metrics["eval/windows"], metrics["eval/window_length"], metrics["eval/tokens"]) == (3, 20, 3 * 19)


def test_no_context_is_carried_over_from_one_window_to_the_next(model: nn.Module, ids: Tensor) -> None:
    together, _ = evaluation.predict(model, ids)
    alone, _ = evaluation.predict(model, ids[2:])

    torch.testing.assert_close(together.nll[2:], alone.nll, rtol=1e-5, atol=1e-6)


def test_capped_logits_are_capped() -> None:
    head = evaluation.Head(lambda h: h, {"final_logit_softcapping": 2.0, "vocab_size": 3})

    assert head(torch.tensor([[0.0, 1.0, 100.0]]))[0].tolist() == pytest.approx([0, 2 * math.tanh(0.5), 2])


def test_a_model_without_finite_likelihoods_fails_as_nonfinite(model: nn.Module, ids: Tensor) -> None:
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").fill_(float("nan"))

    with pytest.raises(TaskError) as error:
        evaluation.predict(model, ids)
    assert error.value.failure == "nonfinite"


def test_the_interval_covers_the_true_perplexity_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        # 40 windows of which each has its own mean, as texts have: nll ~ 2 + N(0, 0.3) over windows + N(0, 1) over tokens.
        nll = 2 + 0.3 * torch.randn(40, 1, generator=generator) + torch.randn(40, 50, generator=generator)
        low, high = evaluation.perplexity_interval(nll)
        covered += low <= math.exp(2) <= high

    assert 180 <= covered <= 198  # 95 % of 200, give or take what 40 windows and 1000 draws allow


def test_equal_windows_leave_no_interval() -> None:
    low, high = evaluation.perplexity_interval(torch.full((5, 10), 1.5))

    assert (low, high) == pytest.approx((math.exp(1.5), math.exp(1.5)))
