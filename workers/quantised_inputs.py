"""Linears whose formula quantises their input, in a model whose other weights are plain."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from pare.methods.parts.formula import Dense, Formula, reading
from pare.methods.parts.linear import FormulaLinear


def quantise_inputs(model: nn.Module, formulas: Iterable[tuple[str, Formula]]) -> None:
    """Puts a `FormulaLinear` in the place of every linear whose formula quantises its input, weights worked out.

    formulas: (name of the weight, formula in its place).

    Raises:
        ValueError: such a formula is not that of a linear's weight.
    """
    for name, formula in formulas:
        if formula.activation is None:
            continue
        module = model.get_submodule(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{name} has a quantised input and is not the weight of a linear layer")
        weight = module.weight
        settled = worked_out(formula).to(weight.device)
        quantised = FormulaLinear(settled, module.bias).requires_grad_(False)
        model.set_submodule(name.removesuffix(".weight"), quantised.train(model.training))


def worked_out(formula: Formula) -> Formula:
    """The same map with a dense weight behind the quantiser and, where parts read x, another beside it."""
    inner = [part for part in formula.parts if part.reads == "q"]
    beside = [part for part in formula.parts if part.reads == "x"]
    parts = [reading(Dense(Formula(beside).materialise()), "x")] if beside else []
    if inner:
        parts.insert(0, Dense(Formula([*inner], left=formula.left).materialise()))
    return Formula(parts, formula.op, None, formula.right if inner else None, formula.activation)
