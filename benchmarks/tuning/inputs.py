"""What both sides read: a model's directory, rows to train on, settings; and how a training is timed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from benchmarks.core.inputs import LENGTH, tokens

BATCH, MICRO_BATCH, RANK, ALPHA, LEARNING_RATE, WARMUP = 4, 2, 8, 16, 2e-4, 0.1


@dataclass(frozen=True)
class Asked:
    """The argument of a reading: `DTYPE,STEPS`."""

    dtype: str
    steps: int

    @classmethod
    def of(cls, argument: str) -> Asked:
        dtype, steps = argument.split(",")
        return cls(dtype, int(steps))

    @property
    def settings(self) -> dict[str, Any]:
        """Of our methods; the peer has the same in its own words."""
        loop = {"steps": self.steps, "batch_size": BATCH, "micro_batch_size": MICRO_BATCH, "learning_rate": LEARNING_RATE}
        return {**loop, "warmup": WARMUP, "rank": RANK, "alpha": ALPHA}

    @property
    def warmup_steps(self) -> int:
        return math.ceil(WARMUP * self.steps)


@dataclass
class Clock:
    """When each step was done."""

    times: list[float] = field(default_factory=list)

    def tick(self, *_: Any) -> None:
        self.times.append(time.perf_counter())

    @property
    def tokens_s(self) -> float:
        """Tokens a second from the end of the first step to that of the last; the first one warms up kernels and memory."""
        return (len(self.times) - 1) * BATCH * LENGTH / (self.times[-1] - self.times[0])


def rows(steps: int) -> Tensor:
    """(rows, length) in the order in which both sides read them: that of our loop with seed 0."""
    from pare.workers.training import shuffled

    ids = tokens("tokens")
    return ids[shuffled(len(ids), steps * BATCH, 0)]
