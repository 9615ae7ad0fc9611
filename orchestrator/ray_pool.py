"""Warm Ray actors: on a Ray of this driver's own, or on a cluster that runs already.

Actors stay alive between tasks, so imports are paid once per slot. An actor is replaced after a failed attempt, for what a
failure leaves in a process is not to be trusted, and when it holds on to memory. Ray's own retries are off: attempts are
the engine's. On a cluster slots come and go with the nodes; what ran on a node that is lost is a lost worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pare.orchestrator import hardware
from pare.orchestrator.errors import InfeasibleError
from pare.orchestrator.pool import Reply, Room, failed, run_requests
from pare.orchestrator.schema import Cluster

GROWTH, GROWTH_FLOOR_BYTES = 1.1, 64e6
"""A worker is replaced when it holds so many times what is usual for it, and so much more."""

CONNECT_S = 10.0

REFRESH_EVERY_S = 2.0
"""Between two looks at which nodes of a cluster there are."""

WORKERS_ENV = {"OMP_WAIT_POLICY": "passive"}
"""Waiting threads of one slot must not spin on another slot's core. Ray itself sets OMP_NUM_THREADS to an actor's cores."""

IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for what was submitted to it; its workers find Pare as the driver does."""


@dataclass
class Running:
    """A job that an actor is at."""

    job: int
    actor: Any
    requests: list[dict[str, Any]]
    in_line: bool = False
    """Whether it waits for another job of its actor."""


class Usual:
    """What a worker holds when nothing is left over: the first task of a kind brings libraries, which stay."""

    def __init__(self) -> None:
        self._kinds: set[str] = set()
        self._bytes = 0

    def is_exceeded(self, kind: str, held: int) -> bool:
        """Whether what it holds after a task of that kind is a tenth more than usual, and not just a little."""
        if kind in self._kinds:
            return held > GROWTH * self._bytes + GROWTH_FLOOR_BYTES
        self._kinds.add(kind)
        self._bytes = max(self._bytes, held)
        return False


class RayPool:
    """Slots are cores on a CPU; on GPUs they are shares, as many to a GPU as `cluster.gpu_memory_gb` leaves room for."""

    def __init__(self, slots: int | None, device: str, home: Path, cluster: Cluster) -> None:
        """slots: at most so many; None: all that there are."""
        self.device, self.labels, self._most, self._pending_s = device, cluster.labels, slots, cluster.pending_s
        self.is_local = cluster.address == "local"
        self._ray = start_ray(slots or hardware.cores(), device, home, cluster)
        self._idle: list[Any] = []
        self._size: dict[Any, int] = {}
        self._running: dict[Any, Running] = {}  # by the reference to the reply
        self._looks: dict[int, Any] = {}
        self._killed: dict[int, Reply] = {}
        self._usual: dict[Any, Usual] = {}
        self._node: dict[Any, str] = {}
        self._up: set[Any] = set()
        self._refreshed = 0.0
        try:
            self.per_gpu = self._shares(cluster.gpu_memory_gb) if device == "cuda" else 1
            self.slots = self._capacity()
            if not self.slots:
                wanted = f" with the labels {self.labels}" if self.labels else ""
                what = "GPU" if device == "cuda" else "core"
                where = f"the cluster at {cluster.address} has no node{wanted} that offers a {what}"
                raise InfeasibleError(f"{where}. Look at what there is: ray status")
        except BaseException:
            self.close()
            raise

    def idle(self) -> int:
        return self.slots - sum(self._size[running.actor] for running in self._running.values() if not running.in_line)

    def ranks(self) -> int:
        return self.idle() // self.per_gpu

    def submit(self, job: int, requests: list[dict[str, Any]], room: Room, behind: int | None = None) -> None:
        before = next((running for running in self._running.values() if running.job == behind), None)
        if is_ranked(requests):
            actor = self._launcher(requests[0]["ranks"])
        else:
            actor = before.actor if before else self._acquire(self._size_of(room), room)
        more: dict[str, Any] = {} if self.is_local else {"log": None}  # a path of this machine
        if self.per_gpu > 1 and room is Room.SLOT:
            more["gpu_fraction"] = 1 / self.per_gpu
        self._send(Running(job, actor, [{**request, **more} for request in requests], before is not None))

    def _send(self, running: Running) -> None:
        self._running[running.actor.run.remote(running.requests)] = running

    def wait(self, timeout_s: float) -> list[tuple[int, list[Reply]]]:
        """Jobs that ended within the time. A worker that died is a failed reply, never an exception."""
        self._refresh()
        if not self._running:
            time.sleep(min(timeout_s, 0.02))  # a search is thinking
            return []
        ready, rest = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        if ready and rest:
            ready += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        done = []
        for ref in sorted(ready, key=lambda ref: self._running[ref].job):
            ended = self._running.pop(ref)
            if ended.in_line:  # its actor was given up for the job before it
                self.submit(ended.job, ended.requests, Room.SLOT)
                continue
            self._looks.pop(ended.job, None)
            try:
                replies, held, self._node[ended.actor] = self._ray.get(ref)
            except self._ray.exceptions.OutOfMemoryError as e:
                replies, held = [failed("oom_host", first_line(e))], None
            except self._ray.exceptions.RayError as e:
                replies, held = [self._killed.pop(ended.job, None) or failed("lost_worker", first_line(e))], None
            self._killed.pop(ended.job, None)
            follower = next((other for other in self._running.values() if other.actor is ended.actor), None)
            is_well = all(reply["ok"] for reply in replies) and not is_ranked(ended.requests)
            if is_well and follower:
                follower.in_line = False
            elif is_well and not self._has_grown(ended, held):
                self._idle.append(ended.actor)
            else:
                self._retire(ended.actor)
            done.append((ended.job, replies))
        return done

    def look(self, wanted: Mapping[int, tuple[str, int]]) -> dict[int, dict[str, Any]]:
        actors = {running.job: running.actor for running in self._running.values() if not running.in_line}
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
        for running in self._running.values():
            running.actor.stop.remote()

    def kill(self, job: int, failure: str, message: str) -> None:
        for running in self._running.values():
            if running.job == job:
                self._killed[job] = failed(failure, message)
                self._ray.kill(running.actor, no_restart=True)

    def is_pending(self, job: int) -> bool:
        return any(running.job == job and running.actor not in self._up for running in self._running.values())

    def close(self) -> None:
        """Ends every worker, whatever it is at, and a Ray of our own with them."""
        for actor in [*self._idle, *(running.actor for running in self._running.values())]:
            self._ray.kill(actor, no_restart=True)
        self._running.clear()
        self._idle.clear()
        self._ray.shutdown()

    # -- what there is -------------------------------------------------------------------------------------------

    def _nodes(self) -> list[dict[str, Any]]:
        """Living nodes that carry the labels."""
        return [
            node
            for node in self._ray.nodes()
            if node["Alive"] and all(node.get("Labels", {}).get(key) == value for key, value in self.labels.items())
        ]

    def _capacity(self) -> int:
        """Slots on the nodes that there are now."""
        resource = "GPU" if self.device == "cuda" else "CPU"
        there = int(sum(node["Resources"].get(resource, 0) for node in self._nodes())) * self.per_gpu
        return min(there, self._most) if self._most else there

    def _shares(self, gigabytes: float | None) -> int:
        """Tasks that share a GPU: as many as have room beside each other on the smallest."""
        if gigabytes is None:
            return 1

        def smallest() -> int:
            from pare.orchestrator.hardware import gpu_memory

            return min(gpu_memory())

        ask = self._ray.remote(num_cpus=0)(smallest)
        nodes = [node for node in self._nodes() if node["Resources"].get("GPU")]
        found = [ask.options(scheduling_strategy=self._on(node["NodeID"])).remote() for node in nodes]
        least = min(self._ray.get(found, timeout=60), default=0)
        if least < gigabytes * 1e9:
            raise InfeasibleError(
                f"cluster.gpu_memory_gb={gigabytes:g}: the smallest GPU has {least / 1e9:.1f} GB. Take less, or null for "
                "a GPU to each task"
            )
        return int(least / (gigabytes * 1e9))

    def _refresh(self) -> None:
        """On a cluster: how many slots there are now; idle workers of lost nodes are forgotten."""
        if self.is_local or time.monotonic() - self._refreshed < REFRESH_EVERY_S:
            return
        self._refreshed = time.monotonic()
        self.slots = self._capacity()
        alive = {node["NodeID"] for node in self._nodes()}
        for actor in [actor for actor in self._idle if self._node.get(actor, "") not in alive]:
            self._idle.remove(actor)
            self._retire(actor)
        while self._idle and sum(self._size.values()) > self.slots:  # a new worker may wait for what an idle one holds
            self._retire(self._idle.pop())

    # -- workers -------------------------------------------------------------------------------------------------

    def _size_of(self, room: Room) -> int:
        """Slots."""
        if room is Room.SLOT:
            return 1
        if room is Room.DEVICE or self.device == "cuda":
            return self.per_gpu
        return min(self.slots, int(self._machine()["Resources"].get("CPU", 1)))

    def _machine(self) -> dict[str, Any]:
        """The node for what takes a machine to itself: the driver's, whose hardware the plan speaks of, if it has slots."""
        resource = "GPU" if self.device == "cuda" else "CPU"
        offering = [node for node in self._nodes() if node["Resources"].get(resource)]
        here = self._ray.get_runtime_context().get_node_id()
        return next((node for node in offering if node["NodeID"] == here), offering[0])

    def _acquire(self, size: int, room: Room) -> Any:
        for actor in self._idle:
            if self._size[actor] == size and room is Room.SLOT:
                self._idle.remove(actor)
                return actor
        # For more than a slot all make room: two shares that are free may be of two GPUs.
        while self._idle and (room is not Room.SLOT or sum(self._size.values()) + size > self.slots):
            self._retire(self._idle.pop())
        options: dict[str, Any] = {"num_cpus": size, "max_restarts": 0, "max_task_retries": 0}
        if self.device == "cuda":
            options |= {"num_cpus": 0 if self.per_gpu > 1 else 1, "num_gpus": size / self.per_gpu}
        if room is Room.MACHINE and not self.is_local:
            options["scheduling_strategy"] = self._on(self._machine()["NodeID"])
        elif self.labels:
            options["label_selector"] = self.labels
        actor = self._ray.remote(concurrency_groups={"work": 1, "watch": 1})(Worker).options(**options).remote()
        self._size[actor] = size
        return actor

    def _launcher(self, ranks: int) -> Any:
        """An actor for one job of several ranks, with room made for them: idle workers give up what they hold."""
        from pare.orchestrator.launch import Launcher

        while self._idle:  # all of them: what is free may be of as many machines
            self._retire(self._idle.pop())
        cores = 0 if self.per_gpu > 1 else 1
        each = {"CPU": cores, "GPU": 1} if self.device == "cuda" else {"CPU": 1}
        groups = {"work": 1, "watch": 1}
        actor = self._ray.remote(concurrency_groups=groups)(Launcher).options(num_cpus=0, max_restarts=0, max_task_retries=0)
        made = actor.remote(each, self.labels, self._pending_s)
        self._size[made] = ranks * self.per_gpu
        return made

    def _on(self, node: str) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node, soft=False)

    def _has_grown(self, ended: Running, held: int | None) -> bool:
        """Whether the worker holds on to memory. Between two probes of a search it is meant to."""
        request = ended.requests[0]
        if held is None or "probes" in request:
            return False
        return self._usual.setdefault(ended.actor, Usual()).is_exceeded(
            f"{request['type']} {request['spec'].get('method')}", held
        )

    def _retire(self, actor: Any) -> None:
        del self._size[actor]
        self._usual.pop(actor, None)
        self._node.pop(actor, None)
        self._up.discard(actor)
        self._ray.kill(actor, no_restart=True)


def is_ranked(requests: list[dict[str, Any]]) -> bool:
    """Whether a job is a task of several ranks."""
    return bool(requests[0].get("ranks", 1) > 1)


class Worker:
    """The actor: a warm process that runs one job at a time, and answers how far it is meanwhile."""

    def run(self, requests: list[dict[str, Any]]) -> tuple[list[Reply], int, str]:
        """Replies, bytes that this process holds, and the node it is on."""
        import ray

        from pare.workers.run import STOP, resident_bytes

        STOP.clear()
        return run_requests(requests), resident_bytes("VmRSS"), ray.get_runtime_context().get_node_id()

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


def start_ray(slots: int, device: str, home: Path, cluster: Cluster) -> Any:
    """The module `ray`, connected. What Ray reads from the environment is set before it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.address == "local":
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(private_token(home)))
        for name, value in WORKERS_ENV.items():
            os.environ.setdefault(name, value)
        if cluster.gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, cluster.gpus))
        import ray

        ray.init(
            address="local",
            num_cpus=slots if device == "cpu" else None,
            num_gpus=len(cluster.gpus) if cluster.gpus is not None else None,
            include_dashboard=False,
            # Results are small dicts and inputs travel as fingerprints: the smallest object store Ray accepts will do.
            object_store_memory=80 * 1024 * 1024,
            **quiet,
        )
        return ray
    import ray

    somebody_listens(cluster.address)
    with travelling_wheel() as wheel:
        env = {} if wheel is None else {"runtime_env": {"py_modules": [str(wheel)], "env_vars": WORKERS_ENV}}
        try:
            ray.init(address=cluster.address, **env, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise no_cluster(cluster.address, e) from e
    return ray


def somebody_listens(address: str) -> None:
    """Ray itself tries for minutes where nobody does."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as e:
        raise no_cluster(address, e) from e


def no_cluster(address: str, why: Exception) -> InfeasibleError:
    return InfeasibleError(
        f"no Ray cluster answers at cluster.address={address}: {first_line(why)}. Start one (ray start --head), give its "
        "address, or take a Ray of your own: cluster.address=local"
    )


@contextlib.contextmanager
def travelling_wheel() -> Iterator[Path | None]:
    """Pare as a wheel for the nodes; None in a submitted job, with which it has come."""
    if os.environ.get(IN_A_JOB):
        yield None
        return
    from pare.orchestrator.packing import build_wheel

    with tempfile.TemporaryDirectory() as scratch:
        yield build_wheel(Path(scratch))


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
