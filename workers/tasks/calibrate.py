"""Statistics over the inputs of every input group of the model as it stands, one file for each block.

inputs: `model` (a model artifact), `tokens` (`input_ids` (sequences, length)).
spec: `statistics` (list of {"module", "class"}: where the statistics are defined), `dtype` (of the forward pass).
Files: `block_000.safetensors`, ... with keys `<input group>:<statistic>`. Result: `blocks`, `tokens`.
"""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pare.workers.blocks import open_blocks
from pare.workers.calibration import stream
from pare.workers.checkpoint import block_piece, resume_blocks, save_blocks
from pare.workers.hidden_states import HiddenStates
from pare.workers.models import ModelArtifact
from pare.workers.task import TaskContext, TaskError


def run(ctx: TaskContext) -> dict[str, Any]:
    needs = [getattr(importlib.import_module(where["module"]), where["class"]) for where in ctx.spec["statistics"]]
    model = open_blocks(ModelArtifact(ctx.inputs["model"], ctx.resolve), getattr(torch, ctx.spec["dtype"]))
    tokens = load_file(ctx.inputs["tokens"] / "tokens.safetensors")["input_ids"]

    def file(index: int) -> Path:
        return ctx.out / f"block_{index:03d}.safetensors"

    def reached(index: int, hidden: HiddenStates) -> None:
        if ctx.checkpoint.due():
            save_blocks(ctx.checkpoint, index, hidden, {block_piece(i): partial(load_file, file(i)) for i in range(index)})

    with HiddenStates(ctx.out) as hidden:
        start, _ = resume_blocks(ctx.checkpoint, lambda index, statistics: save_file(statistics, file(index)), hidden)
        passing_by = stream(model, model.anatomy, tokens, needs, ctx.device, start=start, hidden=hidden, reached=reached)
        for index, passing in enumerate(passing_by, start):
            values = {f"{group}:{name}": v.cpu() for group, of in passing.statistics.items() for name, v in of.items()}
            overflowing = next((name for name, value in values.items() if not value.isfinite().all()), None)
            if overflowing:
                raise TaskError(
                    f"{overflowing} is not finite: in {ctx.spec['dtype']} the model's activations overflow. Try dtype=float32"
                )
            save_file(values, file(index))
            passing.statistics.clear()
            values.clear()
            ctx.progress(index + 1, len(model.anatomy.blocks), "blocks")
    return {"blocks": len(model.anatomy.blocks), "tokens": tokens.numel()}
