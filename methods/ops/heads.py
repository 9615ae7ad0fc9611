"""From final hidden states to logits: a matrix, and what some families do to its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

HEAD_ROWS = 8192
"""Rows of a head of lower precision that are in float32 at a time."""

Project = Callable[[Tensor], Tensor]
"""hidden (positions, width) -> hidden @ weight.T + bias (positions, vocabulary)."""


class Head:
    """The way from a final hidden state to logits."""

    def __init__(self, project: Project, config: Mapping[str, Any]) -> None:
        """config: the model's."""
        self.project = project
        self.vocabulary: int = config["vocab_size"]
        self.cap: float | None = config.get("final_logit_softcapping")
        self.factor: float = config.get("logit_scale") or 1 / (config.get("logits_scaling") or 1)

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden (positions, width) -> logits (positions, vocabulary), float32."""
        logits = self.project(hidden).float()
        logits = logits if self.factor == 1 else logits * self.factor
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def in_float32(weight: Tensor, bias: Tensor | None = None) -> Project:
    """In float32, whatever the dtype of weight (vocabulary, width)."""

    def project(hidden: Tensor) -> Tensor:
        x = hidden.float()
        if weight.dtype == torch.float32:
            return nn.functional.linear(x, weight, bias)
        logits = torch.cat([nn.functional.linear(x, rows.float()) for rows in weight.split(HEAD_ROWS)], dim=-1)
        return logits if bias is None else logits + bias.float()

    return project


def as_stored(weight: Tensor, bias: Tensor | None = None) -> Project:
    """In the dtype that weight (vocabulary, width) and the hidden states have, or that autocast says: the way of a layer."""
    return partial(nn.functional.linear, weight=weight, bias=bias)


def head_of(model: nn.Module) -> Head:
    """The model's own head; a plain linear one computes in float32, any other as it will."""
    output = model.get_output_embeddings()
    plain = type(output) is nn.Linear and output.weight.is_floating_point()
    return Head(in_float32(output.weight, output.bias) if plain else output, config_of(model))


def layer_head_of(model: nn.Module) -> Head:
    """The model's own head, its layer called as the model calls it."""
    return Head(model.get_output_embeddings(), config_of(model))


def config_of(model: nn.Module) -> dict[str, Any]:
    """The config of a transformers model as plain data."""
    return dict(model.config.to_dict())
