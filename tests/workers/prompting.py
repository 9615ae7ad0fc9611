"""A small model, and every way to learn a prompt for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pare.methods.contract import METHODS, load_all

load_all()
CPU = torch.device("cpu")
IDS = torch.randint(96, (2, 10), generator=torch.Generator().manual_seed(1))
DATA = {"input_ids": torch.randint(96, (6, 16), generator=torch.Generator().manual_seed(3)) // 8}
P = 4
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt_tuning": ("prompt_tuning", {}),
    "p_tuning": ("p_tuning", {"hidden": 16}),
    "p_tuning_lstm": ("p_tuning", {"hidden": 8, "network": "lstm"}),
    "prefix_tuning": ("prefix_tuning", {}),
    "prefix_tuning_projected": ("prefix_tuning", {"projection": True, "hidden": 16}),
    "prefix_tuning_drawn": ("prefix_tuning", {"projection": True, "init": "random"}),
}
every = pytest.mark.parametrize("way", WAYS)


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, initializer_range=0.1, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def made(way: str, **settings: Any) -> Any:
    name, own = WAYS[way]
    cls: Any = METHODS[name]
    return cls(**{"virtual_tokens": P, "steps": 4, "warmup": 0, "learning_rate": 1e-2, **own, **settings})


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, **more: Any) -> Tensor:
    return model.eval()(input_ids=ids, **more).logits.float()  # type: ignore[no-any-return]
