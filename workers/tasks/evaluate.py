"""Measures an export in a process that reads nothing of the model but its directory; compares with the in-memory score."""

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


def run(ctx: TaskContext) -> dict[str, Any]:
    """Inputs: export, tokens, teacher, score, optional questions. Spec: dtype, tolerance, task (name of the questions)."""
    paths = {role: str(path) for role, path in ctx.inputs.items()}
    spec = {"dtype": ctx.spec["dtype"], "device": str(ctx.device)}
    steps = 1 + ("questions" in paths)
    with FreshProcess(ExportUnderTest, threads=torch.get_num_threads(), directory=paths["export"], **spec) as export:
        with loading():
            export.ask("open")
        found = export.ask("predict", tokens=paths["tokens"], teacher=paths["teacher"], models=models_of_teacher(ctx))
        ctx.progress(1, steps, "measurements")
        metrics = compare(found["metrics"], Path(paths["score"]), ctx.spec.get("tolerance", 0.005))
        if "questions" in paths:
            questions = str(ctx.inputs["questions"] / "questions.jsonl")
            metrics |= export.ask("answer", questions=questions, task=ctx.spec["task"])
            ctx.progress(steps, steps, "measurements")
    content = {"result": metrics, "windows": found["windows"]}
    (ctx.out / "evaluation.json").write_text(json.dumps(content, indent=1))
    return metrics


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
