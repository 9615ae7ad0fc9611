"""Records as the orchestrator makes them, with figures of a plausible shape. Figures are drawn from a seeded formula."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from typing import Any

BASE_BYTES, BASE_PPL = 269_060_552, 18.3
RUNTIME = "transformers"


def fp(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def trial(
    block: str, recipe: str, overrides: dict[str, Any], ppl: float, n_bytes: float, seed: int = 0, **changes: Any
) -> dict[str, Any]:
    rng = random.Random(f"{block}{overrides}{seed}")
    trains, quantizes = recipe in ("lora", "qlora"), recipe in ("rtn", "gptq", "qlora", "awq", "hqq")
    index = fp(block, overrides, seed)[:4]
    tasks = [
        {"task": fp("import"), "type": "import_model", "label": "import smollm2", "wall_s": 12.1, "shared_by": 8},
        {"task": fp("corpus"), "type": "corpus", "label": "corpus pydoc", "wall_s": 2.4, "shared_by": 8},
        {"task": fp("tokens", "test"), "type": "tokens", "label": "test tokens", "wall_s": 1.1, "shared_by": 8},
        {"task": fp("teacher"), "type": "score", "label": "score of the base", "wall_s": 21.0, "shared_by": 8},
    ]
    own: list[tuple[str, str, float]] = []
    if recipe == "gptq":
        tasks.append({"task": fp("calibrate"), "type": "calibrate", "label": "statistics gram", "wall_s": 58.0, "shared_by": 2})
    if trains:
        own.append(("train", f"train {recipe}", 96.0 + 20 * rng.random()))
    if quantizes:
        own.append(("compress", f"compress {recipe}", {"rtn": 4.0, "gptq": 41.0}.get(recipe, 12.0) + rng.random()))
    own += [("export", "export", 6.2), ("evaluate", "evaluate the export", 38.0 + 4 * rng.random()), ("speed", "speed", 11.5)]
    tasks += [
        {"task": fp(block, overrides, seed, kind), "type": kind, "label": label, "wall_s": wall, "shared_by": 1}
        for kind, label, wall in own
    ]
    tasks = [{**task, "status": "done"} for task in tasks]
    metrics = {
        "quality/ppl": ppl,
        "quality/ppl_low": ppl * 0.972,
        "quality/ppl_high": ppl * 1.029,
        "quality/ppl_in_memory": ppl * (1 + 0.002 * (rng.random() - 0.5)),
        "quality/kl": 0.0 if recipe == "base" else abs(math.log(ppl / BASE_PPL)) * 0.9 + 0.01,
        "quality/top1_agreement": 1.0 if recipe == "base" else 0.97 - abs(math.log(ppl / BASE_PPL)) * 0.3,
        "quality/acc/pydoc_choice": max(0.25, 0.62 - 0.2 * math.log(ppl / BASE_PPL)),
        "size/bytes": float(round(n_bytes)),
        "size/bits_per_weight": n_bytes * 8 / 134_515_008,
        f"speed/{RUNTIME}/decode_tok_s": 14 + 3 * rng.random(),
        f"speed/{RUNTIME}/prefill_tok_s": 410 + 50 * rng.random(),
        f"memory/{RUNTIME}/peak_bytes": 9.1e8,
        "cost/wall_s": sum(task["wall_s"] / task["shared_by"] for task in tasks),
        "cost/cpu_s": sum(task["wall_s"] for task in tasks) * 0.98,
        "cost/tokens": 24 * 512.0 if trains else 8192.0 if recipe == "gptq" else 0.0,
    }
    loss = [[step, 3.1 * math.exp(-step / 30) + 1.9 + 0.12 * rng.random()] for step in range(1, 25)] if trains else []
    return {
        "trial": f"{block}-{index}",
        "block": block,
        "recipe": recipe,
        "overrides": overrides,
        "status": "done",
        "metrics": metrics,
        "artifact": fp(block, overrides, seed, "export"),
        "export_path": f".pare/exports/{block}-{index}",
        "opens_with": "transformers + compressed-tensors" if quantizes else "transformers",
        "pareto": False,
        "error": None,
        "notes": ["transformers decompresses these codes: no deployment figure"] if quantizes else [],
        "tasks": tasks,
        "config": {"recipe": {"quantize": {"method": recipe, "bits": overrides.get("recipe.quantize.bits", 16)}}, "seed": seed},
        "curves": {"train/loss": loss} if loss else {},
        "uid": fp("uid", block, overrides, seed),
        **changes,
    }


def failed(
    one: dict[str, Any], message: str = "killed: 14.2 GiB needed, 11.9 GiB free", failure: str = "out_of_memory"
) -> dict[str, Any]:
    done = one["tasks"][:-2]
    tasks = [*done[:-1], {**done[-1], "status": "failed"}]
    error = {"failure": failure, "message": message, "task": tasks[-1]["label"]}
    return {
        **one,
        "status": "failed",
        "metrics": {},
        "artifact": None,
        "export_path": None,
        "opens_with": None,
        "tasks": tasks,
        "error": error,
        "curves": {},
    }


def record(trials: list[dict[str, Any]], status: str = "done", sweep: str = "demo-3f2c9a1b") -> dict[str, Any]:
    unique = {task["task"]: task for one in trials for task in one["tasks"]}
    uses = {key: sum(any(task["task"] == key for task in one["tasks"]) for one in trials) for key in unique}
    for one in trials:
        one["tasks"] = [{**task, "shared_by": uses[task["task"]]} for task in one["tasks"]]
    total = sum(len(one["tasks"]) for one in trials)
    shared = [{"label": t["label"], "used_by": uses[k], "wall_s": t["wall_s"]} for k, t in unique.items() if uses[k] > 1]
    return {
        "schema_version": 1,
        "sweep": sweep,
        "name": sweep.rsplit("-", 1)[0],
        "about": {
            "command": "pare run experiment=demo",
            "started_at": "2026-11-21T09:27:00+00:00",
            "finished_at": None if status == "running" else "2026-11-21T09:35:32+00:00",
            "wall_s": 512.3,
            "status": status,
            "base": {"name": "SmolLM2-135M-Instruct", "parameters": 134_515_008, "bytes": BASE_BYTES},
            "data": "pydoc",
            "evaluation": {"test_tokens": 4096, "questions": 64, "tolerance": 0.005},
            "hardware": {"cpu": "Xeon", "cores": 2, "gpus": []},
            "versions": {"pare": "0.1.0", "torch": "2.13.0"},
        },
        "tasks": {"total_if_separate": total, "unique": len(unique), "executed": len(unique), "cached": 0},
        "saving": {
            "tasks_not_repeated": total - len(unique),
            "wall_s_saved": sum((s["used_by"] - 1) * s["wall_s"] for s in shared),
            "shared": shared,
        },
        "trials": trials,
    }


def quantized(bits: float, adapter: int = 0) -> float:
    """Bytes of SmolLM2-135M with its linears at `bits` plus a 16-bit scale per 64 weights, embeddings in bf16."""
    return 28_311_552 * 2 + 106_203_456 * (bits + 0.25) / 8 + adapter


def demo() -> dict[str, Any]:
    """The eight trials of the demo, as they come out in kind: RTN at 3 bits is bad, tuning helps on this text."""
    bits = "recipe.quantize.bits"
    lora = 4_884_480
    return record(
        [
            trial("base", "base", {}, BASE_PPL, BASE_BYTES),
            trial("rtn", "rtn", {bits: 4}, 19.1, quantized(4)),
            trial("rtn", "rtn", {bits: 3}, 58.7, quantized(3)),
            trial("gptq", "gptq", {bits: 4}, 18.9, quantized(4)),
            trial("gptq", "gptq", {bits: 3}, 24.4, quantized(3)),
            trial("lora", "lora", {"recipe.tune.learning_rate": 0.0002}, 14.6, BASE_BYTES + lora),
            trial("lora", "lora", {"recipe.tune.learning_rate": 0.001}, 13.4, BASE_BYTES + lora),
            trial("qlora", "qlora", {}, 14.9, quantized(4.5, lora)),
        ]
    )


def large(n: int = 60) -> dict[str, Any]:
    """n trials of five recipes at many sizes, two failed, one diverged; beyond 61 they are repeated with other seeds."""
    rng = random.Random(7)
    trials = [trial("base", "base", {}, BASE_PPL, BASE_BYTES)]
    harm = {"rtn": 11.0, "gptq": 4.0, "awq": 5.0, "hqq": 7.0}
    for seed, recipe, bits, group in itertools.product(range(1 + n // 62), harm, (2, 3, 4, 5, 6, 8), (32, 64)):
        overrides: dict[str, Any] = {"recipe.quantize.bits": bits, "recipe.quantize.group_size": group}
        overrides |= {"seed": seed} if n > 61 else {}
        worse = harm[recipe] * 2.0 ** (-2 * bits) * (0.7 if group == 32 else 1) * (6 + 3 * rng.random())
        trials.append(
            trial(recipe, recipe, overrides, BASE_PPL * (1 + worse), quantized(bits + (0.25 if group == 32 else 0)), seed)
        )
    for seed, rank, rate in itertools.product(range(1 + n // 62), (4, 8, 16, 32), (1e-4, 2e-4, 1e-3)):
        overrides = {"recipe.tune.rank": rank, "recipe.tune.learning_rate": rate} | ({"seed": seed} if n > 61 else {})
        trials.append(trial("lora", "lora", overrides, 13.5 + 2 * rng.random(), BASE_BYTES + rank * 610_560, seed))
    trials = trials[:n]
    trials[7] = failed(trials[7])
    trials[23] = failed(trials[23], "loss is nan at step 12", "nonfinite")
    for name in ("quality/ppl", "quality/ppl_low", "quality/ppl_high", "quality/ppl_in_memory"):
        trials[1]["metrics"][name] = 48_211.0
    return record(trials)


def single() -> dict[str, Any]:
    return record([trial("gptq", "gptq", {"recipe.quantize.bits": 4}, 18.9, quantized(4))])


def all_failed() -> dict[str, Any]:
    return record([failed(one) for one in demo()["trials"]], status="failed")
