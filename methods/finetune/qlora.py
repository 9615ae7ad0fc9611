"""QLoRA: train LoRA adapters through a frozen base of 4-bit codes.

    W' = decode(codes, scales) + s * B A

Each linear of the blocks is quantised in flat blocks of 64 weights, to NormalFloat codes by default; the scales of the
blocks are themselves 8-bit codes ("double quantisation"). The forward and backward passes decode the weight on the fly, so
that the adapters learn to make up for the quantisation error. Embeddings, norms and the head stay as they are. A linear that an
earlier stage has compressed is left as that stage made it (GPTQ's codes, say), and is decoded by the same rule.
Cost: that of LoRA plus decoding each weight twice a step; the base takes 4.127 bits a weight (4.5 without `double_quant`).
Source: Dettmers et al. (2023), "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314, section 3, eqs. 5 and 6.
With `init=loftq` the adapters start as the best low-rank answer to what the codes leave of the weights, not at zero: Li et al.
(2023), "LoftQ", arXiv:2310.08659, algorithm 1; there the scale s counts, which peft's own leaves out.
Differs from the paper: AdamW is paged only if `optimizer` says so, and activations are kept unless `gradient_checkpointing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from pare.methods.contract import Context, TrainMethod, method
from pare.methods.ops.adapters import INITS, LoraFields, attach, block_linears, save_adapter, select_targets, start_at, updates
from pare.methods.ops.bnb4bit import BLOCK, QUANT_TYPES, quantise_linear, quantised_weights
from pare.methods.ops.loftq import fitted
from pare.methods.parts.formula import Formula
from pare.methods.parts.linear import FrozenLinear
from pare.methods.settings import SettingsError, check


@method("qlora", source="Dettmers et al. (2023), QLoRA, arXiv:2305.14314, eqs. 5 and 6", extra="qlora")
@dataclass
class Qlora(TrainMethod, LoraFields):
    keeps_formulas = True
    inits = (*INITS, "loftq")

    quant_type: str = "nf4"
    """What a code stands for: "nf4" (quantiles of a normal distribution) or "fp4" (2 bits of exponent, 1 of mantissa)."""

    double_quant: bool = True
    """Keep the scales of the blocks as 8-bit codes, which saves 0.373 bits a weight."""

    loftq_steps: int = 1
    """How often codes and adapters are fitted to what the other leaves, with `init=loftq`, >= 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "quant_type", one_of=QUANT_TYPES)
        check(self, "loftq_steps", at_least=1)
        self.check_adapter()

    def check_shapes(self, widths: Mapping[str, tuple[int, int]]) -> None:
        for name, (_, columns) in widths.items():
            if columns % BLOCK:
                # bitsandbytes 0.50 decodes wrongly on a CPU where a block of 64 runs over the end of a row.
                allowed = f"used on linears that all read a multiple of {BLOCK} features ({name} reads {columns})"
                raise SettingsError(self.name, "quant_type", self.quant_type, allowed)

    def prepare(self, model: nn.Module, context: Context) -> nn.Module:
        linears = {name: linear for name, linear in block_linears(model).items() if not isinstance(linear, FrozenLinear)}
        self.check_shapes({f"{name}.weight": (linear.out_features, linear.in_features) for name, linear in linears.items()})
        starts: dict[str, list[Tensor]] = {}
        targets = select_targets(model, self.targets) if self.init == "loftq" else []
        quantise = partial(quantise_linear, quant_type=self.quant_type, double_quant=self.double_quant, device=context.device)
        for name, linear in linears.items():
            if name in targets:
                codes, *starts[name] = fitted(linear, self.rank, self.scale, self.loftq_steps, quantise)
            else:
                codes = quantise(linear)
            model.set_submodule(name, codes)
        model.is_loaded_in_4bit = True  # peft and accelerate go by this, not by the layers
        adapted = attach(model.to(context.device), self)
        start_at(adapted, starts)
        return adapted

    def finish(self, model: nn.Module, directory: Path) -> dict[str, Formula]:
        save_adapter(model, directory / "adapter")
        formulas = {name: Formula([update], op="add") for name, update in updates(model).items()}
        for name, codes in quantised_weights(model.get_base_model()).items():
            added = formulas[name].parts if name in formulas else []
            formulas[name] = Formula([codes, *added], op="replace")
        return formulas
