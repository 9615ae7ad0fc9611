"""Sees how much attention tokens receive while a block runs: by the softmax itself, whatever module it stands in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

QUERIES = 256
"""Queries of which the attention is worked out at a time."""

SOFTMAX = (functional.softmax, torch.softmax, Tensor.softmax)


class Attends(TorchFunctionMode):
    """While in force, adds up what tokens receive.

    Attention is `scaled_dot_product_attention`, or a softmax over (sequences, heads, length, length).
    """

    received: Tensor | None = None
    """(sequences, length) float32, summed over all heads and queries; None where nothing has attended."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            self.add(received_in(*args, **kwargs))
        elif func in SOFTMAX and result.dim() == 4 and result.shape[-1] == result.shape[-2]:
            self.add(result.float().sum((1, 2)))
        return result

    def add(self, received: Tensor) -> None:
        self.received = received if self.received is None else self.received + received


def received_in(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Arguments of `scaled_dot_product_attention`, query (sequences, heads, length, width of a head) -> (sequences, length)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1).float()
    length = query.shape[-2]
    if is_causal:
        attn_mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    found = torch.zeros(key.shape[0], key.shape[-2], device=query.device)
    for start in range(0, length, QUERIES):
        scores = query[:, :, start : start + QUERIES].float() @ key.mT * scale
        if attn_mask is not None:
            mask = attn_mask.expand(*attn_mask.shape[:-2], length, -1)[..., start : start + QUERIES, :]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        found += scores.softmax(-1).sum((1, 2))
    return found
