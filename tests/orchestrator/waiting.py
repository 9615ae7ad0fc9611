"""A task for tests of pools: it waits, and tells where it was. Its type is this module's full name."""

from __future__ import annotations

import os
import time
from typing import Any

from pare.workers.task import TaskContext


def run(ctx: TaskContext) -> dict[str, Any]:
    time.sleep(ctx.spec["seconds"])
    (ctx.out / "done").write_text(str(ctx.spec))
    return {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid()}
