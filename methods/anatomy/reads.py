"""Sees what the linears of a model read while it runs: by the multiplication itself, whatever module it stands in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pare.methods.anatomy.views import weight_of

Note = Callable[[str, Tensor], None]
"""Takes the name of a weight and what it is multiplied with (..., in)."""


class Reads(TorchFunctionMode):
    """While in force, `note` is told of every product with one of the weights.

    weights: name -> weight (out, in), as views of the parameters that the model runs with, on their device.
    A product is `linear`, or `addmm` or `@` with the weight on the right.
    """

    def __init__(self, weights: Mapping[str, Tensor], note: Note) -> None:
        super().__init__()
        self.names = {place(weight): name for name, weight in weights.items()}
        self.note = note

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS and len(args) > max(PRODUCTS[func]):
            x, weight = (args[i] for i in PRODUCTS[func])
            name = self.names.get(place(weight))
            if name is not None:
                self.note(name, x)
        return func(*args, **kwargs or {})


PRODUCTS: dict[Callable[..., Any], tuple[int, int]] = {
    torch.nn.functional.linear: (0, 1),
    torch.addmm: (1, 2),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), (0, 1)),
}
"""Function -> positions of what is read, and of the weight."""


def place(weight: Tensor) -> tuple[int, int]:
    """Where a matrix lies in memory, and its size: equal for all views of the whole of it."""
    return weight.data_ptr(), weight.numel()


@contextmanager
def reading(model: nn.Module, names: Iterable[str], note: Note) -> Iterator[None]:
    """Lets `note` see what these weights are multiplied with. Experts are run one by one meanwhile, each weight by itself."""
    with one_expert_at_a_time(model), Reads({name: weight_of(model, name) for name in names}, note):
        yield


@contextmanager
def one_expert_at_a_time(model: nn.Module) -> Iterator[None]:
    """Transformers multiplies all experts at once unless it is told otherwise."""
    configs = {
        id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_experts_implementation")
    }
    before = {key: config._experts_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._experts_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
