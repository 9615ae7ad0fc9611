"""Training weights themselves: which of them, from which values, and what they are as formulas.

What is trained is float32 whatever the model computes in. A weight of which an earlier stage has left only some stays so: the
others begin at zero, their gradients are zero, and the result is the same mask with new values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pare.methods.anatomy.views import parse, view
from pare.methods.ops.adapters import block_linears
from pare.methods.ops.sparsity import left_by
from pare.methods.parts.formula import Dense, Formula
from pare.methods.parts.masked import Kept
from pare.methods.settings import SettingsError, check

CHOICES = ("all", "linear", "norm", "bias", "embedding")
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class WholeFields:
    """Settings that every method has which trains weights themselves."""

    name: ClassVar[str]
    optimizer: ClassVar[str]  # a setting of every method that trains

    parameters: str = "all"
    """What is trained: "all", "linear" (weights of all linears but the head), "norm", "bias", "embedding" (with the head, where
    the two are tied), or a regular expression for whole names of parameters, e.g. `.*mlp.*weight`."""

    last_blocks: int = 0
    """Of these only what lies in the last so many decoder blocks, >= 0; 0: wherever it lies."""

    store: str = "as_found"
    """Dtype of the trained weights in the result: "as_found" (that in which each was stored before), "float32", "bfloat16" or
    "float16"."""

    decode: bool = False
    """Whether weights that an earlier stage has made codes or factors of are made dense and trained, which takes the bytes of
    dense weights again. Else they are refused."""

    def check_whole(self) -> None:
        """Raises `SettingsError` for a setting above that is out of its range."""
        check(self, "last_blocks", at_least=0)
        check(self, "store", one_of=("as_found", *STORED))
        if self.decode and self.store == "as_found":
            raise SettingsError(self.name, "store", self.store, f"one of {', '.join(STORED)} with decode=true")
        is_word = re.fullmatch(r"[\w-]*", self.parameters) is not None
        try:
            valid = self.parameters in CHOICES if is_word else re.compile(self.parameters) is not None
        except re.error:
            valid = False
        if not valid:
            allowed = f"{', '.join(CHOICES)} or a regular expression such as '.*mlp.*weight'"
            raise SettingsError(self.name, "parameters", self.parameters, allowed)


@dataclass
class Opened:
    """Weights that are being trained."""

    fields: WholeFields
    weights: dict[str, list[str]]
    """Name of a trained parameter -> names of the weights that it holds: itself, or views of it."""
    formulas: Mapping[str, Formula]
    """Name of a weight -> what it was made of before."""
    keep: dict[str, Tensor]
    """Name of a parameter of which only some weights stay -> which, bool of its shape, on its device."""

    def masked(self, name: str) -> Callable[[Tensor], Tensor]:
        """Of the gradient of a parameter, the part of the weights that stay."""

        def mask(gradient: Tensor) -> Tensor:
            keep = self.keep[name] = self.keep[name].to(gradient.device)
            return gradient * keep

        return mask

    def results(self, model: nn.Module) -> dict[str, Formula]:
        """Name of a weight -> its formula now.

        Raises:
            SettingsError: the optimizer has moved what was to stay zero, by a gradient of zero.
        """
        found = {}
        for name, weights in self.weights.items():
            parameter = model.get_parameter(name).detach()
            if name in self.keep and parameter[~self.keep[name].to(parameter.device)].any():
                allowed = f"one that moves each weight by its own gradient, as adamw_torch does; it has moved zeros of {name}"
                raise SettingsError(self.fields.name, "optimizer", self.fields.optimizer, allowed)
            for weight in weights:
                found[weight] = self.result(torch.atleast_2d(view(parameter, weight)), self.formulas.get(weight))
        return found

    def result(self, value: Tensor, before: Formula | None) -> Formula:
        """value (out, in)."""
        if kept := dense_values(before):
            values = value[kept.keep().to(value.device)].cpu()
            return Formula([kept.with_values(values.to(STORED.get(self.fields.store, kept.values.dtype)))])  # type: ignore[union-attr]
        found = before.parts[0].weight.dtype if before and isinstance(before.parts[0], Dense) else value.dtype
        # A copy: nothing of the training is to be held by what it made.
        return Formula([Dense(value.to("cpu", STORED.get(self.fields.store, found), copy=True))])


def open_weights(model: nn.Module, fields: WholeFields, formulas: Mapping[str, Formula]) -> Opened:
    """Freezes `model` but for the parameters that `fields` means; these become float32, with zeros where they are to stay.

    formulas: name of every weight -> what an earlier stage has made of it, dense where none has.

    Raises:
        SettingsError: nothing is meant, or a weight that could be trained only dense.
    """
    chosen = select_parameters(model, fields)
    views: dict[str, list[str]] = {}
    for name in formulas:
        if not parse(name).is_plain:
            views.setdefault(parse(name).parameter, []).append(name)
    weights = {name: views.get(name, [name]) for name in chosen}
    opened = Opened(fields, weights, formulas, {})
    model.requires_grad_(False)
    for name, parameter in chosen.items():
        parameter.data = parameter.data.float()
        known = [weight for weight in weights[name] if weight in formulas]
        keep = torch.ones(parameter.shape, dtype=torch.bool)
        for weight in known:
            formula = formulas[weight]
            check_trainable(fields, weight, formula)
            value = view(parameter.data, weight)
            value.copy_(formula.materialise().view(value.shape))  # exactly, where the model computes in less
            if kept := dense_values(formula):
                view(keep, weight).copy_(kept.keep())
        parameter.requires_grad_(True)
        if not keep.all():
            opened.keep[name] = keep.to(parameter.device)
            parameter.data.mul_(opened.keep[name])
            parameter.register_hook(opened.masked(name))
    return opened


def dense_values(formula: Formula | None) -> Kept | None:
    """What an earlier stage has left of a weight, if that is plain numbers."""
    kept = left_by(formula)
    return kept if kept is not None and isinstance(kept.values, Tensor) and formula and not formula.activation else None


def check_trainable(fields: WholeFields, name: str, formula: Formula) -> None:
    """Raises SettingsError where a weight is made of something that is not trained here."""
    kinds = " + ".join(part.kind for part in formula.everything())
    others = f"a regular expression that leaves out {name}"
    if formula.activation:
        allowed = f"{others}, which rounds its inputs, which cannot be trained in this way; lora trains an update beside it"
        raise SettingsError(fields.name, "parameters", fields.parameters, allowed)
    is_dense = not formula.transforms and any(isinstance(part, Dense) for part in formula.parts)
    if not (fields.decode or is_dense or dense_values(formula)):
        more = formula.shape[0] * formula.shape[1] * 2 / formula.nbytes
        allowed = (
            f"true (with `store`) to train {name}: it is made of {kinds}, and trained it is dense again, {more:.1f} times as "
            "large in bfloat16. lora and qlora train an update beside it and leave it as small as it is; or let `parameters` "
            f"be {others}"
        )
        raise SettingsError(fields.name, "decode", False, allowed)


def select_parameters(model: nn.Module, fields: WholeFields) -> dict[str, nn.Parameter]:
    """Name -> parameter, for those that are meant; a tied one once, under its first name, if any of its names is meant."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    linears = {f"{name}.weight" for name in block_linears(model)}
    normed = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    embedding = model.get_input_embeddings().weight
    last = tuple(f"{block}." for block in blocks_of(model)[-fields.last_blocks :]) if fields.last_blocks else ("",)

    def is_meant(name: str, parameter: nn.Parameter) -> bool:
        if not name.startswith(last):
            return False
        match fields.parameters:
            case "all":
                return True
            case "linear":
                return name in linears
            case "norm":
                return name.rpartition(".")[0] in normed
            case "bias":
                return name.endswith(".bias")
            case "embedding":
                return parameter is embedding
        return re.fullmatch(fields.parameters, name) is not None

    parameters = dict(model.named_parameters())
    chosen = {name: p for name, p in parameters.items() if any(is_meant(other, p) for other in names[id(p)])}
    if not chosen:
        leaves = ", ".join(sorted({".".join(name.split(".")[-2:]) for name in parameters}))
        where = f" within last_blocks={fields.last_blocks}" if fields.last_blocks else ""
        allowed = f"what means some parameter of this {type(model).__name__}{where}; their names end in {leaves}"
        raise SettingsError(fields.name, "parameters", fields.parameters, allowed)
    return chosen


def blocks_of(model: nn.Module) -> list[str]:
    """Names of the decoder blocks in order: the members of the list of modules that holds most of the weights."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in lists.items()}
    largest = max(sizes, key=lambda name: sizes[name], default=None)
    return [] if largest is None else [f"{largest}.{i}" for i in range(len(lists[largest]))]
