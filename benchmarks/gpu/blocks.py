"""Compression of Llama-8B-shaped blocks on one device: seconds and memory for a block, and what 32 of them would take.

    python -m benchmarks.gpu.blocks                                   on the GPU there is; benchmarks/results/gpu_blocks.json
    python -m benchmarks.gpu.blocks --hidden 64 --ffn 128 --heads 4 --sequences 2 --length 16 --result /tmp/x.json      anywhere

Weights are random, of the shape alone, and activations wait in host memory as in a real run. Needs neither Ray nor MLflow.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import ROOT, provenance
from pare.methods.anatomy.describe import describe
from pare.methods.anatomy.views import weight_of
from pare.methods.contract import Context, InputGroup, load_all
from pare.workers.calibration import stream

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 4, "group_size": -1},
    "gptq": {"bits": 4, "group_size": -1, "mse": False},
    "gptq_mse": {"bits": 4, "group_size": -1, "mse": True},
    "sparsegpt": {"pattern": "2:4"},
    "wanda": {"pattern": "2:4"},
    "eora": {"rank": 8},
}
"""Reading -> settings of the method (its name before the underscore)."""


class Clock:
    """Seconds by name; a GPU is waited for before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.taken: dict[str, list[float]] = {}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        self.wait()
        start = time.perf_counter()
        yield
        self.wait()
        self.taken.setdefault(name, []).append(time.perf_counter() - start)


def model_of(given: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=given.hidden,
        intermediate_size=given.ffn,
        num_attention_heads=given.heads,
        num_key_value_heads=max(1, given.heads // 4),
        num_hidden_layers=given.blocks,
        vocab_size=1024,
        max_position_embeddings=max(2048, given.length),
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@torch.no_grad()
def measure(given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    model = model_of(given)
    anatomy = describe(model)
    tokens = torch.randint(1024, (given.sequences, given.length), generator=torch.Generator().manual_seed(1))
    known, clock = load_all(), Clock(device)
    needs = tuple({need for name in METHODS for need in known[name.partition("_")[0]].needs})
    context = Context(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # The clock of a statistics pass runs from one block's end to the next one's arrival, its move to the device included.
    passing_by = stream(model, anatomy, tokens, needs, device)
    for _ in range(given.blocks):
        with clock.timing("statistics"):
            passing = next(passing_by)
        for name, settings in METHODS.items():
            method: Any = known[name.partition("_")[0]](**settings)
            with clock.timing(name):
                for group in passing.block.groups:
                    weights = {weight: weight_of(model, weight).float() for weight in group.weights}
                    original = {weight: value + 0.01 for weight, value in weights.items()} if name == "eora" else {}
                    values = passing.statistics[group.name]
                    method.compress(InputGroup(group.name, weights, {}, values, original, group.fold), context)
    # The first block warms up kernels and memory.
    seconds = {name: statistics.median(taken[1:] or taken) for name, taken in clock.taken.items()}
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "seconds_a_block": seconds,
        "hours_of_32_blocks": {n: 32 * s / 3600 for n, s in seconds.items()},
        "peak_bytes": peak,
    }


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 4096), ("ffn", 14336), ("heads", 32), ("blocks", 3), ("sequences", 128), ("length", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_blocks.json")
    given = parser.parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = {name: value for name, value in vars(given).items() if isinstance(value, int)}
    found = {"schema_version": 1, **provenance("benchmarks.gpu.blocks", "torch", "transformers"), "device": str(device)}
    found |= {"shape": shape, **measure(given, device)}
    given.result.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: found[key] for key in ("seconds_a_block", "peak_bytes")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
