"""How fast this machine computes: a probe of a few hundredths of a second, once in a process.

A GPU is probed in a process of its own, so that the driver holds no memory there, and the answer is kept between calls.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pare.orchestrator import hardware

SIDE = {"cpu": 256, "cuda": 4096}
"""Side of the square matrices that are multiplied: small enough on a CPU to stay in one core's cache."""

COPIED = {"cpu": 16 << 20, "cuda": 1 << 30}
"""Bytes that are copied."""


@dataclass(frozen=True)
class Machine:
    """One slot of it: one core or one GPU."""

    float32: float
    """Floating-point operations per second of a matrix product in float32."""
    bfloat16: float
    bandwidth: float
    """Bytes per second that a copy reads and writes."""

    def flops(self, dtype: str) -> float:
        return self.float32 if dtype == "float32" else self.bfloat16


@functools.cache
def machine(device: str) -> Machine:
    """The speed of one slot on this machine; of a GPU that was probed before, what was found then."""
    if device == "cpu":
        return probe(device)
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pare" / f"{hardware.key(device)}.json"
    if not kept.exists():
        found = subprocess.run(
            [sys.executable, "-P", "-m", "pare.orchestrator.machine", device], capture_output=True, text=True, timeout=120
        )
        if found.returncode:
            raise RuntimeError(f"the speed of {device} could not be probed:\n{found.stderr[-2000:]}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(found.stdout)
    return Machine(**json.loads(kept.read_text()))


def probe(device: str) -> Machine:
    """Measures; the best of many readings, because a neighbour can only make one slower."""
    import torch

    def best(action: Callable[[], object], readings: int) -> float:
        found = []
        for _ in range(readings):
            start = time.perf_counter()
            action()
            if device == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
        return min(found)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        speeds = {}
        for name in ("float32", "bfloat16"):
            a = torch.ones(SIDE[device], SIDE[device], dtype=getattr(torch, name), device=device)
            speeds[name] = 2 * SIDE[device] ** 3 / best(functools.partial(torch.mm, a, a), 40)
        source = torch.ones(COPIED[device] // 4, device=device)
        target = torch.empty_like(source)
        return Machine(**speeds, bandwidth=2 * COPIED[device] / best(functools.partial(target.copy_, source), 20))
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    print(json.dumps(asdict(probe(sys.argv[1]))))
