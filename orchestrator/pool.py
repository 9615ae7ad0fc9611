"""Where tasks run: warm Ray actors on this machine, or this very process (tests, and machines without Ray).

A slot is one core and one thread, or one GPU. Actors stay alive between tasks, so imports are paid once per slot. An
actor is replaced after a failed attempt: what a failure leaves in a process is not to be trusted. A task that wants
the whole machine waits until the slots are idle; the idle actors make room for one of the size it asks for.
Ray's own retries are off: attempts are the engine's.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

Reply = dict[str, Any]

GROWTH, GROWTH_FLOOR_BYTES = 1.1, 64e6
"""A worker is replaced when it holds so many times the memory that it held after its first task of a type, and so much more."""


class Pool(Protocol):
    """What the engine needs of a place to run tasks. A job is a list of requests that one worker takes on together."""

    slots: int

    def idle(self) -> int: ...

    def submit(self, job: int, requests: list[dict[str, Any]], whole_machine: bool) -> None: ...

    def wait(self, timeout_s: float) -> list[tuple[int, list[Reply]]]: ...

    def look(self, wanted: Mapping[int, tuple[str, int]]) -> dict[int, dict[str, Any]]:
        """Job -> signs of life (see `pare.workers.run.look`) of those that have answered; wanted: job -> (key, points seen)."""
        ...

    def ask_to_stop(self) -> None:
        """Lets running tasks save their state and end."""
        ...

    def kill(self, job: int, failure: str, message: str) -> None:
        """Ends a job by force; `wait` then gives a reply of that failure class."""
        ...

    def is_pending(self, job: int) -> bool:
        """Whether the job's worker has not come up yet."""
        ...

    def close(self) -> None: ...


def run_requests(requests: list[dict[str, Any]]) -> list[Reply]:
    """Runs a job in this process: probes of a search, or tasks."""
    from pare.workers.run import run_batch, run_probes

    return [run_probes(requests[0])] if "probes" in requests[0] else run_batch(requests)


class InlinePool:
    """Runs every job in this process as soon as it is waited for."""

    def __init__(self, run: Callable[[list[dict[str, Any]]], list[Reply]] = run_requests, slots: int = 1) -> None:
        self._run, self.slots = run, slots
        self._queue: list[tuple[int, list[dict[str, Any]]]] = []

    def idle(self) -> int:
        return self.slots - len(self._queue)

    def submit(self, job: int, requests: list[dict[str, Any]], whole_machine: bool) -> None:
        self._queue.append((job, requests))

    def wait(self, timeout_s: float) -> list[tuple[int, list[Reply]]]:
        if not self._queue:
            time.sleep(min(timeout_s, 0.005))  # a search is thinking
        done = [(job, self._run(requests)) for job, requests in self._queue]
        self._queue.clear()
        return done

    def look(self, wanted: Mapping[int, tuple[str, int]]) -> dict[int, dict[str, Any]]:
        return {}

    def ask_to_stop(self) -> None:
        pass

    def kill(self, job: int, failure: str, message: str) -> None:
        raise RuntimeError(f"job {job} runs in this process and cannot be ended: {failure}: {message}")

    def is_pending(self, job: int) -> bool:
        return False

    def close(self) -> None:
        self._queue.clear()


class RayPool:
    """Warm actors on a Ray that this driver starts on this machine and that ends with it."""

    def __init__(self, slots: int, device: str, home: Path) -> None:
        # Before the import of ray, which reads them. Telemetry off; a token of our own that only this user can read.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(private_token(home)))
        # Waiting threads of one slot must not spin on another slot's core. Ray itself sets OMP_NUM_THREADS to an actor's cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import ray

        self._ray = ray
        self.slots, self.device = slots, device
        self._idle: list[Any] = []
        self._size: dict[Any, int] = {}
        self._running: dict[Any, tuple[int, Any]] = {}
        self._looks: dict[int, Any] = {}
        self._killed: dict[int, Reply] = {}
        self._held: dict[Any, dict[str, int]] = {}
        self._kinds: dict[int, str] = {}
        self._up: set[Any] = set()
        ray.init(
            address="local",
            num_cpus=slots,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            # Results are small dicts and inputs travel as fingerprints: the smallest object store Ray accepts will do.
            object_store_memory=80 * 1024 * 1024,
        )

    def idle(self) -> int:
        return self.slots - sum(self._size[actor] for _, actor in self._running.values())

    def submit(self, job: int, requests: list[dict[str, Any]], whole_machine: bool) -> None:
        actor = self._acquire(self.slots if whole_machine else 1)
        self._running[actor.run.remote(requests)] = (job, actor)
        self._kinds[job] = requests[0]["type"]

    def wait(self, timeout_s: float) -> list[tuple[int, list[Reply]]]:
        """Jobs that ended within the time. A worker that died is a failed reply, never an exception."""
        if not self._running:
            time.sleep(min(timeout_s, 0.02))  # a search is thinking
            return []
        ready, rest = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        if ready and rest:
            ready += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        done = []
        for ref in ready:
            job, actor = self._running.pop(ref)
            kind = self._kinds.pop(job)
            self._looks.pop(job, None)
            try:
                replies, held = self._ray.get(ref)
            except self._ray.exceptions.OutOfMemoryError as e:
                replies, held = [failed("oom_host", first_line(e))], None
            except self._ray.exceptions.RayError as e:
                replies, held = [self._killed.pop(job, None) or failed("lost_worker", first_line(e))], None
            self._killed.pop(job, None)
            if all(reply["ok"] for reply in replies) and not self._has_grown(actor, kind, held):
                self._idle.append(actor)
            else:
                self._retire(actor)
            done.append((job, replies))
        return done

    def look(self, wanted: Mapping[int, tuple[str, int]]) -> dict[int, dict[str, Any]]:
        actors = dict(self._running.values())
        found = {}
        for job, (key, seen) in wanted.items():
            if job not in actors:
                continue
            if job not in self._looks:
                self._looks[job] = actors[job].look.remote(key, seen)
            elif self._ray.wait([self._looks[job]], timeout=0)[0]:
                try:
                    found[job] = self._ray.get(self._looks.pop(job))
                    self._up.add(actors[job])
                except self._ray.exceptions.RayError:
                    continue  # the worker has died: `wait` says so
        return found

    def ask_to_stop(self) -> None:
        for _, actor in self._running.values():
            actor.stop.remote()

    def kill(self, job: int, failure: str, message: str) -> None:
        for number, actor in self._running.values():
            if number == job:
                self._killed[job] = failed(failure, message)
                self._ray.kill(actor, no_restart=True)

    def is_pending(self, job: int) -> bool:
        return any(number == job and actor not in self._up for number, actor in self._running.values())

    def close(self) -> None:
        """Ends Ray and with it every worker, whatever it is at."""
        for actor in [*self._idle, *(actor for _, actor in self._running.values())]:
            self._ray.kill(actor, no_restart=True)
        self._running.clear()
        self._idle.clear()
        self._ray.shutdown()

    def _acquire(self, size: int) -> Any:
        for actor in self._idle:
            if self._size[actor] == size:
                self._idle.remove(actor)
                return actor
        while self._idle and sum(self._size.values()) + size > self.slots:
            self._retire(self._idle.pop())
        actor = (
            self._ray.remote(concurrency_groups={"work": 1, "watch": 1})(Worker)
            .options(
                num_cpus=size,
                num_gpus=1 if self.device == "cuda" else 0,
                max_restarts=0,
                max_task_retries=0,
            )
            .remote()
        )
        self._size[actor] = size
        return actor

    def _has_grown(self, actor: Any, kind: str, held: int | None) -> bool:
        """Whether the worker holds a tenth more memory than after its first task of that type, and not just a little."""
        if held is None:
            return False
        first = self._held.setdefault(actor, {}).setdefault(kind, held)
        return held > GROWTH * first + GROWTH_FLOOR_BYTES

    def _retire(self, actor: Any) -> None:
        del self._size[actor]
        self._held.pop(actor, None)
        self._up.discard(actor)
        self._ray.kill(actor, no_restart=True)


class Worker:
    """The actor: a warm process that runs one job at a time, and answers how far it is meanwhile."""

    def run(self, requests: list[dict[str, Any]]) -> tuple[list[Reply], int]:
        from pare.workers.run import STOP, resident_bytes

        STOP.clear()
        return run_requests(requests), resident_bytes("VmRSS")

    def look(self, key: str, seen: int) -> dict[str, Any]:
        from pare.workers.run import look

        return look(key, seen)

    def stop(self) -> None:
        from pare.workers.run import STOP

        STOP.set()


# Ray reads the group from the method's own mark, which its decorator would set; this file must import without Ray.
setattr(Worker.run, "__ray_concurrency_group__", "work")  # noqa: B010
for _method in (Worker.look, Worker.stop):
    setattr(_method, "__ray_concurrency_group__", "watch")  # noqa: B010


def failed(failure: str, message: str) -> Reply:
    return {"ok": False, "failure": failure, "message": message, "cost": {}}


def private_token(home: Path) -> Path:
    """A token file that only this user can read. Ray's own default is readable by everyone."""
    path = (home / "ray.token").absolute()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(handle, secrets.token_hex(32).encode())
        os.close(handle)
    return path


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
