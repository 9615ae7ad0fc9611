"""Measures an export in a process that reads nothing of the model but its directory; compares with the in-memory score.

Writes `evaluation.json`: `result`; `directions`, metric -> "higher" or "lower" for what is not known by its name; `windows`,
sums over each test window; `answers`, metric -> one character for each question: 1 right, 0 wrong, 5 half.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pare.workers.fresh import FreshProcess
from pare.workers.loading import loading
from pare.workers.models import ModelArtifact
from pare.workers.probe import ExportUnderTest
from pare.workers.task import TaskContext, TaskError

BENCHMARK = "benchmark."
"""What the roles of lm-eval's tasks begin with."""


def run(ctx: TaskContext) -> dict[str, Any]:
    """Inputs: export, tokens, teacher, optional score, questions, pairs and benchmark.NAME. Spec: dtype, tolerance, task (name
    of the questions); optional num_fewshot and limit (of benchmarks) and metrics (functions of the user)."""
    paths = {role: str(path) for role, path in ctx.inputs.items()}
    benchmarks = sorted(role for role in paths if role.startswith(BENCHMARK))
    functions = ctx.spec.get("metrics", [])
    few = {"num_fewshot": ctx.spec.get("num_fewshot"), "limit": ctx.spec.get("limit")}
    asked: list[tuple[str, dict[str, Any]]] = []
    if "questions" in paths:
        asked.append(("answer", {"questions": str(ctx.inputs["questions"] / "questions.jsonl"), "task": ctx.spec["task"]}))
    if "pairs" in paths:
        asked.append(("pairs", {"directory": paths["pairs"]}))
    asked += [("benchmark", {"directory": paths[role], **few}) for role in benchmarks]
    steps = 1 + len(asked) + len(functions)
    directions: dict[str, str] = {}
    answers: dict[str, str] = {}
    where = ctx.spec.get("where") or {}
    opened = {"dtype": ctx.spec["dtype"], "device": str(ctx.device), "memory": where.get("memory_bytes")}
    with FreshProcess(ExportUnderTest, threads=torch.get_num_threads(), directory=paths["export"], **opened) as export:
        with loading():
            read = export.ask("prepare")
        found = export.ask("predict", tokens=paths["tokens"], teacher=paths["teacher"], models=models_of_teacher(ctx))
        ctx.progress(1, steps, "measurements")
        metrics = dict(found["metrics"])
        if "score" in paths:  # what was made elsewhere has none
            metrics = compare(metrics, Path(paths["score"]), ctx.spec.get("tolerance", 0.005))
        for step, (what, arguments) in enumerate(asked, 2):
            measured = export.ask(what, **arguments)
            metrics |= measured["metrics"]
            directions |= measured["directions"]
            answers |= measured["answers"]
            ctx.progress(step, steps, "measurements")
        for step, function in enumerate(functions, 2 + len(asked)):
            values = export.ask("metric", spec=function, file=where["metrics"][function["name"]], tokens=paths["tokens"])
            metrics |= values
            directions |= dict.fromkeys(values, function["direction"])
            ctx.progress(step, steps, "measurements")
    content = {"result": metrics, "directions": directions, "windows": found["windows"], "answers": answers}
    (ctx.out / "evaluation.json").write_text(json.dumps(content, indent=1))
    notes = (
        [] if read["way"] == "whole" else [f"{read['way']} for its evaluation: {read['bytes']:,} bytes of weights in memory"]
    )
    return {**metrics, "directions": directions, "notes": notes}


def compare(metrics: dict[str, float], score: Path, tolerance: float) -> dict[str, float]:
    """The metrics with the in-memory perplexity beside them.

    Raises:
        TaskError: the two perplexities differ by more than `tolerance`, as a fraction.
    """
    in_memory = json.loads((score / "score.json").read_text())["result"]["quality/ppl"]
    exported = metrics["quality/ppl"]
    if not abs(exported / in_memory - 1) <= tolerance:
        raise TaskError(
            f"the export is not the model that was made: its perplexity is {exported:.6g}, that of the parts in memory "
            f"{in_memory:.6g}; they differ by {abs(exported / in_memory - 1):.3%}, allowed are {tolerance:.3%} "
            "(evaluation.tolerance)",
            "export_mismatch",
        )
    return {**metrics, "quality/ppl_in_memory": in_memory}


def models_of_teacher(ctx: TaskContext) -> dict[str, str]:
    """Fingerprint -> directory of the artifact whose head the teacher uses, and of all that it stands on."""
    found: dict[str, str] = {}

    def resolve(fingerprint: str) -> Path:
        found[fingerprint] = str(ctx.resolve(fingerprint))
        return Path(found[fingerprint])

    teacher = json.loads((ctx.inputs["teacher"] / "teacher.json").read_text())
    ModelArtifact(resolve(teacher["model"]), resolve)
    return found
