"""The tuners of Hugging Face peft that suit a decoder language model, each a method of its own name.

    rslora, dora, pissa, ia3, vera, adalora, oft ...        method@recipe.tune=lora,dora,ia3 sweeps them

All are one thin method: peft makes and runs the layers, `KINDS` says what there is to know of a tuner besides, and `config`
takes what is the tuner's own, checked against peft's own class while planning. What comes out is a formula for every weight
that has changed, relative to the base as it was, so that scoring, export and merging need know nothing of tuners; beside it
stands the adapter as peft writes it. A tuner whose result is a plain low-rank update is published as plain LoRA: what a start
has taken from the base (PiSSA, OLoRA, CorDA, LoRA-GA) is in it, at twice the rank, so that no reader has to repeat the start.
Cost: about that of LoRA; the orthogonal tuners and DoRA form a product with each weight in every pass.
Source: each tuner's own, in `KINDS`.
Differs from the papers: the targets are every linear of a block, whatever a paper chose (`targets`); of ln_tuning the norms.
Which merge exactly, which are small and which run on 4-bit bases is measured: docs/peft.md.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pare.methods.contract import Context, TrainMethod, method
from pare.methods.ops.adapters import (
    AdapterFields,
    TargetFields,
    drawn_from,
    peft_targets,
    save_adapter,
    select_by_name,
    select_targets,
    trained_in_float32,
    updates,
    wrap,
    write_adapter,
)
from pare.methods.ops.tuner_kinds import KINDS, REFUSED, Kind
from pare.methods.ops.tuners import copied, merged_updates, plain_updates
from pare.methods.parts.formula import Formula, LowRank
from pare.methods.settings import SettingsError, check


@dataclass
class Tuner(TrainMethod, AdapterFields):
    """What all of them share."""

    of: ClassVar[Kind]
    is_plain: ClassVar[bool] = False
    """Whether the result is a plain low-rank update, which is published as such."""
    writes_dense: ClassVar[bool] = False
    """Whether updates are kept whole, because they are not known to have a low rank."""

    config: dict[str, Any] = field(default_factory=dict)
    """Further keys of the tuner's own config class in peft, e.g. `+recipe.tune.config.oft_block_size=16`. Keys that have a
    setting of their own, or that would make more of the adapter than an update of weights, are refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config:  # only then is peft, which takes seconds to import, needed to check it
            self.check_config()

    def check_config(self) -> None:
        """Raises `SettingsError` for a key that is not the tuner's, or a value that peft refuses."""
        cls = config_class(self.of.type)
        known = {f.name for f in dataclasses.fields(cls)} - REFUSED - {*self.of.fixed, self.of.seed, (self.of.rank or [""])[0]}
        for key in self.config:
            if key not in known:
                near = [f"nearest: {found!r}" for found in difflib.get_close_matches(key, known, 1)]
                hint = "; ".join([*near, f"all: {', '.join(sorted(known))}"])
                allowed = f"made of keys of peft's {cls.__name__} that have no setting of their own ({hint})"
                raise SettingsError(self.name, "config", key, allowed)
        try:
            self.peft_config(["q_proj"])
        except (TypeError, ValueError, AttributeError) as e:
            raise SettingsError(self.name, "config", self.config, f"what peft's {cls.__name__} takes ({e})") from e

    def values(self) -> dict[str, Any]:
        """What the settings are in the tuner's config."""
        return {**self.of.usual, **self.config, **self.of.fixed, **({self.of.seed: self.init_seed} if self.of.seed else {})}

    def peft_config(self, targets: list[str] | str) -> Any:
        values = self.values()
        for key, cls in nested_configs().items():
            if isinstance(values.get(key), Mapping):
                values[key] = cls(**values[key])
        return config_class(self.of.type)(**values, target_modules=targets, task_type="CAUSAL_LM")

    def targets_in(self, model: nn.Module) -> list[str] | str:
        raise NotImplementedError

    def prepare(self, model: nn.Module, context: Context) -> nn.Module:
        model = model.to(context.device)
        with drawn_from(self.init_seed, context.device):
            adapted = self.start(model, self.peft_config(self.targets_in(model)), context)
        self._start = copied(updates(adapted)) if self.of.takes_from_base else None
        return adapted

    def start(self, model: nn.Module, config: Any, context: Context) -> nn.Module:
        """The model with the tuner's layers at their initial values."""
        return wrap(model, config, self)

    def finish(self, model: nn.Module, directory: Path) -> dict[str, Formula]:
        if self.is_plain:
            found: dict[str, LowRank] = plain_updates(model, self._start)
            write_adapter(found, model.get_base_model(), directory / "adapter")
            return {name: Formula([update], op="add") for name, update in found.items()}
        save_adapter(model, directory / "adapter", trained_only=False)
        return dict(merged_updates(model, self.greatest_rank()))

    def greatest_rank(self) -> int:
        """Of an update; 0 if nothing is known of it."""
        return 0


@dataclass
class NormTuner(Tuner):
    """Trains copies of the norms."""

    def targets_in(self, model: nn.Module) -> list[str]:
        return [name for name, module in model.named_modules() if type(module).__name__.endswith("Norm")]


@dataclass
class LinearTuner(Tuner, TargetFields):
    """Puts something at each target linear."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_adapter()

    def check_shapes(self, widths: Mapping[str, tuple[int, int]]) -> None:
        if self.of.divides is None or self.targets == "attention":  # which those are is not told by names
            return
        key, sides = self.of.divides
        divisor = self.values()[key]
        for name in select_by_name([name.removesuffix(".weight") for name in widths], self.targets):
            out, columns = widths[f"{name}.weight"]
            for width in {"in": [columns], "out": [out], "both": [columns, out]}[sides]:
                if width % divisor:
                    raise SettingsError(self.name, f"config.{key}", divisor, f"a divisor of {width}, a width of {name}")

    def targets_in(self, model: nn.Module) -> list[str] | str:
        return peft_targets(model, select_targets(model, self.targets))


@dataclass
class RankedTuner(LinearTuner):
    """One whose size is a rank."""

    rank: int = 8
    """Rank of the update of each weight, or what the tuner calls its rank, >= 1."""

    def __post_init__(self) -> None:
        check(self, "rank", at_least=1)
        super().__post_init__()

    def values(self) -> dict[str, Any]:
        assert self.of.rank is not None
        return {**super().values(), self.of.rank[0]: self.rank}

    def greatest_rank(self) -> int:
        return self.rank**self.of.bound if self.of.bound else 0


@dataclass
class LoraTuner(RankedTuner):
    """LoRA in another scale, form or start."""

    alpha: int = 16
    """Scale of the update: it is multiplied by alpha / rank, with rslora by alpha / sqrt(rank), >= 1."""

    dropout: float = 0.0
    """Fraction of an adapter's inputs zeroed while training, in [0, 1)."""

    def __post_init__(self) -> None:
        check(self, "alpha", at_least=1)
        check(self, "dropout", at_least=0, below=1)
        if self.of.fixed.get("init_lora_weights") == "orthogonal" and self.rank % 2:
            raise SettingsError(self.name, "rank", self.rank, "even")
        super().__post_init__()

    def values(self) -> dict[str, Any]:
        return {**super().values(), "lora_alpha": self.alpha, "lora_dropout": self.dropout}


@dataclass
class LoraFromData(LoraTuner):
    """LoRA whose start looks at some of the training data."""

    start_sequences: int = 16
    """Sequences of the training data that the start looks at, the first ones, >= 1."""

    def __post_init__(self) -> None:
        check(self, "start_sequences", at_least=1)
        super().__post_init__()

    def values(self) -> dict[str, Any]:
        key = f"{self.of.fixed['init_lora_weights']}_config"
        return {**super().values(), key: self.config.get(key, {})}

    def start(self, model: nn.Module, config: Any, context: Context) -> nn.Module:
        from peft import initialize_lora_eva_weights
        from peft.tuners.lora.corda import preprocess_corda
        from peft.tuners.lora.loraga import preprocess_loraga

        if not context.data:
            raise ValueError(f"{self.name} starts from training data, and was given none")
        batches = [{k: c[i : i + 1].to(context.device) for k, c in context.data.items()} for i in range(self.start_sequences)]
        batches = [batch for batch in batches if len(batch["input_ids"])]

        def read() -> None:
            for batch in batches:
                self.loss(model, batch)

        def learn() -> None:
            for batch in batches:
                total, tokens = self.loss(model, batch)
                (total / tokens).backward()

        if self.of.fixed["init_lora_weights"] == "corda":
            with torch.no_grad():
                preprocess_corda(model, config, read)
        elif self.of.fixed["init_lora_weights"] == "lora_ga":
            preprocess_loraga(model, config, learn)
        adapted = wrap(model, config, self)
        if self.of.fixed["init_lora_weights"] == "eva":
            # All in one batch: it reads batch after batch until the directions stay, and those of one batch do at once.
            together = {"input_ids": torch.cat([batch["input_ids"] for batch in batches])}
            initialize_lora_eva_weights(
                adapted, [together], forward_fn=run_body, gather_distributed_inputs=False, show_progress_bar=False
            )
            trained_in_float32(adapted)
        return adapted


@dataclass
class AdaLora(LoraTuner):
    """Gives rank to the weights that need it: starts with more than `rank` each and takes triplets away by their importance.

    The loss has R(P, Q) = ||P^T P - I|| + ||Q Q^T - I|| on top of it (eq. 4; of each the norm, and the mean over all matrices,
    as peft has it). Triplets are left out after the optimizer's step, by gradients from before it (algorithm 1).
    """

    is_plain = True

    def __post_init__(self) -> None:
        super().__post_init__()
        settled = self.values()["tfinal"]
        if self.steps < settled + 2:  # importance is known from the second step on
            allowed = f"at least {settled + 2}, as ranks are settled {settled} steps before the last"
            raise SettingsError(self.name, "steps", self.steps, allowed)
        self._gradients: dict[nn.Parameter, Tensor] = {}

    def values(self) -> dict[str, Any]:
        room = {"init_r": max(self.rank + 1, self.rank * 3 // 2), "tinit": self.steps // 10, "tfinal": self.steps // 4}
        return {**room, **super().values(), "total_step": self.steps}

    def prepare(self, model: nn.Module, context: Context) -> nn.Module:
        self._tuner = (adapted := super().prepare(model, context)).base_model
        return adapted

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        total, tokens = super().loss(model, batch)
        weight = self._tuner.peft_config["default"].orth_reg_weight
        return total + tokens * weight * self.crookedness(), tokens

    def crookedness(self) -> Tensor:
        """How far the singular vectors are from orthonormal: the mean norm over all P and Q."""
        norms = []
        for name, p in self._tuner.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                norms.append((gram - torch.eye(len(gram), device=p.device)).norm())
        return torch.stack(norms).mean()

    def after_backward(self, step: int) -> None:
        self._gradients = {p: p.grad for p in self._tuner.parameters() if p.grad is not None}

    def after_step(self, step: int) -> None:
        for p, gradient in self._gradients.items():  # the loop has let go of them
            p.grad = gradient
        self._tuner.update_and_allocate(step)
        for p in self._gradients:
            p.grad = None
        self._gradients = {}

    def state(self) -> dict[str, Any]:
        allocator = self._tuner.rankallocator
        kept = {key: dict(getattr(allocator, key)) for key in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
        return {**kept, "rank_pattern": self._tuner.peft_config["default"].rank_pattern}

    def load_state(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self._tuner.peft_config["default"].rank_pattern = state.pop("rank_pattern")
        for key, value in state.items():
            setattr(self._tuner.rankallocator, key, dict(value))


FAMILIES: dict[str, type[Tuner]] = {
    "norms": NormTuner,
    "linear": LinearTuner,
    "ranked": RankedTuner,
    "lora": LoraTuner,
    "lora_from_data": LoraFromData,
    "adalora": AdaLora,
}


def run_body(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """A pass that makes no logits."""
    model.get_base_model().base_model(**inputs, use_cache=False)


def config_class(type_: str) -> Any:
    """peft's config class of a `PeftType`."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(type_)]


def nested_configs() -> dict[str, Any]:
    """Key of LoRA's config -> the class of what stands there."""
    from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig

    return {"eva_config": EvaConfig, "corda_config": CordaConfig, "lora_ga_config": LoraGAConfig}


def register(name: str, kind: Kind) -> None:
    """Makes the method of a kind."""
    of = FAMILIES[kind.family]
    defaults: list[tuple[str, Any, Any]] = [("learning_rate", float, field(default=kind.rate))]
    if kind.rank:
        defaults.append(("rank", int, field(default=kind.rank[1])))
    title = name.title().replace("_", "")
    plain = issubclass(of, LoraTuner) and not kind.fixed.get("use_dora")
    dense = not plain and not kind.bound and kind.family != "norms"
    body = {
        "of": kind,
        "shards": kind.shards,
        "is_plain": plain,
        "writes_dense": dense,
        "__module__": __name__,
        "__doc__": kind.source,
    }
    made = dataclasses.make_dataclass(title, defaults, bases=(of,), namespace=body)
    globals()[title] = method(name, source=kind.source)(made)  # by this name it is pickled


for _name, _kind in KINDS.items():
    register(_name, _kind)
