"""Full and partial fine-tuning: the weights themselves go on learning, all of them or those that are named.

    W <- W - step(d loss / d W)        on the mean next-token loss of the batch

The weights that are trained are float32 ("master weights"), whatever dtype the model computes in: steps that are small beside
the weight would be lost in bfloat16. They are stored in the dtype in which they were found, unless `store` says otherwise.
After a stage that prunes (wanda, sparsegpt) the zeros stay zero exactly and the result keeps the mask, so that it takes no more
bytes than before. Weights that are codes can only be trained by making them dense, which has to be asked for (`decode`).
Cost: forward and backward pass with gradients for all that is trained: 16 bytes a trained weight under AdamW (value,
gradient, two moments), where LoRA has them for its factors alone.
Source: Micikevicius et al. (2017), "Mixed Precision Training", arXiv:1710.03740, section 3.1 (master weights); keeping the
mask while a pruned model is trained: Han et al. (2015), "Learning both Weights and Connections", arXiv:1506.02626, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from pare.methods.contract import Context, TrainMethod, method
from pare.methods.ops.whole_weights import WholeFields, open_weights
from pare.methods.parts.formula import Formula


@method("full", source="Micikevicius et al. (2017), arXiv:1710.03740, section 3.1; Han et al. (2015), arXiv:1506.02626")
@dataclass
class Full(TrainMethod, WholeFields):
    shards: ClassVar[str] = "zero3"

    learning_rate: float = 5e-5
    """Peak learning rate, > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole()

    def prepare(self, model: nn.Module, context: Context) -> nn.Module:
        model = model.to(context.device)
        self.opened = open_weights(model, self, context.formulas)
        return model

    def finish(self, model: nn.Module, directory: Path) -> dict[str, Formula]:
        return self.opened.results(model)
