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
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

Reply = dict[str, Any]


class Pool(Protocol):
    """What the engine needs of a place to run tasks."""

    slots: int

    def idle(self) -> int: ...

    def submit(self, job: int, requests: list[dict[str, Any]], whole_machine: bool) -> None: ...

    def wait(self, timeout_s: float) -> list[tuple[int, list[Reply]]]: ...

    def close(self) -> None: ...


class InlinePool:
    """Runs every task in this process as soon as it is waited for."""

    slots = 1

    def __init__(self, run: Callable[[list[dict[str, Any]]], list[Reply]] | None = None) -> None:
        from pare.workers.run import run_batch

        self._run = run or run_batch
        self._queue: list[tuple[int, list[dict[str, Any]]]] = []

    def idle(self) -> int:
        return 1 - len(self._queue)

    def submit(self, job: int, requests: list[dict[str, Any]], whole_machine: bool) -> None:
        self._queue.append((job, requests))

    def wait(self, timeout_s: float) -> list[tuple[int, list[Reply]]]:
        done = [(job, self._run(requests)) for job, requests in self._queue]
        self._queue.clear()
        return done

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

    def wait(self, timeout_s: float) -> list[tuple[int, list[Reply]]]:
        """Jobs that ended within the time. A worker that died is a failed reply, never an exception."""
        if not self._running:
            return []
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        done = []
        for ref in ready:
            job, actor = self._running.pop(ref)
            try:
                replies = self._ray.get(ref)
            except self._ray.exceptions.OutOfMemoryError as e:
                replies = [{"ok": False, "failure": "oom_host", "message": first_line(e), "cost": {}}]
            except self._ray.exceptions.RayError as e:
                replies = [{"ok": False, "failure": "lost_worker", "message": first_line(e), "cost": {}}]
            if all(reply["ok"] for reply in replies):
                self._idle.append(actor)
            else:
                self._retire(actor)
            done.append((job, replies))
        return done

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
            self._ray.remote(Worker)
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

    def _retire(self, actor: Any) -> None:
        del self._size[actor]
        self._ray.kill(actor, no_restart=True)


class Worker:
    """The actor: a warm process that runs one job at a time."""

    def run(self, requests: list[dict[str, Any]]) -> list[Reply]:
        from pare.workers.run import run_batch

        return run_batch(requests)


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
