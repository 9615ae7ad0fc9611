"""Linear layers that run a formula: one that trains what there is in it to train, and one that is frozen and small."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pare.methods.parts.formula import Dense, Formula


class FormulaLinear(nn.Module):
    """y = formula(x) + bias.

    The floating-point tensors of the formula (dense weights, factors, scales, tables, diagonals) are parameters; the others
    (codes, masks, indices) and those of the activation quantiser are buffers. They go under the names that `Formula.tensors`
    gives them, so that a state dict is the formula's file. `requires_grad_` on a parameter says whether it is trained.
    """

    def __init__(self, formula: Formula, bias: Tensor | None = None, look_up: Callable[[str], Formula] | None = None) -> None:
        """formula: one in place of a weight (`op="replace"`). Its tensors are shared, not copied.

        look_up: where references in it lead, asked at each pass: with another layer's `formula` what two layers share is
        trained by both. Default: what they are resolved to now.
        """
        super().__init__()
        if formula.op != "replace":
            raise ValueError("FormulaLinear takes a formula in place of a weight; see FormulaLinear.of for one on top of it")
        self.spec = formula.spec()
        self.look_up = look_up or formula.references().__getitem__
        self.out_features, self.in_features = formula.shape
        self.names = list(formula.tensors())
        for name, tensor in formula.tensors().items():
            place, leaf = self.place(name)
            if tensor.is_floating_point() and not name.startswith("activation."):
                place.register_parameter(leaf, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach()))
            else:
                place.register_buffer(leaf, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach())

    @classmethod
    def of(cls, linear: nn.Linear, formula: Formula, trained: Iterable[str] | None = None) -> FormulaLinear:
        """In place of `linear`, whose bias it keeps and, with an `add` formula, whose weight.

        trained: names of `Formula.tensors` of the result, and "bias", that are to be trained; None: all.
        """
        whole = Formula([Dense(linear.weight.detach())]).plus(formula) if formula.op == "add" else formula
        made = cls(whole, linear.bias)
        if trained is not None:
            wanted = set(trained)
            if unknown := wanted - {name for name, _ in made.named_parameters()}:
                known = ", ".join(name for name, _ in made.named_parameters())
                raise ValueError(f"no parameters {', '.join(sorted(unknown))} in this formula; there are {known}")
            for name, parameter in made.named_parameters():
                parameter.requires_grad_(name in wanted)
        return made

    def place(self, name: str) -> tuple[nn.Module, str]:
        """Name of a tensor -> the module within this one that holds it, made where it is missing, and its name there."""
        *path, leaf = name.split(".")
        module: nn.Module = self
        for step in path:
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        return module, leaf

    def formula(self) -> Formula:
        """The formula of the parameters as they are now; a loss of it has gradients. Write it down with `written`."""
        tensors = {name: getattr(*self.place(name)) for name in self.names}
        found = Formula.from_tensors(self.spec, tensors)
        return found.resolve(self.look_up)

    def written(self) -> Formula:
        """The formula, its tensors copied and cut off from training."""
        return Formula.from_tensors(self.spec, {name: t.detach().clone() for name, t in self.formula().tensors().items()})

    def forward(self, x: Tensor) -> Tensor:
        y = self.formula().apply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        kinds = " + ".join(part["kind"] for part in self.spec["parts"])
        return f"in_features={self.in_features}, out_features={self.out_features}, {kinds}, bias={self.bias is not None}"


class FrozenLinear(nn.Linear):
    """y = formula(x) + bias, for a linear beside which something else is trained, such as an adapter.

    To whoever looks at it, it is a linear: its `weight` is worked out anew whenever it is asked for. What is in memory is the
    formula; a pass works the weight out, and the backward pass does so again instead of keeping it.
    """

    def __init__(self, formula: Formula, bias: Tensor | None, dtype: torch.dtype) -> None:
        """dtype: of `weight`. A pass is in the dtype of its input."""
        nn.Module.__init__(self)  # not nn.Linear's, which makes a weight
        self.out_features, self.in_features = formula.shape
        self.dtype = dtype
        self.held = FormulaLinear(formula, bias).requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """(out, in), in `dtype`, without the rounding of inputs that there may be."""
        return self.held.formula().materialise().to(self.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.held.bias

    def formula(self) -> Formula:
        return self.held.formula()

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.held(x)
        return checkpoint(self.held, x, use_reentrant=False, preserve_rng_state=False)
