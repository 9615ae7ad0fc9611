"""How much memory this process may still take."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil


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
