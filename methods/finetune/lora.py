"""LoRA: train a low-rank update of each weight, the model itself frozen.

    W' = W + s * B A        A (rank, in), B (out, rank) starting at zero, s = alpha / rank

The update's equation, its initial values and its targets are in `pare.methods.ops.adapters`; the layers themselves are those
of Hugging Face peft, so that the result is an adapter which any peft opens.
Cost: the frozen model's forward pass and the gradients of its activations; optimizer state for rank * (in + out) numbers a
linear instead of in * out.
Source: Hu et al. (2021), "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1, eq. 3.
Differs from the paper: adapts every linear of a block by default, where the paper adapts the query and value projections.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pare.methods.contract import Context, TrainMethod, method
from pare.methods.ops.adapters import LoraFields, attach, save_adapter, updates
from pare.methods.parts.formula import Formula


@method("lora", source="Hu et al. (2021), LoRA, arXiv:2106.09685, eq. 3")
@dataclass
class Lora(TrainMethod, LoraFields):
    shards = "zero3"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_adapter()

    def prepare(self, model: nn.Module, context: Context) -> nn.Module:
        return attach(model.to(context.device), self)

    def finish(self, model: nn.Module, directory: Path) -> dict[str, Formula]:
        save_adapter(model, directory / "adapter")
        return {name: Formula([update], op="add") for name, update in updates(model).items()}
