"""Of a conversation only what the assistant says is learnt: the spans, found through unlike templates, and the refusals."""

from __future__ import annotations

from typing import Any

import pytest

from pare.workers.chat import read
from pare.workers.corpus import Document
from pare.workers.rows import Passage
from pare.workers.task import TaskError
from pare.workers.tiny import tiny_tokenizer

END = 256
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}[system]\nHelp.<|end|>\n{% endif %}"
    "[{{ m['role'] }}]\n{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A: {% generation %}{{ m['content'] }}.{% endgeneration %}\n"
    "{% else %}Q: {{ m['content'] }}\n{% endif %}{% endfor %}"
)
LINES = (
    "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
THINKING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A: {% if loop.last %}<think></think>{% endif %}{{ m['content'] }}"
    "{% else %}Q: {{ m['content'] }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
TURNS = [("user", "Who?"), ("assistant", "Me "), ("user", "Where?"), ("assistant", "Here")]


def conversation(turns: list[tuple[str, str]]) -> Document:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Document("chat/1", "\n\n".join(content for _, content in turns), messages=messages)


def chat(template: str, turns: list[tuple[str, str]] = TURNS, predict: str = "assistant") -> tuple[Passage, str]:
    """The tokens of a conversation, and those to be learnt as text with a bar wherever something is left out between."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    passage = read(conversation(turns), tokenizer, predict)
    pieces: list[list[int]] = [[]]
    for i, label in zip(passage.ids, passage.labels, strict=True):
        assert label in (i, -100)
        if label >= 0:
            pieces[-1].append(label)
        elif pieces[-1]:
            pieces.append([])
    return passage, "|".join(tokenizer.decode(piece) for piece in pieces if piece)


@pytest.mark.parametrize(
    ("template", "learnt"),
    [
        (CHATML, "Me <|end|>|Here<|end|>"),
        (MARKED, "Me .|Here.<|end|>"),
        (LINES, " Me| Here<|end|>"),
    ],
)
def test_the_assistants_turns_and_their_ends_are_learnt_and_nothing_else(template: str, learnt: str) -> None:
    passage, said = chat(template)

    assert said == learnt
    assert passage.ids == chat(template, predict="all")[0].ids
    assert passage.ids[-1] == END != passage.ids[-2]


def test_all_of_a_conversation_is_learnt_where_nothing_else_is_asked_for() -> None:
    passage, said = chat(CHATML, predict="all")

    assert passage.ids == passage.labels
    assert said.startswith("[system]\nHelp.<|end|>\n[user]\nWho?")


def test_an_end_that_only_joins_conversations_is_not_learnt() -> None:
    passage, said = chat(LINES, [*TURNS, ("user", "Bye")])

    assert said == " Me| Here"
    assert (passage.ids[-1], passage.labels[-1]) == (END, -100)


def test_a_conversation_that_the_assistant_begins_is_learnt_from_behind_the_prompt() -> None:
    turns = [("assistant", "Hello"), *TURNS]

    assert chat(CHATML, turns)[1] == "Hello<|end|>|Me <|end|>|Here<|end|>"
    assert chat(LINES, turns)[1] == " Hello| Me| Here<|end|>"


def test_a_system_prompt_of_ones_own_is_not_learnt() -> None:
    assert chat(CHATML, [("system", "Be brief."), *TURNS[:2]])[1] == "Me <|end|>"


def test_a_conversation_without_the_assistant_predicts_nothing() -> None:
    assert chat(CHATML, TURNS[:1])[0].predicts == 0


def test_a_template_that_rewrites_what_was_said_is_refused_unless_there_is_one_turn_or_it_marks_them() -> None:
    with pytest.raises(TaskError, match=r"in the conversation chat/1 cannot be told.*message 2.*{% generation %}.*predict=all"):
        chat(THINKING)

    assert chat(THINKING, TURNS[:2])[1] == "<think></think>Me<|end|>"
    begin = "{% if loop.last %}<think></think>{% endif %}{{ m['content'] }}"
    marked = THINKING.replace(begin, "{% generation %}" + begin + "{% endgeneration %}")
    assert chat(marked)[1] == "Me |<think></think>Here<|end|>"


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand_is_refused() -> None:
    class Slow:
        is_fast = False
        eos_token_id = END
        chat_template = "{{ messages[0]['content'] }}"

        def apply_chat_template(self, messages: Any, **more: Any) -> str:
            return str(messages[0]["content"])

    with pytest.raises(TaskError, match=r"a Slow does not say which characters .* tokenizer.json"):
        read(conversation(TURNS), Slow(), "assistant")
