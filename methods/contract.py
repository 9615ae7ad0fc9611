"""What a method is: a settings dataclass with one verb, registered by name.

The *kind* of a method is the unit of its work. It is what lets the platform cut the work up, spread it, cache it and
resume it without the method knowing. A method file defines one class:

    @method("rtn", source="Nagel et al. (2021), arXiv:2106.08295, eq. 4")
    @dataclass
    class Rtn(LayerMethod):
        bits: int = 4
        \"\"\"Bits of one code, 2 to 8.\"\"\"

        def __post_init__(self): check(self, "bits", at_least=2, at_most=8)

        def compress(self, group, context): ...

Nothing here knows of Ray, MLflow, Hydra, stores or sweeps.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.metadata
import inspect
import itertools
import pkgutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from pare.methods.ops.losses import next_token_loss_
from pare.methods.ops.statistics import Statistic
from pare.methods.parts.formula import Formula
from pare.methods.settings import SettingsError, check

METHODS: dict[str, type[Method]] = {}
"""Every registered method by name; `load_all` fills it."""

NOT_METHODS = ("parts", "anatomy", "ops", "contract", "settings")
"""Names beneath `pare.methods` that hold what methods are made of."""


@dataclass
class Context:
    """The only door of a method to the outside."""

    device: torch.device
    """Where tensors are worked on."""

    seed: int = 0
    """Seed of every random draw of the method."""

    report: Callable[[str, float], None] = lambda name, value: None
    """Writes a named number down with the result, e.g. `report("gptq/fallbacks", 0)`. Numbers of one name are added up."""

    def generator(self) -> torch.Generator:
        """A fresh CPU generator, seeded with `seed`."""
        return torch.Generator().manual_seed(self.seed)


@dataclass
class InputGroup:
    """The linears that read one tensor, and what is known of it."""

    name: str
    """Name of the group, unique in the model, e.g. `model.layers.3.self_attn.qkv`."""

    weights: dict[str, Tensor]
    """Parameter name -> dense weight (out, in), float32, as the weight stands before this stage."""

    formulas: dict[str, Formula] = field(default_factory=dict)
    """Parameter name -> formula of a weight that an earlier stage has already compressed."""

    statistics: dict[str, Tensor] = field(default_factory=dict)
    """Name of the statistic -> its value, for the statistics the method needs."""


class Method:
    """What all kinds share. The settings are the dataclass fields of the subclass."""

    kind: ClassVar[str]
    name: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[tuple[type[Statistic], ...]] = ()
    draws_random_numbers: ClassVar[bool] = False
    extra: ClassVar[str | None] = None
    """Name of the optional dependency group that the method imports, if any."""

    def check_shapes(self, widths: Mapping[str, tuple[int, int]]) -> None:
        """Raises `SettingsError`, naming the layer, where the settings do not fit the model.

        widths: parameter name -> (out, in) of every weight that the method is to work on. Called while planning, when
        there are no weights yet.
        """


class LayerMethod(Method):
    """(input group) -> new formulas. Works on one input group at a time and sees nothing else of the model."""

    kind: ClassVar[str] = "layer"
    inputs: str = "dense"
    """Under calibration a block reads what the "dense" or the "compressed" blocks before it put out. A method with
    statistics may make this a setting."""

    def compress(self, group: InputGroup, context: Context) -> dict[str, Formula]:
        """New formula for each weight of the group.

        The default maps `compress_weight` over the group, which is all that a method of one weight needs to define.
        """
        return {name: self.compress_weight(name, weight, group.statistics, context) for name, weight in group.weights.items()}

    def compress_weight(self, name: str, weight: Tensor, statistics: Mapping[str, Tensor], context: Context) -> Formula:
        """weight (out, in) float32 -> formula of the same shape."""
        raise NotImplementedError(f"{type(self).__name__} defines neither compress nor compress_weight")


@dataclass
class TrainMethod(Method):
    """prepare -> (loss, after_backward, after_step)* -> finish. The platform owns the loop; these are its settings."""

    kind: ClassVar[str] = "train"
    shards: ClassVar[str] = "data"
    """How far the method may be spread: "none", "data" (replicas, ZeRO-1 and 2) or "zero3"."""
    draws_random_numbers: ClassVar[bool] = True

    steps: int = 100
    """Optimizer steps, >= 1."""

    batch_size: int = 1
    """Sequences per optimizer step over all ranks, >= 1. The length of a sequence belongs to the data."""

    micro_batch_size: int = 1
    """Sequences in one forward pass, >= 1; must divide `batch_size`. Changes memory, not the result."""

    learning_rate: float = 2e-4
    """Peak learning rate, > 0."""

    schedule: str = "cosine"
    """Learning rate after warm-up: "constant", "linear" or "cosine" (both to zero at the last step)."""

    warmup: float = 0.1
    """Fraction of the steps over which the learning rate rises from zero, in [0, 1)."""

    weight_decay: float = 0.0
    """Decoupled weight decay, >= 0."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, > 0."""

    optimizer: str = "adamw_torch"
    """Optimizer by its name in Hugging Face `TrainingArguments.optim`."""

    def __post_init__(self) -> None:
        check(self, "steps", at_least=1)
        check(self, "batch_size", at_least=1)
        check(self, "micro_batch_size", at_least=1)
        if self.batch_size % self.micro_batch_size:
            raise SettingsError(
                self.name, "micro_batch_size", self.micro_batch_size, f"a divisor of batch_size={self.batch_size}"
            )
        check(self, "learning_rate", above=0)
        check(self, "schedule", one_of=("constant", "linear", "cosine"))
        check(self, "warmup", at_least=0, below=1)
        check(self, "weight_decay", at_least=0)
        check(self, "max_grad_norm", above=0)

    def prepare(self, model: nn.Module, context: Context) -> nn.Module:
        """Dense base model (on the CPU, in the compute dtype) -> the module to train, on `context.device`."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(sum of the loss over the predicted tokens, number of predicted tokens). Default: next-token cross-entropy.

        batch["input_ids"] (sequences, length) int64; every position but the first of a sequence is predicted.
        """
        ids = batch["input_ids"]
        return next_token_loss_(model(input_ids=ids, use_cache=False).logits, ids)

    def after_backward(self, step: int) -> None:
        """Called with the gradients in place, before the optimizer."""

    def after_step(self, step: int) -> None:
        """Called after the optimizer."""

    def finish(self, model: nn.Module, directory: Path) -> dict[str, Formula]:
        """What training made: parameter name of the *base* -> its new formula (see `Formula.op`).

        A method whose result has a file form of its own (a PEFT adapter, say) writes it to `directory`/adapter.
        """
        raise NotImplementedError


M = TypeVar("M", bound=Method)


def method(
    name: str, *, source: str, needs: Sequence[type[Statistic]] = (), extra: str | None = None
) -> Callable[[type[M]], type[M]]:
    """Registers a class as the method `name`.

    source: authors (year), title or id, equation: where the method comes from.
    needs: the statistics that calibration has to collect for it.
    extra: the optional dependency group to install for it, if any.
    """

    def register(cls: type[M]) -> type[M]:
        known = METHODS.get(name)
        if known is not None and known.__module__ != cls.__module__:
            raise ValueError(f"method {name!r} is defined twice: in {known.__module__} and in {cls.__module__}")
        cls.name, cls.source, cls.needs, cls.extra = name, source, tuple(needs), extra
        METHODS[name] = cls
        return cls

    return register


def family(cls: type[Method]) -> str:
    """The folder that the method's file stands in, e.g. `quantize`."""
    return cls.__module__.split(".")[-2] if "." in cls.__module__ else "plugin"


def field_docs(cls: type) -> dict[str, str]:
    """Setting -> the string literal beneath it, for the class and those it inherits settings from."""
    docs: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(part):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0].body  # type: ignore[attr-defined]
        except (OSError, TypeError):  # a class made at run time has no source; its bases have
            continue
        for statement, below in itertools.pairwise(body):
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and isinstance(text, str):
                docs[statement.target.id] = inspect.cleandoc(text)
    return docs


def load_all() -> dict[str, type[Method]]:
    """Imports every method file of Pare and every `pare.methods` entry point; returns the registry."""
    root = importlib.import_module("pare.methods")
    for folder in pkgutil.iter_modules(root.__path__):
        if folder.name in NOT_METHODS:
            continue
        package = importlib.import_module(f"pare.methods.{folder.name}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"pare.methods.{folder.name}.{module.name}")
    for entry in importlib.metadata.entry_points(group="pare.methods"):
        entry.load()
    return METHODS
