"""Runs one task in this process: verify the inputs, call the task module, publish, account. No Ray in here.

A request and a reply are plain JSON, so that any transport will do. A cost holds the seconds of the slots that a task has
held as `slot_s` where it was more than one, or not all the time; else they are its wall time.

    request  {"fingerprint", "type", "label", "spec", "where", "inputs": {role: fingerprint}, "store", "device", "threads",
              "log", "keep_log"?, "gpu_fraction"?, "ranks"?, "plugins"?}
    reply    {"ok": true, "fingerprint", "digest", "result", "cost", "published"}
             {"ok": false, "fingerprint", "failure", "message", "artifact"?, "cost"}

A task type whose module sets `BATCH_ROLE` is measured together with its likes: `run_batch` hands it one context with
the inputs of all of them (`<role>.0`, `<role>.1`, ...) and publishes one artifact each.

A task of several ranks runs in as many processes at once, each of which is handed the same request once torch.distributed
is set up (`pare.workers.ranks`). The first of them publishes; what the others make is dropped.

A task type whose module defines `coordinate` instead of `run` is a search: `coordinate(ctx)` is a generator that yields
lists of probes, is sent their replies, and returns the result. A driver runs it as a `Coordination` and spreads the
probes over workers (`run_probes`); without a driver both happen in this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import os
import resource
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pare.workers import loading
from pare.workers.blobs import log_key
from pare.workers.checkpoint import EVERY_S, Checkpoint
from pare.workers.plugins import take_plugins
from pare.workers.ranks import Ranks
from pare.workers.store import ArtifactError, Store, open_store
from pare.workers.task import TaskContext, TaskError

LOG_BYTES = 1 << 20
"""The end of a log that is kept in the store."""

STORES: dict[str, Store] = {}
"""One store object per root, so that a warm process verifies an unchanged file once."""


def run_task(request: dict[str, Any]) -> dict[str, Any]:
    """Runs one task. Never raises: a failure is a reply."""
    return run_batch([request])[0]


def run_batch(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs tasks that are measured together, else one after another. One reply per request, in order; never raises."""
    first = requests[0]
    if len(requests) > 1 and not hasattr(module_of(first["type"]), "BATCH_ROLE"):
        return [reply for request in requests for reply in run_batch([request])]
    let_go_of_searches(first["fingerprint"])  # before the clock looks at the memory, of which they hold most
    clock = Clock()
    try:
        with output_of(first):
            try:
                return attempt(requests, clock)
            except BaseException:
                traceback.print_exc()
                raise
    except Exception as e:  # every failure becomes a reply: the driver decides what follows
        failure = {"ok": False, **classify(e), "cost": clock.cost()}
        return [{**failure, "fingerprint": request["fingerprint"]} for request in requests]
    finally:
        if clock.has_held_much():
            release_memory()


def attempt(requests: list[dict[str, Any]], clock: Clock) -> list[dict[str, Any]]:
    first = requests[0]
    store = store_of(first)
    with loading.loading():
        take_plugins(first.get("plugins", ()))
        module = module_of(first["type"])
    with contextlib.ExitStack() as stack:
        outs = [stack.enter_context(store.attempt()) for _ in requests]
        inputs: dict[str, str] = dict(first["inputs"])
        batch_role = getattr(module, "BATCH_ROLE", None)
        if batch_role:
            inputs = {f"{batch_role}.{i}": request["inputs"][batch_role] for i, request in enumerate(requests)}
        ctx = context(first, store, inputs, outs[0])
        result = module.run(ctx) if hasattr(module, "run") else search_alone(module, ctx)
        ranks = Ranks.here()
        cost = cost_together(ranks.all(clock.cost()))
        if not ranks.is_first:
            return [{"ok": True, "fingerprint": first["fingerprint"], "cost": cost}]
        replies = []
        for i, (request, out) in enumerate(zip(requests, outs, strict=True)):
            own = result["exports"][f"{batch_role}.{i}"] if batch_role else result
            share = {name: value / len(requests) for name, value in cost.items()}
            share["disk_bytes"] = bytes_of(out)
            manifest, published = store.publish(out, request["fingerprint"], request["type"], own, share)
            done_with(ctx)
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


def cost_together(costs: list[dict[str, float]]) -> dict[str, float]:
    """Of several ranks: processor seconds and host memory add up; of the rest the most counts."""
    if len(costs) == 1:
        return costs[0]
    whole = {name: max(cost[name] for cost in costs) for name in costs[0]}
    whole |= {name: sum(cost[name] for cost in costs) for name in ("cpu_s", "memory_start_bytes", "peak_rss_bytes")}
    return {**whole, "slot_s": len(costs) * whole["wall_s"]}


def done_with(ctx: TaskContext) -> None:
    """Forgets how far a task had come, now that its result is published."""
    if isinstance(ctx.checkpoint, Stoppable) and ctx.checkpoint.used:
        ctx.checkpoint.clear()


def bytes_of(directory: Path) -> int:
    """Bytes of the files beneath a directory, without those that are another artifact's by a hard link."""
    stats = [file.stat() for file in directory.rglob("*") if file.is_file()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def store_of(request: dict[str, Any]) -> Store:
    if request["store"] not in STORES:
        STORES[request["store"]] = open_store(request["store"])
    return STORES[request["store"]]


def module_of(kind: str) -> Any:
    """The module of a task type; a type with a dot is the full name of a module elsewhere."""
    return importlib.import_module(kind if "." in kind else f"pare.workers.tasks.{kind}")


def context(request: dict[str, Any], store: Store, inputs: dict[str, str], out: Path, device: str | None = None) -> TaskContext:
    """What the task sees. Opens, and so verifies, every input."""
    import torch

    torch.set_num_threads(request["threads"])
    if request["device"] == "cuda" and device is None:
        torch.cuda.set_per_process_memory_fraction(request.get("gpu_fraction", 1.0))
    live = LIVE[live_key(request["fingerprint"], "probes" in request)] = Live()
    checkpoint = Stoppable(store.blobs, f"checkpoints/{request['fingerprint']}")

    def progress(done: int, total: int, unit: str) -> None:
        live.said(done, total, unit)
        if STOP.is_set() and not checkpoint.used:  # one that is used ends the task when it has saved
            raise Stopped

    with loading.loading():
        directories = {role: store.open(fp) for role, fp in inputs.items()}
    return TaskContext(
        spec={**request["spec"], "where": request["where"]},
        inputs=directories,
        out=out,
        device=torch.device(device or request["device"]),
        resolve=store.open,
        fingerprint_of=inputs,
        progress=progress,
        point=live.point,
        checkpoint=checkpoint,
    )


def search_alone(module: Any, ctx: TaskContext) -> dict[str, Any]:
    """A coordinated task with its probes in this same process."""
    search = module.coordinate(ctx)
    try:
        probes = next(search)
        while True:
            probes = search.send(module.probe(ctx, probes))
    except StopIteration as end:
        return dict(end.value)
    finally:
        module.release()


SEARCHES: dict[str, Any] = {}
"""Fingerprint -> module of the searches that this process holds the model of."""


def run_probes(request: dict[str, Any]) -> dict[str, Any]:
    """Evaluates `request["probes"]`, some candidates of a coordinated task. Never raises: a failure is a reply."""
    let_go_of_searches(request["fingerprint"])
    clock = Clock()
    try:
        with output_of(request):
            try:
                take_plugins(request.get("plugins", ()))
                module = SEARCHES[request["fingerprint"]] = module_of(request["type"])
                ctx = context(request, store_of(request), request["inputs"], Path(os.devnull))
                scores = module.probe(ctx, request["probes"])
            except BaseException:
                traceback.print_exc()
                raise
        return {"ok": True, "fingerprint": request["fingerprint"], "scores": scores, "cost": clock.cost()}
    except Exception as e:
        return {"ok": False, "fingerprint": request["fingerprint"], **classify(e), "cost": clock.cost()}


def let_go_of_searches(but: str) -> None:
    """Frees what probes of other searches have left in this process."""
    for fingerprint in [fp for fp in SEARCHES if fp != but]:
        SEARCHES.pop(fingerprint).release()
        release_memory()


class Coordination:
    """A coordinated task in the process of its driver: what is to be probed next, and in the end a reply like any other."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.reply: dict[str, Any] = {}
        """The task's reply, once `advance` has returned None."""
        self.cost: dict[str, float] = {}
        self._stack = contextlib.ExitStack()
        self._search: Any = None
        self._since = time.monotonic()

    def advance(self, scores: list[Any] | None) -> list[dict[str, Any]] | None:
        """The next probes, given the replies to the last (None at the start). None when the task has ended."""
        request = self.request
        try:
            if self._search is None:
                self._store = store_of(request)
                self._out = self._stack.enter_context(self._store.attempt())
                self._ctx = context(request, self._store, request["inputs"], self._out, device="cpu")
                self._search = module_of(request["type"]).coordinate(self._ctx)
                return list(next(self._search))
            return list(self._search.send(scores))
        except StopIteration as end:
            self.cost["wall_s"] = time.monotonic() - self._since
            manifest, published = self._store.publish(self._out, request["fingerprint"], request["type"], end.value, self.cost)
            done_with(self._ctx)
            self.end({"ok": True, "digest": manifest["digest"], "result": manifest["result"], "published": published})
        except Exception as e:
            with output_of(request):
                traceback.print_exc()
            self.end({"ok": False, **classify(e)})
        return None

    def spend(self, cost: dict[str, float]) -> None:
        """Adds what probes cost. Seconds add up, their wall time as that of slots; of memory the most counts."""
        for name, value in cost.items():
            name = "slot_s" if name == "wall_s" else name
            known = self.cost.get(name, 0.0)
            self.cost[name] = known + value if name.endswith("_s") else max(known, value)

    def look(self, seen: int) -> dict[str, Any]:
        return look(live_key(self.request["fingerprint"], False), seen)

    def end(self, reply: dict[str, Any]) -> None:
        """Ends the task with this reply, wherever it stands."""
        if self._search is not None:
            self._search.close()
        self._stack.close()
        self.reply = {**reply, "fingerprint": self.request["fingerprint"], "cost": self.cost}


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
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return {"failure": "disk_full", "message": message}
    if isinstance(error, ImportError | ValueError | TypeError | KeyError | NotImplementedError):
        return {"failure": "user_error", "message": message}
    return {"failure": "unknown", "message": message}


WORTH_A_SEARCH_BYTES = 16e6


def release_memory() -> None:
    """Gives back what the task let go of: a warm process lives on, and its neighbours need the room.

    It looks through all objects of the process, which takes 0.1 s once torch is there.
    """
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)


class Clock:
    """Wall and processor seconds of an attempt, children included, and the most memory that it held, on the host and on a GPU.

    On Linux the kernel's mark of the highest resident size is set back when the clock starts; elsewhere it is that of the
    process's whole life. Of children the kernel keeps only the largest ever, so fresh processes tell theirs when they end.
    """

    children: ClassVar[list[int]] = []
    """Peak bytes of the fresh processes that have ended since the clock started."""

    def __init__(self) -> None:
        self.wall, self.cpu, self.loaded = time.monotonic(), self._cpu(), loading.seconds
        self.children.clear()
        with contextlib.suppress(OSError):  # no Linux, or a container that forbids it
            Path("/proc/self/clear_refs").write_text("5")
        self.start = resident_bytes("VmRSS")
        self.peak = float("inf")
        if gpu := self._gpu():
            gpu.reset_peak_memory_stats()

    @staticmethod
    def _cpu() -> float:
        own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime

    @staticmethod
    def _gpu() -> Any:
        torch = sys.modules.get("torch")
        return torch.cuda if torch is not None and torch.cuda.is_initialized() else None

    def has_held_much(self) -> bool:
        """Whether the attempt may have left something that is worth looking for."""
        return self._gpu() is not None or self.peak - self.start > WORTH_A_SEARCH_BYTES

    def cost(self) -> dict[str, float]:
        gpu = self._gpu()
        self.peak = resident_bytes("VmHWM")
        return {
            "wall_s": time.monotonic() - self.wall,
            "cpu_s": self._cpu() - self.cpu,
            "load_s": loading.seconds - self.loaded,
            "memory_start_bytes": self.start,
            "peak_rss_bytes": self.peak + sum(self.children),
            **({"peak_gpu_bytes": gpu.max_memory_allocated()} if gpu else {}),
        }


def resident_bytes(field: str, pid: int | str = "self") -> int:
    """Resident memory of a process: `VmRSS` now, `VmHWM` at its highest. Where there is no /proc: this process's highest."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next((line for line in status.read_text().splitlines() if line.startswith(field + ":")), ":0")  # ended: no memory
    return int(line.split(":")[1].split()[0]) * 1024


@contextlib.contextmanager
def output_of(request: dict[str, Any]) -> Iterator[None]:
    """Sends what a task prints to its log: a file of the driver's machine and, with `keep_log`, a blob of the store."""
    if not request.get("keep_log"):
        with output_to(request.get("log")):
            yield
        return
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(request.get("log") or f"{scratch}/log")
        try:
            with output_to(str(log)):
                yield
        finally:
            if written := log.read_bytes():
                store_of(request).blobs.write(log_key(request["fingerprint"]), written[-LOG_BYTES:])


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


@dataclass
class Live:
    """What a running task has said so far. Read by another thread of this process."""

    beat: int = 0
    """Grows with every sign of life."""
    progress: dict[str, Any] | None = None
    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def said(self, done: int, total: int, unit: str) -> None:
        self.beat += 1
        self.progress = {"done": done, "total": total, "unit": unit}

    def point(self, step: int, values: dict[str, float]) -> None:
        self.beat += 1
        self.points.append((step, values))


LIVE: dict[str, Live] = {}
"""Fingerprint -> what the running task has said."""

STOP = threading.Event()
"""Set when the driver wants tasks to end where they can go on later."""


def live_key(fingerprint: str, probing: bool) -> str:
    """What a task's signs of life are kept under. Probes may run in the process of their coordination."""
    return f"{fingerprint}/probes" if probing else fingerprint


def look(key: str, seen: int) -> dict[str, Any]:
    """How far a task is: a beat that grows, its progress, and the curve points after the first `seen`."""
    live = LIVE.get(key, Live())
    return {"beat": live.beat, "progress": live.progress, "points": live.points[seen:]}


class Stopped(TaskError):
    """The task was told to end. What it has saved is where the next attempt goes on."""

    def __init__(self) -> None:
        super().__init__("stopped; the next attempt goes on from the last checkpoint, if the task keeps any", "stopped")


class Stoppable(Checkpoint):
    """A checkpoint that is due at once when the task is told to stop, and ends the task when it has been saved."""

    used = False

    def due(self, every_s: float = EVERY_S) -> bool:
        self.used = True
        return STOP.is_set() or super().due(every_s)

    def latest(self) -> dict[str, Any] | None:
        self.used = True
        return super().latest()

    def save(self, state: dict[str, Any], pieces: Mapping[str, Callable[[], dict[str, Any]] | None] | None = None) -> None:
        super().save(state, pieces)
        if STOP.is_set():
            raise Stopped
