import copy

import pytest
import torch
from torch import nn

from pare.methods.ops.float_grids import FloatGrid
from pare.methods.ops.grids import IntegerGrid
from pare.methods.parts.formula import Dense, Formula, LowRank
from pare.methods.parts.linear import FormulaLinear, FrozenLinear
from pare.methods.parts.references import Reference
from pare.methods.parts.transforms import Diagonal, Hadamard


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stacked() -> Formula:
    """Codes with scales, a low-rank term, a diagonal in front."""
    codes = IntegerGrid(bits=3, group_size=16, scale_dtype="float32").round_to_nearest(normal(12, 32))
    low_rank = LowRank(normal(2, 32, seed=1), normal(12, 2, seed=2), scale=0.5)
    return Formula([codes, low_rank], right=Diagonal(normal(32, seed=3).abs() + 0.5))


def test_it_computes_what_the_formula_says_and_adds_the_bias() -> None:
    formula, bias, x = stacked(), normal(12, seed=4), normal(3, 5, 32)
    layer = FormulaLinear(formula, bias)
    torch.testing.assert_close(layer(x), x @ formula.materialise().T + bias)
    assert (layer.in_features, layer.out_features) == (32, 12)
    assert repr(layer).startswith("FormulaLinear(\n  in_features=32, out_features=12, codes + low_rank, bias=True")


def test_floating_point_tensors_are_trained_and_codes_are_not() -> None:
    layer = FormulaLinear(stacked(), normal(12))
    assert set(dict(layer.named_parameters())) == {"0.scale", "1.a", "1.b", "right.values", "bias"}
    assert set(dict(layer.named_buffers())) == {"0.codes"}
    before, x, target = layer.written(), normal(20, 32), normal(20, 12, seed=9)
    optimizer, losses = torch.optim.Adam(layer.parameters(), 0.02), []
    for _ in range(30):
        losses.append((layer(x) - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    after = layer.written()
    assert torch.equal(after.tensors()["0.codes"], before.tensors()["0.codes"])
    assert not torch.equal(after.tensors()["0.scale"], before.tensors()["0.scale"])
    assert not any(t.requires_grad for t in after.tensors().values())
    torch.testing.assert_close(layer(x) - layer.bias, x @ after.materialise().T)


def test_its_state_dict_is_the_file_of_the_formula_and_brings_it_back() -> None:
    formula = stacked()
    layer, other = FormulaLinear(formula, normal(12)), FormulaLinear(stacked().to("cpu"), normal(12, seed=8))
    assert layer.state_dict().keys() == formula.tensors().keys() | {"bias"}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(normal(*parameter.shape, seed=7))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(normal(4, 32)), layer(normal(4, 32)))
    assert torch.equal(copy.deepcopy(layer)(normal(4, 32)), layer(normal(4, 32)))
    again = Formula.from_tensors(layer.spec, {k: v for k, v in layer.state_dict().items() if k != "bias"})
    assert torch.equal(again.materialise(), layer.written().materialise())


def test_it_follows_a_change_of_dtype() -> None:
    layer = FormulaLinear(stacked(), normal(12)).to(torch.bfloat16)
    y = layer(normal(4, 32).bfloat16())
    assert y.dtype == torch.bfloat16
    assert layer.written().tensors()["0.scale"].dtype == torch.bfloat16
    assert layer.written().tensors()["0.codes"].dtype == torch.int32


def test_an_adapter_goes_on_top_of_a_linear_and_may_alone_be_trained() -> None:
    linear, x = nn.Linear(32, 12), normal(6, 32)
    adapter = Formula([LowRank(normal(2, 32, seed=1), torch.zeros(12, 2))], "add")
    layer = FormulaLinear.of(linear, adapter, trained=["1.a", "1.b"])
    torch.testing.assert_close(layer(x), linear(x))
    layer(x).square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == ["1.a", "1.b"]
    with pytest.raises(ValueError, match=r"no parameters 2\.a in this formula; there are bias, 0.weight, 1.a, 1.b"):
        FormulaLinear.of(linear, adapter, trained=["2.a"])
    with pytest.raises(ValueError, match="in place of a weight"):
        FormulaLinear(adapter)


def test_scales_that_are_codes_train_no_more_than_their_own_factor() -> None:
    layer = FormulaLinear(Formula([FloatGrid("nvfp4").round_to_nearest(normal(8, 32))]))
    assert set(dict(layer.named_parameters())) == {"0.scale.scale"}
    layer(normal(4, 32)).sum().backward()
    assert layer.get_parameter("0.scale.scale").grad is not None


def test_layers_that_share_a_weight_train_it_together() -> None:
    shared = FormulaLinear(Formula([Dense(normal(8, 8))]))
    other = FormulaLinear(
        Formula([Dense(normal(8, 8, seed=1)), Reference("shared", (8, 8))], right=Hadamard.of(8, 0)),
        look_up=lambda name: shared.formula(),
    )
    other(normal(3, 8)).sum().backward()
    assert shared.get_parameter("0.weight").grad is not None
    assert set(dict(other.named_parameters())) == {"0.weight"}
    before = other(normal(3, 8))
    with torch.no_grad():
        shared.get_parameter("0.weight").mul_(2)
    assert not torch.equal(other(normal(3, 8)), before)


def frozen(dtype: torch.dtype = torch.float32) -> tuple[FrozenLinear, nn.Linear]:
    """A frozen linear, and the dense one that it stands for."""
    formula, bias = stacked(), normal(12, seed=4)
    dense = nn.Linear(32, 12)
    dense.weight, dense.bias = nn.Parameter(formula.materialise()), nn.Parameter(bias)
    return FrozenLinear(formula, bias, dtype), dense


def test_a_frozen_linear_is_the_dense_one_in_values_and_gradients() -> None:
    layer, dense = frozen()
    x = normal(3, 5, 32).requires_grad_()
    ours, theirs = layer(x), dense(x)
    torch.testing.assert_close(ours, theirs)
    grad = normal(3, 5, 12, seed=8)
    torch.testing.assert_close(torch.autograd.grad(ours, x, grad)[0], torch.autograd.grad(theirs, x, grad)[0])
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer.weight, dense.weight)
    assert not any(p.requires_grad for p in layer.parameters())
    assert frozen(torch.bfloat16)[0].weight.dtype == torch.bfloat16


def test_a_frozen_linear_keeps_no_dense_weight_for_the_backward_pass() -> None:
    layer, dense = frozen()
    x = normal(2, 32).requires_grad_()

    def kept(module: nn.Module) -> set[tuple[int, ...]]:
        shapes: set[tuple[int, ...]] = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.add(tuple(t.shape)) or t, lambda t: t):
            module(x)
        return shapes

    transposed = {(12, 32), (32, 12)}
    assert kept(dense) & transposed
    assert not kept(layer) & transposed
