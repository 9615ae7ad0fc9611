"""Shapes of the weights that methods are given, known while planning: from the model's config, by its anatomy."""

from __future__ import annotations

import json
from typing import Any

STORED_AS_THEY_ARE = frozenset(
    f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Phi3", "OPT")
)
"""Classes whose checkpoints store every linear of a block as (out, in), under the name of its parameter."""


def with_widths(known: dict[str, Any]) -> dict[str, Any]:
    """known: from `workers.sources.describe_model`; its `linears` are what is stored -> the same with the weights that an
    anatomy names, or with the reason why there is none as `unknown`."""
    if known["architecture"] in STORED_AS_THEY_ARE:
        return known
    from transformers import AutoConfig

    from pare.methods.anatomy.describe import UnknownModel, describe
    from pare.workers.models import skeleton_of

    try:
        config = json.loads(json.dumps(known["config"]), object_hook=infinity)
        skeleton = skeleton_of(AutoConfig.for_model(**config))
        widths = describe(skeleton.eval()).widths
    except UnknownModel as e:
        return {**known, "unknown": str(e)}
    except (KeyError, TypeError, ValueError):  # transformers does not know this kind of config; the import will say so
        return known
    return {**known, "linears": {name: list(width) for name, width in widths.items()}}


def infinity(value: dict[str, Any]) -> Any:
    """A number that JSON has no word for, which transformers writes as {"__float__": "Infinity"}; anything else as it is."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value
