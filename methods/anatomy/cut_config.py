"""What the config of a model has to say when something is taken out of it, as far as it has words for that."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pare.methods.anatomy.architecture import KEY
from pare.methods.anatomy.cut import Cut, narrowest, ties, widest
from pare.methods.anatomy.types import Anatomy, Tie
from pare.methods.anatomy.views import parse


class NotSaid(Exception):
    """A config refuses its values."""


def shallower(config: Any, anatomy: Anatomy, blocks: Sequence[int]) -> Any:
    """A copy of the config with these blocks only."""
    config = copy.deepcopy(config)
    if hasattr(config, KEY):
        delattr(config, KEY)
    count = len(anatomy.blocks)
    if len(blocks) == count:
        return config
    config.num_hidden_layers = len(blocks)
    for key, value in config.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == count and key != "mlp_only_layers":
            setattr(config, key, [value[b] for b in blocks])
    if hasattr(config, "decoder_sparse_step"):
        dense = [not any(group.routed for group in anatomy.blocks[b].groups) for b in blocks]
        config.decoder_sparse_step, config.mlp_only_layers = 1, [i for i, is_dense in enumerate(dense) if is_dense]
    return config


def narrower(config: Any, anatomy: Anatomy, cut: Cut, blocks: Sequence[int]) -> Any:
    """A copy of the config with the widths of the cut, as far as it has words for them."""
    config = copy.deepcopy(config)
    counts: dict[tuple[str, ...], set[int]] = {}
    for (b, t), tie in {**ties(anatomy, "ffn"), **ties(anatomy, "kv"), **ties(anatomy, "channel")}.items():
        if b in blocks:
            counts.setdefault(words_for(tie), set()).add(len(cut.units.get((b, t), range(tie.units))))
            if tie.kind == "kv" and (cut.units or cut.hidden):
                config.head_dim = narrowest(tie)
                counts.setdefault(("num_attention_heads",), set()).add(
                    len(cut.units.get((b, t), range(tie.units))) * widest(tie) // narrowest(tie)
                )
    for words, found in counts.items():
        word = next((word for word in words if hasattr(config, word)), None)
        if word is not None and len(found) == 1:
            setattr(config, word, found.pop())
    if cut.hidden is not None and anatomy.hidden is not None:
        config.hidden_size = len(cut.hidden)
        for word in ("rms_norm_eps", "layer_norm_epsilon"):
            if hasattr(config, word):
                setattr(config, word, getattr(config, word) * (anatomy.hidden.units / len(cut.hidden)))
    return config


def words_for(tie: Tie) -> tuple[str, ...]:
    """Keys of a config, of which the first that it has is the number of the tie's units."""
    if tie.kind == "kv":
        return ("num_key_value_heads",)
    if tie.kind == "channel":
        return ("intermediate_size",)
    parameter = tie.sides[0].parameter
    if ".shared_expert." in parameter:
        return ("shared_expert_intermediate_size",)
    dense = ("intermediate_size", "n_inner", "ffn_dim")
    return ("moe_intermediate_size", *dense) if parse(parameter).index is not None else dense


def built(made: type[nn.Module], config: Any) -> tuple[Any, Any]:
    """(the model of a config on the meta device, the config as it will be read from its file).

    Raises:
        NotSaid: the config does not allow its values.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = type(config).from_dict(config.to_dict())
    except StrictDataclassError as e:
        raise NotSaid(str(e)) from e
    config.architectures = [made.__name__]
    with torch.device("meta"):
        return made(copy.deepcopy(config)), config
