"""Promises that hold for every class of model that an anatomy is written for, found in the register unasked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pare.methods.anatomy.describe import FAMILIES, Anatomy, Side, Tie, describe, verify
from pare.methods.anatomy.structure import hollow
from pare.methods.anatomy.views import parse, view, weight_of
from tests.methods.anatomy.tiny_models import HIDDEN, TOKENS, logits, tiny

every = pytest.mark.parametrize("architecture", FAMILIES)


@every
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_said_of_it_holds_when_it_runs(architecture: str, tied: bool) -> None:
    model = tiny(architecture, tied)
    anatomy = describe(model)
    verify(model, anatomy)
    assert anatomy.tied == tied
    assert len(anatomy.blocks) == 3


@every
def test_it_is_described_without_weights_and_runs_with_made_up_ones(architecture: str, model_of: Callable[[str], Any]) -> None:
    model = model_of(architecture)
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    anatomy = describe(skeleton)
    assert anatomy == describe(model)
    verify(hollow(skeleton), anatomy)
    assert all(p.is_meta for p in skeleton.parameters())


@every
def test_every_linear_of_a_block_is_in_one_group_or_left_out_for_a_reason(
    architecture: str, model_of: Callable[[str], Any]
) -> None:
    model = model_of(architecture)
    for block in describe(model).blocks:
        named = [name for group in block.groups for name in group.weights]
        assert len(set(named)) == len(named)
        assert all(len(reason) > 20 for reason in block.left_out.values())
        for name, module in model.get_submodule(block.name).named_modules(prefix=block.name):
            weight = f"{name}.weight"
            if isinstance(module, nn.Linear):
                assert (weight in named) != (weight in block.left_out), weight
            if isinstance(module, Conv1D):
                assert f"{weight}^T" in named
            for parameter, value in module.named_parameters(recurse=False):
                if value.dim() == 3 and not isinstance(module, nn.Conv1d):
                    assert {f"{name}.{parameter}[{e}]" for e in range(len(value))} <= set(named)


@every
def test_widths_are_what_the_linears_read_and_put_out(architecture: str, model_of: Callable[[str], Any]) -> None:
    model = model_of(architecture)
    widths = describe(model).widths
    seen: dict[str, tuple[int, int]] = {}
    hooks = [
        module.register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: (out.shape[-1], args[0].shape[-1])})
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    for name, width in widths.items():
        said = parse(name)
        stack = tuple(model.get_parameter(said.parameter).shape[1:])
        expected = seen[said.parameter.removesuffix(".weight")] if said.index is None else stack
        assert width == expected, name


@every
def test_factors_that_are_folded_into_what_stands_before_a_group_change_nothing(architecture: str) -> None:
    model = tiny(architecture).double()
    before = logits(model)
    generator = torch.Generator().manual_seed(3)
    folds = [group for group in describe(model).groups if group.fold]
    assert folds
    for group in folds:
        with torch.no_grad():
            weights = [weight_of(model, name) for name in group.weights]
            s = group.fold.shared(torch.rand(weights[0].shape[1], generator=generator).double() + 0.5)
            for weight in weights:
                weight.mul_(s)
            parameters = {name: value_of(model, name) for name in group.fold.parameters}
            for name, value in group.fold.divided(parameters, s).items():
                parameters[name].copy_(value)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def value_of(model: nn.Module, name: str) -> Tensor:
    """A weight or a vector of the model, to read and to write."""
    return view(model.get_parameter(parse(name).parameter), name)


def emptied(model: nn.Module, tie: Tie, unit: int, *roles: str) -> Any:
    """A copy of the model with zeros where a unit stands on the sides of these roles."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for side in tie.sides:
            if side.role in roles:
                side.of(value_of(changed, side.parameter), unit).zero_()
    return changed


@every
def test_a_unit_that_is_not_written_is_one_that_is_not_read_and_one_that_is_nowhere(
    architecture: str, model_of: Callable[[str], Any]
) -> None:
    model = model_of(architecture)
    before = logits(model)
    ties = [tie for block in describe(model).blocks for tie in block.ties]
    if not ties:
        pytest.skip("nothing can be taken out of it exactly")
    for tie in {(tie.kind, tie.units): tie for tie in ties}.values():
        unit = tie.units - 1
        unread = logits(emptied(model, tie, unit, "reads"))
        assert (unread - before).abs().max() > 1e-4, tie.kind
        for roles in [("writes", "scales"), ("writes", "reads", "scales")]:
            torch.testing.assert_close(logits(emptied(model, tie, unit, *roles)), unread, rtol=1e-5, atol=1e-5)


@every
def test_a_hidden_feature_that_nobody_writes_stays_zero_all_the_way(architecture: str, model_of: Callable[[str], Any]) -> None:
    model = model_of(architecture)
    anatomy = describe(model)
    assert anatomy.hidden is not None
    assert anatomy.hidden.units == HIDDEN
    changed = emptied(model, anatomy.hidden, 7, "writes")
    states: list[Tensor] = []
    for block in anatomy.blocks:
        changed.get_submodule(block.name).register_forward_hook(lambda module, args, out: states.append(out))
    logits(changed)
    assert len(states) == 3
    assert all(not state[..., 7].any() and state[..., 6].any() for state in states)


@every
def test_every_axis_as_long_as_the_hidden_size_belongs_to_the_residual_stream_or_to_a_tie(
    architecture: str, model_of: Callable[[str], Any]
) -> None:
    model = model_of(architecture)
    anatomy = describe(model)
    explained: dict[str, set[tuple[int, int]]] = {}
    for tie in all_ties(anatomy):
        for side in tie.sides:
            said = parse(side.parameter)
            axis = (1 - side.axis if said.turned else side.axis) + (said.index is not None)
            explained.setdefault(said.parameter, set()).add((axis, tie.units * side.width))
    for name, parameter in model.named_parameters():
        for axis, size in enumerate(parameter.shape):
            if size == HIDDEN:
                assert (axis, size) in explained[name], f"{name} axis {axis}"
    assert all(inside(model, side, tie.units) for tie in all_ties(anatomy) for side in tie.sides)


def all_ties(anatomy: Anatomy) -> list[Tie]:
    assert anatomy.hidden is not None
    return [anatomy.hidden, *(tie for block in anatomy.blocks for tie in block.ties)]


def inside(model: nn.Module, side: Side, units: int) -> bool:
    return side.start + units * side.width <= value_of(model, side.parameter).shape[side.axis]


@every
def test_the_kind_of_norm_is_what_the_norms_do(architecture: str, model_of: Callable[[str], Any]) -> None:
    model = model_of(architecture)
    anatomy = describe(model)
    norm = model.get_submodule(anatomy.norm)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(4))
    scale = norm.weight + 1 if anatomy.blocks[0].norm == "rms_plus_one" else norm.weight
    if anatomy.blocks[0].norm == "layer":
        expected = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0) * scale + norm.bias
    else:
        expected = x / x.square().mean(-1, keepdim=True).sqrt() * scale
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-4)
    assert len({block.norm for block in anatomy.blocks}) == 1


def test_the_model_that_runs_meanwhile_is_left_as_it_was(model_of: Callable[[str], Any]) -> None:
    model = model_of("MixtralForCausalLM")
    before = logits(model, TOKENS[:2])
    implementation = model.config._experts_implementation
    verify(model, describe(model))
    assert model.config._experts_implementation == implementation
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in m.__dict__ for m in model.modules())
    assert torch.equal(logits(model, TOKENS[:2]), before)
