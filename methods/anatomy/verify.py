"""Whether an anatomy holds for a model: found out by running a few tokens through it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from pare.methods.anatomy.calls import block_inputs, first_of
from pare.methods.anatomy.reads import one_expert_at_a_time, reading
from pare.methods.anatomy.types import Anatomy, Group
from pare.methods.anatomy.views import parse, weight_of

TOKENS = 8
"""Length of the text that a model is tried with."""


@torch.no_grad()
def verify(model: nn.Module, anatomy: Anatomy) -> None:
    """Runs a few tokens through the model and raises `ValueError` where the anatomy does not hold for it.

    model: with weights, in evaluation mode.
    """
    check_weights(model, anatomy)
    normed = check_reads(model, anatomy)
    check_stream(model, anatomy, normed)


def check_weights(model: nn.Module, anatomy: Anatomy) -> None:
    """Every parameter of the blocks with two or more dimensions stands in one group or is left out, and ties are right."""
    for block in anatomy.blocks:
        grouped = [parse(name).parameter for group in block.groups for name in group.weights]
        stacked = {parse(name).parameter for group in block.groups for name in group.weights if parse(name).index is not None}
        once = [name for name in grouped if name not in stacked] + sorted(stacked)
        found = [f"{block.name}.{n}" for n, p in model.get_submodule(block.name).named_parameters() if p.dim() > 1]
        if sorted(found) != sorted([*once, *block.left_out]):
            differing = sorted(set(found) ^ {*once, *block.left_out}) or ["a weight in two groups"]
            raise ValueError(
                f"the weights of {block.name} are not those of its input groups and those left out: {', '.join(differing)}"
            )
    names = [name for group in anatomy.groups for name in group.weights]
    missing = [f"{p}[{i}]" for p in {parse(n).parameter for n in names} if (s := model.get_parameter(p)).dim() == 3
               for i in range(len(s)) if not any(n.startswith(f"{p}[{i}]") for n in names)]  # fmt: skip
    if missing:
        raise ValueError(f"these matrices of a stack stand in no input group: {', '.join(missing)}")
    wrong = [name for name in names if anatomy.widths.get(name) != tuple(weight_of(model, name).shape)]
    if wrong or len(anatomy.widths) != len(names):
        raise ValueError(f"the widths are not those of the weights: {', '.join(wrong) or 'there are more of them'}")
    head, embedding = (model.get_submodule(name).weight for name in (anatomy.head, anatomy.embedding))
    if (head is embedding) != anatomy.tied:
        raise ValueError(f"tied={anatomy.tied}, but head and embedding are {'one' if head is embedding else 'two'} parameters")


def check_reads(model: nn.Module, anatomy: Anatomy) -> Tensor:
    """What runs in which order and reads what; returns what the norm before the head puts out."""
    ran: list[str] = []
    read: dict[str, Tensor] = {}
    returned: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        ran.append(name)
        read[name] = x

    def before(name: str) -> Callable[..., None]:
        def noted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note(name, next(iter((*args, *kwargs.values()))))

        return noted

    def after(name: str) -> Callable[..., None]:
        return lambda module, args, output: returned.update({name: first_of(output)})

    modules = [anatomy.embedding, *(block.name for block in anatomy.blocks), anatomy.norm, anatomy.head]
    hooks = [model.get_submodule(name).register_forward_pre_hook(before(name), with_kwargs=True) for name in modules]
    hooks += [model.get_submodule(name).register_forward_hook(after(name)) for name in modules]
    try:
        with reading(model, anatomy.widths, note):
            model(input_ids=tokens_for(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()

    weights = [name for group in anatomy.groups for name in group.weights]
    idle = {name for group in anatomy.groups if group.routed for name in group.weights if name not in read}
    never = [name for name in weights if name not in read and name not in idle]
    if never:
        raise ValueError(f"{never[0]} is not multiplied with anything when the model runs")
    firsts = [name for block in anatomy.blocks for name in (block.name, *(group.weights[0] for group in block.groups))]
    expected = [name for name in [modules[0], *firsts, *modules[-2:]] if name not in idle]
    later = {*weights} - {*firsts}
    order = [name for name in ran if name not in later]
    if order != expected:
        n, said, did = next((n, a, b) for n, (a, b) in enumerate(zip_longest(expected, order)) if a != b)
        raise ValueError(f"number {n + 1} to run should be {said}, but is {did}")
    if len(ran) != len(set(ran)):
        raise ValueError(f"{next(name for name in ran if ran.count(name) > 1)} runs more than once")
    chain = modules[1:-1]
    for one, following in pairwise(chain):
        if read[following] is not returned[one]:
            raise ValueError(f"{following} does not read the tensor that {one} returns")
    first_reader: dict[Any, Group] = {}
    for group in anatomy.groups:
        mine = [name for name in group.weights if name in read]
        apart = [name for name in mine if which(read[name]) != which(read[mine[0]])]
        if apart:
            raise ValueError(f"{group.name}: {apart[0]} does not read the tensor that {mine[0]} reads")
        other = first_reader.setdefault(which(read[mine[0]]), group) if mine else group
        if other is not group:
            raise ValueError(f"{other.name} and {group.name} read one tensor, so they are one group")
    return returned[anatomy.norm]


def check_stream(model: nn.Module, anatomy: Anatomy, normed: Tensor) -> None:
    """Blocks run one at a time, each on what the one before it returned, end where the whole model does."""
    with one_expert_at_a_time(model):
        (hidden,), calls = block_inputs(model, anatomy, [tokens_for(model)])
        for block, call in zip(anatomy.blocks, calls[1], strict=True):
            hidden = call.run(model.get_submodule(block.name), hidden)
        hidden = model.get_submodule(anatomy.norm)(hidden)
    whole, parts = normed.float().nan_to_num(), hidden.float().nan_to_num()
    apart = float((whole - parts).abs().max())
    if apart > 1e-5 * float(whole.abs().max()):
        raise ValueError(
            f"blocks run one at a time end {apart:.3g} away from where the whole model does: something passes between them "
            "besides the hidden state"
        )


def tokens_for(model: nn.Module) -> Tensor:
    """(1, TOKENS): different tokens of the vocabulary."""
    device = next(model.parameters()).device
    size: int = model.config.get_text_config().vocab_size
    return (torch.arange(TOKENS, device=device)[None] * 7 + 1) % size


def which(x: Tensor) -> tuple[Any, ...]:
    """Equal for two looks at one tensor that both live."""
    return x.data_ptr(), x.numel(), x.shape[-1]
