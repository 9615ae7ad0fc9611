"""Task `train`: model + train tokens (+ teachers) -> what a method of kind `train` made of the model.

inputs: `model`, `tokens`, and for a method that learns from other models `teacher.0`, ... made by task `teach` on the same
tokens. spec: `method`, `settings`, `seed`, `dtype`, and then `teachers` (their weights).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pare.methods.anatomy.apart import keeps_apart
from pare.methods.anatomy.views import parse
from pare.methods.contract import Context, Teacher, TrainMethod, load_all
from pare.methods.ops.heads import as_stored
from pare.methods.parts.formula import Formula
from pare.workers.evaluation import open_teacher
from pare.workers.models import ModelArtifact, load_in_memory, load_tokenizer, need_weights_alone, write_formulas
from pare.workers.ranks import Ranks
from pare.workers.task import TaskContext, TaskError
from pare.workers.training import Engine, train
from pare.workers.zero import Zero

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run(ctx: TaskContext) -> dict[str, Any]:
    name, dtype = ctx.spec["method"], ctx.spec["dtype"]
    if dtype not in DTYPES:
        raise TaskError(f"{name} trains in {' or '.join(DTYPES)}, got dtype={dtype}. Try: dtype=bfloat16")
    method = load_all()[name](**ctx.spec["settings"])
    if not isinstance(method, TrainMethod):
        raise TaskError(f"{name} is a method of kind {method.kind}, not train", failure="unknown")

    halvings = ctx.spec.get("where", {}).get("halvings", 0)  # set by the driver when an attempt ran out of GPU memory
    zero = Zero(**ctx.spec["zero"]) if "zero" in ctx.spec else None
    engine = Engine(ctx.device, DTYPES[dtype], zero, halvings, Ranks.here())
    result: dict[str, Any] = {}
    data = load_file(ctx.inputs["tokens"] / "tokens.safetensors")
    artifact = ModelArtifact(ctx.inputs["model"], ctx.resolve)
    need_weights_alone(artifact, name)
    context = Context(
        engine.prepared_on,
        ctx.spec["seed"],
        result.__setitem__,
        formulas=Weights(artifact),
        teachers=open_teachers(ctx, artifact, DTYPES[dtype], data),
        data=data,
    )
    if "position_ids" in data and method.learns_prompt:
        raise TaskError(
            f"data.train.packing=separate: of the documents of a row only the first would see the prompt of {name}. Try: "
            "data.train.packing=padded"
        )
    model = load_in_memory(artifact, DTYPES[dtype], frozen=method.keeps_formulas)
    if "position_ids" in data and not keeps_apart(model):
        raise TaskError(
            f"data.train.packing=separate: the documents of a row see each other in a {type(model).__name__}, whatever "
            "positions it is given. Try: data.train.packing=padded"
        )
    model = method.prepare(model, context)
    live = ctx.progress, ctx.point
    steps = train(method, model, data, ctx.out, ctx.spec["seed"], engine, *live, ctx.checkpoint)
    if engine.ranks.is_first:  # what the others make is dropped, and after ZeRO-3 they have no weights
        write_formulas(ctx.out, ctx.fingerprint_of["model"], method.finish(model, ctx.out))

    quarter = max(1, len(steps) // 4)
    return result | {
        "train/loss_first": fmean(step.loss for step in steps[:quarter]),
        "train/loss_last": fmean(step.loss for step in steps[-quarter:]),
        "train/trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "cost/tokens": len(steps) * method.batch_size * data["input_ids"].shape[1],
    }


class Weights(Mapping[str, Formula]):
    """What every weight of a model is made of, read anew at each look; in place of a parameter its views that have formulas."""

    def __init__(self, artifact: ModelArtifact) -> None:
        names = dict.fromkeys([*artifact.parameter_names(), *artifact.compressed_names()])
        viewed = {parse(name).parameter for name in names if not parse(name).is_plain}
        self.artifact, self.names = artifact, {name: None for name in names if name not in viewed}

    def __getitem__(self, name: str) -> Formula:
        if name not in self.names:
            raise KeyError(name)
        return self.artifact.effective(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def open_teachers(ctx: TaskContext, student: ModelArtifact, dtype: torch.dtype, data: dict[str, Tensor]) -> list[Teacher]:
    """Adds the hidden states of each teacher to the columns of the data, as they lie in their file.

    Raises:
        TaskError: a teacher has another tokenizer than the student, or has seen other tokens.
    """
    shares: list[float] = ctx.spec.get("teachers", [])
    found = []
    for i, share in enumerate(shares):
        column = f"teacher.{i}"
        opened = open_teacher(ctx.inputs[column], ctx.resolve, dtype, ctx.device, as_stored)
        if opened.hidden.shape[:2] != data["input_ids"].shape:
            seen, learnt = tuple(opened.hidden.shape[:2]), tuple(data["input_ids"].shape)
            raise TaskError(f"{column} has seen windows of {seen}, and there are {learnt} to learn from", failure="unknown")
        assert opened.model is not None  # it was opened from a file
        dense = opened.model.dense.directory
        if dense != student.dense.directory and vocabulary_of(dense) != vocabulary_of(student.dense.directory):
            raise TaskError(
                f"{column} has another tokenizer than the student: the same id is not the same token to both. Take a teacher "
                "whose tokenizer has the same vocabulary"
            )
        data[column] = opened.hidden
        found.append(Teacher(column, opened.head, share / sum(shares)))
    return found


def vocabulary_of(directory: Path) -> dict[str, int]:
    """Token -> id."""
    return dict(load_tokenizer(directory).get_vocab())
