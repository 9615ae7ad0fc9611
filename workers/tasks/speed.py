"""Reading and writing speed, and peak memory, of exports that are measured together.

Each export sits in a fresh process of its own; they take turns (A B C A B C ...) and only one computes at a time, so that
what disturbs the machine meets all of them. A bare matrix product before each reading says how disturbed it was.
"""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import psutil
import torch

from pare.workers.fresh import FreshProcess
from pare.workers.memory import free_on
from pare.workers.probe import ExportUnderTest
from pare.workers.task import TaskContext

BATCH_ROLE = "export"
"""All exports of a sweep are measured by one call, as inputs `export.0`, `export.1`, ..."""

SPEED_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
"""What each device computes fastest in, as a rule; the same for all exports."""

PROCESS_BYTES = 400 << 20
"""Memory of a process beside its model: libraries and activations."""


def run(ctx: TaskContext) -> dict[str, Any]:
    """Inputs: export.<i>. Spec: prompt_tokens, new_tokens, repeats, threads."""
    roles = sorted(ctx.inputs, key=lambda role: int(role.removeprefix(f"{BATCH_ROLE}.")))
    dtype = SPEED_DTYPE[ctx.device.type]
    together = all_fit([ctx.inputs[role] for role in roles], dtype, ctx.device)
    readings: dict[str, list[dict[str, float]]] = {role: [] for role in roles}
    about: dict[str, dict[str, Any]] = {}
    peaks: dict[str, int] = {}
    size = {"prompt_tokens": ctx.spec["prompt_tokens"], "new_tokens": ctx.spec["new_tokens"]}
    repeats = ctx.spec["repeats"]
    arguments = {"threads": ctx.spec["threads"], "dtype": dtype, "device": str(ctx.device)}
    with contextlib.ExitStack() as stack:
        processes = {role: FreshProcess(ExportUnderTest, directory=str(ctx.inputs[role]), **arguments) for role in roles}
        for process in processes.values():
            stack.enter_context(process)
        for process in processes.values():
            process.ask("ready")  # from here on only one of them computes at a time
        for turn in range(repeats):
            for i, (role, process) in enumerate(processes.items()):
                if turn == 0 or not together:
                    about[role] = process.ask("open")
                    process.ask("speed", prompt_tokens=8, new_tokens=2)  # warms up: first calls allocate and decompress
                readings[role].append(process.ask("speed", **size))
                peaks[role] = process.ask("peak_bytes")
                if not together:
                    process.ask("close")
                ctx.progress(turn * len(roles) + i + 1, repeats * len(roles), "readings")
    shared = {"hardware": hardware(ctx, about[roles[0]]["threads"]), "dtype": dtype, "kept_loaded": together}
    return {"exports": {role: {**figures(about[role], readings[role], peaks[role]), **shared, **size} for role in roles}}


def figures(about: dict[str, Any], readings: list[dict[str, float]], peak: int) -> dict[str, Any]:
    """Medians over the turns, with the distance of the quartiles, and the readings themselves."""
    runtime = about["runtime"]
    result: dict[str, Any] = {"runtime": runtime, "notes": about["notes"], "deployable": not about["notes"]}
    for name in ("prefill_tok_s", "decode_tok_s"):
        values = [reading[name] for reading in readings]
        result[f"speed/{runtime}/{name}"] = statistics.median(values)
        result[f"speed/{runtime}/{name}_iqr"] = interquartile_range(values)
    result[f"memory/{runtime}/peak_bytes"] = peak
    return {**result, "readings": readings}


def interquartile_range(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def all_fit(directories: list[Path], dtype: str, device: torch.device) -> bool:
    """Whether all exports can be held in memory at once, each in a process of its own and one of them being opened."""
    parameters = [json.loads((directory / "export.json").read_text())["parameters"] for directory in directories]
    models = getattr(torch, dtype).itemsize * (sum(parameters) + max(parameters))
    return models + PROCESS_BYTES * len(directories) < 0.9 * free_on(device)


def hardware(ctx: TaskContext, threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {
        "device": ctx.device.type,
        "threads": threads,
        "processor": processor(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "torch": torch.__version__,
    }
    return found | ({"gpu": torch.cuda.get_device_name(ctx.device)} if ctx.device.type == "cuda" else {})


def processor() -> str:
    """The processor's name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
