"""What one task sees of the world. A task type is a module `pare.workers.tasks.<type>` with `run(ctx) -> dict`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pare.workers.checkpoint import NO_CHECKPOINT, Checkpoint


class TaskError(Exception):
    """A task cannot be done. `failure` is its class (see docs/architecture.md), which decides about another attempt."""

    def __init__(self, message: str, failure: str = "user_error") -> None:
        super().__init__(message)
        self.failure = failure


@dataclass
class TaskContext:
    """Handed to `run` of a task module. `run` writes files under `out` and returns plain JSON: the result."""

    spec: dict[str, Any]
    """What to do: all that enters the fingerprint besides inputs and code."""

    inputs: dict[str, Path]
    """Role -> directory of the published, verified artifact."""

    out: Path
    """Private, empty directory of this attempt; published whole when `run` returns."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    resolve: Callable[[str], Path] = Path
    """Fingerprint -> directory, for artifacts that an input refers to (an adapter's base)."""

    fingerprint_of: dict[str, str] = field(default_factory=dict)
    """Role -> fingerprint of the input, to refer to it from what is written."""

    progress: Callable[[int, int, str], None] = lambda done, total, unit: None
    """progress(done, total, unit): shown live; the unit is a plural, e.g. "steps"."""

    point: Callable[[int, dict[str, float]], None] = lambda step, values: None
    """point(step, {name: value}): a point of a live curve. A resumed task gives the points after its checkpoint anew."""

    checkpoint: Checkpoint = NO_CHECKPOINT
    """Where a long task keeps how far it has come."""
