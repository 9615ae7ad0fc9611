"""One tiny model with random weights of every class that an anatomy is written for."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pare.methods.anatomy.reads import one_expert_at_a_time

HIDDEN = 40
SIZE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZE, "num_key_value_heads": 2, "intermediate_size": 56}
HEADS = {**GROUPED, "head_dim": 8}
ROUTED = {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
KINDS = ["full_attention", "sliding_attention", "full_attention"]
SLIDING = {"sliding_window": 4, "layer_types": KINDS}
TOKENS = torch.randint(96, (5, 24), generator=torch.Generator().manual_seed(1))

CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {**HEADS, "attention_bias": True, "mlp_bias": True},
    "MistralForCausalLM": {**HEADS, "sliding_window": 4},
    "Qwen2ForCausalLM": {**GROUPED, "use_sliding_window": True, **SLIDING},
    "Qwen3ForCausalLM": HEADS,
    "MixtralForCausalLM": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2MoeForCausalLM": {**ROUTED, "shared_expert_intermediate_size": 28, "decoder_sparse_step": 2, "qkv_bias": True},
    "Qwen3MoeForCausalLM": ROUTED,
    "Gemma2ForCausalLM": {**HEADS, **SLIDING, "query_pre_attn_scalar": 8},
    "Gemma3ForCausalLM": {**HEADS, **SLIDING, "query_pre_attn_scalar": 8},
    "Phi3ForCausalLM": GROUPED,
    "GPT2LMHeadModel": {**SIZE, "n_inner": 56},
    "OPTForCausalLM": {**SIZE, "ffn_dim": 56, "word_embed_proj_dim": HIDDEN},
    "MambaForCausalLM": {"vocab_size": 96, "hidden_size": HIDDEN, "num_hidden_layers": 3, "state_size": 4, "pad_token_id": 0},
    "Mamba2ForCausalLM": {
        "vocab_size": 96, "hidden_size": HIDDEN, "num_hidden_layers": 3, "state_size": 4, "pad_token_id": 0, "num_heads": 10,
        "head_dim": 8, "n_groups": 2, "expand": 2, "chunk_size": 8,
    },
}  # fmt: skip


def tiny(architecture: str, tied: bool = False, **changes: Any) -> Any:
    """A model of that class, in evaluation mode, with no weight, norm or bias left at a value that hides what it does."""
    made = getattr(transformers, architecture)
    assert architecture in CONFIGS, f"{architecture} is registered as a family: give it a tiny config in {__name__}"
    config = made.config_class(**{**CONFIGS[architecture], "tie_word_embeddings": tied, **changes})
    torch.manual_seed(0)
    return stirred(made(config).eval())


def stirred(model: nn.Module) -> nn.Module:
    """The model with something random added to every parameter."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with one_expert_at_a_time(model):
        found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found
