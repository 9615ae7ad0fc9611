"""How a model calls its blocks: noted once, so that blocks can be run one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pare.methods.anatomy.types import Anatomy

HIDDEN = "hidden_states"
"""Name under which a block is given the hidden state, where it is not the first argument."""


@dataclass(frozen=True)
class Call:
    """What a block is called with beside the hidden state: masks, positions, and whatever else the model prepares."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool
    """Whether the hidden state comes by name."""

    def run(self, block: nn.Module, hidden: Tensor, device: torch.device | None = None) -> Tensor:
        """hidden (sequences, length, width) -> what the block makes of it, both on `device`; None: where the arguments are."""
        args, kwargs = (self.args, self.kwargs) if device is None else to_device((self.args, self.kwargs), device)
        output = block(**{HIDDEN: hidden}, **kwargs) if self.named else block(hidden, *args, **kwargs)
        return first_of(output)


def first_of(output: Any) -> Tensor:
    """The hidden state in what a block returns."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


class Recorded(Exception):
    """Ends a forward pass when its last block has been reached."""


def block_inputs(model: nn.Module, anatomy: Anatomy, batches: Sequence[Tensor]) -> tuple[list[Tensor], dict[int, list[Call]]]:
    """What the first block reads of each batch, and for each batch size the call of every block.

    The model runs with blocks that do nothing but note how they are called. Sequences have one length and no padding, so
    masks and positions depend on nothing but the batch size.
    """
    blocks = [model.get_submodule(block.name) for block in anatomy.blocks]
    hidden: list[Tensor] = []
    calls: dict[int, list[Call]] = {}

    def stand_in(index: int) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            named = not args
            if named and HIDDEN not in kwargs:
                raise ValueError(f"{anatomy.blocks[index].name} is called without a first argument and without {HIDDEN}=")
            x = kwargs.pop(HIDDEN) if named else args[0]
            if index == 0:
                hidden.append(x)
            if len(noted) == index:
                noted.append(Call(args[1:], kwargs, named))
            if index + 1 == len(blocks):
                raise Recorded
            return (x, *(None,) * (anatomy.returns - 1)) if anatomy.returns else x

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
