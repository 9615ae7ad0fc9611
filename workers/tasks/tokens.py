"""Tokens for one role: documents of its split in random order, each ended by the end-of-text token, cut into windows.
A chat is first rendered by the model's chat template.

spec: `role` (calibration, train, validation, selection or test), `sequences`, `length`, `seed` (of the order).
inputs: `model` (its tokenizer), `corpus`. Writes `tokens.safetensors` with `input_ids` (sequences, length) int64.
Result: `tokens`, `documents` (that the windows were cut from), `characters` (of their text).

Windows follow one another without overlap. Calibration and train share the train split, and no document: a hash of
the document's id, on which no seed has a say, gives `CALIBRATION_SHARE` of the documents to calibration.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from safetensors.torch import save_file

from pare.workers.corpus import NO_TEMPLATE, Document, position, read_split
from pare.workers.models import load_tokenizer
from pare.workers.task import TaskContext, TaskError

ROLES = ("calibration", "train", "validation", "selection", "test")
CALIBRATION_SHARE = 0.2
"""Part of the documents of the train split that is kept for calibration."""

TEMPLATE_DATE = "26 Jul 2024"
"""The day that templates of the Llama family write into the system prompt; left to itself each run would have another one."""


def run(ctx: TaskContext) -> dict[str, Any]:
    role, sequences, length = ctx.spec["role"], ctx.spec["sequences"], ctx.spec["length"]
    if role not in ROLES:
        raise TaskError(f"tokens: role must be one of {', '.join(ROLES)}, got {role!r}")
    if sequences < 1 or length < 2:
        raise TaskError(f"tokens, role {role}: sequences must be >= 1 and length >= 2, got {sequences} and {length}")
    tokenizer = load_tokenizer(ctx.inputs["model"])
    if tokenizer.eos_token_id is None:
        raise TaskError("tokens: the model's tokenizer has no end-of-text token (eos_token), by which documents are joined")
    documents = documents_of(role, read_split(ctx.inputs["corpus"], "train" if role == "calibration" else role))
    random.Random(ctx.spec["seed"]).shuffle(documents)
    wanted = sequences * length
    ids: list[int] = []
    used = characters = 0
    for document in documents:
        if len(ids) >= wanted:
            break
        own = tokenizer(text_of(document, tokenizer), add_special_tokens=False, verbose=False).input_ids
        ids += own if own[-1:] == [tokenizer.eos_token_id] else [*own, tokenizer.eos_token_id]
        used, characters = used + 1, characters + len(document.text)
        ctx.progress(min(len(ids), wanted), wanted, "tokens")
    if len(ids) < wanted:
        raise TaskError(
            f"tokens, role {role}: {sequences} sequences of {length} are {wanted} tokens, but its {len(documents)} documents "
            f"have only {len(ids)}. Lower {settings_of(role)} (at most {len(ids) // length} of length {length}), "
            "or use a longer text"
        )
    save_file({"input_ids": torch.tensor(ids[:wanted]).view(sequences, length)}, ctx.out / "tokens.safetensors")
    return {"tokens": wanted, "documents": used, "characters": characters}


def text_of(document: Document, tokenizer: Any) -> str:
    """What the model reads of a document: its text; of a chat what the model's chat template makes of the messages."""
    if not document.messages:
        return document.text
    if tokenizer.chat_template is None:
        raise TaskError(NO_TEMPLATE)
    from jinja2.exceptions import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(document.messages), tokenize=False, date_string=TEMPLATE_DATE)
    except TemplateError as e:
        roles = ", ".join(message["role"] for message in document.messages)
        raise TaskError(
            f"the model's chat template refuses the conversation {document.id} (roles: {roles}): {e}. Change or drop such "
            "conversations, or name the roles as the template does"
        ) from e
    return str(text).rstrip()


def documents_of(role: str, documents: list[Document]) -> list[Document]:
    """The documents of a role, sorted by id: those of its split, or its share of the train split."""
    documents = sorted(documents, key=lambda d: d.id)
    if role in ("calibration", "train"):
        documents = [d for d in documents if (position(d.id, "calibration") < CALIBRATION_SHARE) == (role == "calibration")]
    return documents


def settings_of(role: str) -> str:
    """The config keys that say how many tokens a role takes."""
    group = "evaluation.windows" if role == "test" else f"data.{role}"
    return f"{group}.sequences or {group}.length"
