"""Our side: the tasks that a sweep runs, in one process, from a model's directory to an artifact on disk."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.core.inputs import perplexity, place, progress_to_stderr, timed
from pare.workers.blocks import open_blocks
from pare.workers.models import ModelArtifact, load_in_memory
from pare.workers.task import TaskContext
from pare.workers.tasks import calibrate, compress

GRAM = {"module": "pare.methods.ops.statistics", "class": "Gram"}
GRID = {"group_size": 64, "symmetric": False}


class Workplace:
    def __init__(self, root: Path) -> None:
        self.root, self.model = root, place() / "model"

    def resolve(self, fingerprint: str) -> Path:
        return self.model if fingerprint == "model" else self.root / fingerprint

    def run(self, task: Any, name: str, spec: dict[str, Any], *inputs: str) -> Path:
        out = self.root / name
        out.mkdir()
        known = {"model": self.model, "tokens": place() / "tokens"}
        paths = {role: known.get(role, self.root / role) for role in inputs}
        task.run(
            TaskContext({"dtype": "bfloat16", **spec}, paths, out, resolve=self.resolve, fingerprint_of={r: r for r in inputs})
        )
        return out

    def sequential(self, method: str, **settings: Any) -> Path:
        """Each block calibrated on what the compressed blocks before it put out."""
        spec = {"method": method, "settings": {"inputs": "compressed", **settings}}
        return self.run(compress, "made", spec, "model", "tokens")

    def dense(self, bits: list[int]) -> Path:
        """Statistics of the dense model once, then one artifact after another."""
        self.run(calibrate, "statistics", {"statistics": [GRAM]}, "model", "tokens")
        for b in bits:
            spec = {"method": "gptq", "settings": {"bits": b, "inputs": "dense", **GRID}}
            made = self.run(compress, f"bits{b}", spec, "model", "statistics")
        return made

    def perplexity(self, made: Path) -> float:
        return perplexity(load_in_memory(ModelArtifact(made, self.resolve), torch.float32))


def main(name: str, argument: str, workplace: Workplace) -> dict[str, float]:
    # For its imports: the peer's libraries are there, too, and its model besides, when the clock starts.
    open_blocks(ModelArtifact(workplace.model, workplace.resolve), torch.bfloat16)
    legs: dict[str, Callable[[], Path]] = {
        "gptq_sequential": lambda: workplace.sequential("gptq", bits=int(argument), **GRID),
        "gptq_dense": lambda: workplace.dense([int(bits) for bits in argument.split(",")]),
        "sparsegpt": lambda: workplace.sequential("sparsegpt", sparsity=float(argument)),
        "wanda": lambda: workplace.sequential("wanda", sparsity=float(argument)),
    }
    made: list[Path] = []
    values = timed(lambda: made.append(legs[name]()))
    return values | {"ppl": workplace.perplexity(made[0])}


if __name__ == "__main__":
    answer = os.dup(1)
    progress_to_stderr()
    with tempfile.TemporaryDirectory() as root:
        line = json.dumps(main(sys.argv[1], sys.argv[2], Workplace(Path(root))))
    os.write(answer, f"{line}\n".encode())
