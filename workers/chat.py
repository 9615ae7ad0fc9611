"""What a model reads of a document, and which part of a chat the assistant says."""

from __future__ import annotations

import re
from typing import Any

from pare.workers.corpus import NO_TEMPLATE, Document
from pare.workers.rows import NOT_PREDICTED, Passage
from pare.workers.task import TaskError

TEMPLATE_DATE = "26 Jul 2024"
"""The day that templates of the Llama family write into the system prompt; left to itself each run would have another one."""
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What a template that itself says where the assistant speaks has before it."""

Span = tuple[int, int]
"""Characters from the first up to the second."""


def read(document: Document, tokenizer: Any, predict: str) -> Passage:
    """The tokens of a document, the end-of-text token last, and which are to be learnt.

    predict: "all", or "assistant" of a chat: what the assistant says and the end of its turn.
    """
    text, end = text_of(document, tokenizer), tokenizer.eos_token_id
    if predict == "all":
        own = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ids = own if own[-1:] == [end] else [*own, end]
        return Passage(ids, ids)
    if not tokenizer.is_fast:
        raise TaskError(
            f"data.train.predict=assistant: a {type(tokenizer).__name__} does not say which characters a token stands for. "
            "Put a tokenizer.json beside the model, or take data.train.predict=all"
        )
    made = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    spans = assistant_spans(document, tokenizer)
    labels = [
        token if any(start < last and max(stop, start + 1) > first for first, last in spans) else NOT_PREDICTED
        for token, (start, stop) in zip(made.input_ids, made.offset_mapping, strict=True)
    ]
    ids = made.input_ids
    if ids[-1:] != [end]:  # it ends the assistant's turn where the assistant spoke last
        ids, labels = [*ids, end], [*labels, end if labels and labels[-1] >= 0 else NOT_PREDICTED]
    return Passage(ids, labels)


def text_of(document: Document, tokenizer: Any) -> str:
    """What the model reads of a document: its text; of a chat what the model's chat template makes of the messages."""
    return rendered(document, tokenizer).rstrip() if document.messages else document.text


def rendered(document: Document, tokenizer: Any, messages: int | None = None, prompt: bool = False) -> str:
    """The first messages of a chat (None: all) by the model's template; `prompt`: as the assistant is asked to go on."""
    if tokenizer.chat_template is None:
        raise TaskError(NO_TEMPLATE)
    from jinja2.exceptions import TemplateError

    said = document.messages[:messages]
    try:
        text = tokenizer.apply_chat_template(
            list(said), tokenize=False, date_string=TEMPLATE_DATE, add_generation_prompt=prompt
        )
    except TemplateError as e:
        roles = ", ".join(message["role"] for message in said)
        raise TaskError(
            f"the model's chat template refuses the conversation {document.id} (roles: {roles}): {e}. Change or drop such "
            "conversations, or name the roles as the template does"
        ) from e
    return str(text)


def assistant_spans(document: Document, tokenizer: Any) -> list[Span]:
    """Where in the rendered chat the assistant speaks, the end of its turn included.

    A template may mark it by `{% generation %}`. Of another one the conversation is rendered up to each turn, as a prompt for
    it, and up to its end: what is between is the assistant's.

    Raises:
        TaskError: what comes later in the conversation changes how its beginning is rendered.
    """
    template = tokenizer.get_chat_template()
    if MARKS.search(template):
        return marked_spans(document, tokenizer, template)
    whole, spans = rendered(document, tokenizer), []
    for i, message in enumerate(document.messages):
        if message["role"] == "assistant":
            behind = rendered(document, tokenizer, i + 1)
            before = rendered(document, tokenizer, i, prompt=True) if i else opening(document, tokenizer)
            if not (whole.startswith(behind.rstrip()) and behind.startswith(before)):
                raise TaskError(
                    f"data.train.predict=assistant: where the assistant speaks in the conversation {document.id} cannot be "
                    f"told. Its beginning up to message {i + 1} is rendered by the model's chat template in another way when "
                    "the conversation goes on. Put {% generation %} and {% endgeneration %} around what the assistant says "
                    "in the template, take conversations of one question and one answer, or data.train.predict=all"
                )
            spans.append((len(before), len(behind.rstrip())))
    return spans


def opening(document: Document, tokenizer: Any) -> str:
    """What stands before a conversation that the assistant begins. No template renders an empty one, so this is what comes
    before the first of the prompts for it to speak."""
    alone = rendered(document, tokenizer, 1)
    prompt = rendered(document, tokenizer, 1, prompt=True).removeprefix(alone)
    before, found, _ = alone.partition(prompt) if prompt else ("", "", "")
    return before + found


def marked_spans(document: Document, tokenizer: Any, template: str) -> list[Span]:
    from transformers.utils.chat_template_utils import render_jinja_template

    _, spans = render_jinja_template(
        [list(document.messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        date_string=TEMPLATE_DATE,
        **tokenizer.special_tokens_map,
    )
    return [(first, last) for first, last in spans[0]]
