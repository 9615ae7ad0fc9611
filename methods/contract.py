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
import functools
import importlib
import importlib.metadata
import inspect
import itertools
import pkgutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pare.methods.anatomy.describe import Fold
from pare.methods.ops.gradients import GradientStatistic
from pare.methods.ops.heads import Head
from pare.methods.ops.losses import next_token_loss_
from pare.methods.ops.statistics import Statistic
from pare.methods.parts.formula import Formula
from pare.methods.settings import SettingsError, check

METHODS: dict[str, type[Method]] = {}
"""Every registered method by name; `load_all` fills it."""

NOT_METHODS = ("parts", "anatomy", "ops", "contract", "settings")
"""Names beneath `pare.methods` that hold what methods are made of."""


@dataclass(frozen=True)
class Teacher:
    """A model whose outputs on the training data are known beforehand: they are a column of that data."""

    column: str
    """Name of the column: the teacher's final hidden states (n, length, width) on the same tokens."""

    head: Head
    """From these to its logits over the student's vocabulary, on the device."""

    weight: float = 1.0
    """Its share in the loss; those of all teachers sum to 1."""


@dataclass
class Context:
    """The only door of a method to the outside."""

    device: torch.device
    """Where tensors are worked on."""

    seed: int = 0
    """Seed of every random draw of the method."""

    report: Callable[[str, float], None] = lambda name, value: None
    """Writes a named number down with the result, e.g. `report("gptq/fallbacks", 0)`. Numbers of one name are added up."""

    formulas: Mapping[str, Formula] = field(default_factory=dict)
    """For a method of kind train: name of a weight -> what it is made of before this stage, in the dtypes in which it is
    stored; a plain dense weight where nothing has been done to it. Read anew at each look."""

    teachers: Sequence[Teacher] = ()
    """For a method that `has_teachers`: those that it learns from, at least one."""

    data: Mapping[str, Tensor] = field(default_factory=dict)
    """Columns of the training data, as `TrainMethod.loss` takes rows of them, for a start that looks at some of it."""

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
    """Name of the statistic -> its value, for the statistics the method needs; `<statistic>:<parameter name>` where it is one
    over gradients."""

    original: dict[str, Tensor] = field(default_factory=dict)
    """Parameter name -> weight (out, in), float32, of the base model, before any stage. Only for a method that
    `reads_original`."""

    fold: Fold | None = None
    """What stands before the group and can take up factors on its input features."""


class Method:
    """What all kinds share. The settings are the dataclass fields of the subclass."""

    kind: ClassVar[str]
    name: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[tuple[type[Statistic], ...]] = ()
    """What it needs to know of inputs."""
    needs_gradients: ClassVar[tuple[type[GradientStatistic], ...]] = ()
    """What it needs to know of the gradients of the model as it stands before this stage."""
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
    reads_original: ClassVar[bool] = False
    """Whether it wants to see the base model's weights beside what an earlier stage has made of them."""
    folds: ClassVar[bool] = False
    """Whether it defines `fold`."""
    inputs: str = "dense"
    """Under calibration a block reads what the "dense" or the "compressed" blocks before it put out. A method with
    statistics may make this a setting."""

    def fold(self, group: InputGroup, context: Context) -> Tensor | None:
        """Factors s > 0 (in,) by which the weights' input features are to be multiplied; None leaves them alone.

        What stands before the group is divided by s, so that the model stays what it was. Asked of every group of a block with
        a `group.fold` before any of them is compressed; `compress` then sees weights and statistics with all factors in.
        """
        raise NotImplementedError(f"{type(self).__name__} folds, but does not define fold")

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
    keeps_formulas: ClassVar[bool] = False
    """Whether linears that earlier stages have compressed come to `prepare` as `methods.parts.linear.FrozenLinear`."""
    has_teachers: ClassVar[bool] = False
    """Whether it learns from other models: its stage then names them, by default the base model alone."""
    learns_prompt: ClassVar[bool] = False
    """Whether what it publishes is a prompt (`methods.ops.prompts.write_prompt`) and no formula: no stage can follow."""
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
    """Optimizer by its name in Hugging Face `TrainingArguments.optim`, e.g. "adamw_8bit", whose state takes 2 bytes a trained
    number in place of 8; paged ones leave the GPU's memory when there is need of it."""

    gradient_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass: less memory, about a third more time."""

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

        batch: columns of some rows of the training data, each (sequences, length, ...). `input_ids`, int64; perhaps `labels`,
        the same with a negative number where a token is not to be predicted, else every one but the first of a sequence is;
        and perhaps `position_ids`, which begin anew with every document of a sequence: none of them sees another.
        """
        ids = batch["input_ids"]
        apart = {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
        return next_token_loss_(model(input_ids=ids, use_cache=False, **apart).logits, batch.get("labels", ids))

    def after_backward(self, step: int) -> None:
        """Called with the gradients in place, before the optimizer."""

    def after_step(self, step: int) -> None:
        """Called after the optimizer."""

    def state(self) -> dict[str, Any]:
        """What the method carries from one step to the next besides the parameters that are trained: lists and dicts of
        tensors and plain JSON values. Saved with a checkpoint, after `after_step`."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Puts a saved `state` in force. Called after `prepare`, before the first step that is taken after it."""

    def finish(self, model: nn.Module, directory: Path) -> dict[str, Formula]:
        """What training made: parameter name of the *base* -> its new formula (see `Formula.op`).

        A method whose result has a file form of its own (a PEFT adapter, say) writes it to `directory`/adapter. One that
        `learns_prompt` returns nothing and writes that.
        """
        raise NotImplementedError


@dataclass
class Member:
    """One of the models that are merged, read a weight at a time and never held whole."""

    name: str
    """Name of the trial that made it."""

    score: float
    """Its selection score: mean next-token loss in nats on the selection windows; lower is better. Finite."""

    names: Sequence[str]
    """Parameters in which it may differ from the base that all members share."""

    formula: Callable[[str], Formula | None]
    """Parameter name -> its formula relative to that base, read anew at each call; None where the base's value stands."""


@dataclass
class Merged:
    """What a merge made of its members."""

    weights: dict[str, float]
    """Member -> its share in the result, for the members that went in, in the order in which they did."""

    formulas: Iterable[tuple[str, Formula]]
    """Parameter name and formula relative to the base, one after another: worked out as they are asked for, once."""

    score: float
    """Selection score of the result."""

    decisions: list[dict[str, Any]] = field(default_factory=list)
    """What was tried in which order and why it was kept or not, as plain JSON."""


Candidate = Iterable[tuple[str, Formula]]
"""A model as parameter names and formulas relative to the base that the members share; what it does not name is the base's."""


class Evaluator(Protocol):
    """Scores candidates on the selection windows. The costly part, a pass over all of them for each question. A merge that is
    resumed asks the same questions in the same order and gets the answers that are known already at no cost."""

    def __call__(self, candidate: Candidate) -> float:
        """Mean next-token loss, nats; infinite where it gives a token no finite likelihood."""

    def slopes(self, candidate: Candidate, along: Callable[[str, Tensor], list[float]]) -> tuple[float, dict[str, list[float]]]:
        """The loss, and for each of the candidate's names what `along` makes of it and of the gradient of the loss with respect
        to that weight, (out, in), float32. Numbers are kept, gradients are not. An infinite loss has no slopes."""


class MergeMethod(Method):
    """(members, base, evaluator) -> one model. Everything passes one weight at a time, so that no member is held whole."""

    kind: ClassVar[str] = "merge"
    takes: ClassVar[tuple[int, int | None]] = (1, None)
    """The fewest and the most members that it makes sense of; None: any number."""
    keeps_updates: ClassVar[bool] = True
    """Whether low-rank updates come out as low-rank updates, and not as dense weights."""

    def check_members(self, names: Sequence[str], most: int | None = None) -> None:
        """Raises `SettingsError` where the settings do not fit the members. Called while planning, too.

        names: the members, or all that may become one, of which `most` will.
        """
        low, high = self.takes
        n = min(len(names), most or len(names))
        if n < low or (high is not None and n > high):
            allowed = f"exactly {low}" if low == high else f"at least {low}"
            raise SettingsError(self.name, "members", n, allowed)

    def questions(self, members: int) -> int:
        """How many questions `merge` asks of the evaluator at most."""
        return 1

    def shares(self, members: Sequence[str]) -> dict[str, float]:
        """Member -> its share in the result, by the settings alone."""
        return dict.fromkeys(members, 1 / len(members))

    def merge(self, members: Sequence[Member], base: Callable[[str], Tensor], evaluate: Evaluator, context: Context) -> Merged:
        """members: at least one, all finite and on one base; whatever order they come in, the answer is the same.

        base: parameter name -> the base's dense weight (out, in), float32.

        The default takes in every member, maps `merge_weight` over the weights, and asks what comes out for its score: all that
        a method of one weight at a time needs.
        """
        members = best_first(members)
        base_there = on_device(base, context.device)
        known = self.survey(members, base_there, context)

        def model() -> Iterator[tuple[str, Formula]]:
            for name, formulas in weight_by_weight(members, context.device):
                formula = self.merge_weight(name, formulas, base_there, known, context)
                if formula is not None:
                    yield name, formula

        return Merged(self.shares([member.name for member in members]), model(), evaluate(model()))

    def survey(self, members: Sequence[Member], base: Callable[[str], Tensor], context: Context) -> Any:
        """What it has to know of all weights before it works on the first: `known` of `merge_weight`."""

    def merge_weight(
        self,
        name: str,
        formulas: Mapping[str, Formula | None],
        base: Callable[[str], Tensor],
        known: Any,
        context: Context,
    ) -> Formula | None:
        """One weight. formulas: member -> its formula, the best member first, None where it leaves the base's value. The answer
        is relative to the base as well. All on `context.device`. Called twice for each weight, and answers twice the same."""
        raise NotImplementedError(f"{type(self).__name__} defines neither merge nor merge_weight")


def best_first(members: Sequence[Member]) -> list[Member]:
    """By score, and of equal ones by name."""
    return sorted(members, key=lambda member: (member.score, member.name))


def weight_by_weight(
    members: Sequence[Member], device: torch.device | None = None
) -> Iterator[tuple[str, dict[str, Formula | None]]]:
    """Every weight that one of the members changes: its name, and member -> its formula, read when it is its turn."""
    for name in dict.fromkeys(name for member in members for name in member.names):
        formulas = {member.name: member.formula(name) for member in members}
        if any(formulas.values()):
            yield name, {member: f and f.to(device) if device else f for member, f in formulas.items()}


def on_device(base: Callable[[str], Tensor], device: torch.device) -> Callable[[str], Tensor]:
    """The base with its weights on a device."""
    return lambda name: base(name).to(device)


Level = int | float
"""A value of the setting that tells levels apart, e.g. the bits of a code."""

Allocation = dict[str, Level]
"""Parameter name of a linear -> its level."""


@dataclass
class LevelTable:
    """What each linear may become, what that costs, and what harm it does."""

    linears: list[str]
    """Parameter names, in the order in which the model runs them."""

    blocks: list[int]
    """Of each linear: the index of its block."""

    sizes: list[int]
    """Of each linear: its number of weights."""

    levels: list[Level]
    """Values of the setting that is varied, the one that takes the fewest bytes first."""

    cost: list[list[int]]
    """[linear][level]: bytes as stored, scales and zero points included."""

    error: list[list[float]]
    """[linear][level]: harm, finite, in a unit in which the harm of one linear adds to that of another."""

    def allocation(self, choice: Sequence[int]) -> Allocation:
        """choice: of each linear the index of its level."""
        return {name: self.levels[k] for name, k in zip(self.linears, choice, strict=True)}

    def bytes(self, choice: Sequence[int]) -> int:
        return sum(cost[k] for cost, k in zip(self.cost, choice, strict=True))


@dataclass
class Problem:
    """What a search is to solve. Does not change while it runs."""

    table: LevelTable
    windows: int
    """Windows of text on which candidates can be compared."""

    length: int
    """Tokens of a window."""

    seed: int = 0
    """Seed of every random draw of the method."""

    spent: int = 0
    """Tokens that were spent on the errors of the table."""


@dataclass
class Question:
    """A candidate of which the search wants to know the KL divergence of the dense model from it, in nats per token."""

    choice: list[int]
    """Of each linear the index of its level."""

    pieces: list[tuple[int, int]]
    """What to take the mean over: (window, so many tokens from its start, at least 2)."""


State = dict[str, Any]
"""All that a search knows so far, as plain JSON. Its `trace` holds an entry for each generation that has ended."""


@dataclass
class AllocateMethod(Method):
    """start -> (ask, tell)* -> answer: a level for every linear, within the bytes that the target allows.

    The verbs are pure functions of the problem and the state, so that a search that was stopped anywhere goes on from its
    state. An exact solver asks nothing.
    """

    kind: ClassVar[str] = "allocate"

    target: float = 3.0
    """Bytes to stay within, as a value of the setting that is varied: those of a model whose linears all stand at that level,
    between two levels in proportion. Must lie within the range of the levels."""

    scores: str = "measured"
    """Where the errors of the table come from: "measured", the KL divergence with one linear at the lowest level, for each in
    turn, and from level to level in proportion to the linear's own output error; or "local", that output error relative to
    the output, which takes no forward pass and makes no difference between linears that matter and those that do not."""

    score_tokens: int = 64
    """Tokens on which each linear is measured, >= 2. All linears being measured counts for more than precision."""

    def __post_init__(self) -> None:
        check(self, "scores", one_of=("measured", "local"))
        check(self, "score_tokens", at_least=2)

    @property
    def reads_errors(self) -> bool:
        """Whether the errors of the table are used, so that they are worth measuring."""
        return True

    @property
    def generations_at_most(self) -> int:
        """How many generations there may be, to show progress by."""
        return 0

    def check_levels(self, levels: Sequence[Level]) -> None:
        """Raises `SettingsError` where no allocation of these levels meets the target. Called while planning, too."""
        if not levels or not min(levels) <= self.target <= max(levels):
            allowed = (
                f"in [{min(levels)}, {max(levels)}], the range of the levels"
                if levels
                else "one of the levels, of which there are none"
            )
            raise SettingsError(self.name, "target", self.target, allowed)

    def budget(self, table: LevelTable) -> int:
        """The bytes that the target allows."""
        self.check_levels(table.levels)
        uniform = sorted((level, sum(cost[k] for cost in table.cost)) for k, level in enumerate(table.levels))
        low, bytes_low = max(pair for pair in uniform if pair[0] <= self.target)
        high, bytes_high = min(pair for pair in uniform if pair[0] >= self.target)
        part = (self.target - low) / (high - low) if high > low else 0.0
        return bytes_low + int((bytes_high - bytes_low) * part)

    def start(self, problem: Problem) -> State:
        """The state before the first question."""
        raise NotImplementedError

    def ask(self, problem: Problem, state: State, n: int) -> list[Question]:
        """At most `n` questions that are open, the same ones until they are told; none when the search has ended."""
        raise NotImplementedError

    def tell(self, problem: Problem, state: State, kl: Sequence[float], tokens: int) -> State:
        """The state after the answers to the first `len(kl)` open questions, which took so many tokens."""
        raise NotImplementedError

    def answer(self, problem: Problem, state: State) -> list[int]:
        """The best choice so far: of each linear the index of its level."""
        raise NotImplementedError


M = TypeVar("M", bound=Method)


def method(
    name: str, *, source: str, needs: Sequence[type[Statistic | GradientStatistic]] = (), extra: str | None = None
) -> Callable[[type[M]], type[M]]:
    """Registers a class as the method `name`.

    source: authors (year), title or id, equation: where the method comes from.
    needs: the statistics that have to be collected for it, over inputs or over gradients.
    extra: the optional dependency group to install for it, if any.
    """

    def register(cls: type[M]) -> type[M]:
        known = METHODS.get(name)
        if known is not None and known.__module__ != cls.__module__:
            raise ValueError(f"method {name!r} is defined twice: in {known.__module__} and in {cls.__module__}")
        cls.needs = tuple(need for need in needs if issubclass(need, Statistic))
        cls.needs_gradients = tuple(need for need in needs if issubclass(need, GradientStatistic))
        if cls.needs_gradients and getattr(cls, "folds", False):
            asked = ", ".join(need.name for need in cls.needs_gradients)
            raise ValueError(
                f"method {name!r} folds and asks for gradients ({asked}), which would be those of other weights "
                "than it is given. Let it fold, or ask for gradients; two methods can be stages of one recipe"
            )
        cls.name, cls.source, cls.extra = name, source, extra
        METHODS[name] = cls
        return cls

    return register


def family(cls: type[Method]) -> str:
    """The folder that the method's file stands in, e.g. `quantize`."""
    return cls.__module__.split(".")[-2] if "." in cls.__module__ else "plugin"


def field_docs(cls: type) -> dict[str, str]:
    """Setting -> the string literal beneath it, for the class and those it inherits settings from."""
    return {name: doc for part in reversed(cls.__mro__) for name, doc in own_field_docs(part).items()}


@functools.cache  # to find a class in its file takes milliseconds, and most methods share what they inherit from
def own_field_docs(cls: type) -> dict[str, str]:
    """`field_docs` of what the class itself declares."""
    if not dataclasses.is_dataclass(cls):
        return {}
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    except (OSError, TypeError):  # a class made at run time has no source; its bases have
        return {}
    docs: dict[str, str] = {}
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
