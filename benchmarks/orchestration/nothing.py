"""A task that does next to nothing: one small file and one number."""

from __future__ import annotations

from typing import Any

from pare.workers.task import TaskContext


def run(ctx: TaskContext) -> dict[str, Any]:
    (ctx.out / "value.txt").write_text(str(ctx.spec["number"]))
    return {"value": ctx.spec["number"]}
