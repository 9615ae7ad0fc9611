"""Our side: task `train`, as a sweep runs it, from a model's directory to an artifact on disk; and what a 4-bit base takes."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.core.inputs import place, progress_to_stderr, timed
from benchmarks.tuning.inputs import Asked, Clock
from pare.methods.contract import Context, TrainMethod, load_all
from pare.workers.models import ModelArtifact, load_in_memory
from pare.workers.task import TaskContext
from pare.workers.tasks import train
from pare.workers.tasks.train import DTYPES


def warm() -> None:
    """Imports all that both sides import: when the clock starts, it is there."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments  # noqa: F401

    load_all()


def trained(method: str, asked: Asked, root: Path) -> dict[str, float]:
    clock = Clock()
    spec = {"method": method, "settings": asked.settings, "seed": 0, "dtype": asked.dtype}
    inputs = {"model": place() / "model", "tokens": place() / "tokens"}
    ctx = TaskContext(
        spec, inputs, root, resolve=lambda _: inputs["model"], fingerprint_of={"model": "model"}, progress=clock.tick
    )
    values = timed(lambda: train.run(ctx))
    curve = [json.loads(line)["loss"] for line in (root / "curve.jsonl").read_text().splitlines()]
    return values | {"tokens_s": clock.tokens_s, "first_loss": curve[0], "last_loss": curve[-1]}


def four_bit_base(asked: Asked) -> dict[str, float]:
    """Bytes of the frozen base of a QLoRA training as it stands in memory, and what the method's paper says it takes."""
    method = load_all()["qlora"](**asked.settings)
    assert isinstance(method, TrainMethod)
    model = load_in_memory(ModelArtifact(place() / "model", lambda _: place() / "model"), DTYPES[asked.dtype])
    weights = {name: p.numel() for name, p in model.named_parameters()}
    prepared = method.prepare(model, Context(torch.device("cpu")))
    linears = sum(n for name, n in weights.items() if "_proj" in name)
    rest = sum(weights.values()) - linears
    paper = linears * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + rest * DTYPES[asked.dtype].itemsize
    return {
        "base_bytes": base_bytes(prepared),
        "paper_bytes": paper,
        "dense_bytes": sum(weights.values()) * 2,
    }


def base_bytes(model: torch.nn.Module) -> int:
    """Of all tensors that belong to the frozen model, those beside 4-bit codes included, each piece of memory once."""
    seen: dict[int, int] = {}
    for p in [*model.parameters(), *model.buffers()]:
        if not p.requires_grad:
            state = getattr(p, "quant_state", None)
            inner = getattr(state, "state2", None)
            for tensor in (p.data, *(getattr(s, key) for s in (state, inner) if s for key in ("absmax", "code", "offset"))):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def main(name: str, argument: str) -> dict[str, float]:
    warm()
    if name == "four_bit_base":
        return four_bit_base(Asked.of(argument))
    with tempfile.TemporaryDirectory() as root:
        return trained(name, Asked.of(argument), Path(root))


if __name__ == "__main__":
    answer = os.dup(1)
    progress_to_stderr()
    os.write(answer, f"{json.dumps(main(sys.argv[1], sys.argv[2]))}\n".encode())
