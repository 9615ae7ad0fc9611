"""Statistics over the gradients of the next-token loss with respect to every linear of the model, one file for each block.

inputs: `model` (a model artifact), `tokens` (`input_ids` (sequences, length)).
spec: `statistics` (list of {"module", "class"}: where the statistics are defined), `dtype` (of the passes).
Files: `block_000.safetensors`, ... with keys `<statistic>:<weight>`. Result: `blocks`, `tokens`.
"""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pare.workers.blocks import open_blocks
from pare.workers.checkpoint import block_piece, resume_blocks, save_blocks
from pare.workers.gradients import backward
from pare.workers.hidden_states import HiddenStates
from pare.workers.models import ModelArtifact
from pare.workers.task import TaskContext, TaskError


def run(ctx: TaskContext) -> dict[str, Any]:
    needs = [getattr(importlib.import_module(where["module"]), where["class"]) for where in ctx.spec["statistics"]]
    model = open_blocks(ModelArtifact(ctx.inputs["model"], ctx.resolve), getattr(torch, ctx.spec["dtype"]), ctx.device)
    tokens = load_file(ctx.inputs["tokens"] / "tokens.safetensors")["input_ids"]
    blocks = len(model.anatomy.blocks)

    def file(done: int) -> Path:
        """Of the block that comes after so many others: the last one is the first."""
        return ctx.out / f"block_{blocks - 1 - done:03d}.safetensors"

    def reached(done: int, gradients: HiddenStates) -> None:
        if ctx.checkpoint.due():
            save_blocks(ctx.checkpoint, done, gradients, {block_piece(i): partial(load_file, file(i)) for i in range(done)})

    with HiddenStates(ctx.out) as gradients:
        start, _ = resume_blocks(ctx.checkpoint, lambda done, statistics: save_file(statistics, file(done)), gradients)
        way = backward(model, tokens, needs, ctx.device, ctx.out, start, gradients, reached)
        for done, passed in enumerate(way, start):
            values = {f"{s}:{weight}": v.cpu() for weight, of in passed.statistics.items() for s, v in of.items()}
            overflowing = next((name for name, value in values.items() if not value.isfinite().all()), None)
            if overflowing:
                raise TaskError(
                    f"{overflowing} is not finite: in {ctx.spec['dtype']} activations or gradients overflow. Try dtype=float32"
                )
            save_file(values, file(done))
            passed.statistics.clear()
            values.clear()
            ctx.progress(done + 1, blocks, "blocks")
    return {"blocks": blocks, "tokens": tokens.numel()}
