"""A byte-level Llama of a few hundred thousand weights, trained in seconds on Python's language reference.

It is for tests and for trying things out: everything about it is real (it opens with plain transformers, it has learnt
the text's letters and common words), and nothing about it is good.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pare.workers.corpus import SourceError, split_documents, topic_documents

if TYPE_CHECKING:
    from torch import nn

SPECIAL = ("<|end|>", "<|pad|>")
"""Tokens behind the 256 bytes."""
END, PAD = 256, 257

SPLIT = {"train": 0.8, "validation": 0.05, "selection": 0.05, "test": 0.1}
"""The model is trained on the train documents of these fractions and seed 0, the defaults of `data=pydoc`."""

BATCH, LENGTH, PEAK_RATE = 8, 64, 4e-3


@dataclass(frozen=True)
class TinySettings:
    """Keys of `model.tiny`."""

    layers: int = 4
    """Decoder blocks, >= 1."""

    width: int = 128
    """Hidden width, a multiple of `heads`, >= 16."""

    ffn: int = 256
    """Width of the feed-forward layer, >= 16."""

    heads: int = 4
    """Query heads, >= 1; the width of a head is even."""

    kv_heads: int = 2
    """Key and value heads, a divisor of `heads`."""

    steps: int = 140
    """Training steps of 8 windows of 64 bytes, >= 0; the default takes about 6 seconds on one core."""

    seed: int = 0
    """Seed of the weights and of the order of the text."""

    def __post_init__(self) -> None:
        allowed = {
            "layers": (self.layers >= 1, ">= 1"),
            "heads": (self.heads >= 1, ">= 1"),
            "width": (
                self.width >= 16 and self.heads >= 1 and self.width % (2 * self.heads) == 0,
                ">= 16 and a multiple of 2 x heads",
            ),
            "ffn": (self.ffn >= 16, ">= 16"),
            "kv_heads": (self.kv_heads >= 1 and self.heads % self.kv_heads == 0, f"a divisor of heads={self.heads}"),
            "steps": (self.steps >= 0, ">= 0"),
        }
        for name, (holds, range_) in allowed.items():
            if not holds:
                raise SourceError(f"model.tiny.{name} must be {range_}, got {getattr(self, name)!r}", f"model.tiny.{name}")


def tiny_settings(given: Mapping[str, Any] | None) -> TinySettings:
    """The settings under `model.tiny`, defaults filled in.

    Raises:
        SourceError: an unknown key, a value that is no whole number, or one out of range.
    """
    names = [f.name for f in dataclasses.fields(TinySettings)]
    for name, value in (given or {}).items():
        if name not in names:
            raise SourceError(f"model.tiny.{name} is unknown; known: {', '.join(names)}", f"model.tiny.{name}")
        if not isinstance(value, int) or isinstance(value, bool):
            raise SourceError(f"model.tiny.{name} must be a whole number, got {value!r}", f"model.tiny.{name}")
    return TinySettings(**(given or {}))


def tiny_config(settings: TinySettings) -> dict[str, Any]:
    """The settings of `transformers.LlamaConfig`."""
    return {
        "vocab_size": PAD + 1,
        "hidden_size": settings.width,
        "intermediate_size": settings.ffn,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "head_dim": settings.width // settings.heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "bos_token_id": END,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of a Llama without biases, from the settings of its config; a tied head is left out."""
    width, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    block = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (query, width),
        "self_attn.k_proj": (key, width),
        "self_attn.v_proj": (key, width),
        "self_attn.o_proj": (width, query),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (ffn, width),
        "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return shapes


def tiny_tokenizer() -> Any:
    """A `transformers` fast tokenizer whose token i < 256 is the byte i."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The letters that stand for bytes in GPT-2's vocabulary, in the order of the bytes: printable ones stand for
    # themselves, the others for the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    letters = [chr(byte if byte in printable else next(hidden)) for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[1],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def train_tiny(settings: TinySettings, progress: Callable[[int, int, str], None]) -> tuple[nn.Module, float | None]:
    """(the trained model in float32 on the CPU, its last training loss in nats per byte). The same numbers every time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    documents = split_documents(topic_documents(), SPLIT, seed=0)["train"]
    data = torch.tensor([i for document in documents for i in (*document.text.encode(), END)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums, and so the weights, depends on it
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = LlamaForCausalLM(LlamaConfig(**tiny_config(settings)))
        generator = torch.Generator().manual_seed(settings.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0)
        rising = max(settings.steps // 5, 1)
        loss = None
        for step in range(settings.steps):
            starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=generator)
            batch = torch.stack([data[start : start + LENGTH] for start in starts])
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            # Up to the peak over the first fifth of the steps, down to nearly zero over the others.
            share = min((step + 1) / rising, (settings.steps - step) / max(settings.steps - rising, 1))
            optimizer.param_groups[0]["lr"] = PEAK_RATE * share
            optimizer.step()
            progress(step + 1, settings.steps, "steps")
        return model.eval(), None if loss is None else loss.item()
    finally:
        torch.set_num_threads(threads)
