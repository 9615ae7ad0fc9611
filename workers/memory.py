"""How much memory this process may still take, on the host and on a device."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch


def free_memory(limit_gb: float | None = None) -> int:
    """Bytes that can be allocated now: the least of what the system, the control group, RLIMIT_AS and the user allow."""
    bounds = [psutil.virtual_memory().available]
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            text = (Path("/sys/fs/cgroup") / limit).read_text().strip()
            if text != "max" and int(text) < 1 << 60:
                bounds.append(int(text) - int((Path("/sys/fs/cgroup") / used).read_text()))
        except (OSError, ValueError):
            continue
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        bounds.append(soft)
    if limit_gb is not None:
        bounds.append(int(limit_gb * 1e9))
    return max(0, min(bounds))


def free_on(device: torch.device) -> int:
    """Bytes that can be allocated now on a device, or on the host for the CPU."""
    import torch

    return free_memory() if device.type == "cpu" else int(torch.cuda.mem_get_info(device)[0])
