"""Names of weights: a parameter, or a view of one where the parameter is not itself an (out, in) matrix.

PARAM         the parameter as it is
PARAM[3]      the fourth matrix of a stack (experts, out, in)
PARAM^T       a parameter that stores (in, out), turned round
PARAM[3]^T    both
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

NAME = re.compile(r"(?P<parameter>[^\[\]^:]+)(?:\[(?P<index>\d+)\])?(?P<turned>\^T)?")


@dataclass(frozen=True)
class View:
    """What a name says."""

    parameter: str
    index: int | None
    turned: bool

    @property
    def is_plain(self) -> bool:
        """Whether the parameter is meant as it is."""
        return self.index is None and not self.turned


def parse(name: str) -> View:
    """Raises ValueError for what is no name of a weight."""
    found = NAME.fullmatch(name)
    if not found:
        raise ValueError(f"{name!r} is no name of a weight. Allowed: PARAM, PARAM[3], PARAM^T, PARAM[3]^T")
    index = found["index"]
    return View(found["parameter"], None if index is None else int(index), bool(found["turned"]))


def name_of(parameter: str, index: int | None = None, turned: bool = False) -> str:
    return parameter + ("" if index is None else f"[{index}]") + ("^T" if turned else "")


def view(parameter: Tensor, name: str) -> Tensor:
    """What the name means of the parameter's value: a view, so that what is written to it is written to the parameter."""
    said = parse(name)
    if said.index is not None:
        if parameter.dim() != 3 or said.index >= len(parameter):
            raise ValueError(f"{name}: there is no matrix {said.index} in a tensor of shape {tuple(parameter.shape)}")
        parameter = parameter[said.index]
    return parameter.T if said.turned else parameter


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight (out, in) of that name in a model, as a view. Written to under `torch.no_grad`."""
    return view(model.get_parameter(parse(name).parameter), name)
