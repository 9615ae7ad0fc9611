"""Multiple choice made from the test split: how does this sentence end?

The context is the first half of a sentence, behind the sentences that precede it in its paragraph; the right choice is
its second half, and the wrong ones are second halves of sentences of other paragraphs of the *same* document, so that
neither topic nor style gives the answer away. All choices of a question are about equally long, so that it matters
little whether likelihoods are normalised by length. (Whole sentences to follow a context are the obvious design, and a
small model does no better than chance on them: what a sentence says matters more to its likelihood than what is before.)

A question is drawn from each document in turn, so that long documents do not crowd out the others.

spec: `n` (questions), `choices` (of each, >= 2), `seed`. Input: `corpus`. Writes `questions.jsonl`, each line
{"context", "choices", "label", "document"}; a choice follows its context after one space. Result: `questions`,
`choices`, `documents`, `words` (mean of context plus one choice).
"""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import dataclass
from typing import Any

from pare.workers.corpus import Document, is_prose, read_split, sentences
from pare.workers.task import TaskContext, TaskError

SENTENCE_CHARACTERS = (40, 160)
"""Length of a sentence that is cut in two, closed range."""
CONTEXT_WORDS = (6, 40)
"""Length of a context, closed range."""
ENDING_WORDS = (5, 14)
"""Length of a choice, closed range."""
SIMILAR = 1.25
"""A wrong choice has at most this many times the characters of the right one, and at least their inverse."""


@dataclass(frozen=True)
class Halves:
    """A sentence cut in two."""

    paragraph: int
    """Number of its paragraph in the document."""

    context: str
    """The sentences before it, as far as they fit, and its first half."""

    ending: str


def run(ctx: TaskContext) -> dict[str, Any]:
    n, n_choices = ctx.spec["n"], ctx.spec["choices"]
    if n < 1 or n_choices < 2:
        raise TaskError(f"questions: n must be >= 1 and choices >= 2, got {n} and {n_choices}")
    chance = random.Random(ctx.spec["seed"])
    documents = read_split(ctx.inputs["corpus"], "test")
    piles = [pile for document in documents if (pile := questions_of(document, n_choices, chance))]
    questions = in_turn(piles, chance)
    if len(questions) < n:
        raise TaskError(
            f"questions: {n} were asked for, but the {len(documents)} documents of the test split give only {len(questions)} "
            f"with {n_choices} choices. Lower evaluation.questions.n (0 leaves them out) or evaluation.questions.choices, "
            "raise data.fractions.test, or use a longer text"
        )
    questions = questions[:n]
    with open(ctx.out / "questions.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
    words = [len(f"{q['context']} {choice}".split()) for q in questions for choice in q["choices"]]
    return {
        "questions": n,
        "choices": n_choices,
        "documents": len({q["document"] for q in questions}),
        "words": statistics.mean(words),
    }


def questions_of(document: Document, n_choices: int, chance: random.Random) -> list[dict[str, Any]]:
    """All questions that a document gives, one for each sentence that has enough others of like length."""
    pool = [half for i, p in enumerate(document.text.split("\n\n")) for half in cut_paragraph(i, " ".join(p.split()))]
    pool = list({half.ending: half for half in pool}.values())
    chance.shuffle(pool)
    found = []
    for right in pool:
        others = [
            other.ending
            for other in pool
            if other.paragraph != right.paragraph and 1 / SIMILAR <= len(other.ending) / len(right.ending) <= SIMILAR
        ]
        if len(others) < n_choices - 1:
            continue
        wrong = chance.sample(others, n_choices - 1)
        label = chance.randrange(n_choices)
        choices = [*wrong[:label], right.ending, *wrong[label:]]
        found.append({"context": right.context, "choices": choices, "label": label, "document": document.id})
    return found


def cut_paragraph(number: int, paragraph: str) -> list[Halves]:
    """The sentences of a paragraph that can be cut in two."""
    found, before = [], ""
    for sentence in sentences(paragraph):
        words = sentence.split()
        at = max(len(words) // 2, len(words) - ENDING_WORDS[1])
        start, ending = " ".join(words[:at]), " ".join(words[at:])
        context = " ".join([*before.split(), *words[:at]])
        if len(context.split()) > CONTEXT_WORDS[1]:
            context = start
        good = (
            is_prose(sentence)
            and sentence[-1] in ".!?"
            and SENTENCE_CHARACTERS[0] <= len(sentence) <= SENTENCE_CHARACTERS[1]
            and CONTEXT_WORDS[0] <= len(context.split()) <= CONTEXT_WORDS[1]
            and len(words) - at >= ENDING_WORDS[0]
            and is_closed(ending)
        )
        if good:
            found.append(Halves(number, context, ending))
        before = sentence if before == "" else f"{before} {sentence}"
    return found


def is_closed(text: str) -> bool:
    """Whether brackets and quotation marks that the text closes are opened in it: otherwise they give the cut away."""
    pairs = all(text.count(a) == text.count(b) for a, b in ("()", "[]", "“”"))
    return pairs and text.count('"') % 2 == 0


def in_turn(piles: list[list[dict[str, Any]]], chance: random.Random) -> list[dict[str, Any]]:
    """The first of every pile in random order, then the second of every pile, and so on."""
    chance.shuffle(piles)
    deepest = max(map(len, piles), default=0)
    return [pile[depth] for depth in range(deepest) for pile in piles if depth < len(pile)]
