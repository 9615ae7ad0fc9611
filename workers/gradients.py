"""Gradients of the loss with respect to the linears of a model, a block at a time from the last to the first.

A pass forward keeps what every block reads, in files where that is much. Then each block runs once more, this time with a
graph, and takes the gradient of what it put out, which the block behind it has left. One block is on the device at a time, with
its gradients and statistics, so memory there does not grow with depth. A sequence is a batch of its own: gradients of several
cannot be told apart afterwards, and it is of each that squares and magnitudes are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pare.methods.anatomy.calls import Call, block_inputs
from pare.methods.anatomy.reads import one_expert_at_a_time
from pare.methods.anatomy.types import Anatomy, Block
from pare.methods.anatomy.views import parse, view
from pare.methods.ops.gradients import GradientStatistic
from pare.methods.ops.losses import next_token_loss_
from pare.workers.blocks import BlockByBlock
from pare.workers.hidden_states import HiddenStates

Reached = Callable[[int, HiddenStates], None]
"""Called with the number of blocks that are done and, for each sequence, the gradient of what the next one put out."""


@dataclass
class Passed:
    """A block that the gradients have passed."""

    index: int
    statistics: dict[str, dict[str, Tensor]]
    """Weight -> statistic -> its value, on the device."""


def backward(
    model: BlockByBlock,
    tokens: Tensor,
    needs: Sequence[type[GradientStatistic]],
    device: torch.device,
    folder: Path | None = None,
    done: int = 0,
    gradients: HiddenStates | None = None,
    reached: Reached = lambda done, gradients: None,
) -> Iterator[Passed]:
    """Yields every block in reverse order, with statistics over `tokens` (sequences, length >= 2).

    folder: where there is room for what all blocks read; None: that stays in memory.
    gradients: where those of hidden states are to stay; None: in memory. If there are some in it, they are of what the last
        block but `done` puts out.
    reached: called before every block but the first that passes, when the consumer has finished the one behind it. With what it
        is called with as `done` and `gradients` the way goes on from there.
    """
    sequences = tokens.to(device).split(1)
    gradients = HiddenStates() if gradients is None else gradients
    blocks = model.anatomy.blocks[: len(model.anatomy.blocks) - done]
    with HiddenStates(folder) as states:
        calls = forward(model, blocks[:-1] if len(gradients) else blocks, sequences, device, states)
        if not len(gradients):
            gradients.extend(loss_gradients(model, sequences, of_block(len(blocks), states, len(sequences)), device))
        for index in reversed(range(len(blocks))):
            if index + 1 < len(blocks):
                reached(len(model.anatomy.blocks) - 1 - index, gradients)
            with model.loaded(blocks[index].name) as module, one_expert_at_a_time(model.model):
                module.to(device)
                read = of_block(index, states, len(sequences))
                found = block_statistics(model.model, blocks[index], calls[index], read, gradients, needs, device)
            yield Passed(index, found)


def of_block(index: int, states: HiddenStates, sequences: int) -> Iterator[Tensor]:
    """What a block reads of each sequence, (1, length, width); behind the last block, what that puts out."""
    return (states[i] for i in range(index * sequences, (index + 1) * sequences))


@torch.no_grad()
def forward(
    model: BlockByBlock, blocks: Sequence[Block], sequences: Sequence[Tensor], device: torch.device, states: HiddenStates
) -> list[Call]:
    """Fills `states` with what each of these blocks reads and the last puts out; returns how all blocks are called."""
    with model.outside():
        for ids in sequences:
            (first,), by_size = block_inputs(model.model, model.anatomy, [ids])
            states.append(first.cpu())
    for index, block in enumerate(blocks):
        with model.loaded(block.name) as module, one_expert_at_a_time(model.model):
            module.to(device)
            for x in of_block(index, states, len(sequences)):
                states.append(by_size[1][index].run(module, x.to(device), device).cpu())
    return by_size[1]


@torch.enable_grad()
def loss_gradients(
    model: BlockByBlock, sequences: Sequence[Tensor], hidden: Iterator[Tensor], device: torch.device
) -> list[Tensor]:
    """Gradient of each sequence's summed loss with respect to `hidden`: what the last block put out, (1, length, width)."""
    found = []
    with model.outside():
        head = f"{model.anatomy.head}."
        model.fill(model.model, "", [name for name in model.around if name.startswith(head)])
        for ids, x in zip(sequences, hidden, strict=True):
            end = x.detach().to(device).requires_grad_()
            with ending_in(model.model, model.anatomy, end):
                logits = model.model(input_ids=ids, use_cache=False).logits
            total, _ = next_token_loss_(logits, ids)
            found.append(torch.autograd.grad(total, end)[0].cpu())
    return found


@contextmanager
def ending_in(model: nn.Module, anatomy: Anatomy, hidden: Tensor) -> Iterator[None]:
    """All blocks put out `hidden`, whatever they read."""

    def put_out(*args: Any, **kwargs: Any) -> Any:
        return (hidden, *(None,) * (anatomy.returns - 1)) if anatomy.returns else hidden

    blocks: list[Any] = [model.get_submodule(block.name) for block in anatomy.blocks]
    for block in blocks:
        block.forward = put_out
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@torch.enable_grad()
def block_statistics(
    model: nn.Module,
    block: Block,
    call: Call,
    read: Iterator[Tensor],
    gradients: HiddenStates,
    needs: Sequence[type[GradientStatistic]],
    device: torch.device,
) -> dict[str, dict[str, Tensor]]:
    """Weight -> statistic -> its value.

    read: for each sequence what the block reads. gradients: of each sequence's summed loss with respect to what the block puts
    out; in place of it is left that with respect to what it reads. The loss is divided by its tokens at the end, in float32.
    """
    module = model.get_submodule(block.name).requires_grad_(False)
    names = [name for group in block.groups for name in group.weights]
    parameters = {parse(name).parameter: model.get_parameter(parse(name).parameter).requires_grad_() for name in names}
    statistics = {name: [need() for need in needs] for name in names}
    for name, of_weight in statistics.items():
        rows, columns = view(parameters[parse(name).parameter], name).shape
        for statistic in of_weight:
            statistic.start((rows, columns), device)
    for i, x in enumerate(read):
        x = x.detach().to(device).requires_grad_()
        y = call.run(module, x, device)
        wanted = [x, *parameters.values()]
        before, *own = torch.autograd.grad(y, wanted, gradients[i].to(device), materialize_grads=True)
        gradients[i] = before.cpu()
        by_parameter = dict(zip(parameters, own, strict=True))
        for name, of_weight in statistics.items():
            gradient = view(by_parameter[parse(name).parameter], name).float() / (x.shape[1] - 1)
            for statistic in of_weight:
                statistic.add(gradient)
    return {name: {s.name: s.finish() for s in statistics.pop(name)} for name in names}
