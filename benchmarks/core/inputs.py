"""What both sides read: a model's directory, tokens to calibrate on and others to measure on. Also how quality is measured.

Runs in the peers' virtualenv too, so nothing of Pare is imported at the top.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEQUENCES, LENGTH, TEST = 32, 512, 16
PLACE = "PARE_BENCH_INPUTS"
"""Environment variable that names the directory of `make_inputs`."""


def make_inputs(directory: Path) -> None:
    """SmolLM2-135M in bfloat16 as a transformers directory, and windows of the Python language reference."""
    from pydoc_data import topics

    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from pare.workers.sources import resolve_model
    from pare.workers.task import TaskContext
    from pare.workers.tasks import import_model

    model = {"source": "smollm2", "dtype": "bfloat16"}
    (directory / "model").mkdir(parents=True)
    import_model.run(TaskContext({"model": model, "identity": resolve_model(model)}, {}, directory / "model"))
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    ids = torch.tensor(tokenizer("\n".join(topics.topics.values()))["input_ids"])
    parts = {"tokens": ids[: SEQUENCES * LENGTH], "test": ids[-TEST * LENGTH :]}
    for name, part in parts.items():
        (directory / name).mkdir()
        save_file({"input_ids": part.view(-1, LENGTH)}, directory / name / "tokens.safetensors")


def place() -> Path:
    """The directory of the inputs."""
    return Path(os.environ[PLACE])


def tokens(name: str) -> Tensor:
    """`tokens` or `test`: int64 (sequences, length)."""
    from safetensors.torch import load_file

    found: Tensor = load_file(place() / name / "tokens.safetensors")["input_ids"]
    return found


@torch.no_grad()
def perplexity(model: Any) -> float:
    """On the test windows, in the model's dtype, losses in float32; every token of a window but the first is predicted."""
    model.eval()
    losses = []
    for window in tokens("test").split(1):
        logits = model(input_ids=window).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]))
    return float(torch.stack(losses).mean().exp())


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the clock and of all cores, and by how much the most memory that was ever held grew."""
    Path("/proc/self/clear_refs").write_text("5")  # the most memory so far is from now on what there is now
    before = memory("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {
        "s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_growth_bytes": memory("VmHWM") - before,
    }


def memory(field: str) -> int:
    """Bytes by that name in what the kernel says of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def progress_to_stderr() -> None:
    """Keeps standard output for the line of values."""
    os.dup2(sys.stderr.fileno(), 1)
