"""Brings minimal pairs into the store. spec: `columns` {good, bad, group}, `identity`, `where` {path}. Writes `pairs.jsonl`,
each line {"good", "bad", "group"}, group "" where there is none. Result: `pairs`, `groups`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pare.workers.corpus import SourceError
from pare.workers.files import digest_file
from pare.workers.pairs import read_pairs
from pare.workers.sources import check_unchanged
from pare.workers.task import TaskContext, TaskError


def run(ctx: TaskContext) -> dict[str, Any]:
    path = Path(ctx.spec["where"]["path"])
    try:
        pairs = read_pairs(ctx.spec["columns"], path)
        check_unchanged(digest_file(path), ctx.spec["identity"], str(path))
    except SourceError as e:
        raise TaskError(str(e)) from e
    with open(ctx.out / "pairs.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    return {"pairs": len(pairs), "groups": len({pair["group"] for pair in pairs} - {""})}
