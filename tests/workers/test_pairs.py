"""Minimal pairs: read from any JSONL, decided by the likelihood of the whole sentence, ties counted as half."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pare.workers import evaluation
from pare.workers.corpus import SourceError
from pare.workers.models import load_dense, load_tokenizer
from pare.workers.pairs import accuracy, read_pairs, resolve_pairs, share
from pare.workers.task import TaskError
from pare.workers.tasks import pairs as bring

COLUMNS = {"good": "sentence_good", "bad": "sentence_bad", "group": "phenomenon"}
ROWS = [
    {"sentence_good": "These cats sleep.", "sentence_bad": "These cat sleep.", "phenomenon": "agreement", "more": 1},
    {"sentence_good": "A dog that barks bites.", "sentence_bad": "A dog that bark bites.", "phenomenon": "agreement"},
    {"sentence_good": "Who saw it?", "sentence_bad": "Who it saw?", "phenomenon": "order"},
    {"sentence_good": "The same.", "sentence_bad": "The same.", "phenomenon": "order"},
    {"sentence_good": "I have never been there.", "sentence_bad": "I have ever been there.", "phenomenon": "polarity"},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return path


@pytest.fixture
def model(random_llama: Path) -> nn.Module:
    return load_dense(random_llama, torch.float32)


def slow_likelihood(model: nn.Module, ids: list[int]) -> float:
    """Sum of log-likelihoods in Python floats, one prefix at a time, the first token behind the first id."""
    total = 0.0
    for end in range(1, len(ids)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:end]])).logits[0, -1].tolist()
        top = max(logits)
        total += logits[ids[end]] - top - math.log(sum(math.exp(x - top) for x in logits))
    return total


def test_the_likelier_sentence_of_a_pair_is_that_of_a_slow_computation(
    model: nn.Module, random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(random_llama)
    pairs = read_pairs(COLUMNS, write(tmp_path / "p.jsonl", ROWS))
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    sentences = [pair[side] for pair in pairs for side in ("good", "bad")]
    slow = [slow_likelihood(model, [start, *tokenizer(s, add_special_tokens=False).input_ids]) for s in sentences]

    found = evaluation.sentence_likelihoods(model, tokenizer, sentences)
    answers = evaluation.prefers_good(model, tokenizer, pairs)
    monkeypatch.setattr(evaluation, "FORWARD_TOKENS", 40)
    in_small_batches = evaluation.sentence_likelihoods(model, tokenizer, sentences)

    assert found == pytest.approx(slow, rel=1e-5)
    assert in_small_batches == pytest.approx(slow, rel=1e-5)
    assert answers[3] == 0.5, "equal sentences are a tie"
    assert [a for i, a in enumerate(answers) if i != 3] == [float(slow[2 * i] > slow[2 * i + 1]) for i in (0, 1, 2, 4)]
    assert evaluation.prefers_good(model, tokenizer, pairs) == answers


def test_accuracy_is_told_by_group_with_intervals_and_ties() -> None:
    metrics = accuracy([1.0, 0.0, 1.0, 0.5, 1.0], ["a", "a", "b", "b", ""])

    assert metrics["quality/acc/pairs"] == pytest.approx(0.7)
    assert metrics["quality/acc/pairs.a"] == 0.5
    assert metrics["quality/acc/pairs.b"] == 0.75
    assert "quality/acc/pairs." not in metrics
    assert (metrics["eval/ties/pairs"], metrics["eval/questions/pairs"]) == (1, 5)
    assert 0 <= metrics["quality/acc/pairs_low"] < 0.7 < metrics["quality/acc/pairs_high"] <= 1


def test_the_interval_of_a_share_is_that_of_the_book_and_is_wide_where_all_are_right() -> None:
    some = share("x", [1.0] * 8 + [0.0] * 2)
    every = share("x", [1.0] * 10)

    assert (some["x_low"], some["x_high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert (every["x_low"], every["x_high"]) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_pairs_are_brought_into_the_store_and_named_by_their_bytes(run_task: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", ROWS)
    identity = resolve_pairs({**COLUMNS, "path": str(path)})

    out, result = run_task(bring, {"columns": COLUMNS, "identity": identity, "where": {"path": str(path)}})

    lines = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert lines[2] == {"good": "Who saw it?", "bad": "Who it saw?", "group": "order"}
    assert result == {"pairs": 5, "groups": 3}
    write(path, ROWS[:2])
    assert resolve_pairs({**COLUMNS, "path": str(path)}) != identity
    with pytest.raises(TaskError, match="is not what it was when the plan was made"):
        run_task(bring, {"columns": COLUMNS, "identity": identity, "where": {"path": str(path)}})


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [ROWS[0], {"sentence_good": "A."}],
            r"p.jsonl:2: has no column 'sentence_bad', only sentence_good. Try: evaluation.pairs.bad",
        ),
        ([{**ROWS[0], "phenomenon": 3}], r"p.jsonl:1: 'phenomenon' must be text that is not empty, got 3"),
        ([["a", "b"]], r"p.jsonl:1: is no JSON object but list"),
        ([], r"holds no pair"),
    ],
)
def test_a_line_that_is_no_pair_is_named(rows: list[Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=said):
        read_pairs(COLUMNS, write(tmp_path / "p.jsonl", rows))


def test_what_is_no_file_and_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"evaluation.pairs.path=.*no such file"):
        read_pairs(COLUMNS, tmp_path / "nowhere")
    (tmp_path / "p.jsonl").write_text("good\tbad\n")
    with pytest.raises(SourceError, match=r"p.jsonl:1: is no JSON"):
        read_pairs(COLUMNS, tmp_path / "p.jsonl")


def test_a_model_that_gives_no_likelihood_fails_as_nonfinite(model: nn.Module, random_llama: Path) -> None:
    tokenizer = load_tokenizer(random_llama)
    tokenizer.bos_token_id, tokenizer.eos_token_id = None, None
    with pytest.raises(TaskError, match="neither a beginning- nor an end-of-text token"):
        evaluation.sentence_likelihoods(model, tokenizer, ["a"])
