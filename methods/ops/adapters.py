"""Low-rank adapters on the linears of a model: which linears, how they are made, and what they are as formulas.

    y = x W^T + s * dropout(x) A^T B^T        A (rank, in), B (out, rank), W frozen

Source: Hu et al. (2021), "LoRA", arXiv:2106.09685, eq. 3; s = alpha / rank, or alpha / sqrt(rank) with `rslora`
(Kalajdzievski, 2023, arXiv:2312.03732, theorem 3.2).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pare.methods.parts.formula import LowRank
from pare.methods.settings import SettingsError, check

TARGETS = ("all-linear", "attention", "q_v")
INITS: dict[str, bool | str] = {"default": True, "gaussian": "gaussian"}
"""Our name -> peft's `init_lora_weights`. All leave the base untouched, so that base plus formula is exact."""

SETS = {"target_modules", "feedforward_modules", "exclude_modules"}
"""What peft keeps as sets, and so writes in any order."""

BASE_PATH = "base"
"""`base_model_name_or_path` of a saved adapter: where an export puts the base, beside the adapter."""


@dataclass
class AdapterFields:
    """Settings that every method has which trains something small beside a frozen model."""

    init_seed: int = 0
    """Seed of the adapter's initial values alone, apart from the trial's seed: members that are to be averaged share it."""


@dataclass
class TargetFields(AdapterFields):
    """Those of a method whose adapters stand at linears."""

    name: ClassVar[str]

    targets: str = "all-linear"
    """Which linears get an adapter: "all-linear" (all but the head), "attention", "q_v", or a regular expression for their
    whole names, e.g. `.*mlp.*`."""

    def check_adapter(self) -> None:
        """Raises `SettingsError` for a setting above that is out of its range."""
        if not targets_are_valid(self.targets):
            allowed = f"{', '.join(TARGETS)} or a regular expression such as '.*mlp.*'"
            raise SettingsError(self.name, "targets", self.targets, allowed)


@dataclass
class LoraFields(TargetFields):
    """Those of a method with plain low-rank adapters; they also say all about the adapters' shape."""

    rank: int = 8
    """Rank of the update of each weight, >= 1."""

    alpha: int = 16
    """Scale of the update: it is multiplied by alpha / rank, >= 1."""

    dropout: float = 0.0
    """Fraction of an adapter's inputs zeroed while training, in [0, 1)."""

    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, which keeps large ranks learning."""

    init: str = "default"
    """How A starts: "default" (Kaiming-uniform) or "gaussian" (standard deviation 1 / rank). B starts at zero. Where the base
    is quantised by the method itself also "loftq": both start as what the codes leave of the weights."""

    inits: ClassVar[tuple[str, ...]] = tuple(INITS)
    """The values that `init` may have."""

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def check_adapter(self) -> None:
        super().check_adapter()
        check(self, "rank", at_least=1)
        check(self, "alpha", at_least=1)
        check(self, "dropout", at_least=0, below=1)
        check(self, "init", one_of=self.inits)


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
    if targets == "attention":
        attention = tuple(f"{name}." for name, module in model.named_modules() if type(module).__name__.endswith("Attention"))
        chosen = [name for name in names if name.startswith(attention)]
    else:
        chosen = select_by_name(names, targets)
    if not chosen:
        leaves = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise ValueError(
            f"targets={targets!r} means no linear of this {type(model).__name__}, whose linears end in {leaves}. "
            "Try: targets=all-linear, or a regular expression for whole names such as '.*q_proj'"
        )
    return chosen


def select_by_name(names: list[str], targets: str) -> list[str]:
    """Those that `targets` means, which is not "attention"."""
    pattern = {"all-linear": r".*", "q_v": r".*\b[qv]_proj"}.get(targets, targets)
    return [name for name in names if re.fullmatch(pattern, name)]


def peft_targets(model: nn.Module, chosen: list[str]) -> list[str] | str:
    """`target_modules` for peft: the last parts of the names where these say it all, else a regular expression."""
    leaves = sorted({name.rpartition(".")[2] for name in chosen})
    same_leaf = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves]
    return leaves if set(same_leaf) == set(chosen) else "|".join(re.escape(name) for name in chosen)


def attach(model: nn.Module, fields: LoraFields) -> nn.Module:
    """Freezes `model` and wraps its target linears by plain adapters in float32 -> a `peft.PeftModel` on the model's device."""
    from peft import LoraConfig

    config = LoraConfig(
        r=fields.rank,
        lora_alpha=fields.alpha,
        lora_dropout=fields.dropout,
        target_modules=peft_targets(model, select_targets(model, fields.targets)),
        use_rslora=fields.rslora,
        init_lora_weights=INITS.get(fields.init, True),
        task_type="CAUSAL_LM",
    )
    return wrap(model, config, fields)


def wrap(model: nn.Module, config: Any, fields: AdapterFields) -> nn.Module:
    """Freezes `model` and puts the adapters of a `peft.PeftConfig` on it, what is trained in float32 -> a `peft.PeftModel`."""
    from peft import get_peft_model

    with drawn_from(fields.init_seed, next(model.parameters()).device):
        adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=True)
    trained_in_float32(adapted)
    return adapted


@torch.no_grad()
def start_at(model: nn.Module, starts: Mapping[str, Sequence[Tensor]]) -> None:
    """Gives adapters other initial values. starts: name of a linear in the base -> A (rank, in) and B (out, rank)."""
    for name, (a, b) in starts.items():
        layer = model.get_base_model().get_submodule(name)
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)


def trained_in_float32(model: nn.Module) -> None:
    """Of what is trained, peft leaves some in the model's dtype, such as copies of norms."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def drawn_from(seed: int, device: torch.device) -> Iterator[None]:
    """What is drawn inside comes from the seed, and no draw outside does."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
        yield


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


def save_adapter(model: nn.Module, directory: Path, trained_only: bool = True) -> None:
    """Writes the adapter as PEFT does, less what differs from run to run: a path of this machine, an order, a date.

    trained_only: leave out what an adapter holds besides, such as projections that are drawn and stay. To look at the state of
    a whole model also unpacks 4-bit weights in place.
    """
    state = {name: p for name, p in model.named_parameters() if p.requires_grad} if trained_only else None
    model.save_pretrained(directory, state_dict=state, save_embedding_layers=False)
    (directory / "README.md").unlink()
    write_adapter_config(directory, BASE_PATH)


def write_adapter(updates: Mapping[str, LowRank], model: nn.Module, directory: Path) -> None:
    """Writes low-rank updates as a PEFT adapter. Each keeps its own rank and scale, which peft makes of alpha / rank.

    updates: parameter name in `model` -> its update. model: the base, of which only the names of the modules are read.
    """
    from peft import LoraConfig

    modules = {name.removesuffix(".weight"): update for name, update in updates.items()}
    ranks = {name: update.a.shape[0] for name, update in modules.items()}
    alphas = {name: whole(update.scale * ranks[name]) for name, update in modules.items()}
    rank, alpha = Counter(zip(ranks.values(), alphas.values(), strict=True)).most_common(1)[0][0]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=peft_targets(model, list(modules)),
        rank_pattern={re.escape(name): own for name, own in ranks.items() if own != rank},
        alpha_pattern={re.escape(name): own for name, own in alphas.items() if own != alpha},
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    directory.mkdir(exist_ok=True)
    config.save_pretrained(directory)
    write_adapter_config(directory, BASE_PATH)
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": tensor.contiguous()
        for name, update in modules.items()
        for side, tensor in (("A", update.a), ("B", update.b))
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def whole(number: float) -> int | float:
    """The number as an integer where it is one, which is how peft writes the alpha of a plain adapter."""
    return int(number) if number == int(number) else number


def write_adapter_config(directory: Path, base: str) -> None:
    """Rewrites adapter_config.json so that it names `base` and always lists its entries in one order."""
    path = directory / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    config["base_model_name_or_path"] = base
    for key in SETS & config.keys():
        if isinstance(config[key], list):
            config[key].sort()
    new = path.with_suffix(".new")  # a new file: the old one may be a hard link into an immutable store
    new.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    new.replace(path)
