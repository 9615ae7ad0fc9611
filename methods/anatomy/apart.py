"""Whether the documents of one sequence stay apart: positions that begin anew with a document tell transformers' attention
masks where it begins, but not every model has a mask, or asks them."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from pare.methods.anatomy.reads import one_expert_at_a_time

STATE = "its state runs on from one document to the next"
SEES_ACROSS: dict[str, str] = {
    "MambaForCausalLM": STATE,
    "Mamba2ForCausalLM": STATE,
    "OPTForCausalLM": "its attention mask is made without regard to positions",
}
"""Classes that are known not to keep them apart -> why. Others are tried, see `keeps_apart`."""

TOKENS = 12
"""Length of each of the two documents that a model is tried with."""
TOLERATED = 0.1
"""Of the difference that a document seen makes: well above what rounding to bfloat16 makes, far below what a leak does."""


@torch.no_grad()
def keeps_apart(model: Any) -> bool:
    """Whether `position_ids` that begin anew make the logits of a second document what they are without the first.

    model: a causal language model of transformers with weights, in evaluation mode.
    """
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" not in accepted and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return False
    embedding = model.get_input_embeddings().weight
    ids = torch.randint(len(embedding), (1, 2 * TOKENS), generator=torch.Generator().manual_seed(0)).to(embedding.device)
    positions = torch.arange(TOKENS, device=ids.device).repeat(1, 2)
    with one_expert_at_a_time(model):
        alone = model(input_ids=ids[:, TOKENS:], use_cache=False).logits.float()
        seen = model(input_ids=ids, use_cache=False).logits[:, TOKENS:].float()
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, TOKENS:].float()
    return bool((packed - alone).abs().mean() <= TOLERATED * (seen - alone).abs().mean())
