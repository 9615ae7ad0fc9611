"""A task that takes a known time and no processor."""

from __future__ import annotations

import time
from typing import Any

from pare.workers.task import TaskContext


def run(ctx: TaskContext) -> dict[str, Any]:
    time.sleep(ctx.spec["seconds"])
    return {}
