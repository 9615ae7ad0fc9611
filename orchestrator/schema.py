"""The shape of each config group: names, types, defaults and ranges of what a person may set.

Methods bring their own settings. Everything else that `conf/` holds is described here, so that a wrong key, type or
value is refused before anything starts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from pare.orchestrator.errors import ConfigError
from pare.orchestrator.zero_config import check_config

DTYPES = ("float32", "bfloat16", "float16")


def need(condition: bool, key: str, got: Any, allowed: str, hint: str = "") -> None:
    """Raises ConfigError with where, got, allowed and what to type."""
    if not condition:
        raise ConfigError(f"{key} must be {allowed}, got {got!r}.{' Try: ' + hint if hint else ''}")


@dataclass
class Model:
    source: str = "smollm2"
    name: str | None = None
    revision: str | None = None
    path: str | None = None
    dtype: str = "bfloat16"
    tiny: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        need(self.source in ("smollm2", "tiny", "hf"), "model.source", self.source, "smollm2, tiny or hf", "model=smollm2")
        need(self.dtype in DTYPES, "model.dtype", self.dtype, "one of " + ", ".join(DTYPES), "model.dtype=bfloat16")
        if self.source == "hf":
            need(bool(self.path or self.name), "model.path or model.name", None, "given for model=hf", "model.path=DIRECTORY")
        hub = self.source == "hf" and self.path is None
        need(self.revision is None or hub, "model.revision", self.revision, "null unless model.name is a name of the hub")


@dataclass
class Windows:
    sequences: int = 8
    length: int = 512


@dataclass
class TrainWindows(Windows):
    packing: str = "concatenated"
    """How documents share a row. concatenated: one after another, cut at its end; separate: several to a row, none sees
    another; padded: each has rows of its own."""
    predict: str = "all"
    """Which tokens are learnt: all, or of a chat those of the assistant."""


def check_windows(key: str, windows: Windows) -> None:
    need(windows.sequences >= 1, f"{key}.sequences", windows.sequences, ">= 1")
    need(windows.length >= 8, f"{key}.length", windows.length, ">= 8")


@dataclass
class Data:
    source: str = "pydoc"
    name: str | None = None
    config: str | None = None
    """Which configuration of a data set that has several."""
    revision: str | None = None
    """Commit, tag or branch of a data set of the hub."""
    path: Any = None
    """A file or directory; with data=table also a pattern or a list of them."""
    column: str | None = "text"
    """Column of a data set that holds the text, or the messages of a chat."""
    rows: str = "text"
    """What a row of a table is: text, chat or labelled."""
    label: str = "label"
    """Column of a table that holds the label."""
    message: dict[str, str] = field(default_factory=lambda: {"role": "role", "content": "content"})
    """What a message of a chat calls its role and its content."""
    template: str = "{text}\nLabel: {label}"
    """How a labelled row becomes a text; words in braces are columns."""
    fractions: dict[str, float] = field(
        default_factory=lambda: {"train": 0.8, "validation": 0.05, "selection": 0.05, "test": 0.1}
    )
    seed: int = 0
    calibration: Windows = field(default_factory=Windows)
    train: TrainWindows = field(default_factory=TrainWindows)
    selection: Windows = field(default_factory=Windows)
    """What merges choose their members by."""
    validation: Windows = field(default_factory=Windows)
    """What searches measure their candidates on."""

    def __post_init__(self) -> None:
        known = ("pydoc", "text", "table", "hf")
        need(self.source in known, "data.source", self.source, "pydoc, text, table or hf", "data=pydoc")
        several = isinstance(self.path, list) and self.source == "table" and all(isinstance(p, str) for p in self.path)
        need(self.path is None or isinstance(self.path, str) or several, "data.path", self.path,
             "a path (data=table takes a list of them as well)", "data.path=FILE")  # fmt: skip
        need(self.rows in ("text", "chat", "labelled"), "data.rows", self.rows, "text, chat or labelled", "data.rows=text")
        need(self.rows == "text" or self.source == "table", "data.rows", self.rows, "text unless data=table", "data=table")
        need(set(self.message) == {"role", "content"}, "data.message", self.message, "a mapping of role and content",
             "data.message={role: from, content: value}")  # fmt: skip
        need(set(self.fractions) == {"train", "validation", "selection", "test"}, "data.fractions", sorted(self.fractions),
             "a share for each of train, validation, selection, test")  # fmt: skip
        need(all(f > 0 for f in self.fractions.values()) and abs(sum(self.fractions.values()) - 1) < 1e-6, "data.fractions",
             self.fractions, "positive and sum to 1")  # fmt: skip
        for role in ("calibration", "train", "selection", "validation"):
            check_windows(f"data.{role}", getattr(self, role))
        need(self.train.packing in ("concatenated", "separate", "padded"), "data.train.packing", self.train.packing,
             "concatenated, separate or padded", "data.train.packing=separate")  # fmt: skip
        need(self.train.predict in ("all", "assistant"), "data.train.predict", self.train.predict, "all or assistant")
        need(self.train.predict == "all" or self.rows == "chat", "data.train.predict", self.train.predict,
             "all unless rows are conversations", "data=table data.rows=chat")  # fmt: skip
        if self.source == "text":
            need(bool(self.path), "data.path", self.path, "the path of a text file for data=text", "data.path=FILE")
        if self.source == "table":
            need(bool(self.path), "data.path", self.path, "files of rows for data=table", "data.path='DIRECTORY/*.jsonl'")
        hub = self.source == "hf" and self.path is None
        need(self.revision is None or hub, "data.revision", self.revision, "null unless data.name is a name of the hub")
        need(self.config is None or self.source == "hf", "data.config", self.config, "null unless data=hf", "data=hf")


@dataclass
class Questions:
    n: int = 48
    choices: int = 4


@dataclass
class Speed:
    prompt_tokens: int = 128
    new_tokens: int = 16
    repeats: int = 3


METRIC_NAME = re.compile(r"[A-Za-z][\w-]*")
TAKEN = ("ppl", "kl", "acc", "acc_norm", "top1_agreement", "ppl_in_memory")
"""Names beneath `quality/` that are not a user's to give."""


@dataclass
class Pairs:
    """Minimal pairs of any JSONL file."""

    path: str | None = None
    good: str = "sentence_good"
    bad: str = "sentence_bad"
    group: str | None = None
    """Column by which accuracy is told apart as well; None: no groups."""


@dataclass
class Metric:
    """A Python function of the user that measures an export."""

    name: str
    function: str
    """FILE.py:FUNCTION or MODULE:FUNCTION, called with (model, tokenizer, windows)."""
    direction: str
    """`lower` or `higher`: which is better."""


@dataclass
class Evaluation:
    dtype: str = "float32"
    windows: Windows = field(default_factory=Windows)
    tolerance: float = 0.005
    questions: Questions = field(default_factory=Questions)
    tasks: list[str] = field(default_factory=list)
    """Tasks, groups or tags of lm-eval."""
    include_path: str | None = None
    """A directory with tasks of one's own as YAML."""
    num_fewshot: int | None = None
    """Examples before each question of `tasks`; None: as many as the task says."""
    limit: int | None = None
    """Only so many questions of each of `tasks`, the first ones; None: all."""
    pairs: Pairs = field(default_factory=Pairs)
    metrics: list[Metric] = field(default_factory=list)
    memory_gb: float | None = None
    """What a model may take of a device while it is evaluated; a larger one is read block by block. None: what is free."""
    speed: Speed = field(default_factory=Speed)

    def __post_init__(self) -> None:
        self.metrics = [m if isinstance(m, Metric) else Metric(**m) for m in self.metrics]
        need(
            self.num_fewshot is None or self.num_fewshot >= 0,
            "evaluation.num_fewshot",
            self.num_fewshot,
            ">= 0 (null: the task's own)",
        )
        need(self.limit is None or self.limit >= 1, "evaluation.limit", self.limit, ">= 1 (null: all questions)")
        need(self.memory_gb is None or self.memory_gb > 0, "evaluation.memory_gb", self.memory_gb, "> 0 (null: what is free)")
        need(len(set(self.tasks)) == len(self.tasks), "evaluation.tasks", self.tasks, "names that occur once")
        names = [m.name for m in self.metrics]
        need(len(set(names)) == len(names), "evaluation.metrics", names, "metrics of different names")
        for m in self.metrics:
            key = f"evaluation.metrics: {m.name}"
            need(bool(METRIC_NAME.fullmatch(m.name)), f"{key}: name", m.name, "letters, digits, _ and -")
            need(m.name not in TAKEN, f"{key}: name", m.name, f"none of {', '.join(TAKEN)}, which Pare measures itself")
            need(m.direction in ("lower", "higher"), f"{key}: direction", m.direction, "lower or higher, whichever is better")
            function = bool(m.function.rpartition(":")[0]) and m.function.rpartition(":")[2].isidentifier()
            need(function, f"{key}: function", m.function, "FILE.py:FUNCTION or MODULE:FUNCTION")
        need(self.dtype in DTYPES, "evaluation.dtype", self.dtype, "one of " + ", ".join(DTYPES), "evaluation.dtype=float32")
        check_windows("evaluation.windows", self.windows)
        need(self.tolerance > 0, "evaluation.tolerance", self.tolerance, "> 0", "evaluation.tolerance=0.005")
        need(self.questions.n >= 0, "evaluation.questions.n", self.questions.n, ">= 0 (0 leaves the questions out)")
        need(2 <= self.questions.choices <= 8, "evaluation.questions.choices", self.questions.choices, "in [2, 8]")
        need(self.speed.repeats >= 0, "evaluation.speed.repeats", self.speed.repeats, ">= 0 (0 leaves the speed out)")
        need(self.speed.prompt_tokens >= 1, "evaluation.speed.prompt_tokens", self.speed.prompt_tokens, ">= 1")
        need(self.speed.new_tokens >= 2, "evaluation.speed.new_tokens", self.speed.new_tokens, ">= 2")


@dataclass
class Engine:
    """How the steps of a training method are computed."""

    kind: str = "torch"
    """torch, or deepspeed, which spreads over the ranks what each of them would hold a copy of."""
    ranks: int = 1
    """Processes that train together, each with a part of every step's batch."""
    stage: int = 0
    """Of deepspeed: 1 spreads the optimizer's state, 2 gradients too, 3 weights too. 0 for torch."""
    offload: bool = False
    """Of deepspeed: whether what is spread lies in the memory of the host."""
    config: dict[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's own config, checked by `zero_config`."""

    def __post_init__(self) -> None:
        need(self.kind in ("torch", "deepspeed"), "engine.kind", self.kind, "torch or deepspeed", "engine=deepspeed_zero2")
        need(self.ranks >= 1, "engine.ranks", self.ranks, ">= 1", "engine.ranks=1")
        if self.kind == "torch":
            given = next((key for key in ("stage", "offload", "config") if getattr(self, key)), None)
            need(given is None, f"engine.{given}", given and getattr(self, given), "left out for engine=torch",
                 "engine=deepspeed_zero2")  # fmt: skip
        else:
            need(self.stage in (1, 2, 3), "engine.stage", self.stage, "1, 2 or 3", "engine=deepspeed_zero2")
            check_config(self.config, self.stage, self.offload)


EXPORTS = ("auto", "dense", "compressed-tensors", "adapter", "gguf", "pare")


@dataclass
class Export:
    """In what form a model is written down, opened again and measured."""

    format: str = "auto"
    """auto: the form that says exactly what the model is and that others can open, else Pare's own; or one of the others, which
    fails where it cannot say the model."""

    def __post_init__(self) -> None:
        need(self.format in EXPORTS, "export.format", self.format, "one of " + ", ".join(EXPORTS), "export.format=auto")


ADDRESS = re.compile(r"local|auto|(ray://)?[^\s:/]+:\d{1,5}")


@dataclass
class Cluster:
    address: str = "local"
    """`local`: a Ray of its own on this machine; `auto`: the Ray that runs here; else HOST:PORT or ray://HOST:PORT."""
    slots: int | None = None
    device: str = "auto"
    gpus: list[int] | None = None
    """Which GPUs of this machine, by their numbers in `nvidia-smi`; None takes all that are visible."""
    gpu_memory_gb: float | None = None
    memory_gb: float | None = None
    disk_gb: float | None = None
    keep_going: bool = True
    pending_s: float = 600.0
    """A task that no node has room for is given up after so many seconds."""
    stall_s: float = 1800.0
    """A task that reports no progress for so many seconds is stopped and counts as failed."""
    labels: dict[str, str] = field(default_factory=dict)
    """Only nodes of the cluster that carry these labels."""

    def __post_init__(self) -> None:
        need(bool(ADDRESS.fullmatch(self.address)), "cluster.address", self.address, "local, auto, HOST:PORT or ray://HOST:PORT",
             "cluster.address=auto")  # fmt: skip
        need(self.slots is None or self.slots >= 1, "cluster.slots", self.slots, ">= 1")
        need(self.device in ("auto", "cpu", "cuda"), "cluster.device", self.device, "auto, cpu or cuda", "cluster.device=auto")
        if self.gpus is not None:
            fits = len(set(self.gpus)) == len(self.gpus) > 0 and min(self.gpus) >= 0
            need(fits, "cluster.gpus", self.gpus, "one or more different numbers >= 0", "cluster.gpus=[0]")
            need(self.device != "cpu", "cluster.gpus", self.gpus, "null with cluster.device=cpu", "cluster.device=cuda")
        for key in ("gpu_memory_gb", "memory_gb", "disk_gb", "pending_s", "stall_s"):
            value = getattr(self, key)
            need(value is None or value > 0, f"cluster.{key}", value, "> 0")


@dataclass
class StoreOptions:
    url: str | None = None
    """A directory or an fsspec URL (s3://BUCKET/PREFIX); None: PARE_HOME/store."""
    keep: str = "all"
    """Whose files outlive the sweep: `all`, those of trials on the `pareto` front, or `exports` alone."""
    limit_gb: float | None = None

    def __post_init__(self) -> None:
        need(
            self.url is None or bool(self.url.strip()),
            "store.url",
            self.url,
            "a directory or a URL",
            "store.url=s3://BUCKET/PREFIX",
        )
        need(self.keep in ("all", "pareto", "exports"), "store.keep", self.keep, "all, pareto or exports", "store.keep=exports")
        need(self.limit_gb is None or self.limit_gb > 0, "store.limit_gb", self.limit_gb, "> 0")


@dataclass
class Budget:
    """What a sweep may spend; it stops cleanly where one of them is reached. None: without end."""

    gpu_hours: float | None = None
    wall_s: float | None = None
    trials: int | None = None

    def __post_init__(self) -> None:
        for key in ("gpu_hours", "wall_s", "trials"):
            value = getattr(self, key)
            need(value is None or value > 0, f"budget.{key}", value, "> 0 (null: no limit)", f"budget.{key}=null")


@dataclass
class Query:
    """Which trials of the sweep a merge takes."""

    blocks: list[str] = field(default_factory=list)
    """Names of blocks; `*` and `?` as in file names."""
    paths: list[str] = field(default_factory=list)
    """Directories of full models of the same base, or of LoRA adapters on it, that are members beside the trials."""
    top: int | None = None
    """How many of the best by the selection split; None takes all."""

    @property
    def foreign(self) -> dict[str, str]:
        """Name as a member -> directory, of what does not come from this sweep."""
        return {f"path{i}": path for i, path in enumerate(self.paths)}


@dataclass
class Tracking:
    enabled: bool = True
    uri: str | None = None
    experiment: str = "pare"


@dataclass
class SweepOptions:
    invalid: str = "error"

    def __post_init__(self) -> None:
        need(self.invalid in ("error", "skip"), "sweep.invalid", self.invalid, "error or skip", "sweep.invalid=skip")


GROUPS: dict[str, type] = {
    "model": Model,
    "data": Data,
    "evaluation": Evaluation,
    "engine": Engine,
    "export": Export,
    "cluster": Cluster,
    "tracking": Tracking,
    "store": StoreOptions,
    "budget": Budget,
    "sweep": SweepOptions,
}
"""Top-level key -> its shape."""

PLAIN: dict[str, Any] = {
    "name": None,
    "seed": 0,
    "dtype": "float32",
    "blocks": {},
    "plugins": [],
    "recipe": None,
    "experiment": None,
}
"""Top-level keys without a shape of their own -> their defaults."""
