"""Minimal pairs: two sentences of which a model should find the good one likelier. Read from any JSONL; no torch here.

After Warstadt et al. (2020), "BLiMP: The Benchmark of Linguistic Minimal Pairs for English".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pare.workers.corpus import SourceError
from pare.workers.files import digest_file

Z95 = 1.959964
"""Standard errors on either side of a mean that make a 95 % interval."""


def read_pairs(spec: Mapping[str, Any], path: Path) -> list[dict[str, str]]:
    """[{"good", "bad", "group"}] of the lines of a file. spec: `good`, `bad`, `group`: names of the columns, group None where
    there are no groups.

    Raises:
        SourceError: a line is no JSON object, lacks a column or has something else than text there; says which line.
    """
    setting = "evaluation.pairs.path"
    if not path.is_file():
        raise SourceError(f"{setting}={path}: no such file. Give a JSONL file: one JSON object a line", setting)
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise SourceError(f"{path}:{number}: is no JSON ({e}); every line is one JSON object", setting) from e
        if not isinstance(row, dict):
            raise SourceError(f"{path}:{number}: is no JSON object but {type(row).__name__}", setting)
        pairs.append({"good": cell(row, "good", spec, path, number), "bad": cell(row, "bad", spec, path, number)})
        pairs[-1]["group"] = cell(row, "group", spec, path, number) if spec["group"] is not None else ""
    if not pairs:
        raise SourceError(f"{setting}={path}: holds no pair", setting)
    return pairs


def cell(row: Mapping[str, Any], role: str, spec: Mapping[str, Any], path: Path, number: int) -> str:
    """What a line says in the column for a role."""
    column = spec[role]
    if column not in row:
        has = ", ".join(map(str, row)) or "none"
        setting = f"evaluation.pairs.{role}"
        raise SourceError(f"{path}:{number}: has no column {column!r}, only {has}. Try: {setting}=COLUMN", setting)
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise SourceError(
            f"{path}:{number}: {column!r} must be text that is not empty, got {value!r}", f"evaluation.pairs.{role}"
        )
    return value


def resolve_pairs(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of the pairs, after a check of every line. spec: `path` and the columns."""
    read_pairs(spec, Path(spec["path"]))
    return {"digest": digest_file(Path(spec["path"]))}


def accuracy(answers: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """Metrics of answers in {0, 0.5, 1}, overall and by group: `quality/acc/pairs` and `quality/acc/pairs.GROUP` with their
    95 % intervals, how many pairs, and how many ties."""
    metrics = share("quality/acc/pairs", answers)
    metrics |= {"eval/questions/pairs": len(answers), "eval/ties/pairs": sum(a == 0.5 for a in answers)}
    for group in sorted(set(groups) - {""}):
        metrics |= share(f"quality/acc/pairs.{group}", [a for a, g in zip(answers, groups, strict=True) if g == group])
    return metrics


def share(name: str, answers: Sequence[float]) -> dict[str, float]:
    """The mean of answers with its 95 % score interval (Wilson, 1927), which is no point where all answers are alike:
    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)."""
    n, p = len(answers), sum(answers) / len(answers)
    middle, half = p + Z95**2 / (2 * n), Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    return {name: p, f"{name}_low": max(0.0, (middle - half) / scale), f"{name}_high": min(1.0, (middle + half) / scale)}
