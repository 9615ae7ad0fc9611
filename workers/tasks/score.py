"""Scores a model artifact in memory, from its parts, before any export.

Beside the score of an export it says whether the export is what was made. The base's score with `keep_hidden` is also
the *teacher*: the final hidden states on the test windows, to which every other model is compared.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from pare.workers import evaluation, large
from pare.workers.models import ModelArtifact, load_in_memory
from pare.workers.task import TaskContext


def run(ctx: TaskContext) -> dict[str, Any]:
    """Inputs: model, tokens, optional teacher. Spec: dtype, keep_hidden."""
    dtype = getattr(torch, ctx.spec["dtype"])
    artifact = ModelArtifact(ctx.inputs["model"], ctx.resolve)
    limit = (ctx.spec.get("where") or {}).get("memory_bytes")
    model: evaluation.Reader
    if large.way(large.bytes_of(artifact.dense.directory, dtype), limit, ctx.device, can_shard=False) == "whole":
        model = evaluation.Whole(load_in_memory(artifact, dtype, ctx.device))
    else:
        model = large.stream_artifact(artifact, dtype, ctx.device)
    teacher = None
    if "teacher" in ctx.inputs:
        teacher = evaluation.open_teacher(ctx.inputs["teacher"], ctx.resolve, dtype, ctx.device)
    ids = evaluation.read_windows(ctx.inputs["tokens"])
    predictions, hidden = evaluation.predict(model, ids, teacher, ctx.spec["keep_hidden"], ctx.progress)
    result = {**evaluation.summary(predictions), "tokens": predictions.nll.numel()}
    if hidden is not None:
        evaluation.write_teacher(ctx.out, model.model, ctx.fingerprint_of["model"], hidden, predictions.nll)
    content = {"result": result, "windows": evaluation.per_window(predictions)}
    (ctx.out / "score.json").write_text(json.dumps(content, indent=1))
    return result
