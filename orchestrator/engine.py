"""The ready loop: starts what can run, takes in what came back, decides about another attempt.

The driver owns it all. Ray is only where tasks run; the store says what is done; the ledger writes down what happened.
Nothing in the loop walks the whole plan: a task knows how many of its inputs are missing and which tasks wait for it.

A search (a coordinated task) holds no slot. Its coordination runs in a thread of the driver and asks for probes; these
are jobs in the pool like others, as many at once as slots are free.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pare.orchestrator.estimate import Estimate
from pare.orchestrator.fingerprint import DEPENDS_ON_DEVICE, canonical
from pare.orchestrator.lease import Leases
from pare.orchestrator.ledger import Ledger
from pare.orchestrator.plan import NoMembersError, Plan, Task, ranks_of
from pare.orchestrator.pool import Pool, Reply, Room
from pare.orchestrator.schedule import ranks
from pare.orchestrator.work import MADE_OF_TEXT
from pare.workers.blobs import log_key
from pare.workers.plugins import pack_plugins
from pare.workers.run import Coordination, live_key
from pare.workers.store import Store

RETRIES = {
    "lost_worker": 3,
    "oom_host": 1,
    "oom_gpu": 2,
    "corrupt_input": 1,
    "hang": 1,
    "unknown": 1,
    "user_error": 0,
    "nonfinite": 0,
    "export_mismatch": 0,
    "disk_full": 0,
    "pending": 0,
}
"""Failure class -> further attempts. A deterministic failure gets none: it would fail again."""

ALONE = frozenset({"speed"})
"""Task types that take the whole machine, together with their likes, after everything else."""

COORDINATED = frozenset({"allocate"})
"""Task types whose module defines `coordinate`: searches."""

STOPPED = "stopped"
"""Class of an attempt that ended because it was told to. It is no failure of the task."""

SHORT_S = 0.05
"""A task that takes less may be handed to a worker before the one it is at has ended."""

BRIEF_S, SHARE = 0.02, 16
"""Tasks of a type that takes no longer go to a worker in shares of up to so many."""

WAIT_S = 0.25
LOOK_EVERY_S = 1.0
"""Between two looks at how far the running tasks are."""
ELSEWHERE_EVERY_S = 2.0
"""Between two looks at what other drivers have made."""


class Listener(Protocol):
    """Told what happens, to show it."""

    def started(self, task: Task, attempt: int) -> None: ...

    def progressed(self, running: dict[str, dict[str, Any] | None]) -> None: ...

    def points(self, task: Task, points: list[tuple[int, dict[str, float]]]) -> None: ...

    def ended(self, task: Task, reply: Reply, final: bool) -> None: ...

    def elsewhere(self, task: Task, holder: dict[str, Any]) -> None:
        """Another driver is at the task (see `lease`)."""
        ...

    def trial_ended(self, trial: str, status: str, failure: dict[str, Any] | None) -> None: ...


@dataclass
class Limits:
    """What may be spent, and how long something may stand still."""

    keep_going: bool = True
    """Whether other tasks go on when one has failed for good."""
    stall_s: float = 1800.0
    """Seconds without a sign of progress after which a task counts as hung."""
    pending_s: float = 600.0
    """Seconds that a worker may take to come up."""
    wall_s: float | None = None
    gpu_hours: float | None = None
    trials: int | None = None
    """Trials that may end; further ones are not started."""


@dataclass
class Job:
    """What one worker is at."""

    tasks: list[Task]
    probes: list[int] | None = None
    """Of a search: numbers of its probes."""
    since: float = field(default_factory=time.monotonic)
    beat: Any = None
    beat_at: float = field(default_factory=time.monotonic)
    seen: int = 0
    """Curve points taken in."""
    behind: int | None = None
    """The job in whose worker it waits."""


@dataclass
class Search:
    """A coordinated task on its way."""

    task: Task
    coordination: Coordination
    thinking: Future[Any] | None = None
    probes: list[dict[str, Any]] = field(default_factory=list)
    waiting: deque[list[int]] = field(default_factory=deque)
    """Numbers of the probes still to be handed out, in shares."""
    scores: dict[int, Any] = field(default_factory=dict)
    failures: int = 0
    seen: int = 0
    """Curve points shown."""


class Engine:
    """Executes one plan."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        ledger: Ledger,
        run: int,
        sweep: str,
        pool: Pool,
        home: Path,
        device: str,
        limits: Limits,
        estimates: Mapping[str, Estimate] | None = None,
        missing: Iterable[Task] | None = None,
        only: Collection[str] | None = None,
        again: Collection[str] = (),
        leases: Leases | None = None,
        committed: Callable[[], None] = lambda: None,
    ) -> None:
        """estimates: fingerprint -> estimate. Ready tasks are chosen by the time to the end of all that waits for them.
        missing: what is to run; None: what the store lacks. only: trials to work on (None: all); the others count as settled.
        again: those of them that have been made before. leases: where others work on the store, too.
        committed: called whenever the ledger is on the disk.
        """
        self.plan, self.store, self.ledger, self.run, self.sweep = plan, store, ledger, run, sweep
        self.pool, self.home, self.device, self.limits = pool, home, device, limits
        self.estimates = estimates or {}
        self.leases, self.committed = leases, committed
        self.anew = set(again)
        self.failed: dict[str, dict[str, Any]] = {}
        self.failures: Counter[tuple[str, str]] = Counter()
        self.running: dict[int, Job] = {}
        self.searches: dict[str, Search] = {}
        self.attempts: dict[str, int] = {}
        self.settled: set[str] = set() if only is None else set(plan.goals) - set(only)
        self.ours = set(plan.goals) - self.settled
        """Trials to work on that have not failed."""
        self.lost: set[str] = set()
        """Those that have."""
        self.begun: set[str] = set()
        self.usual: dict[str, float] = {}
        """Type of task -> seconds that one of it has taken of late."""
        self.ended = 0
        """Trials of which something ran and that are settled."""
        self.elsewhere: dict[str, Task] = {}
        """Tasks that another driver is at."""
        self.jobs = 0
        self.unfollowed: list[int] = []
        """Running jobs of short tasks behind which nothing waits."""
        self.stopping: str | None = None
        """Why nothing more is started, if so."""
        self.interrupted = 0
        """Number of the signal that asked for the end, if one did."""
        self.spent_gpu_s = 0.0
        self._since = time.monotonic()
        self._looked = self._looked_elsewhere = 0.0
        self._thinkers = ThreadPoolExecutor(max_workers=4, thread_name_prefix="search")
        self._order: dict[str, int] = {}
        self.stock(plan.missing(store, only) if missing is None else missing)

    # -- the graph of what is missing ----------------------------------------------------------------------------

    def stock(self, missing: Iterable[Task]) -> None:
        """Takes the missing tasks in, producers first."""
        self.missing = {task.fingerprint: task for task in missing}
        there = self.store.present(self.missing) if self.leases else ()
        self.anew = {fp for fp in there if fp in self.anew or not self.store.held(fp)}
        """Missing tasks that have been made before: because they are to run again, or their files were dropped."""
        self.consumers: dict[str, list[str]] = {}
        self.needs: dict[str, int] = {}
        self.ready: list[tuple[float, int, str]] = []
        self.alone: dict[str, list[Task]] = {}
        self.solo: deque[Task] = deque()
        self.ends: dict[str, list[str]] = {}
        self.open: dict[str, int] = {}
        self.pointless: set[str] | None = None
        """Missing tasks that only trials need which have failed; None: to be worked out anew."""
        nodes = [*self.missing.values(), *self.plan.expected()]
        durations = {
            n.fingerprint: self.estimates[n.fingerprint].wall_s if n.fingerprint in self.estimates else 0.0 for n in nodes
        }
        self.ranks = ranks(nodes, durations)
        self.admit(self.missing.values())
        for trial in self.plan.goals:
            self.watch(trial)

    def admit(self, tasks: Iterable[Task]) -> None:
        """Queues missing tasks, each behind those that it needs."""
        self.pointless = None
        for task in tasks:
            fingerprint = task.fingerprint
            self._order.setdefault(fingerprint, len(self._order))
            needed = {fp for fp in task.inputs.values() if fp in self.missing}
            self.needs[fingerprint] = len(needed)
            for producer in needed:
                self.consumers.setdefault(producer, []).append(fingerprint)
            if not needed:
                self.queue(task)

    def queue(self, task: Task) -> None:
        """A task whose inputs are all there."""
        if task.fingerprint in self.failed:
            return
        if task.type in MADE_OF_TEXT:  # soon over, and what they fail of fails every trial
            heapq.heappush(self.ready, (-math.inf, self._order[task.fingerprint], task.fingerprint))
        elif self.room_of(task) is not Room.SLOT and task.type not in ALONE | COORDINATED:
            self.solo.append(task)
        elif task.type in ALONE:
            self.alone.setdefault(canonical([task.type, task.spec]), []).append(task)
        else:
            heapq.heappush(
                self.ready, (-self.ranks.get(task.fingerprint, 0.0), self._order[task.fingerprint], task.fingerprint)
            )

    def watch(self, trial: str) -> None:
        """Counts what a trial still waits for."""
        if trial in self.settled:
            return
        ends = self.plan.wanted_of(trial) if trial in self.plan.late else self.plan.goals[trial].ends
        waiting = {fp for fp in ends if fp in self.missing and fp not in self.failed}
        for fingerprint in waiting:
            self.ends.setdefault(fingerprint, []).append(trial)
        self.open[trial] = len(waiting)

    # -- the loop ------------------------------------------------------------------------------------------------

    def execute(self, listener: Listener) -> None:
        """Runs until nothing is left to start and nothing runs. Failed tasks fail their trials, not the sweep."""
        try:
            for trial in list(self.plan.goals):
                self.settle(trial, listener)
            while True:
                self.check_budget()
                self.think(listener)
                self.start(listener)
                self.commit()
                waits = self.elsewhere and not self.stopping
                if not self.running and not waits and not any(search.thinking for search in self.searches.values()):
                    break
                for job, replies in self.pool.wait(WAIT_S):
                    self.take_in(job, replies, listener)
                self.look(listener)
                self.look_elsewhere(listener)
            if self.leases:
                self.take_over()
        finally:
            self._thinkers.shutdown(wait=False, cancel_futures=True)
            self.commit()

    def commit(self) -> None:
        self.ledger.commit()
        self.committed()

    def stop(self, reason: str) -> None:
        """Starts nothing more; what runs is asked to save its state and end."""
        self.stopping = reason
        self.pool.ask_to_stop()

    def check_budget(self) -> None:
        limits = self.limits
        if self.interrupted and not self.stopping:
            self.stop("interrupted")
        for name, allowed, spent in (
            ("wall_s", limits.wall_s, time.monotonic() - self._since),
            ("gpu_hours", limits.gpu_hours, self.spent_gpu_s / 3600),
            ("trials", limits.trials, self.ended),
        ):
            if allowed is not None and spent >= allowed and not self.stopping and (self.missing or self.running):
                self.stop(f"budget.{name}={allowed:g} is spent")

    def start(self, listener: Listener) -> None:
        """Hands probes and ready tasks to free slots, the longest way to the end first; tasks that run alone come last.

        What ran out of memory is tried again before all others, with nothing beside it.
        """
        if self.stopping:
            return
        while self.solo and not self.has_purpose(self.solo[0]):
            self.solo.popleft()
        if self.solo:
            if not self.running:
                self.launch([self.solo.popleft()], listener)
            return
        while self.pool.idle() > 0:
            search = next((s for s in self.searches.values() if s.waiting), None)
            if search:
                self.send_probes(search)
                continue
            share = self.next_share()
            if not share:
                break
            if ranks_of(share[0]) > self.pool.ranks() and self.running:  # what ends makes room, and nothing else takes that
                self.queue(share[0])
                break
            self.launch(share, listener)
        while self.unfollowed and self.pool.idle() <= 0 and self.ready and self.is_short(self.ready[0][2]):
            if share := self.next_share():
                self.launch(share, listener, behind=self.unfollowed.pop())
        if not self.alone or self.running or self.searches or self.ready or self.elsewhere:
            return
        if any(task.type not in ALONE for task in self.unblocked()):
            return
        while self.alone and not self.running:
            batch = self.alone.pop(next(iter(self.alone)))
            self.launch([task for task in batch if self.has_purpose(task)], listener)

    def unblocked(self) -> Iterable[Task]:
        """Missing tasks that may still run. Asked only when nothing runs and nothing is ready."""
        return (task for task in self.missing.values() if self.has_purpose(task) and not self.cause(task.fingerprint))

    def has_purpose(self, task: Task) -> bool:
        """Whether it is worth starting: not for trials alone that can no longer be done."""
        if self.pointless is None:
            self.pointless = self.behind(self.lost) - self.behind(self.ours) if self.lost else set()
        return task.fingerprint not in self.pointless

    def behind(self, trials: Iterable[str]) -> set[str]:
        """Fingerprints of the missing tasks that trials need."""
        found: set[str] = set()
        waiting = [fingerprint for trial in trials for fingerprint in self.plan.wanted_of(trial)]
        while waiting:
            fingerprint = waiting.pop()
            if fingerprint in self.missing and fingerprint not in found:
                found.add(fingerprint)
                waiting += self.missing[fingerprint].inputs.values()
        return found

    def next_share(self) -> list[Task]:
        """The next task for a worker, and those after it where all of them are over at once: the way there and back would take
        longer than they do. The other slots find as many left."""
        most = max(1, min(SHARE, len(self.ready) // max(1, self.pool.slots)))
        share: list[Task] = []
        while len(share) < most and (task := self.next_ready()):
            share.append(task)
            following = self.missing.get(self.ready[0][2]) if self.ready else None
            if following is None or not (self.is_brief(task) and self.is_brief(following)):
                break
        return share

    def is_brief(self, task: Task) -> bool:
        """Whether tasks of its type have been over at once of late, and it has not failed."""
        has_failed = any(self.failures[task.fingerprint, failure] for failure in RETRIES)
        return self.usual.get(task.type, math.inf) <= BRIEF_S and self.is_plain(task) and not has_failed

    def is_plain(self, task: Task) -> bool:
        """Whether it takes one slot of one worker and nothing else."""
        return task.type not in COORDINATED and self.room_of(task) is Room.SLOT and ranks_of(task) == 1

    def next_ready(self) -> Task | None:
        while self.ready:
            fingerprint = heapq.heappop(self.ready)[2]
            task = self.missing.get(fingerprint)
            if task and fingerprint not in self.failed and self.has_purpose(task):
                return task
        return None

    def request(self, task: Task) -> dict[str, Any]:
        """What a worker is told."""
        return {
            "fingerprint": task.fingerprint,
            "type": task.type,
            "label": task.label,
            "spec": task.spec,
            "where": {**task.where, "halvings": self.failures[task.fingerprint, "oom_gpu"]},
            "inputs": task.inputs,
            "store": self.store.location,
            "device": self.device if task.type in DEPENDS_ON_DEVICE else "cpu",
            "threads": task.spec["threads"] if task.type in ALONE else 1,
            "ranks": ranks_of(task),
            "log": str(self.log(task).absolute()),
            "keep_log": self.leases is not None,  # others work on this store
            "plugins": pack_plugins(),
        }

    def is_short(self, fingerprint: str) -> bool:
        """Whether a task may wait in line behind another one, so that its worker need not wait for the driver."""
        estimate = self.estimates.get(fingerprint)
        task = self.missing.get(fingerprint)
        return estimate is not None and estimate.wall_s < SHORT_S and task is not None and self.is_plain(task)

    def launch(self, tasks: list[Task], listener: Listener, behind: int | None = None) -> None:
        tasks = [task for task in tasks if self.is_ours(task, listener)]
        if not tasks:
            if behind is not None:
                self.unfollowed.append(behind)
            return
        for task in tasks:
            self.attempts[task.fingerprint] = self.ledger.start_attempt(
                task.fingerprint, self.run, self.estimates.get(task.fingerprint)
            )
            listener.started(task, sum(self.failures[task.fingerprint, failure] for failure in RETRIES) + 1)
        for trial in {name for task in tasks for name in task.trials} - self.begun - self.settled:
            self.begun.add(trial)
            self.ledger.set_trial(self.sweep, trial, "running")
        if tasks[0].type in COORDINATED:
            search = Search(tasks[0], Coordination(self.request(tasks[0])))
            search.thinking = self._thinkers.submit(search.coordination.advance, None)
            self.searches[tasks[0].fingerprint] = search
            return
        self.jobs += 1
        self.running[self.jobs] = Job(tasks, behind=behind)
        if behind is None and self.is_short(tasks[0].fingerprint):
            self.unfollowed.append(self.jobs)
        self.pool.submit(self.jobs, [self.request(task) for task in tasks], self.room_of(tasks[0]), behind)

    def room_of(self, task: Task) -> Room:
        """What ran out of memory gets more of it."""
        if task.type in ALONE or self.failures[task.fingerprint, "oom_host"]:
            return Room.MACHINE
        return Room.DEVICE if self.failures[task.fingerprint, "oom_gpu"] else Room.SLOT

    def take_in(self, job: int, replies: list[Reply], listener: Listener) -> None:
        """Writes down how a job ended. A worker that died gives one reply for all its tasks."""
        ended = self.running.pop(job)
        if job in self.unfollowed:
            self.unfollowed.remove(job)
        for number, other in self.running.items():
            if other.behind == job:
                other.behind, other.since, other.beat_at = None, time.monotonic(), time.monotonic()
                self.unfollowed.append(number)
        if ended.probes is not None:
            self.take_in_probes(ended, replies[0])
            return
        if len(replies) != len(ended.tasks):
            replies = replies * len(ended.tasks)
        for task, given in zip(ended.tasks, replies, strict=True):
            if given.get("failure") == "lost_worker":
                given = self.published(task) or given
            self.finish(task, {**given, "fingerprint": task.fingerprint}, listener)

    def published(self, task: Task) -> Reply | None:
        """The reply that a worker did not come to give: its result is there."""
        if task.fingerprint in self.anew or not self.store.has(task.fingerprint):
            return None
        return {"ok": True, "published": True, **self.store.manifest(task.fingerprint)}

    def finish(self, task: Task, reply: Reply, listener: Listener) -> None:
        """Writes down how an attempt ended, and sets free or blocks what waits for the task."""
        self.ledger.end_attempt(self.attempts.pop(task.fingerprint), self.run, reply)
        cost = reply.get("cost", {})
        self.spent_gpu_s += cost.get("slot_s", cost.get("wall_s", 0.0)) if self.device == "cuda" else 0.0
        final = True
        if reply["ok"]:
            took = cost.get("wall_s", math.inf)
            self.usual[task.type] = 0.8 * self.usual.get(task.type, took) + 0.2 * took
            self.done(task.fingerprint)
        else:
            final = not self.again(task, reply)
        listener.ended(task, reply, final)
        if reply["ok"]:
            self.settle_ends(task, listener)
        if final and self.leases:
            self.leases.release(task.fingerprint)
        if final and not reply["ok"]:
            for trial in [*task.trials, *self.plan.late]:
                self.settle(trial, listener)

    def settle_ends(self, task: Task, listener: Listener) -> None:
        """Counts a result for the trials that end with it."""
        for trial in list(self.ends.get(task.fingerprint, ())):
            self.open[trial] -= 1
            self.settle(trial, listener)

    def done(self, fingerprint: str) -> None:
        self.missing.pop(fingerprint, None)
        for consumer in self.consumers.pop(fingerprint, ()):
            self.needs[consumer] -= 1
            if not self.needs[consumer] and consumer in self.missing:
                self.queue(self.missing[consumer])

    def again(self, task: Task, reply: Reply) -> bool:
        """Whether the task gets another attempt. A damaged input is made anew first."""
        failure = reply["failure"]
        if failure == STOPPED:
            return True
        self.failures[task.fingerprint, failure] += 1
        if self.failures[task.fingerprint, failure] <= RETRIES.get(failure, 0):
            if failure == "corrupt_input":
                self.restock()
            else:
                self.queue(task)
            return True
        message = f"{reply.get('message', '')} (log: {self.log(task)})"
        self.failed[task.fingerprint] = {"failure": failure, "message": message, "task": task.label}
        if not self.limits.keep_going:
            self.stopping = f"{task.label} failed, and nothing more is started (--fail-fast)"
        return False

    def restock(self) -> None:
        """Works out anew what is missing: an artifact has been taken out of the store. What runs goes on."""
        busy = (
            {task.fingerprint for job in self.running.values() for task in job.tasks} | set(self.searches) | set(self.elsewhere)
        )
        self.stock(self.plan.missing(self.store, [trial for trial in self.plan.goals if trial in self.ours]))
        self.ready = [entry for entry in self.ready if entry[2] not in busy]
        heapq.heapify(self.ready)

    def cause(self, fingerprint: str) -> dict[str, Any] | None:
        """The failure that keeps a task from being done, if any."""
        waiting, seen = [fingerprint], set()
        while waiting:
            fp = waiting.pop()
            if fp in self.failed:
                return self.failed[fp]
            if fp in self.missing and fp not in seen:
                seen.add(fp)
                waiting += self.plan.tasks[fp].inputs.values()
        return None

    # -- trials --------------------------------------------------------------------------------------------------

    def settle(self, trial: str, listener: Listener) -> None:
        """Marks a trial that is done or can no longer be done; answers its query when the last candidate is final."""
        if trial in self.settled:
            return
        if trial in self.plan.late:
            if self.resolve(trial, listener):
                self.settle(trial, listener)
            return
        goals = self.plan.goals[trial]
        status, cause = "done", None
        if self.open[trial]:
            cause = next((c for fp in goals.ends if (c := self.cause(fp))), None) if self.failed else None
            if cause is None:
                return
            status = "failed"
        self.end_trial(trial, status, cause, listener)

    def end_trial(self, trial: str, status: str, cause: dict[str, Any] | None, listener: Listener) -> None:
        self.settled.add(trial)
        if status == "failed":
            self.ours.discard(trial)
            self.lost.add(trial)
            self.pointless = None
        self.ended += trial in self.begun
        self.ledger.set_trial(self.sweep, trial, status, cause)
        listener.trial_ended(trial, status, cause)

    def resolve(self, trial: str, listener: Listener) -> bool:
        """Replaces a late trial's stand-ins by its true tasks. Whether its candidates were all final."""
        candidates = self.plan.late[trial].candidates.values()
        results: dict[str, Mapping[str, Any] | None] = {}
        for fingerprint in candidates:
            if fingerprint not in self.missing:
                results[fingerprint] = self.store.manifest(fingerprint)["result"]
            elif self.failed and self.cause(fingerprint):
                results[fingerprint] = None
            else:
                return False
        rank_of = {task.label: self.ranks.get(task.fingerprint, 0.0) for task in self.plan.expected()}
        try:
            new = self.plan.resolve(trial, results)
        except NoMembersError as e:
            why = next((c for fp in candidates if (c := self.cause(fp))), None)
            message = f"{e}. '{why['task']}' failed: {why['message']}" if why else str(e)
            cause = {"failure": "no_members", "message": message, "task": why and why["task"]}
            self.end_trial(trial, "failed", cause, listener)
            return False
        register_tasks(new, self.store, self.ledger)
        goals = self.plan.goals[trial]
        self.ledger.set_goals(self.sweep, trial, vars(goals))
        fresh = [task for task in self.plan.missing(self.store, [trial]) if task.fingerprint not in self.missing]
        self.ledger.count_cached(self.run, len(new) - len(fresh))
        self.missing |= {task.fingerprint: task for task in fresh}
        self.ranks |= {task.fingerprint: rank_of.get(task.label, 0.0) for task in fresh}
        self.admit(fresh)
        self.watch(trial)
        return True

    # -- other drivers -------------------------------------------------------------------------------------------

    def is_ours(self, task: Task, listener: Listener) -> bool:
        """Whether this driver may start the task; else another one is at it, or has just made it."""
        if self.leases is None:
            return True
        if not self.leases.take(task.fingerprint):
            self.elsewhere[task.fingerprint] = task
            if holder := self.leases.holder(task.fingerprint):
                listener.elsewhere(task, holder)
            return False
        if task.fingerprint not in self.anew and self.store.has(task.fingerprint):
            self.leases.release(task.fingerprint)
            self.made_elsewhere(task, listener)
            return False
        return True

    def made_elsewhere(self, task: Task, listener: Listener) -> None:
        """Takes over a result that another driver has published."""
        manifest = copy_result(task.fingerprint, self.store, self.ledger)
        self.ledger.count_cached(self.run, 1)
        self.done(task.fingerprint)
        listener.ended(task, {"ok": True, "elsewhere": True, **manifest}, True)
        self.settle_ends(task, listener)

    def take_over(self) -> None:
        """Copies into the ledger what others have made in the meantime and nothing here has waited for."""
        rows = self.ledger.tasks(list(self.plan.tasks))
        for fingerprint in self.store.present(fp for fp, row in rows.items() if row["status"] != "done"):
            copy_result(fingerprint, self.store, self.ledger)

    def look_elsewhere(self, listener: Listener) -> None:
        """What others have published, and what they have let go of."""
        if self.leases is None:
            return
        self.leases.beat()
        now = time.monotonic()
        if not self.elsewhere or now - self._looked_elsewhere < ELSEWHERE_EVERY_S:
            return
        self._looked_elsewhere = now
        there = self.store.present(self.elsewhere)
        for fingerprint, task in list(self.elsewhere.items()):
            if fingerprint in there and fingerprint not in self.anew:
                del self.elsewhere[fingerprint]
                self.made_elsewhere(task, listener)
            elif self.leases.take(fingerprint):
                del self.elsewhere[fingerprint]
                self.queue(task)

    # -- searches ------------------------------------------------------------------------------------------------

    def think(self, listener: Listener) -> None:
        """Takes in what coordinations have come to: more probes, or their end."""
        for fingerprint, search in list(self.searches.items()):
            if search.thinking is None:
                if len(search.scores) == len(search.probes) and not search.waiting:
                    scores = [search.scores[i] for i in range(len(search.probes))]
                    search.thinking = self._thinkers.submit(search.coordination.advance, scores)
                elif self.stopping and not self.probing(search):
                    self.end_search(search, {"ok": False, "failure": STOPPED, "message": self.stopping}, listener)
                continue
            if not search.thinking.done():
                continue
            probes = search.thinking.result()
            search.thinking = None
            self.tell_search(search, listener)
            if probes is None:
                del self.searches[fingerprint]
                self.finish(search.task, search.coordination.reply, listener)
                continue
            search.probes, search.scores = probes, {}
            n = max(1, min(self.pool.slots, len(probes)))
            search.waiting = deque(list(range(start, len(probes), n)) for start in range(n))

    def tell_search(self, search: Search, listener: Listener) -> None:
        """Shows how far a search has come."""
        live = search.coordination.look(search.seen)
        search.seen += len(live["points"])
        listener.points(search.task, live["points"])
        listener.progressed({search.task.fingerprint: live["progress"]})

    def probing(self, search: Search) -> bool:
        return any(job.probes is not None and job.tasks[0] is search.task for job in self.running.values())

    def send_probes(self, search: Search) -> None:
        numbers = search.waiting.popleft()
        request = {**self.request(search.task), "probes": [search.probes[i] for i in numbers]}
        self.jobs += 1
        self.running[self.jobs] = Job([search.task], numbers)
        self.pool.submit(self.jobs, [request], self.room_of(search.task))

    def take_in_probes(self, job: Job, reply: Reply) -> None:
        """Scores of some probes. A share that was lost is handed out again, as often as a task would be."""
        search = self.searches.get(job.tasks[0].fingerprint)
        if search is None or job.probes is None:
            return
        search.coordination.spend(reply.get("cost", {}))
        if reply["ok"]:
            search.scores |= dict(zip(job.probes, reply["scores"], strict=True))
            return
        search.failures += 1
        if reply["failure"] == STOPPED or search.failures <= RETRIES.get(reply["failure"], 0):
            search.waiting.append(job.probes)
            return
        search.waiting.clear()
        search.probes, search.scores = [], {}
        failure = {"ok": False, "failure": reply["failure"], "message": reply.get("message", "")}
        search.coordination.end(failure)
        search.thinking = self._thinkers.submit(lambda: None)

    def end_search(self, search: Search, reply: Reply, listener: Listener) -> None:
        search.coordination.end(reply)
        del self.searches[search.task.fingerprint]
        self.finish(search.task, search.coordination.reply, listener)

    # -- watching ------------------------------------------------------------------------------------------------

    def look(self, listener: Listener) -> None:
        """How far the running tasks are; ends those that stand still."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        shown: dict[str, dict[str, Any] | None] = {}
        wanted = {
            number: (live_key(job.tasks[0].fingerprint, job.probes is not None), job.seen)
            for number, job in self.running.items()
        }
        for number, live in self.pool.look(wanted).items():
            job = self.running[number]
            if live["beat"] != job.beat:
                job.beat, job.beat_at = live["beat"], now
            if live["points"]:
                job.seen += len(live["points"])
                listener.points(job.tasks[0], live["points"])
            if job.probes is None:
                shown[job.tasks[0].fingerprint] = live["progress"]
        listener.progressed(shown)
        for number, job in list(self.running.items()):
            if job.behind is not None:
                continue
            if now - job.beat_at > self.limits.stall_s:
                self.pool.kill(number, "hang", f"no progress for {self.limits.stall_s:g} s (cluster.stall_s)")
            elif job.beat is None and now - job.since > self.limits.pending_s and self.pool.is_pending(number):
                message = f"no worker came up within {self.limits.pending_s:g} s (cluster.pending_s)"
                self.pool.kill(number, "pending", message)

    def log(self, task: Task) -> Path:
        return self.home / log_key(task.fingerprint)


def register(plan: Plan, store: Store, ledger: Ledger) -> None:
    """Writes the plan's tasks into the ledger; results that are in the store but not in the ledger are copied over."""
    register_tasks((task for task in plan.tasks.values() if not task.late), store, ledger)


def register_tasks(tasks: Iterable[Task], store: Store, ledger: Ledger) -> None:
    by_fingerprint = {task.fingerprint: task for task in tasks}
    known, there = ledger.tasks(list(by_fingerprint)), store.present(by_fingerprint)
    for fingerprint, task in by_fingerprint.items():
        row, present = known.get(fingerprint), fingerprint in there
        if row is not None and row["status"] == "done" and present:
            continue
        ledger.put_task(fingerprint, task.type, task.label, task.record, "done" if present else "pending")
        if present:
            copy_result(fingerprint, store, ledger)


def copy_result(fingerprint: str, store: Store, ledger: Ledger) -> dict[str, Any]:
    """Writes into the ledger what the manifest says of a task, and returns the manifest."""
    manifest = store.manifest(fingerprint)
    ledger.put_result(fingerprint, manifest["digest"], manifest["result"], manifest["cost"])
    return manifest
