"""Perplexity, KL and multiple choice against slow computations of the same by other means."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pare.workers import evaluation
from pare.workers.models import load_dense, load_in_memory, load_tokenizer
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


def test_capped_logits_are_capped() -> None:
    head = evaluation.Head(lambda h: h, {"final_logit_softcapping": 2.0})

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


def questions() -> list[dict[str, Any]]:
    choices = [["the cat", "a", "some dogs ran", "zq"], ["one two", "three", "four five six", "seven"]]
    return [
        {"context": f"number {i}: it was said that", "choices": choices[i % 2], "label": i % 4, "document": "d"}
        for i in range(6)
    ]


def test_multiple_choice_is_decided_by_the_likelihood_of_the_whole_choice(model: nn.Module, random_llama: Path) -> None:
    tokenizer = load_tokenizer(random_llama)
    noisy(model)
    right = right_by_length = 0
    for question in questions():
        sums = []
        for choice in question["choices"]:
            start = len(tokenizer(question["context"]).input_ids)
            whole = torch.tensor(tokenizer(question["context"] + " " + choice).input_ids)
            q = slow_distributions(model, whole)
            sums.append(sum(math.log(q[t][whole[t + 1]]) for t in range(start - 1, len(whole) - 1)))
        by_length = [s / len(c) for s, c in zip(sums, question["choices"], strict=True)]
        right += sums.index(max(sums)) == question["label"]
        right_by_length += by_length.index(max(by_length)) == question["label"]

    got = evaluation.multiple_choice(model, tokenizer, questions(), "made_up")

    assert got["quality/acc/made_up"] == pytest.approx(right / 6)
    assert got["quality/acc_norm/made_up"] == pytest.approx(right_by_length / 6)
    p = right / 6
    assert got["quality/acc_stderr/made_up"] == pytest.approx(math.sqrt(p * (1 - p) / 5))


def test_reading_the_shared_context_once_gives_what_lm_eval_gives(model: nn.Module, random_llama: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = load_tokenizer(random_llama)
    requests = [
        Instance("loglikelihood", {}, (q["context"], " " + choice), i)
        for i, q in enumerate(questions())
        for choice in q["choices"]
    ]

    ours = evaluation.scorer(model, tokenizer).loglikelihood(requests)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(requests)

    assert [x for x, _ in ours] == pytest.approx([x for x, _ in theirs], rel=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_a_question_longer_than_the_model_reads_is_cut_as_lm_eval_cuts_it(model: nn.Module, random_llama: Path) -> None:
    long = [{**question, "context": "x" * 2040 + question["context"]} for question in questions()[:1]]

    got = evaluation.multiple_choice(model, load_tokenizer(random_llama), long, "long")

    assert got["quality/acc/long"] in (0.0, 1.0)
