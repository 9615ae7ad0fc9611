"""Weights of the tokens that are passing through a block, for the statistics in which tokens count differently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn

from pare.methods.anatomy.attends import Attends
from pare.methods.anatomy.calls import HIDDEN
from pare.methods.anatomy.types import Group
from pare.methods.ops.statistics import Statistic
from pare.methods.ops.token_weights import TokenWeights, WeighedStatistic
from pare.workers.task import TaskError


class Weighing:
    """Works out the weights of a batch when a block is given it."""

    def __init__(self, needs: Sequence[type[Statistic]], groups: Sequence[Group]) -> None:
        self.wanted = {need.token_weights for need in needs if issubclass(need, WeighedStatistic)}
        self.weights: dict[TokenWeights, Tensor] = {}
        self.looks_ahead = False
        """Whether the block runs to show its attention, and what it reads meanwhile does not count."""
        routed = next((group.name for group in groups if group.routed), None)
        if self.wanted and routed:
            raise TaskError(
                f"a statistic weighs tokens, and which of them {routed} reads is not known. Try a method without token weights "
                "for a model with experts"
            )

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            @cache
            def attention() -> Tensor:
                self.looks_ahead = True
                with Attends() as attends:
                    module.forward(*args, **kwargs)
                self.looks_ahead = False
                if attends.received is None:
                    raise TaskError(f"a statistic weighs tokens by attention, and none is seen in a {type(module).__name__}")
                return attends.received

            hidden = args[0] if args else kwargs[HIDDEN]
            self.weights = {weights: weights.of(hidden, attention).flatten() for weights in self.wanted}

        hook = block.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def add(self, statistic: Statistic, x: Tensor) -> None:
        """x (tokens, in): of the batch that the block was given last, all of its tokens in their order."""
        if self.looks_ahead:
            return
        if isinstance(statistic, WeighedStatistic):
            statistic.add(x, self.weights[statistic.token_weights])
        else:
            statistic.add(x)
