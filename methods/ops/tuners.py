"""What tuners other than plain LoRA have made of a model, as formulas relative to the base as it was.

    W' = W + dW        dW low-rank where it is that, else dense

Every tuner of peft that can be merged is asked to merge, a layer at a time and in float32, and dW is what that changed. Where
the update is known as factors it is taken from these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pare.methods.ops.adapters import updates
from pare.methods.parts.formula import Dense, Formula, LowRank

ROUNDING = 1e-6
"""Of the norm of a weight: less than float32 loses when an update is merged and read off again."""
SPARE = 8
"""Random directions more than the rank that is looked for."""


def beside_start(updates: Mapping[str, LowRank], start: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Updates of a base that a start has been taken from, as updates of the base as it was: of twice the rank.

    (W - s B0 A0) + s B A = W + s [B, -B0] [A; A0]
    """
    return {
        name: LowRank(torch.cat([now.a, start[name].a]), torch.cat([now.b, -start[name].b], 1), now.scale)
        for name, now in updates.items()
    }


def copied(updates: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The updates as they are now, whatever becomes of the model."""
    return {name: LowRank(update.a.clone(), update.b.clone(), update.scale) for name, update in updates.items()}


def pruned_updates(model: nn.Module) -> dict[str, LowRank]:
    """Parameter name in the base -> its update, of an AdaLoRA model: the triplets that are left, or one of zeros.

    dW = s / rank * P diag(lambda) Q        (Zhang et al., 2023, arXiv:2303.10512, eq. 3)
    """
    from peft.tuners.adalora import AdaLoraLayer

    found = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, AdaLoraLayer):
            singular = layer.lora_E["default"].detach()
            stays = singular[:, 0] != 0
            stays[0] |= not stays.any()
            a = (layer.lora_A["default"].detach() * singular)[stays]
            scale = layer.scaling["default"] / (layer.ranknum["default"].item() + 1e-5)  # as peft guards the division
            found[f"{name}.weight"] = LowRank(a, layer.lora_B["default"].detach()[:, stays], scale)
    return found


@torch.no_grad()
def merged_updates(model: nn.Module, rank: int = 0) -> Iterator[tuple[str, Formula]]:
    """Parameter name in the base -> what its tuner adds to it, of a `peft.PeftModel` of any kind that merges. Ends the model's
    use: its tuned layers are float32 and merged afterwards.

    rank: the greatest that an update can have; 0 if nothing is known of it.

    Raises:
        ValueError: the tuner changes what a formula cannot say, such as a bias that the base does not have.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, layer in layers.items():
        layer.float()
        before = {own: p.detach().clone() for own, p in layer.get_base_layer().named_parameters(recurse=False)}
        layer.merge()
        after = dict(layer.get_base_layer().named_parameters(recurse=False))
        if after.keys() != before.keys():
            raise ValueError(f"{name}: merging leaves {', '.join(after)} where there was {', '.join(before)}")
        for own, was in before.items():
            added = after[own].detach() - was
            if added.any():
                part = factored(added, rank, was.norm().item()) if was.dim() == 2 else Dense(torch.atleast_2d(added))
                yield f"{name}.{own}", Formula([part], op="add")


def factored(update: Tensor, rank: int, scale: float) -> LowRank | Dense:
    """The update (out, in) float32 as factors, where its rank is no more than `rank` > 0 and that takes less room; else itself.

    It is projected on some more random directions of what it can put out, which is all there is of it (Halko et al., 2011,
    arXiv:0909.4061, section 1.5).
    scale: the norm of the weight that it was read off, to tell an update from rounding.
    """
    out, columns = update.shape
    if not rank or (rank + SPARE) * (out + columns) >= out * columns:
        return Dense(update)
    drawn = torch.randn(columns, rank + SPARE, generator=torch.Generator().manual_seed(0)).to(update.device)
    q, _ = torch.linalg.qr(update @ drawn)
    a = q.T @ update
    if (update - q @ a).norm() > ROUNDING * scale:
        return Dense(update)
    u, s, v = torch.linalg.svd(a, full_matrices=False)
    return LowRank((s[:rank, None] * v[:rank]).contiguous(), (q @ u[:, :rank]).contiguous())


def plain_updates(model: nn.Module, start: Mapping[str, LowRank] | None) -> dict[str, LowRank]:
    """The updates of a LoRA or AdaLoRA model relative to the base as it was. start: what was taken from that."""
    from peft import AdaLoraModel

    if isinstance(model.base_model, AdaLoraModel):
        return pruned_updates(model)
    return updates(model) if start is None else beside_start(updates(model), start)
