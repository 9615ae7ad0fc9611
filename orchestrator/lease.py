"""Leases: who makes what, where several drivers work on one store.

    leases/FINGERPRINT     the driver that is at this task, put there by conditional creation
    drivers/DRIVER         its beat, a number that it writes anew every few seconds as long as it lives

A lease makes double work rare; publication makes it harmless. Clocks of different machines are never compared: a driver
counts as dead when its beat has not changed for `TTL_S` by the clock of whoever looks, or at once when its process was on
this machine and is gone.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pare.workers.blobs import Blobs
from pare.workers.files import host_tag

BEAT_S = 10.0
TTL_S = 60.0


class Leases:
    """The leases of one driver."""

    def __init__(self, blobs: Blobs, driver: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.blobs, self.driver = blobs, driver
        self._now = clock
        own = {
            "driver": driver,
            "name": socket.gethostname(),
            "host": host_tag(),
            "pid": os.getpid(),
            "born": born(os.getpid()),
        }
        self._me = json.dumps(own).encode()
        self._beats = 0
        self._beat_at: float | None = None
        self._seen: dict[str, tuple[bytes | None, float]] = {}
        self._held: set[str] = set()

    def beat(self) -> None:
        """Says that this driver lives, when it is time to."""
        if self._beat_at is None or self._now() - self._beat_at >= BEAT_S:
            self._beats += 1
            self.blobs.write(f"drivers/{self.driver}", str(self._beats).encode())
            self._beat_at = self._now()

    def take(self, fingerprint: str) -> bool:
        """Whether the task is this driver's to make. A lease of a dead driver is taken over."""
        if fingerprint in self._held:
            return True
        self.beat()
        key = f"leases/{fingerprint}"
        if not self.blobs.create(key, self._me):
            holder = self.holder(fingerprint)
            if holder and holder["driver"] != self.driver:
                if not self.is_dead(holder):
                    return False
                if self.holder(fingerprint) == holder:  # nobody has taken it over in the meantime
                    self.blobs.delete(key)
                    if not self.blobs.create(key, self._me):
                        return False
            else:
                self.blobs.write(key, self._me)  # an earlier life of this driver's
        self._held.add(fingerprint)
        return True

    def release(self, fingerprint: str) -> None:
        """To be called when the task is published, or has failed."""
        if fingerprint in self._held:
            self._held.discard(fingerprint)
            self.blobs.delete(f"leases/{fingerprint}")

    def close(self) -> None:
        for fingerprint in list(self._held):
            self.release(fingerprint)
        self.blobs.delete(f"drivers/{self.driver}")

    def holder(self, fingerprint: str) -> dict[str, Any] | None:
        """Who holds the lease: `driver`, `name` and tag of its `host`, `pid`, `born`."""
        try:
            found: dict[str, Any] = json.loads(self.blobs.read(f"leases/{fingerprint}"))
            return found
        except FileNotFoundError:
            return None

    def is_dead(self, holder: dict[str, Any]) -> bool:
        """Whether the driver that holds a lease has ended without giving it back."""
        if holder["host"] == host_tag() and born(holder["pid"]) != holder["born"]:
            return True
        try:
            beat: bytes | None = self.blobs.read(f"drivers/{holder['driver']}")
        except FileNotFoundError:
            beat = None
        driver = holder["driver"]
        if self._seen.get(driver, (b"", 0.0))[0] != beat or driver not in self._seen:
            self._seen[driver] = (beat, self._now())
        return self._now() - self._seen[driver][1] >= TTL_S


def born(pid: int) -> str | None:
    """When a process of this machine began, which tells it from a later one of the same number; None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "unknown"
