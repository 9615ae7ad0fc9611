"""What this machine has: devices, cores, free memory and disk, as limits see them. Imports neither torch nor Ray."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil

from pare.workers.memory import free_memory as free_memory


@functools.cache
def gpus() -> tuple[str, ...]:
    """Names of the GPUs that `nvidia-smi` lists and CUDA_VISIBLE_DEVICES leaves visible; empty without a driver."""
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    names = tuple(line.strip() for line in out.splitlines() if line.strip())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return names
    return tuple(names[int(i)] for i in visible.split(",") if i.strip().isdigit() and int(i) < len(names))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def key(device: str) -> str:
    """The hardware that a speed figure belongs to. Never a host name."""
    return f"{gpus()[0]}" if device == "cuda" and gpus() else f"{cpu_name()} x{cores()}"


def free_gpu_memory() -> int | None:
    """Bytes free on the fullest of the visible GPUs; None without a driver."""
    free = gpu_memory("memory.free")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = free if visible is None else [free[int(i)] for i in visible.split(",") if i.isdigit() and int(i) < len(free)]
    return min(chosen, default=None)


def gpu_memory(field: str = "memory.total") -> list[int]:
    """Bytes of each GPU of this machine, visible to this process or not; empty without a driver."""
    try:
        out = subprocess.run(
            ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=20, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) << 20 for line in out.split() if line.isdigit()]


def free_disk(path: Path, limit_gb: float | None = None) -> int:
    """Bytes free on the file system that will hold `path`."""
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    return free if limit_gb is None else min(free, int(limit_gb * 1e9))


def describe() -> dict[str, Any]:
    """For the report and `pare doctor`."""
    return {"cpu": cpu_name(), "cores": cores(), "memory_bytes": psutil.virtual_memory().total, "gpus": list(gpus())}
