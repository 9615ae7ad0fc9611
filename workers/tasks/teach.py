"""What a teacher makes of the training data, once for all students that learn from it: its final hidden states.

inputs: `model` (the teacher, any model artifact), `tokens` (what the students are trained on). spec: `dtype`.
Files: `hidden.safetensors` with `hidden` (sequences, length, width) in that dtype, and `teacher.json`, which says where the
teacher's head lies; `evaluation.open_teacher` opens both. Result: `tokens`, `width`.

Of logits it would be the vocabulary for each token; hidden states are the width, and the logits made of them are the teacher's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pare.methods.anatomy.apart import keeps_apart
from pare.workers import evaluation, large
from pare.workers.models import ModelArtifact, load_in_memory
from pare.workers.task import TaskContext, TaskError

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What safetensors calls a dtype."""


def run(ctx: TaskContext) -> dict[str, Any]:
    dtype = getattr(torch, ctx.spec["dtype"])
    artifact = ModelArtifact(ctx.inputs["model"], ctx.resolve)
    data = load_file(ctx.inputs["tokens"] / "tokens.safetensors")
    ids, positions = data["input_ids"], data.get("position_ids")
    rows = max(1, evaluation.FORWARD_TOKENS // ids.shape[1])
    limit = (ctx.spec.get("where") or {}).get("memory_bytes")
    reader: evaluation.Reader
    if large.way(large.bytes_of(artifact.dense.directory, dtype), limit, ctx.device, can_shard=False) == "whole":
        reader = whole = evaluation.Whole(load_in_memory(artifact, dtype, ctx.device))
        check_apart(whole, positions)
        states = ordinary(whole, ids.split(rows), None if positions is None else positions.split(rows))
    elif positions is None:
        reader = large.stream_artifact(artifact, dtype, ctx.device)
        states = reader.hidden(ids.split(rows))
    else:
        raise TaskError(
            "the teacher does not fit into memory, and rows of several documents cannot be read block by block. Give it more "
            "(evaluation.memory_gb), or let each document have rows of its own: data.train.packing=padded",
            "infeasible",
        )
    with torch.inference_mode():
        width = write_states(ctx, states, ids, dtype)
    evaluation.write_head(ctx.out, reader.model, ctx.fingerprint_of["model"])
    return {"tokens": ids.numel(), "width": width}


def check_apart(read: evaluation.Whole, positions: Tensor | None) -> None:
    if positions is not None and not keeps_apart(read.model):
        raise TaskError(
            f"data.train.packing=separate: the documents of a row see each other in the teacher, a "
            f"{type(read.model).__name__}, whatever positions it is given. Try: data.train.packing=padded"
        )


def ordinary(read: evaluation.Whole, ids: Iterable[Tensor], positions: Iterable[Tensor] | None) -> Iterator[Tensor]:
    """Final hidden states of each batch of ids (sequences, length), of the documents that positions tell apart."""
    if positions is None:
        yield from (read.body(batch.to(read.entry)) for batch in ids)
        return
    for batch, where in zip(ids, positions, strict=True):
        yield read.body(batch.to(read.entry), position_ids=where.to(read.entry))


def write_states(ctx: TaskContext, states: Iterable[Tensor], ids: Tensor, dtype: torch.dtype) -> int:
    """Writes hidden states as they come, so that no more of them is in memory than a batch. Returns their width."""
    done, width = 0, 0
    with (ctx.out / "hidden.safetensors").open("wb") as file:
        for hidden in states:
            if not done:
                width = hidden.shape[-1]
                file.write(header("hidden", (*ids.shape, width), dtype))
            if not hidden.isfinite().all():
                raise TaskError(f"the teacher's hidden states are not finite in {ctx.spec['dtype']}", "nonfinite")
            file.write(hidden.to("cpu", dtype).contiguous().view(torch.uint8).numpy().data)
            done += len(hidden)
            ctx.progress(done, len(ids), "sequences")
    return width


def header(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """What a safetensors file with one tensor begins with; the tensor follows, row by row."""
    size = torch.Size(shape).numel() * dtype.itemsize
    text = json.dumps({name: {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [0, size]}}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
