"""Calibration: the blocks of a model pass by one at a time, each with statistics over the inputs of its linears.

One block is on the device, and in memory at all where the model is one that reads its blocks from files
(`blocks.BlockByBlock`), so memory does not grow with depth. What the blocks read waits on the CPU, and in files beyond a limit
(`hidden_states.HiddenStates`). The model's own forward pass prepares what blocks are called with (masks, position embeddings),
so nothing of it is written again here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pare.methods.anatomy.calls import Call, block_inputs
from pare.methods.anatomy.reads import one_expert_at_a_time, reading
from pare.methods.anatomy.types import Anatomy, Block, Group
from pare.methods.anatomy.views import weight_of
from pare.methods.ops.statistics import Statistic
from pare.workers.hidden_states import HiddenStates
from pare.workers.weighing import Weighing

BATCH_SIZE = 4
"""Sequences in one forward pass. Part of the result: sums of float32 depend on their order."""


@dataclass
class Passing:
    """A block on its way past."""

    block: Block
    module: nn.Module
    statistics: dict[str, dict[str, Tensor]]
    """Input group -> statistic -> its value, on the device."""


class Opened(Protocol):
    """A model of which no more need be in memory than is worked with."""

    @property
    def model(self) -> Any:
        """All modules, whether their weights are there or not."""

    def outside(self) -> AbstractContextManager[None]:
        """With what belongs to no block."""

    def loaded(self, name: str) -> AbstractContextManager[nn.Module]:
        """A block with its weights, on the CPU at first; on whatever device it is at the end."""


class InMemory:
    """A model that is on the CPU as a whole."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def outside(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def loaded(self, name: str) -> Iterator[nn.Module]:
        module = self.model.get_submodule(name)
        try:
            yield module
        finally:
            module.to("cpu")


@torch.no_grad()
def stream(
    model: nn.Module | Opened,
    anatomy: Anatomy,
    tokens: Tensor,
    needs: Sequence[type[Statistic]],
    device: torch.device,
    inputs: str = "dense",
    batch_size: int = BATCH_SIZE,
    start: int = 0,
    hidden: HiddenStates | None = None,
    reached: Callable[[int, HiddenStates], None] = lambda index, hidden: None,
) -> Iterator[Passing]:
    """Yields every block in order, with statistics over `tokens` (sequences, length).

    model: on the CPU, in evaluation mode, in the dtype of the forward pass; or one that reads its blocks when they pass.
    inputs: "dense": a block reads what the blocks before it put out when they passed, whatever the consumer makes of them;
        one forward pass per block. "compressed": a block's outputs are worked out when the consumer asks for the next one,
        with the weights that the consumer has left in `module`; two forward passes per block.
    hidden: where the hidden states are to stay; None: in memory. If there are some in it, they are what block `start` reads.
    reached: called before every block but the first that passes, when the consumer has finished the blocks before it, with
        the block's index and what it reads. With these two as `start` and `hidden` the stream goes on from there.
    """
    opened: Opened = InMemory(model) if isinstance(model, nn.Module) else model
    hidden = HiddenStates() if hidden is None else hidden
    calls: dict[int, list[Call]] = {}
    is_new = not len(hidden)
    with opened.outside():
        for batch in tokens.split(batch_size):
            if is_new or len(batch) not in calls:
                (first,), called = block_inputs(opened.model, anatomy, [batch])
                calls.setdefault(len(batch), called[len(batch)])
                if is_new:
                    hidden.append(first)
                del first
    for index, block in enumerate(anatomy.blocks[start:], start):
        if index > start:
            reached(index, hidden)
        with opened.loaded(block.name) as module:
            module.to(device)

            def outputs(module: nn.Module = module, index: int = index) -> Iterator[Tensor]:
                with one_expert_at_a_time(opened.model):
                    for x in hidden:
                        yield calls[len(x)][index].run(module, x.to(device), device).cpu()

            watch = Watch(opened.model, block.groups, needs, device)
            with reading(opened.model, watch.readers, watch.note), watch.weighing.watching(module):
                for i, y in enumerate(outputs()):
                    if inputs == "dense":
                        hidden[i] = y
            yield Passing(block, module, watch.values())
            if inputs == "compressed" and index + 1 < len(anatomy.blocks):
                for i, y in enumerate(outputs()):
                    hidden[i] = y


class Watch:
    """Statistics over what the input groups of a block read: of each group, by the first of its weights."""

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], needs: Sequence[type[Statistic]], device: torch.device
    ) -> None:
        self.readers = {group.weights[0]: group for group in groups}
        self.weighing = Weighing(needs, groups)
        self.statistics = {group.name: [need() for need in needs] for group in groups}
        self.features = {group.name: weight_of(model, group.weights[0]).shape[1] for group in groups}
        for name, statistics in self.statistics.items():
            for statistic in statistics:
                statistic.start(self.features[name], device)
        self.device = device
        self.idle = set(self.statistics)
        """Groups that have read nothing yet."""

    def note(self, weight: str, x: Tensor) -> None:
        """x (..., in): what the weight is multiplied with."""
        name = self.readers[weight].name
        self.idle.discard(name)
        for statistic in self.statistics[name]:
            self.weighing.add(statistic, x.flatten(0, -2))

    def values(self) -> dict[str, dict[str, Tensor]]:
        """Input group -> statistic -> its value; asked for once. An expert that no token has reached counts as one that has
        read zeros: this is how its statistics say that there is nothing to go by."""
        for group in self.readers.values():
            if group.name in self.idle and group.routed:
                self.note(group.weights[0], torch.zeros(1, self.features[group.name], device=self.device))
        return {name: {s.name: s.finish() for s in self.statistics.pop(name)} for name in list(self.statistics)}
