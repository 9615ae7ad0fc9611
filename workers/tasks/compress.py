"""Compresses the linears of a model's blocks with a method of kind layer; everything else stays the base's, save what stands
before linears and takes up factors on their input features.

inputs: `model` (a model artifact of either form), and for a method that needs statistics either `statistics` (from a
`calibrate` task) or, where each block is to see its compressed predecessors, `tokens`; for one that needs statistics over
gradients, `gradients` (from a `gradients` task).
spec: `method`, `settings`, `seed` (where the method draws random numbers), `dtype` (of the forward pass over `tokens`).
Result: `size/linear_bits_per_weight` (codes and scales, without padding), `size/linear_bytes` (with it), `notes` (what
the method reported).
A checkpoint holds the formulas of the finished blocks, the notes and, for the latter kind, what the next block reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pare.methods.anatomy.describe import Block, Group, describe
from pare.methods.anatomy.views import weight_of
from pare.methods.contract import Context, InputGroup, LayerMethod, load_all
from pare.methods.parts.formula import Dense, Formula
from pare.workers.blocks import open_blocks
from pare.workers.calibration import stream
from pare.workers.checkpoint import block_piece, resume_blocks, save_blocks
from pare.workers.hidden_states import HiddenStates
from pare.workers.models import (
    FOLD_IN,
    FOLD_OUT,
    FormulaWriter,
    ModelArtifact,
    as_written,
    folded,
    load_skeleton,
    need_weights_alone,
)
from pare.workers.task import TaskContext, TaskError

Statistics = dict[str, dict[str, Tensor]]
"""Input group -> statistic -> value."""


@dataclass
class Finished:
    """What was made of a block."""

    formulas: dict[str, Formula]
    """Parameter name -> its new formula."""

    factors: dict[str, Tensor]
    """What was folded into its weights; see `write_formulas`."""


class Made:
    """The finished blocks, on the disk but for the operands of the next shard."""

    def __init__(self, directory: Path) -> None:
        self.writer = FormulaWriter(directory)
        self.blocks: list[dict[str, Any]] = []
        """As `piece`, with the names of the operands alone."""

    def append(self, block: Block, finished: Finished, placed: dict[str, Formula]) -> None:
        """placed: see `in_place`."""
        whole = [placed[name] for group in block.groups for name in group.weights]
        size = {
            "weights": sum(formula.shape[0] * formula.shape[1] for formula in whole),
            "bits": sum(formula.logical_bits for formula in whole),
            "bytes": sum(formula.nbytes for formula in whole),
        }
        table, operands = as_written(finished.formulas, finished.factors)
        self.restore({"table": table, "operands": operands, "size": size})

    def restore(self, piece: dict[str, Any]) -> None:
        """The next block, from its piece."""
        self.writer.add(piece["table"], piece["operands"])
        self.blocks.append(piece | {"operands": list(piece["operands"])})

    def piece(self, index: int) -> dict[str, Any]:
        """A finished block as a checkpoint keeps it."""
        block = self.blocks[index]
        return block | {"operands": {key: self.writer.operands.read(key) for key in block["operands"]}}

    def discard(self) -> None:
        self.writer.discard()
        self.blocks = []

    def size(self, of: str) -> int:
        """Of all linears the `weights`, `bits` without padding, or `bytes` with it."""
        return sum(block["size"][of] for block in self.blocks)


Reached = Callable[[int, HiddenStates], None]
"""Called before a block with its index and what it reads: the place to save."""


def run(ctx: TaskContext) -> dict[str, Any]:
    method = load_all()[ctx.spec["method"]](**ctx.spec["settings"])
    if not isinstance(method, LayerMethod):
        raise TaskError(f"compress takes a method of kind layer; {method.name} is of kind {method.kind}")
    artifact = ModelArtifact(ctx.inputs["model"], ctx.resolve)
    need_weights_alone(artifact, method.name)
    with HiddenStates(ctx.out) as hidden:
        made = Made(ctx.out)
        start, state = resume_blocks(ctx.checkpoint, lambda index, piece: made.restore(piece), hidden)
        if not start:
            made.discard()
        notes: dict[str, float] = state.get("notes", {})

        def reached(index: int, hidden: HiddenStates) -> None:
            if ctx.checkpoint.due():
                pieces = {block_piece(i): partial(made.piece, i) for i in range(index)}
                save_blocks(ctx.checkpoint, index, hidden, pieces, notes=notes)

        def report(name: str, value: float) -> None:
            notes[name] = notes.get(name, 0.0) + value

        context = Context(ctx.device, ctx.spec.get("seed", 0), report)
        if method.needs and "tokens" in ctx.inputs:
            compress_streaming(ctx, artifact, method, context, made, hidden, reached)
        else:
            compress_blocks(ctx, artifact, method, context, made, reached)
    made.writer.close(ctx.fingerprint_of["model"])
    return {
        "size/linear_bits_per_weight": made.size("bits") / made.size("weights"),
        "size/linear_bytes": made.size("bytes"),
        "notes": notes,
    }


def compress_blocks(
    ctx: TaskContext, artifact: ModelArtifact, method: LayerMethod, context: Context, made: Made, reached: Reached
) -> None:
    """Every block not yet `made` by itself, with the statistics of the `statistics` input, if the method needs any."""
    anatomy = describe(load_skeleton(artifact.dense.directory))
    method.check_shapes(anatomy.widths)
    for index, block in enumerate(anatomy.blocks[len(made.blocks) :], len(made.blocks)):
        reached(index, HiddenStates())
        statistics: Statistics = {group.name: {} for group in block.groups}
        if method.needs:
            with safe_open(ctx.inputs["statistics"] / f"block_{index:03d}.safetensors", framework="pt") as file:
                for group in block.groups:
                    wanted = [need.name for need in method.needs]
                    statistics[group.name] = {name: file.get_tensor(f"{group.name}:{name}").to(ctx.device) for name in wanted}
        add_gradients(ctx, index, block, method, statistics)
        finished = compress_block(artifact, block, statistics, method, context)
        made.append(block, finished, in_place(artifact, finished.formulas))
        ctx.progress(index + 1, len(anatomy.blocks), "blocks")


def compress_streaming(
    ctx: TaskContext,
    artifact: ModelArtifact,
    method: LayerMethod,
    context: Context,
    made: Made,
    hidden: HiddenStates,
    reached: Reached,
) -> None:
    """The blocks not yet `made`, one after another, each calibrated on what its compressed predecessors put out.

    hidden: what the first of these blocks reads, if blocks have been made.
    """
    model = open_blocks(artifact, getattr(torch, ctx.spec["dtype"]))
    tokens = load_file(ctx.inputs["tokens"] / "tokens.safetensors")["input_ids"]
    anatomy = model.anatomy
    method.check_shapes(anatomy.widths)
    passing_by = stream(
        model, anatomy, tokens, method.needs, ctx.device, "compressed", start=len(made.blocks), hidden=hidden, reached=reached
    )
    for passing in passing_by:
        add_gradients(ctx, len(made.blocks), passing.block, method, passing.statistics)
        finished = compress_block(artifact, passing.block, passing.statistics, method, context)
        placed = in_place(artifact, finished.formulas)
        write_into(model.model, placed)
        made.append(passing.block, finished, placed)
        del finished, placed
        ctx.progress(len(made.blocks), len(anatomy.blocks), "blocks")


def add_gradients(ctx: TaskContext, index: int, block: Block, method: LayerMethod, statistics: Statistics) -> None:
    """Puts statistics over the gradients of each weight beside those over the inputs of its group."""
    if not method.needs_gradients:
        return
    with safe_open(ctx.inputs["gradients"] / f"block_{index:03d}.safetensors", framework="pt") as file:
        for group in block.groups:
            keys = [f"{need.name}:{weight}" for need in method.needs_gradients for weight in group.weights]
            statistics[group.name] |= {key: file.get_tensor(key).to(ctx.device) for key in keys}


def compress_block(
    artifact: ModelArtifact, block: Block, statistics: Statistics, method: LayerMethod, context: Context
) -> Finished:
    """New formulas, on the device, for the linears of one block and what factors were folded into. Takes the statistics."""
    groups: Iterable[InputGroup] = (
        open_group(artifact, group, statistics.pop(group.name), method, context) for group in block.groups
    )
    finished = Finished({}, {})
    if method.folds:
        groups = opened = list(groups)
        finished = fold_block(artifact, opened, method, context)
    for group in groups:
        made = method.compress(group, context)
        got, wanted = {n: f.shape for n, f in made.items()}, {n: tuple(w.shape) for n, w in group.weights.items()}
        if got != wanted:
            raise TaskError(f"{method.name} made formulas of shapes {got} for weights of shapes {wanted}")
        finished.formulas |= made
    return finished


def open_group(
    artifact: ModelArtifact, group: Group, statistics: dict[str, Tensor], method: LayerMethod, context: Context
) -> InputGroup:
    present = {name: formula.to(context.device) for name in group.weights if (formula := artifact.formula(name))}
    weights = {name: artifact.materialise(name).to(context.device) for name in group.weights}
    original = {}
    if method.reads_original:
        original = {name: artifact.original(name).to(context.device) for name in group.weights}
    return InputGroup(group.name, weights, present, statistics, original, group.fold)


def fold_block(artifact: ModelArtifact, groups: list[InputGroup], method: LayerMethod, context: Context) -> Finished:
    """Asks the method for factors, group by group, and works them into weights, statistics and what stands before.

    Returns the factors, and the formulas of what is no linear of the block: norms, and biases. They are rounded to the dtype in
    which the base stores them, and what that changes in a norm goes into the weights behind it.
    """
    owner = {name: group for group in groups for name in group.weights}
    formulas: dict[str, Formula] = {}
    factors: dict[str, Tensor] = {}
    for group in groups:
        s = method.fold(group, context) if group.fold else None
        if group.fold is None or s is None:
            continue
        s = group.fold.shared(s)
        before = {}
        for name in group.fold.parameters:
            if name in owner:
                before[name] = owner[name].weights[name]
            else:
                known = formulas[name].materialise() if name in formulas else artifact.materialise(name)
                before[name] = known.flatten().to(context.device)
        for name, value in group.fold.divided(before, s).items():
            if name in owner:
                owner[name].weights = owner[name].weights | {name: value}
                one = group.fold.feeding(s)
                rows = factors.get(FOLD_OUT + name, torch.ones(len(value), device=value.device)).clone()
                rows[group.fold.start : group.fold.start + len(one)] *= one
                factors[FOLD_OUT + name] = rows
                continue
            stored = value.to(artifact.dense.stored(name).dtype)
            formulas[name] = Formula([Dense(stored[None])])
            if group.fold.kind != "linear" and name == group.fold.parameters[0]:
                one = 1.0 if group.fold.kind == "norm_plus_one" else 0.0
                s = ((before[name] + one) / (stored.float() + one)).where(stored != -one, s)
        group.weights = {name: weight * s for name, weight in group.weights.items()}
        factors |= {FOLD_IN + name: s for name in group.weights}
        group.statistics = {need.name: need.of_divided(group.statistics[need.name], s) for need in method.needs}
    for group in groups:
        for name, weight in group.original.items():
            group.original[name] = folded(weight, name, factors)
    return Finished(formulas, factors)


@torch.no_grad()
def write_into(model: nn.Module, placed: dict[str, Formula]) -> None:
    """Gives the weights the values that their formulas stand for."""
    for name, formula in placed.items():
        weight = weight_of(model, name)
        weight.copy_(formula.materialise().view_as(weight))


def in_place(artifact: ModelArtifact, formulas: dict[str, Formula]) -> dict[str, Formula]:
    """The whole of each weight: what is added to one is counted, and worked out, with it."""
    return {
        name: formula if formula.op == "replace" else artifact.effective(name).plus(formula.to("cpu"))
        for name, formula in formulas.items()
    }
