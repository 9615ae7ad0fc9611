"""Where tasks run, as the engine sees it; and the simplest such place, this very process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Protocol

Reply = dict[str, Any]


class Room(Enum):
    """What a job has for itself."""

    SLOT = "a slot"
    """One core and one thread, or its share of a GPU."""
    DEVICE = "a device"
    """As much as SLOT, but a whole GPU."""
    MACHINE = "a machine"
    """All slots of one machine, while nothing else runs anywhere."""


class Pool(Protocol):
    """What the engine needs of a place to run tasks. A job is a list of requests that one worker takes on together."""

    slots: int

    def idle(self) -> int: ...

    def ranks(self) -> int:
        """Ranks of a job that would find room now."""
        ...

    def submit(self, job: int, requests: list[dict[str, Any]], room: Room, behind: int | None = None) -> None:
        """behind: a running job in whose worker this one may wait; it takes no slot until that one has ended."""
        ...

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

    def ranks(self) -> int:
        return min(1, self.idle())

    def submit(self, job: int, requests: list[dict[str, Any]], room: Room, behind: int | None = None) -> None:
        if requests[0].get("ranks", 1) > 1:
            raise ValueError(f"this process is one rank, and '{requests[0]['label']}' wants {requests[0]['ranks']}")
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


def failed(failure: str, message: str) -> Reply:
    return {"ok": False, "failure": failure, "message": message, "cost": {}}
