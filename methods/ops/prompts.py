"""Prompts: what a model reads before everything else, learnt instead of written.

A prompt is one tensor, float32, with `tokens` virtual tokens in its last dimension but one:

    (tokens, width)                              embeddings, which stand before those of the input
    (layers, 2, kv_heads, tokens, head_dim)      keys and values, which each layer finds before those of the input

With one attached, a model still takes and gives what it did: hidden states and logits are those of the input alone, and a cache
of keys and values holds the prompt from the first call on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pare.methods.ops.adapters import BASE_PATH, write_adapter_config

FILE = "prompt.safetensors"
ADAPTER = "adapter_model.safetensors"
TOLERATED = 1e-2
"""Of the largest logit: by how much ours and peft's may differ, as they differ in the order of sums."""


def attach(model: Any, prompt: Callable[[], Tensor]) -> None:
    """Makes the model read the prompt before every sequence. prompt: asked anew in each pass, so that it may be in training.

    Raises:
        ValueError: the model's body takes no embeddings or keeps no keys and values.
    """
    body = model.get_decoder()
    names = list(inspect.signature(body.forward).parameters)
    if body is model or not {"inputs_embeds", "past_key_values"} <= set(names):
        raise ValueError(
            f"a {type(model).__name__} cannot read a prompt: its body does not take `inputs_embeds` and `past_key_values`"
        )
    hooks = Hooks(prompt, model.get_input_embeddings(), names)
    body.register_forward_pre_hook(hooks.before, with_kwargs=True)
    body.register_forward_hook(hooks.after)
    for module in body.modules():
        if hasattr(module, "layer_idx") and "past_key_values" in inspect.signature(module.forward).parameters:
            module.register_forward_pre_hook(hooks.remind, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=hooks.embedding.weight.device))
    if not hooks.value.numel():
        raise ValueError(f"a {type(model).__name__} cannot read a prompt: it does not call its body as a module")


class Hooks:
    """What happens around a pass through the body of a model."""

    def __init__(self, prompt: Callable[[], Tensor], embedding: Any, names: list[str]) -> None:
        """names: of the arguments of the body."""
        self.prompt, self.embedding, self.names = prompt, embedding, names
        self.value = torch.empty(0)
        """The prompt in the latest pass, which the backward pass looks at again where activations are recomputed."""
        self.added = 0
        """Positions of the latest pass that are the prompt's."""
        self.is_borrowed = False
        """Whether the cache of the latest pass is there for the prompt alone, and nobody is to see it."""

    def before(self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        read: list[Any] = [given.get(name) for name in ("input_ids", "inputs_embeds", "past_key_values")]
        ids, embedded, cache = read
        is_first = cache is None or cache.get_seq_length() == 0
        rows, weight = len(ids if embedded is None else embedded), self.embedding.weight
        value = self.prompt()
        if is_first:
            self.value = value = value.to(weight.device, weight.dtype)
        tokens, is_embedded = value.shape[-2], value.dim() == 2
        self.added = tokens if is_first and is_embedded else 0
        keeps = given.get("use_cache")
        self.is_borrowed = (
            not (is_embedded or (getattr(body.config, "use_cache", True) if keeps is None else keeps)) and cache is None
        )
        if given.get("attention_mask") is not None:
            given["attention_mask"] = seen_by(given["attention_mask"], tokens)
        if given.get("position_ids") is not None:
            given["position_ids"] = moved(given["position_ids"], tokens, is_first, self.added)
        if self.added:
            embedded = self.embedding(ids) if embedded is None else embedded
            given |= {"inputs_embeds": torch.cat([value.expand(rows, -1, -1), embedded], 1), "input_ids": None}
        elif is_first:
            given["past_key_values"] = with_prefix(cache, value, rows, body.config)
        return (), given

    def after(self, body: nn.Module, args: Any, output: Any) -> None:
        if self.added:
            output.last_hidden_state = output.last_hidden_state[:, self.added :]
            if getattr(output, "hidden_states", None) is not None:
                output.hidden_states = tuple(state[:, self.added :] for state in output.hidden_states)
        if self.is_borrowed:
            output.past_key_values = None

    def remind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Blocks that recompute their activations drop the cache, lest it grow twice. The attention gets one that cannot."""
        if module.training and self.value.dim() == 5 and kwargs.get("past_key_values") is None:
            return args, {**kwargs, "past_key_values": Prefix(self.value)}
        return None


class Prefix:
    """A cache that holds the prompt and keeps nothing more."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> list[Tensor]:
        """keys, values (sequences, kv_heads, length, head_dim) -> the same behind those of the prompt."""
        ours = self.value[layer_idx].to(keys.dtype)
        return [torch.cat([own.expand(len(new), -1, -1, -1), new], -2) for own, new in zip(ours, (keys, values), strict=True)]


def with_prefix(cache: Any, value: Tensor, rows: int, config: Any) -> Any:
    """The empty cache, or a new one, with the prompt in it for so many sequences."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config) if cache is None else cache
    for layer, (keys, values) in enumerate(value):
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
    return cache


def seen_by(mask: Any, tokens: int) -> Tensor:
    """A mask (sequences, length) of what may be seen, with the prompt before it."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError(
            "a model with a prompt takes an attention mask of (sequences, length), not one for each pair of tokens"
        )
    return torch.cat([mask.new_ones(len(mask), tokens), mask], 1)


def moved(positions: Tensor, tokens: int, is_first: bool, added: int) -> Tensor:
    """Positions (sequences or 1, length) behind those of the prompt, and with those of so many added before them."""
    if is_first and positions.shape[-1] > 1 and (positions.diff(dim=-1) < 0).any():
        raise ValueError("positions begin anew within a row, but only its first document would see the prompt")
    positions = positions + tokens
    own = torch.arange(added, device=positions.device, dtype=positions.dtype).expand(len(positions), -1)
    return torch.cat([own, positions], 1)


@torch.no_grad()
def keys_and_values(model: Any, ids: Tensor) -> Tensor:
    """What the layers keep of the tokens `ids` (tokens,): a prompt of keys and values, in the model's dtype.

    Raises:
        ValueError: they keep something else, or not all of the same shape.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise ValueError(f"a {type(model).__name__} has layers without keys and values, which are what a prefix consists of")
    cache = DynamicCache()
    model.base_model(input_ids=ids[None], past_key_values=cache, use_cache=True)
    pairs = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    shapes = {tuple(t.shape) for pair in pairs for t in pair}
    if len(shapes) > 1:
        raise ValueError(
            f"the layers of a {type(model).__name__} keep keys and values of different shapes: {sorted(shapes)}. Try: "
            "prompt_tuning or p_tuning"
        )
    return torch.stack([torch.stack(pair) for pair in pairs])


# --- as peft has them ---------------------------------------------------------------------------------------------------


def flattened(prompt: Tensor) -> Tensor:
    """Keys and values in peft's order: (tokens, layers * 2 * kv_heads * head_dim)."""
    return prompt.permute(3, 0, 1, 2, 4).flatten(1)


def unflattened(flat: Tensor, layers: int, heads: int) -> Tensor:
    """The inverse of `flattened`."""
    return flat.unflatten(1, (layers, 2, heads, -1)).permute(1, 2, 3, 0, 4)


def write_prompt(prompt: Tensor, directory: Path) -> None:
    """Writes the prompt, and the adapter that peft opens it by."""
    from peft import PrefixTuningConfig, PromptTuningConfig

    prompt = prompt.detach().float().cpu()
    save(directory / FILE, {"prompt": prompt})
    said = {"num_virtual_tokens": prompt.shape[-2], "num_transformer_submodules": 1, "task_type": "CAUSAL_LM"}
    if prompt.dim() == 2:
        config: Any = PromptTuningConfig(**said, token_dim=prompt.shape[1], inference_mode=True)
    else:
        layers, _, heads, _, width = prompt.shape
        shape = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * width}
        config = PrefixTuningConfig(**said, **shape, inference_mode=True)
    (directory / "adapter").mkdir(exist_ok=True)
    config.save_pretrained(directory / "adapter")
    write_adapter_config(directory / "adapter", BASE_PATH)
    save(directory / "adapter" / ADAPTER, {"prompt_embeddings": prompt if prompt.dim() == 2 else flattened(prompt)})


def save(file: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors writes 0600


def read_prompt(directory: Path) -> Tensor | None:
    """What `write_prompt` wrote there, if anything."""
    return load_file(directory / FILE)["prompt"] if (directory / FILE).is_file() else None


def prompt_of(model: Any) -> Tensor:
    """The prompt of a `peft.PeftModel` that has been opened for inference."""
    config = model.active_peft_config
    flat: Tensor = model.prompt_encoder[model.active_adapter].embedding.weight.detach()
    if config.peft_type in ("PROMPT_TUNING", "P_TUNING"):
        return flat
    if config.peft_type == "PREFIX_TUNING":
        return unflattened(flat, config.num_layers, config.num_attention_heads)
    raise ValueError(f"an adapter of type {config.peft_type.value} does more than to stand before the input")


@torch.no_grad()
def freed(model: Any) -> nn.Module:
    """The base of a `peft.PeftModel` that has been opened for inference, with the prompt attached to it.

    Raises:
        ValueError: its logits are not those that peft gives.
    """
    base: Any = model.get_base_model()
    prompt = prompt_of(model)
    ids = torch.arange(8, device=prompt.device)[None] % base.config.vocab_size
    theirs = model.eval()(input_ids=ids).logits[:, -8:].float()
    attach(base, lambda: prompt)
    ours = base(input_ids=ids).logits.float()
    if not torch.allclose(ours, theirs, rtol=0, atol=TOLERATED * theirs.abs().max().item()):
        raise ValueError(f"a {type(base).__name__} with the prompt attached to it does not give the logits that peft gives")
    return base
