"""Calibration: the blocks of a model pass by one at a time, each with statistics over the inputs of its linears.

Activations stay on the CPU and one block is on the device, so memory does not grow with depth. The model's own forward
pass prepares what blocks are called with (masks, position embeddings), so nothing of it is written again here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pare.methods.anatomy.describe import Anatomy, Block
from pare.methods.ops.statistics import Statistic

BATCH_SIZE = 4
"""Sequences in one forward pass. Part of the result: sums of float32 depend on their order."""


@dataclass
class Passing:
    """A block on its way past."""

    block: Block
    module: nn.Module
    statistics: dict[str, dict[str, Tensor]]
    """Input group -> statistic -> its value, on the device."""


@torch.no_grad()
def stream(
    model: nn.Module,
    anatomy: Anatomy,
    tokens: Tensor,
    needs: Sequence[type[Statistic]],
    device: torch.device,
    inputs: str = "dense",
    batch_size: int = BATCH_SIZE,
    start: int = 0,
    hidden: list[Tensor] | None = None,
    reached: Callable[[int, list[Tensor]], None] = lambda index, hidden: None,
) -> Iterator[Passing]:
    """Yields every block in order, with statistics over `tokens` (sequences, length).

    model: on the CPU, in evaluation mode, in the dtype of the forward pass.
    inputs: "dense": a block reads what the blocks before it put out when they passed, whatever the consumer makes of them;
        one forward pass per block. "compressed": a block's outputs are worked out when the consumer asks for the next one,
        with the weights that the consumer has left in `module`; two forward passes per block.
    reached: called before every block but the first that passes, when the consumer has finished the blocks before it, with
        the block's index and what it reads. With these two as `start` and `hidden` the stream goes on from there.
    """
    first, calls = block_inputs(model, anatomy, tokens.split(batch_size))
    hidden = first if hidden is None else hidden
    for index, block in enumerate(anatomy.blocks[start:], start):
        if index > start:
            reached(index, hidden)
        module = model.get_submodule(block.name).to(device)

        def outputs(module: nn.Module = module, index: int = index) -> Iterator[Tensor]:
            for x in hidden:
                yield module(x.to(device), **to_device(calls[len(x)][index], device)).cpu()

        watched, release = watch(model, block, needs, device)
        try:
            for i, y in enumerate(outputs()):
                if inputs == "dense":
                    hidden[i] = y
        finally:
            release()
        values = {group: {s.name: s.finish() for s in statistics} for group, statistics in watched.items()}
        yield Passing(block, module, values)
        if inputs == "compressed" and index + 1 < len(anatomy.blocks):
            for i, y in enumerate(outputs()):
                hidden[i] = y
        module.to("cpu")


def watch(
    model: nn.Module, block: Block, needs: Sequence[type[Statistic]], device: torch.device
) -> tuple[dict[str, list[Statistic]], Callable[[], None]]:
    """Lets statistics see what each input group of the block reads, until the second result is called."""
    watched: dict[str, list[Statistic]] = {}
    hooks = []
    for group in block.groups:
        reader = model.get_submodule(group.linears[0])
        statistics = watched[group.name] = [need() for need in needs]
        for statistic in statistics:
            statistic.start(reader.in_features, device)

        def add(module: nn.Module, args: tuple[Tensor, ...], statistics: list[Statistic] = statistics) -> None:
            for statistic in statistics:
                statistic.add(args[0].flatten(0, -2))

        hooks.append(reader.register_forward_pre_hook(add))

    def release() -> None:
        for hook in hooks:
            hook.remove()

    return watched, release


class Recorded(Exception):
    """Ends a forward pass when its last block has been reached."""


def block_inputs(
    model: nn.Module, anatomy: Anatomy, batches: Sequence[Tensor]
) -> tuple[list[Tensor], dict[int, list[dict[str, Any]]]]:
    """What the first block reads of each batch, and for each batch size the keyword arguments of every block.

    The model runs with blocks that do nothing but note how they are called. Sequences have one length and no padding, so
    masks and positions depend on nothing but the batch size.
    """
    blocks = [model.get_submodule(block.name) for block in anatomy.blocks]
    hidden: list[Tensor] = []
    calls: dict[int, list[dict[str, Any]]] = {}

    def stand_in(index: int) -> Callable[..., Tensor]:
        def note(x: Tensor, **arguments: Any) -> Tensor:
            if index == 0:
                hidden.append(x)
            if len(noted) == index:
                noted.append(arguments)
            if index + 1 == len(blocks):
                raise Recorded
            return x

        return note

    for index, block in enumerate(blocks):
        block.forward = stand_in(index)
    try:
        for batch in batches:
            noted = calls.setdefault(len(batch), [])
            try:
                model(input_ids=batch, use_cache=False)
            except Recorded:
                continue
            raise ValueError(f"{anatomy.blocks[-1].name} was not reached: the anatomy does not fit {type(model).__name__}")
    finally:
        for block in blocks:
            del block.forward
    return hidden, calls


def to_device(value: Any, device: torch.device) -> Any:
    """Arguments of a block, with the tensors in them on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(to_device(item, device) for item in value)
    return value
