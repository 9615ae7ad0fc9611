"""QLoRA: train LoRA adapters through a frozen base of 4-bit codes.

    W' = decode(codes, scales) + s * B A

Each linear of the blocks is quantised in flat blocks of 64 weights, to NormalFloat codes by default; the scales of the
blocks are themselves 8-bit codes ("double quantisation"). The forward and backward passes decode the weight on the fly, so
that the adapters learn to make up for the quantisation error. Embeddings, norms and the head stay as they are.
Cost: that of LoRA plus decoding each weight twice a step; the base takes 4.127 bits a weight (4.5 without `double_quant`).
Source: Dettmers et al. (2023), "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314, section 3, eqs. 5 and 6.
Differs from the paper: AdamW is paged only if `optimizer` says so, and activations are kept unless `gradient_checkpointing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pare.methods.contract import Context, TrainMethod, method
from pare.methods.ops.adapters import LoraFields, attach, block_linears, save_adapter, updates
from pare.methods.ops.bnb4bit import BLOCK, QUANT_TYPES, quantise_linear, quantised_weights
from pare.methods.parts.formula import Formula, Part
from pare.methods.settings import SettingsError, check


@method("qlora", source="Dettmers et al. (2023), QLoRA, arXiv:2305.14314, eqs. 5 and 6", extra="qlora")
@dataclass
class Qlora(TrainMethod, LoraFields):
    quant_type: str = "nf4"
    """What a code stands for: "nf4" (quantiles of a normal distribution) or "fp4" (2 bits of exponent, 1 of mantissa)."""

    double_quant: bool = True
    """Keep the scales of the blocks as 8-bit codes, which saves 0.373 bits a weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "quant_type", one_of=QUANT_TYPES)
        self.check_adapter()

    def check_shapes(self, widths: Mapping[str, tuple[int, int]]) -> None:
        for name, (_, columns) in widths.items():
            if columns % BLOCK:
                # bitsandbytes 0.50 decodes wrongly on a CPU where a block of 64 runs over the end of a row.
                allowed = f"used on linears that all read a multiple of {BLOCK} features ({name} reads {columns})"
                raise SettingsError(self.name, "quant_type", self.quant_type, allowed)

    def prepare(self, model: nn.Module, context: Context) -> nn.Module:
        linears = block_linears(model)
        self.check_shapes({f"{name}.weight": (linear.out_features, linear.in_features) for name, linear in linears.items()})
        for name, linear in linears.items():
            model.set_submodule(name, quantise_linear(linear, self.quant_type, self.double_quant, context.device))
        model.is_loaded_in_4bit = True  # peft and accelerate go by this, not by the layers
        return attach(model.to(context.device), self)

    def finish(self, model: nn.Module, directory: Path) -> dict[str, Formula]:
        save_adapter(model, directory / "adapter")
        trained = updates(model)
        formulas = {}
        for name, codes in quantised_weights(model.get_base_model()).items():
            parts: list[Part] = [codes, trained[name]] if name in trained else [codes]
            formulas[name] = Formula(parts, op="replace")
        return formulas
