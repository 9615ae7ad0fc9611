"""Low-rank adapters on the linears of a model: which linears, how they are made, and what they are as formulas.

    y = x W^T + s * dropout(x) A^T B^T        A (rank, in), B (out, rank), W frozen

Source: Hu et al. (2021), "LoRA", arXiv:2106.09685, eq. 3; s = alpha / rank, or alpha / sqrt(rank) with `rslora`
(Kalajdzievski, 2023, arXiv:2312.03732, theorem 3.2).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from pare.methods.parts.formula import LowRank
from pare.methods.settings import SettingsError, check

TARGETS = ("all-linear", "attention", "q_v")
INITS: dict[str, bool | str] = {"default": True, "gaussian": "gaussian"}
"""Our name -> peft's `init_lora_weights`. All leave the base untouched, so that base plus formula is exact."""

BASE_PATH = "base"
"""`base_model_name_or_path` of a saved adapter: where an export puts the base, beside the adapter."""


@dataclass
class LoraFields:
    """Settings that every method with low-rank adapters has; they also say all about the adapters' shape."""

    name: ClassVar[str]

    rank: int = 8
    """Rank of the update of each weight, >= 1."""

    alpha: int = 16
    """Scale of the update: it is multiplied by alpha / rank, >= 1."""

    dropout: float = 0.0
    """Fraction of an adapter's inputs zeroed while training, in [0, 1)."""

    targets: str = "all-linear"
    """Which linears get an adapter: "all-linear" (all but the head), "attention", "q_v", or a regular expression for their
    whole names, e.g. `.*mlp.*`."""

    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, which keeps large ranks learning."""

    init: str = "default"
    """How A starts: "default" (Kaiming-uniform) or "gaussian" (standard deviation 1 / rank). B starts at zero."""

    init_seed: int = 0
    """Seed of A alone, apart from the trial's seed: members that are to be averaged share it."""

    gradient_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass: less memory, about a third more time."""

    def check_adapter(self) -> None:
        """Raises `SettingsError` for a setting above that is out of its range."""
        check(self, "rank", at_least=1)
        check(self, "alpha", at_least=1)
        check(self, "dropout", at_least=0, below=1)
        check(self, "init", one_of=tuple(INITS))
        if not targets_are_valid(self.targets):
            allowed = f"{', '.join(TARGETS)} or a regular expression such as '.*mlp.*'"
            raise SettingsError(self.name, "targets", self.targets, allowed)


def targets_are_valid(targets: str) -> bool:
    """Whether `targets` is one of `TARGETS` or a regular expression; a plain word that is neither is a misspelling."""
    if re.fullmatch(r"[\w-]*", targets):
        return targets in TARGETS
    try:
        re.compile(targets)
    except re.error:
        return False
    return True


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> linear, for every linear but the head that makes the logits."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}


def select_targets(model: nn.Module, targets: str) -> list[str]:
    """Names of the linears that `targets` means, in the order of the model."""
    names = list(block_linears(model))
    if targets == "all-linear":
        chosen = names
    elif targets == "attention":
        attention = tuple(f"{name}." for name, module in model.named_modules() if type(module).__name__.endswith("Attention"))
        chosen = [name for name in names if name.startswith(attention)]
    else:
        pattern = r".*\b[qv]_proj" if targets == "q_v" else targets
        chosen = [name for name in names if re.fullmatch(pattern, name)]
    if not chosen:
        leaves = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise ValueError(
            f"targets={targets!r} means no linear of this {type(model).__name__}, whose linears end in {leaves}. "
            "Try: targets=all-linear, or a regular expression for whole names such as '.*q_proj'"
        )
    return chosen


def peft_targets(model: nn.Module, chosen: list[str]) -> list[str] | str:
    """`target_modules` for peft: the last parts of the names where these say it all, else a regular expression."""
    leaves = sorted({name.rpartition(".")[2] for name in chosen})
    same_leaf = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves]
    return leaves if set(same_leaf) == set(chosen) else "|".join(re.escape(name) for name in chosen)


def attach(model: nn.Module, fields: LoraFields) -> nn.Module:
    """Freezes `model` and wraps its target linears by adapters in float32 -> a `peft.PeftModel`, on the model's device."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=fields.rank,
        lora_alpha=fields.alpha,
        lora_dropout=fields.dropout,
        target_modules=peft_targets(model, select_targets(model, fields.targets)),
        use_rslora=fields.rslora,
        init_lora_weights=INITS[fields.init],
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(fields.init_seed)
        adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=True)
    if fields.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return adapted


def updates(model: nn.Module) -> dict[str, LowRank]:
    """Parameter name in the base -> its update, for every adapted linear of a `peft.PeftModel`."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    return {
        f"{name}.weight": LowRank(
            layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach(), layer.scaling["default"]
        )
        for name, layer in layers.items()
    }


def save_adapter(model: nn.Module, directory: Path) -> None:
    """Writes the adapter as PEFT does, less what differs from run to run: a path of this machine, an order, a date."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(directory, state_dict=trained, save_embedding_layers=False)
    (directory / "README.md").unlink()
    write_adapter_config(directory, BASE_PATH)


def write_adapter_config(directory: Path, base: str) -> None:
    """Rewrites adapter_config.json so that it names `base` and always lists its entries in one order."""
    path = directory / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    config["base_model_name_or_path"] = base
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    new = path.with_suffix(".new")  # a new file: the old one may be a hard link into an immutable store
    new.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    new.replace(path)
