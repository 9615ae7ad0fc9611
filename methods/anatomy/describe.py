"""What a decoder is made of: its blocks, the linears in them, and which linears read one tensor.

A family of models is one function in `FAMILIES` that writes its modules out by name. `describe` needs no weights: a model
on the meta device will do. `verify` runs a model to see whether what is written here is so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Group:
    """Linears that read one tensor."""

    name: str
    """Unique in the model, e.g. `model.layers.3.self_attn.qkv`."""

    linears: tuple[str, ...]
    """Module names, e.g. `model.layers.3.self_attn.q_proj`."""

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weight parameters of the linears."""
        return tuple(f"{linear}.weight" for linear in self.linears)


@dataclass(frozen=True)
class Block:
    name: str
    """Module name, e.g. `model.layers.3`."""

    groups: tuple[Group, ...]
    """In the order in which the block runs them. They hold every linear of the block."""


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
    """Parameter name -> (out, in) of the weight of every linear in the blocks."""

    @property
    def groups(self) -> list[Group]:
        return [group for block in self.blocks for group in block.groups]


def llama(model: nn.Module) -> Anatomy:
    """Attention and a gated MLP, each behind a norm: Llama, Mistral, Qwen2, Qwen3."""

    def block(name: str) -> Block:
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        return Block(
            name,
            (
                Group(f"{attention}.qkv", (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")),
                Group(f"{attention}.o", (f"{attention}.o_proj",)),
                Group(f"{mlp}.gate_up", (f"{mlp}.gate_proj", f"{mlp}.up_proj")),
                Group(f"{mlp}.down", (f"{mlp}.down_proj",)),
            ),
        )

    blocks = tuple(block(f"model.layers.{i}") for i in range(len(model.get_submodule("model.layers"))))
    return Anatomy(
        blocks=blocks,
        embedding="model.embed_tokens",
        norm="model.norm",
        head="lm_head",
        tied=bool(model.config.tie_word_embeddings),
        widths=widths(model, blocks),
    )


FAMILIES: dict[str, Callable[[Any], Anatomy]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": llama,
    "Qwen2ForCausalLM": llama,
    "Qwen3ForCausalLM": llama,
}
"""Class of the model in transformers -> what describes it."""


class UnknownModel(ValueError):
    """No family is written for this class of model."""


def family_of(architecture: str) -> Callable[[Any], Anatomy]:
    """What describes models of that transformers class.

    Raises:
        UnknownModel: no family is written for it; says what to write.
    """
    if architecture not in FAMILIES:
        raise UnknownModel(
            f"the anatomy of {architecture} is not known (known: {', '.join(FAMILIES)}). Write a function that names its "
            "blocks, input groups, embedding, norm and head, as `llama` in methods/anatomy/describe.py does, and add it there "
            f"to FAMILIES as {architecture!r}."
        )
    return FAMILIES[architecture]


def describe(model: nn.Module) -> Anatomy:
    """The anatomy of a Hugging Face decoder."""
    return family_of(type(model).__name__)(model)


def widths(model: nn.Module, blocks: tuple[Block, ...]) -> dict[str, tuple[int, int]]:
    """Parameter name -> (out, in) of all linears of the blocks."""
    weights = [name for block in blocks for group in block.groups for name in group.weights]
    return {name: (shape[0], shape[1]) for name in weights for shape in [model.get_parameter(name).shape]}


def verify(model: nn.Module, anatomy: Anatomy) -> None:
    """Runs a few tokens through the model and raises `ValueError` where the anatomy does not hold for it."""
    grouped = [linear for group in anatomy.groups for linear in group.linears]
    found = [
        f"{block.name}.{name}"
        for block in anatomy.blocks
        for name, module in model.get_submodule(block.name).named_modules()
        if isinstance(module, nn.Linear)
    ]
    if sorted(found) != sorted(grouped):
        differing = ", ".join(sorted(set(found) ^ set(grouped))) or "a linear in two groups"
        raise ValueError(f"the linears of the blocks are not those of the input groups: {differing}")
    head, embedding = (model.get_submodule(name).weight for name in (anatomy.head, anatomy.embedding))
    if (head is embedding) != anatomy.tied:
        raise ValueError(f"tied={anatomy.tied}, but head and embedding are {'one' if head is embedding else 'two'} parameters")

    chain = [*(block.name for block in anatomy.blocks), anatomy.norm]
    inside = [name for block in anatomy.blocks for name in (block.name, *(n for g in block.groups for n in g.linears))]
    expected = [anatomy.embedding, *inside, anatomy.norm, anatomy.head]
    ran: list[str] = []
    read: dict[str, Tensor] = {}
    returned: dict[str, Any] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            ran.append(name)
            read[name] = args[0]

        return note

    def watch_end(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        return lambda module, args, output: returned.update({name: output})

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in expected]
    hooks += [model.get_submodule(name).register_forward_hook(watch_end(name)) for name in chain]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 8, dtype=torch.int64, device=embedding.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if ran != expected:
        n, said, did = next((n, a, b) for n, (a, b) in enumerate(zip_longest(expected, ran)) if a != b)
        raise ValueError(f"module {n + 1} to run should be {said}, but is {did}")
    for one, following in pairwise(chain):
        if read[following] is not returned[one]:
            raise ValueError(f"{following} does not read the tensor that {one} returns")
    for group in anatomy.groups:
        apart = [linear for linear in group.linears if read[linear] is not read[group.linears[0]]]
        if apart:
            raise ValueError(f"{group.name}: {apart[0]} does not read the tensor that {group.linears[0]} reads")
    first_reader: dict[int, Group] = {}
    for group in anatomy.groups:
        other = first_reader.setdefault(id(read[group.linears[0]]), group)
        if other is not group:
            raise ValueError(f"{other.name} and {group.name} read one tensor, so they are one group")
