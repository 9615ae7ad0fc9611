"""The shape of each config group: names, types, defaults and ranges of what a person may set.

Methods bring their own settings. Everything else that `conf/` holds is described here, so that a wrong key, type or
value is refused before anything starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pare.orchestrator.errors import ConfigError

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


@dataclass
class Windows:
    sequences: int = 8
    length: int = 512


@dataclass
class Data:
    source: str = "pydoc"
    name: str | None = None
    path: str | None = None
    column: str = "text"
    fractions: dict[str, float] = field(
        default_factory=lambda: {"train": 0.8, "validation": 0.05, "selection": 0.05, "test": 0.1}
    )
    seed: int = 0
    calibration: Windows = field(default_factory=Windows)
    train: Windows = field(default_factory=Windows)

    def __post_init__(self) -> None:
        need(self.source in ("pydoc", "text", "hf"), "data.source", self.source, "pydoc, text or hf", "data=pydoc")
        need(set(self.fractions) == {"train", "validation", "selection", "test"}, "data.fractions", sorted(self.fractions),
             "a share for each of train, validation, selection, test")  # fmt: skip
        need(all(f > 0 for f in self.fractions.values()) and abs(sum(self.fractions.values()) - 1) < 1e-6, "data.fractions",
             self.fractions, "positive and sum to 1")  # fmt: skip
        for role, windows in (("calibration", self.calibration), ("train", self.train)):
            need(windows.sequences >= 1, f"data.{role}.sequences", windows.sequences, ">= 1")
            need(windows.length >= 8, f"data.{role}.length", windows.length, ">= 8")
        if self.source == "text":
            need(bool(self.path), "data.path", self.path, "the path of a text file for data=text", "data.path=FILE")


@dataclass
class Questions:
    n: int = 48
    choices: int = 4


@dataclass
class Speed:
    prompt_tokens: int = 128
    new_tokens: int = 16
    repeats: int = 3


@dataclass
class Evaluation:
    dtype: str = "float32"
    windows: Windows = field(default_factory=Windows)
    tolerance: float = 0.005
    questions: Questions = field(default_factory=Questions)
    speed: Speed = field(default_factory=Speed)

    def __post_init__(self) -> None:
        need(self.dtype in DTYPES, "evaluation.dtype", self.dtype, "one of " + ", ".join(DTYPES), "evaluation.dtype=float32")
        need(self.windows.sequences >= 1, "evaluation.windows.sequences", self.windows.sequences, ">= 1")
        need(self.windows.length >= 8, "evaluation.windows.length", self.windows.length, ">= 8")
        need(self.tolerance > 0, "evaluation.tolerance", self.tolerance, "> 0", "evaluation.tolerance=0.005")
        need(self.questions.n >= 0, "evaluation.questions.n", self.questions.n, ">= 0 (0 leaves the questions out)")
        need(2 <= self.questions.choices <= 8, "evaluation.questions.choices", self.questions.choices, "in [2, 8]")
        need(self.speed.repeats >= 0, "evaluation.speed.repeats", self.speed.repeats, ">= 0 (0 leaves the speed out)")
        need(self.speed.prompt_tokens >= 1, "evaluation.speed.prompt_tokens", self.speed.prompt_tokens, ">= 1")
        need(self.speed.new_tokens >= 2, "evaluation.speed.new_tokens", self.speed.new_tokens, ">= 2")


@dataclass
class Cluster:
    address: str = "local"
    slots: int | None = None
    device: str = "auto"
    memory_gb: float | None = None
    disk_gb: float | None = None
    keep_going: bool = True

    def __post_init__(self) -> None:
        need(self.address == "local", "cluster.address", self.address, "local (submission to clusters is not built yet)")
        need(self.slots is None or self.slots >= 1, "cluster.slots", self.slots, ">= 1")
        need(self.device in ("auto", "cpu", "cuda"), "cluster.device", self.device, "auto, cpu or cuda", "cluster.device=auto")
        for key in ("memory_gb", "disk_gb"):
            value = getattr(self, key)
            need(value is None or value > 0, f"cluster.{key}", value, "> 0")


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
    "cluster": Cluster,
    "tracking": Tracking,
    "sweep": SweepOptions,
}
"""Top-level key -> its shape."""

PLAIN = ("name", "seed", "dtype", "blocks", "plugins", "recipe", "experiment")
"""Top-level keys without a shape of their own."""
