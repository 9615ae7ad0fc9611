"""Compresses the linears of a model's blocks with a method of kind layer; everything else stays the base's.

inputs: `model` (a model artifact of either form), and for a method that needs statistics either `statistics` (from a
`calibrate` task) or, where each block is to see its compressed predecessors, `tokens`.
spec: `method`, `settings`, `seed` (where the method draws random numbers), `dtype` (of the forward pass over `tokens`).
Result: `size/linear_bits_per_weight` (codes and scales, without padding), `size/linear_bytes` (with it), `notes` (what
the method reported).
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pare.methods.anatomy.describe import Block, describe, verify
from pare.methods.contract import Context, InputGroup, LayerMethod, load_all
from pare.methods.parts.formula import Formula
from pare.workers.calibration import stream
from pare.workers.models import ModelArtifact, load_in_memory, load_skeleton, write_formulas
from pare.workers.task import TaskContext, TaskError

Statistics = dict[str, dict[str, Tensor]]
"""Input group -> statistic -> value."""


def run(ctx: TaskContext) -> dict[str, Any]:
    method = load_all()[ctx.spec["method"]](**ctx.spec["settings"])
    if not isinstance(method, LayerMethod):
        raise TaskError(f"compress takes a method of kind layer; {method.name} is of kind {method.kind}")
    artifact = ModelArtifact(ctx.inputs["model"], ctx.resolve)
    notes: dict[str, float] = {}

    def report(name: str, value: float) -> None:
        notes[name] = notes.get(name, 0.0) + value

    context = Context(ctx.device, ctx.spec.get("seed", 0), report)
    if method.needs and "tokens" in ctx.inputs:
        formulas = compress_streaming(ctx, artifact, method, context)
    else:
        formulas = compress_blocks(ctx, artifact, method, context)
    write_formulas(ctx.out, ctx.fingerprint_of["model"], formulas)
    weights = sum(formula.shape[0] * formula.shape[1] for formula in formulas.values())
    return {
        "size/linear_bits_per_weight": sum(formula.logical_bits for formula in formulas.values()) / weights,
        "size/linear_bytes": sum(formula.nbytes for formula in formulas.values()),
        "notes": notes,
    }


def compress_blocks(ctx: TaskContext, artifact: ModelArtifact, method: LayerMethod, context: Context) -> dict[str, Formula]:
    """Every block by itself, with the statistics of the `statistics` input, if the method needs any."""
    anatomy = describe(load_skeleton(artifact.dense.directory))
    method.check_shapes(anatomy.widths)
    formulas: dict[str, Formula] = {}
    for index, block in enumerate(anatomy.blocks):
        statistics: Statistics = {group.name: {} for group in block.groups}
        if method.needs:
            with safe_open(ctx.inputs["statistics"] / f"block_{index:03d}.safetensors", framework="pt") as file:
                for group in block.groups:
                    wanted = [need.name for need in method.needs]
                    statistics[group.name] = {name: file.get_tensor(f"{group.name}:{name}").to(ctx.device) for name in wanted}
        made = compress_block(artifact, block, statistics, method, context)
        formulas |= {name: formula.to("cpu") for name, formula in made.items()}
        ctx.progress(index + 1, len(anatomy.blocks), "blocks")
    return formulas


def compress_streaming(ctx: TaskContext, artifact: ModelArtifact, method: LayerMethod, context: Context) -> dict[str, Formula]:
    """Block after block, each calibrated on what its compressed predecessors put out."""
    model = load_in_memory(artifact, getattr(torch, ctx.spec["dtype"]))
    tokens = load_file(ctx.inputs["tokens"] / "tokens.safetensors")["input_ids"]
    anatomy = describe(model)
    verify(model, anatomy)
    method.check_shapes(anatomy.widths)
    formulas: dict[str, Formula] = {}
    for index, passing in enumerate(stream(model, anatomy, tokens, method.needs, ctx.device, inputs="compressed")):
        made = compress_block(artifact, passing.block, passing.statistics, method, context)
        with torch.no_grad():
            for name, formula in made.items():
                model.get_parameter(name).copy_(formula.materialise())
        formulas |= {name: formula.to("cpu") for name, formula in made.items()}
        ctx.progress(index + 1, len(anatomy.blocks), "blocks")
    return formulas


def compress_block(
    artifact: ModelArtifact, block: Block, statistics: Statistics, method: LayerMethod, context: Context
) -> dict[str, Formula]:
    """Parameter name -> new formula, on the device, for the linears of one block."""
    formulas: dict[str, Formula] = {}
    for group in block.groups:
        present = {name: formula.to(context.device) for name in group.weights if (formula := artifact.formula(name))}
        weights = {name: artifact.materialise(name).to(context.device) for name in group.weights}
        made = method.compress(InputGroup(group.name, weights, present, statistics[group.name]), context)
        got, wanted = {n: f.shape for n, f in made.items()}, {n: tuple(w.shape) for n, w in weights.items()}
        if got != wanted:
            raise TaskError(f"{method.name} made formulas of shapes {got} for weights of shapes {wanted}")
        formulas |= made
    return formulas
