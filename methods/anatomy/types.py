"""The words in which the anatomy of a decoder is written, and the register of families."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pare.methods.anatomy.views import weight_of


@dataclass(frozen=True)
class Fold:
    """What stands before a group, and before nothing else, so that a diagonal over the group's input features can be folded
    into it: with the group's weights multiplied by s and this divided by s, the model computes what it did."""

    kind: str
    """"norm": weight (n,) and bias are divided by s; "norm_plus_one": 1 + weight is; "linear": rows of weight (n, k) and
    elements of bias are."""

    parameters: tuple[str, ...]
    """Names of the weight and, if there is one, the bias."""

    repeat: int = 1
    """Input features that each feature of the parameters feeds: 1, or with grouped-query attention the query heads of a head
    of v, in turn."""

    head: int = 1
    """Features of a head that is repeated as a whole: v's head h feeds o's heads h * repeat ... h * repeat + repeat - 1."""

    start: int = 0
    """First feature of the parameters that counts; there are others where a parameter is fused (qkv, gate_up)."""

    def shared(self, s: Tensor) -> Tensor:
        """s (input features,) with one value, the geometric mean, for the features that one of the parameters feeds."""
        heads = s.view(-1, self.repeat, self.head)
        return heads.log().mean(1, keepdim=True).exp().expand_as(heads).reshape(-1)

    def feeding(self, s: Tensor) -> Tensor:
        """s (input features,) with one value for what one feature feeds -> those values, for the features that count."""
        return s.view(-1, self.repeat, self.head)[:, 0].reshape(-1)

    def divided(self, values: Mapping[str, Tensor], s: Tensor) -> dict[str, Tensor]:
        """values: the parameters; s (input features,) positive, one value for what one feature feeds -> the parameters with
        s folded in."""
        one = self.feeding(s)
        made = {}
        for name in self.parameters:
            value = values[name].clone()
            rows = value[self.start : self.start + len(one)]
            plus = 1 if self.kind == "norm_plus_one" and name == self.parameters[0] else 0
            rows.copy_((rows + plus) / one.view(-1, *(1,) * (value.dim() - 1)) - plus)
            made[name] = value
        return made


@dataclass(frozen=True)
class Group:
    """Linears that read one tensor."""

    name: str
    """Unique in the model, e.g. `model.layers.3.self_attn.qkv`."""

    weights: tuple[str, ...]
    """Names of their weights (see `views`), e.g. `model.layers.3.self_attn.q_proj.weight`."""

    fold: Fold | None = None
    """What a diagonal over the input features can be folded into; None where nothing stands there that feeds these alone."""

    routed: bool = False
    """Whether it is part of an expert, which reads some of the tokens and perhaps none."""


@dataclass(frozen=True)
class Side:
    """Where the units of a tie stand in one weight or vector: unit u at start + u * width, `width` long."""

    parameter: str
    """Name of a weight (see `views`) or of any other parameter."""

    role: str
    """"writes": what stands there makes the unit; "reads": takes it in; "scales": acts on each unit by itself."""

    axis: int
    """Of the (out, in) weight: 0 for rows, 1 for columns. Of another parameter: its own."""

    start: int = 0
    width: int = 1

    def of(self, value: Tensor, unit: int) -> Tensor:
        """The part of the parameter's value that belongs to a unit, as a view."""
        return value.narrow(self.axis, self.start + unit * self.width, self.width)


@dataclass(frozen=True)
class Tie:
    """Units that can be taken out of a model, each from all sides at once."""

    kind: str
    """"ffn": a feature between an MLP's linears; "kv": a head of k and v with the heads of q that use it; "channel": a channel
    of a state-space mixer; "hidden": a feature of the residual stream."""

    units: int
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class Block:
    name: str
    """Module name, e.g. `model.layers.3`."""

    groups: tuple[Group, ...]
    """In the order in which the block runs them."""

    left_out: Mapping[str, str] = field(default_factory=dict)
    """Every other parameter of the block with two or more dimensions -> why no method is given it."""

    ties: tuple[Tie, ...] = ()
    """What can be taken out of this block: exact, and all of the kinds "ffn", "kv" and "channel" that is."""

    norm: str = "unknown"
    """Kind of its norms: "rms", "rms_plus_one" (1 + weight multiplies), "layer" or "unknown"."""


@dataclass(frozen=True)
class Anatomy:
    """Module names of a decoder's parts."""

    blocks: tuple[Block, ...]
    """In the order in which they run; each maps a hidden state to one of the same shape."""

    embedding: str
    norm: str
    """The normalisation between the last block and the head."""

    head: str
    tied: bool
    """Whether head and embedding are one parameter."""

    widths: dict[str, tuple[int, int]]
    """Name -> (out, in) of the weight of every group."""

    hidden: Tie | None = None
    """The residual stream: who writes to it and who reads it, through a norm or not. None where it is not known."""

    returns: int = 0
    """0 where blocks return the hidden state; else they return so many things, the hidden state first."""

    @property
    def groups(self) -> list[Group]:
        return [group for block in self.blocks for group in block.groups]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        blocks: Iterable[Block],
        embedding: str,
        norm: str,
        head: str,
        hidden: Tie | None = None,
        returns: int = 0,
    ) -> Anatomy:
        """With what can be read off the model."""
        blocks = tuple(blocks)
        tied = model.get_submodule(head).weight is model.get_submodule(embedding).weight
        names = [name for block in blocks for group in block.groups for name in group.weights]
        widths = {name: (shape[0], shape[1]) for name in names for shape in [weight_of(model, name).shape]}
        return cls(blocks, embedding, norm, head, tied, widths, hidden, returns)


class UnknownModel(ValueError):
    """Nothing is written for this class of model, and its parts were not found by trying it."""


Family = Callable[[Any], Anatomy]

FAMILIES: dict[str, Family] = {}
"""Class of the model in transformers -> what describes it."""


def family(*architectures: str) -> Callable[[Family], Family]:
    """Registers a function as what describes models of these classes. A plugin may do so, also for a class known already."""

    def register(function: Family) -> Family:
        FAMILIES.update(dict.fromkeys(architectures, function))
        return function

    return register


def parameters_of(model: nn.Module, module: str) -> Iterator[str]:
    """Full names of a module's own parameters: the weight, and the bias if there is one."""
    for name, _ in model.get_submodule(module).named_parameters(recurse=False):
        yield f"{module}.{name}"
