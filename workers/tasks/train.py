"""Task `train`: model + train tokens -> what a method of kind `train` made of the model."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file

from pare.methods.contract import Context, TrainMethod, load_all
from pare.workers.models import ModelArtifact, load_in_memory, write_formulas
from pare.workers.ranks import Ranks
from pare.workers.task import TaskContext, TaskError
from pare.workers.training import Engine, train

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run(ctx: TaskContext) -> dict[str, Any]:
    name, dtype = ctx.spec["method"], ctx.spec["dtype"]
    if dtype not in DTYPES:
        raise TaskError(f"{name} trains in {' or '.join(DTYPES)}, got dtype={dtype}. Try: dtype=bfloat16")
    method = load_all()[name](**ctx.spec["settings"])
    if not isinstance(method, TrainMethod):
        raise TaskError(f"{name} is a method of kind {method.kind}, not train", failure="unknown")

    result: dict[str, Any] = {}
    context = Context(ctx.device, ctx.spec["seed"], report=result.__setitem__)
    data = load_file(ctx.inputs["tokens"] / "tokens.safetensors")
    model = load_in_memory(ModelArtifact(ctx.inputs["model"], ctx.resolve), DTYPES[dtype])
    model = method.prepare(model, context)
    halvings = ctx.spec.get("where", {}).get("halvings", 0)  # set by the driver when an attempt ran out of GPU memory
    engine = Engine(ctx.device, DTYPES[dtype], halvings=halvings, ranks=Ranks.here())
    live = ctx.progress, ctx.point
    steps = train(method, model, data, ctx.out, ctx.spec["seed"], engine, *live, ctx.checkpoint)
    write_formulas(ctx.out, ctx.fingerprint_of["model"], method.finish(model, ctx.out))

    quarter = max(1, len(steps) // 4)
    return result | {
        "train/loss_first": fmean(step.loss for step in steps[:quarter]),
        "train/loss_last": fmean(step.loss for step in steps[-quarter:]),
        "train/trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "cost/tokens": len(steps) * method.batch_size * data["input_ids"].shape[1],
    }
