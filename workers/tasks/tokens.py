"""Tokens for one role: documents of its split in random order, each ended by the end-of-text token, as rows of one length.
A chat is first rendered by the model's chat template.

spec: `role` (calibration, train, validation, selection or test), `sequences`, `length`, `seed` (of the order); `packing`
(default "concatenated", see `pare.workers.rows`) and `predict` (default "all", see `pare.workers.chat.read`).
inputs: `model` (its tokenizer), `corpus`. Writes `tokens.safetensors` with `input_ids` (sequences, length) int64, and where
not all of them are predicted from all before them the columns `labels` and `position_ids` of `TrainMethod.loss`.
Result: `tokens`, `documents` (that were read for them), `characters` (of their text); with labels `predicted` (tokens) and
`left_out` (passages without any to predict).

Calibration and train share the train split, and no document: a hash of the document's id, on which no seed has a say,
gives `CALIBRATION_SHARE` of the documents to calibration.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from safetensors.torch import save_file

from pare.workers.chat import read
from pare.workers.corpus import Document, position, read_split
from pare.workers.models import load_tokenizer
from pare.workers.rows import CUT, Passage, columns_of, fill
from pare.workers.task import TaskContext, TaskError

ROLES = ("calibration", "train", "validation", "selection", "test")
CALIBRATION_SHARE = 0.2
"""Part of the documents of the train split that is kept for calibration."""


def run(ctx: TaskContext) -> dict[str, Any]:
    role, sequences, length = ctx.spec["role"], ctx.spec["sequences"], ctx.spec["length"]
    packing, predict = ctx.spec.get("packing", "concatenated"), ctx.spec.get("predict", "all")
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
    used = characters = tokens = 0

    def passages() -> Iterator[Passage]:
        nonlocal used, characters, tokens
        for document in documents:
            passage = read(document, tokenizer, predict)
            used, characters, tokens = used + 1, characters + len(document.text), tokens + len(passage.ids)
            yield passage
            ctx.progress(min(tokens, wanted), wanted, "tokens")

    rows, left_out = fill(CUT[packing](passages(), length), sequences, length, share=packing == "separate")
    if len(rows) < sequences:
        useless = sum(len(passage.ids) for passage in left_out)
        besides = f" besides {useless} in passages without any to predict" if useless else ""
        raise TaskError(
            f"tokens, role {role}: {sequences} sequences of {length} are {wanted} tokens, but its {len(documents)} documents "
            f"have only {tokens - useless}{besides}. Lower {settings_of(role)} (at most {len(rows)} of length {length}), "
            "or use a longer text"
        )
    columns = columns_of(rows, length, tokenizer.eos_token_id, positions=packing == "separate")
    result = {"tokens": wanted, "documents": used, "characters": characters}
    if packing == "concatenated" and predict == "all":
        columns = {"input_ids": columns["input_ids"]}
    else:
        result |= {"predicted": sum(p.predicts for row in rows for p in row), "left_out": len(left_out)}
    save_file(columns, ctx.out / "tokens.safetensors")
    return result


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
