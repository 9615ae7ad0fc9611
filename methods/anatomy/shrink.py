"""Takes blocks, FFN features, KV groups and hidden channels out of a decoder, so that what is left computes what the whole
model does with the same units set to zero.

A block that is taken out is one that returns what it reads. The units of a tie are taken from all its sides at once. Of the
residual stream, an RMS norm over k of n channels, the others being zero, has to divide by the mean over n:

    x * w / sqrt(sum(x^2) / n + e)  =  x * (w * sqrt(n / k)) / sqrt(sum(x^2) / k + e * n / k)

so that its weight is multiplied by sqrt(n / k), and rounded to its dtype, and its epsilon by n / k. A layer norm subtracts
the mean over all channels first, which makes of those that were zero something else: there, nothing can be taken out exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pare.methods.anatomy.architecture import EPSILON, KEY, filled, read, table_for, underived
from pare.methods.anatomy.cut import Cut, check, narrowest, widest
from pare.methods.anatomy.cut_config import NotSaid, built, narrower, shallower
from pare.methods.anatomy.types import Anatomy, Tie
from pare.methods.anatomy.views import parse


@dataclass(frozen=True)
class Piece:
    """What is kept of one parameter."""

    origin: str
    """Its name in the whole model."""

    shape: tuple[int, ...]
    kept: Mapping[int | None, Mapping[int, Tensor]] = field(default_factory=dict)
    """Matrix of a stack, or None -> axis of it -> the places kept there. No entry: all."""

    factor: float = 1.0
    plus: int = 0
    """What is kept of v becomes (v + plus) * factor - plus."""

    def of(self, value: Tensor) -> Tensor:
        """value: of the whole parameter -> of the piece, in its dtype."""

        def cut(matrix: Tensor, places: Mapping[int, Tensor]) -> Tensor:
            for axis, kept in places.items():
                matrix = matrix.index_select(axis, kept.to(matrix.device))
            return matrix

        if None in self.kept or not self.kept:
            value = cut(value, self.kept.get(None, {}))
        else:
            value = torch.stack([cut(matrix, self.kept.get(i, {})) for i, matrix in enumerate(value)])
        if self.factor == 1:
            return value
        precise = value.to(torch.promote_types(value.dtype, torch.float32))
        return ((precise + self.plus) * self.factor - self.plus).to(value.dtype)


@dataclass(frozen=True)
class Shrunk:
    """What a cut makes of a model."""

    made: type[nn.Module]
    """Class of the whole model."""

    config: Any
    """Of transformers; says everything, by its own keys or, where they cannot, by the table of `architecture`."""

    pieces: Mapping[str, Piece]
    """Name of a parameter -> what it is made of. A tied head has no entry."""

    @property
    def is_plain(self) -> bool:
        """Whether transformers opens it without Pare: the config's own keys say it."""
        return getattr(self.config, KEY, None) is None

    def tensors(self, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all parameters. read: name in the whole model -> value of the parameter."""
        for name, piece in self.pieces.items():
            yield name, piece.of(read(piece.origin))

    def model(self, read: Callable[[str], Tensor], dtype: torch.dtype) -> Any:
        """It in memory, in evaluation mode."""
        return filled(self.made, self.config, dict(self.tensors(read)), dtype)


def shrink(model: Any, anatomy: Anatomy, cut: Cut) -> Shrunk:
    """What a cut makes of a model. No weight is read: a model on the meta device will do.

    Raises:
        ValueError: the cut does not fit the model, or what is left would not compute what it did.
    """
    check(anatomy, cut)
    blocks = cut.blocks or tuple(range(len(anatomy.blocks)))
    pieces = pieces_of(model, anatomy, cut, blocks)
    shapes = {name: piece.shape for name, piece in pieces.items()}
    attributes = attributes_of(model, anatomy, cut, blocks)

    made = underived(type(model))
    bare = shallower(model.config, anatomy, blocks)
    try:
        skeleton, config = built(made, narrower(bare, anatomy, cut, blocks))
        says_all = table_for(skeleton, shapes, attributes) is None
    except (ValueError, NotSaid):  # of values that the config, or the class that it is for, does not allow
        says_all = False
    if not says_all:
        skeleton, config = built(made, bare)
        if table := table_for(skeleton, shapes, attributes):
            setattr(config, KEY, table)
    return Shrunk(made, config, rescaled(pieces, model, skeleton, anatomy, cut))


def pieces_of(model: Any, anatomy: Anatomy, cut: Cut, blocks: Sequence[int]) -> dict[str, Piece]:
    """Name in the shrunk model -> piece, without factors."""
    masks: dict[str, dict[int | None, dict[int, Tensor]]] = {}

    def take(tie: Tie, kept: Sequence[int]) -> None:
        gone = torch.ones(tie.units, dtype=torch.bool).index_fill(0, torch.tensor(kept), False).nonzero()
        for side in tie.sides:
            said = parse(side.parameter)
            axis = 1 - side.axis if said.turned else side.axis
            size = model.get_parameter(said.parameter).shape[axis + (said.index is not None)]
            by_axis = masks.setdefault(said.parameter, {}).setdefault(said.index, {})
            mask = by_axis.setdefault(axis, torch.ones(size, dtype=torch.bool))
            mask[(side.start + gone * side.width + torch.arange(side.width)).flatten()] = False

    for (b, t), kept in cut.units.items():
        take(anatomy.blocks[b].ties[t], kept)
    if cut.hidden is not None and anatomy.hidden is not None:
        take(anatomy.hidden, cut.hidden)

    pieces = {}
    for origin, parameter in model.named_parameters():
        name = renamed(origin, anatomy, blocks)
        if name is None:
            continue
        places = {i: {axis: mask.nonzero()[:, 0] for axis, mask in axes.items()} for i, axes in masks.get(origin, {}).items()}
        is_stack = bool(places) and None not in places
        shape = parameter.shape[1:] if is_stack else parameter.shape
        matrices: Iterable[int | None] = range(len(parameter)) if is_stack else [None]
        found = {tuple(len(places.get(i, {}).get(a, range(size))) for a, size in enumerate(shape)) for i in matrices}
        if len(found) > 1:
            raise ValueError(f"{origin} is one stack of matrices, which all have one shape: keep as many units of each expert")
        pieces[name] = Piece(origin, (*parameter.shape[:1], *found.pop()) if is_stack else found.pop(), places)
    return pieces


def renamed(name: str, anatomy: Anatomy, blocks: Sequence[int]) -> str | None:
    """The name of a parameter or a module when only these blocks are left; None where it is in one that is not."""
    for b, block in enumerate(anatomy.blocks):
        if f"{name}.".startswith(f"{block.name}."):
            return anatomy.blocks[blocks.index(b)].name + name[len(block.name) :] if b in blocks else None
    return name


def attributes_of(model: Any, anatomy: Anatomy, cut: Cut, blocks: Sequence[int]) -> dict[str, dict[str, float]]:
    """Module -> the numbers that it has to compute with, by its name in the shrunk model."""
    wanted: dict[str, dict[str, float]] = {}
    said = (getattr(model.config, KEY, None) or {}).get("attributes", {})
    for name, module in model.named_modules():
        numbers = {a: read(module, a) for a in (*EPSILON, "head_dim", "scaling", *said.get(name, ()))}
        wanted[name] = {a: value for a, value in numbers.items() if isinstance(value, int | float)}
    for (b, t), kept in cut.units.items():
        tie = anatomy.blocks[b].ties[t]
        first = tie.sides[0].parameter
        module = parse(first).parameter.rsplit(".", 2)[0]
        if tie.kind == "channel":
            counts = {"intermediate_size": len(kept)}
        elif tie.kind == "kv":
            wide, head = widest(tie), narrowest(tie)
            counts = {"num_heads": len(kept) * wide // head, "num_key_value_heads": len(kept), "split_size": len(kept) * head}
            is_fused = sum(side.parameter == first for side in tie.sides) > 1
            if is_fused:  # the module may tell q, k and v apart by a count in its config
                counts["config.num_attention_heads"] = counts["num_heads"]
        else:
            continue
        has = model.get_submodule(module)
        wanted[module] |= {a: value for a, value in counts.items() if isinstance(read(has, a), int)}
    if cut.hidden is not None and anatomy.hidden is not None:
        ratio = anatomy.hidden.units / len(cut.hidden)
        for norm in norms_of(anatomy):
            wanted[norm] |= {a: wanted[norm][a] * ratio for a in EPSILON if a in wanted[norm]}
        for name, module in model.named_modules():
            if read(module, "hidden_dim") == anatomy.hidden.units:
                wanted[name]["hidden_dim"] = len(cut.hidden)
    return {new: wanted[name] for name in wanted if wanted[name] and (new := renamed(name, anatomy, blocks)) is not None}


def norms_of(anatomy: Anatomy) -> list[str]:
    """The modules that scale the residual stream."""
    sides = anatomy.hidden.sides if anatomy.hidden else ()
    return sorted({side.parameter.rsplit(".", 1)[0] for side in sides if side.role == "scales"})


def rescaled(pieces: dict[str, Piece], model: Any, skeleton: Any, anatomy: Anatomy, cut: Cut) -> dict[str, Piece]:
    """With the factors that keep the norms, and an embedding that is multiplied by the root of the width, what they were."""
    if cut.hidden is None or anatomy.hidden is None:
        return pieces
    root = (anatomy.hidden.units / len(cut.hidden)) ** 0.5
    plus = int(anatomy.blocks[0].norm == "rms_plus_one")
    before, after = (getattr(m.get_submodule(anatomy.embedding), "scalar_embed_scale", 1.0) for m in (model, skeleton))
    factors = dict.fromkeys((f"{norm}.weight" for norm in norms_of(anatomy)), root)
    if anatomy.tied:
        factors[f"{anatomy.norm}.weight"] *= after / before
    scaled = {name: replace(p, factor=factors[p.origin], plus=plus) for name, p in pieces.items() if p.origin in factors}
    name = f"{anatomy.embedding}.weight"
    return {**pieces, **scaled, name: replace(pieces[name], factor=before / after)}
