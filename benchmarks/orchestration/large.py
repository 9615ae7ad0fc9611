"""A sweep of ten thousand trials that is planned for real and driven for real; only the work itself is left out."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pare.orchestrator import drive
from pare.orchestrator.config import load
from pare.orchestrator.plan import build_plan
from pare.orchestrator.pool import InlinePool
from pare.workers.run import resident_bytes
from pare.workers.store import open_store

DEVICE = "cpu"
COST = {"wall_s": 1.0, "cpu_s": 1.0, "memory_start_bytes": 4e8, "peak_rss_bytes": 5e8, "disk_bytes": 1e6}


def overrides(n: int) -> list[str]:
    """What is typed for n trials: GPTQ at four bit widths and n / 4 dampings."""
    dampings = ",".join(str(round(0.001 + 0.0001 * i, 4)) for i in range(n // 4))
    return [
        "model=tiny", "recipe=gptq", "recipe.quantize.bits=2,3,4,8", f"recipe.quantize.damping={dampings}",
        "evaluation.speed.repeats=0", "tracking.enabled=false", "cluster.device=cpu",
    ]  # fmt: skip


def large(n: int) -> dict[str, float]:
    """Seconds of `pare plan` and `pare status`, and the most memory of a driver over all of its life."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        said = overrides(n)
        plan_s = pare(home, "plan", "--json", *said)
        start = time.perf_counter()
        experiment = load(said)
        plan = build_plan(experiment, DEVICE, 1)
        build_s = time.perf_counter() - start
        built_bytes = resident_bytes("VmRSS")
        with contextlib.redirect_stdout(io.StringIO()):
            code = drive.run(experiment, plan, DEVICE, home, "bench", pool=InlinePool(published(home), slots=2))
        if code:
            raise RuntimeError(f"the sweep ended with code {code}")
        run_s = time.perf_counter() - start - build_s
        status_s = sorted(pare(home, "status") for _ in range(3))[1]
        return {
            "trials": len(experiment.trials),
            "tasks": len(plan.tasks),
            "plan_s": plan_s,
            "build_s": build_s,
            "run_ms_per_task": 1e3 * run_s / len(plan.tasks),
            "built_bytes": built_bytes,
            "driver_bytes": resident_bytes("VmHWM"),
            "status_s": status_s,
            "plan_again_s": pare(home, "plan", "--json", *said),
        }


def pare(home: Path, *arguments: str) -> float:
    """Seconds that a command takes."""
    command, environment = [sys.executable, "-m", "pare", *arguments], {**os.environ, "PARE_HOME": str(home)}
    start = time.perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def published(home: Path) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Publishes at once a result for whatever is asked: figures drawn from the fingerprint, so that some trials beat others."""
    store = open_store(home / "store")

    def one(request: dict[str, Any]) -> dict[str, Any]:
        x, y = (int(request["fingerprint"][8 * i : 8 * i + 8], 16) / 2**32 for i in range(2))
        result = {"quality/ppl": 10 + x, "quality/kl": 0.1 * x, "size/bytes": 1e6 * (1 + y), "opens_with": "transformers"}
        with store.attempt() as out:
            (out / "value.txt").write_text(request["label"])
            manifest, _ = store.publish(out, request["fingerprint"], request["type"], result, COST)
        return {"ok": True, "digest": manifest["digest"], "result": result, "cost": COST, "published": True}

    return lambda requests: [one(request) for request in requests]
