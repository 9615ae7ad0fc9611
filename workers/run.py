"""Runs one task in this process: verify the inputs, call the task module, publish, account. No Ray in here.

A request and a reply are plain JSON, so that any transport will do:

    request  {"fingerprint", "type", "label", "spec", "where", "inputs": {role: fingerprint}, "store", "device", "threads",
              "log", "live"}
    reply    {"ok": true, "fingerprint", "digest", "result", "cost", "published"}
             {"ok": false, "fingerprint", "failure", "message", "artifact"?, "cost"}

A task type whose module sets `BATCH_ROLE` is measured together with its likes: `run_batch` hands it one context with
the inputs of all of them (`<role>.0`, `<role>.1`, ...) and publishes one artifact each.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pare.workers.store import ArtifactError, Store
from pare.workers.task import TaskContext, TaskError

STORES: dict[str, Store] = {}
"""One store object per root, so that a warm process verifies an unchanged file once."""


def run_task(request: dict[str, Any]) -> dict[str, Any]:
    """Runs one task. Never raises: a failure is a reply."""
    return run_batch([request])[0]


def run_batch(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs tasks that are measured together (or a single one). One reply per request, in order; never raises."""
    first = requests[0]
    clock = Clock()
    try:
        with output_to(first.get("log")):
            try:
                return attempt(requests, clock)
            except BaseException:
                traceback.print_exc()
                raise
    except Exception as e:  # every failure becomes a reply: the driver decides what follows
        failure = {"ok": False, **classify(e), "cost": clock.cost()}
        return [{**failure, "fingerprint": request["fingerprint"]} for request in requests]
    finally:
        release_memory()


def attempt(requests: list[dict[str, Any]], clock: Clock) -> list[dict[str, Any]]:
    first = requests[0]
    store = STORES.setdefault(first["store"], Store(Path(first["store"])))
    import torch

    torch.set_num_threads(first["threads"])
    module = importlib.import_module(f"pare.workers.tasks.{first['type']}")
    with contextlib.ExitStack() as stack:
        outs = [stack.enter_context(store.attempt()) for _ in requests]
        inputs: dict[str, str] = dict(first["inputs"])
        batch_role = getattr(module, "BATCH_ROLE", None)
        if batch_role:
            inputs = {f"{batch_role}.{i}": request["inputs"][batch_role] for i, request in enumerate(requests)}
        ctx = TaskContext(
            spec={**first["spec"], "where": first["where"]},
            inputs={role: store.open(fp) for role, fp in inputs.items()},
            out=outs[0],
            device=torch.device(first["device"]),
            resolve=store.open,
            fingerprint_of=inputs,
            progress=live_progress(first.get("live")),
        )
        result = module.run(ctx)
        cost = clock.cost()
        replies = []
        for i, (request, out) in enumerate(zip(requests, outs, strict=True)):
            own = result["exports"][f"{batch_role}.{i}"] if batch_role else result
            share = {k: v / len(requests) if k.endswith("_s") else v for k, v in cost.items()}
            manifest, published = store.publish(out, request["fingerprint"], request["type"], own, share)
            replies.append(
                {
                    "ok": True,
                    "fingerprint": request["fingerprint"],
                    "digest": manifest["digest"],
                    "result": manifest["result"],
                    "cost": share,
                    "published": published,
                }
            )
        return replies


def classify(error: Exception) -> dict[str, Any]:
    """The failure class of an exception (docs/architecture.md has the table), and a message for a person."""
    import torch

    message = f"{error}" if isinstance(error, TaskError | ArtifactError) else f"{type(error).__name__}: {error}"
    if isinstance(error, TaskError):
        return {"failure": error.failure, "message": message}
    if isinstance(error, ArtifactError):
        return {"failure": "corrupt_input", "message": message, "artifact": error.fingerprint}
    if isinstance(error, torch.OutOfMemoryError):
        return {"failure": "oom_gpu", "message": message}
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return {"failure": "oom_host", "message": message}
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return {"failure": "disk_full", "message": message}
    if isinstance(error, ImportError | ValueError | TypeError | KeyError | NotImplementedError):
        return {"failure": "user_error", "message": message}
    return {"failure": "unknown", "message": message}


def release_memory() -> None:
    """Gives back what the task let go of: a warm process lives on, and its neighbours need the room."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)


class Clock:
    """Wall and processor seconds of an attempt, children included, and the peak memory of this process."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.monotonic(), self._cpu()

    @staticmethod
    def _cpu() -> float:
        own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime

    def cost(self) -> dict[str, float]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"wall_s": time.monotonic() - self.wall, "cpu_s": self._cpu() - self.cpu, "peak_rss_bytes": peak}


@contextlib.contextmanager
def output_to(log: str | None) -> Iterator[None]:
    """Sends what this process and its children print to the task's log file."""
    if log is None:
        yield
        return
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, original in enumerate(saved, start=1):
            os.dup2(original, target)
            os.close(original)
        os.close(handle)


def live_progress(live: str | None) -> Callable[[int, int, str], None]:
    """Writes progress to a small file, at most twice a second, for the driver to show."""
    last = 0.0

    def progress(done: int, total: int, unit: str) -> None:
        nonlocal last
        now = time.monotonic()
        if live is None or (now - last < 0.5 and done < total):
            return
        last = now
        partial = Path(live + ".tmp")
        partial.write_text(json.dumps({"done": done, "total": total, "unit": unit}))
        partial.replace(live)

    return progress
