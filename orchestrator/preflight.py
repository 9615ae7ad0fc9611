"""What a plan needs, compared with what there is, before anything is spent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pare.orchestrator import hardware
from pare.orchestrator.config import Experiment
from pare.orchestrator.errors import InfeasibleError
from pare.orchestrator.estimate import TOGETHER, Estimate, Estimator, History
from pare.orchestrator.explain import reasons
from pare.orchestrator.plan import Plan, Task, ranks_of
from pare.orchestrator.schedule import schedule

Estimates = Mapping[str, Estimate]


@dataclass(frozen=True)
class Supply:
    """What there is to run a plan on. None: not known here, and not checked."""

    device: str
    slots: int
    memory_bytes: int | None = None
    gpu_bytes: int | None = None
    """Free memory of the GPU that has least."""
    disk_bytes: int | None = None
    home: str = ""
    is_here: bool = True
    """Whether that is this machine; else the slots are a guess."""


def supply(experiment: Experiment, home: Path, device: str, slots: int) -> Supply:
    """What this machine has free. What a cluster has is not known before it has been asked."""
    here = experiment.cluster.address == "local"
    return Supply(
        device,
        slots,
        hardware.free_memory(experiment.cluster.memory_gb) if here else None,
        hardware.free_gpu_memory() if here and device == "cuda" else None,
        hardware.free_disk(home, experiment.cluster.disk_gb) if here else None,
        str(home),
        here,
    )


def estimates_of(plan: Plan, tasks: Sequence[Task], device: str, slots: int, history: History | None = None) -> Estimates:
    """Fingerprint -> estimate of `tasks`."""
    return Estimator(plan, history or History({}, {}), device, slots).estimates(tasks) if tasks else {}


def forecast(
    experiment: Experiment, plan: Plan, tasks: list[Task], device: str, home: Path, history: History
) -> tuple[Estimates, Supply]:
    """What `tasks` will cost, and what there is to run them on: as many slots as fit into memory together.

    Of a cluster nobody has asked yet, so many slots are taken as this machine has.
    """
    most = most_slots(experiment, device)
    estimates = estimates_of(plan, tasks, device, most, history)
    return estimates, supply(experiment, home, device, slots_for(experiment, device, tasks, estimates) or most)


def most_slots(experiment: Experiment, device: str) -> int:
    """Slots of this machine, were there no end of memory."""
    gpus = len(experiment.cluster.gpus or hardware.gpus()) if device == "cuda" else 0
    return experiment.cluster.slots or gpus or hardware.cores()


def shortages(plan: Plan, tasks: Sequence[Task], estimates: Estimates, there: Supply) -> list[dict[str, Any]]:
    """What does not fit: `what`, `task` and `label` where it is one task, of bytes `need_bytes` and `have_bytes`, `message`."""
    if not tasks:
        return []
    parameters = max((model["n_parameters"] for model in plan.models.values()), default=0)
    found = []
    for what, have, need_of, remedy in (
        ("memory", there.memory_bytes, lambda e: e.peak_bytes, "Close other programs, raise cluster.memory_gb if you set it"),
        (
            "GPU memory",
            there.gpu_bytes,
            lambda e: e.gpu_bytes,
            "Stop other programs on that GPU, choose another (cluster.gpus)",
        ),
    ):
        task = max(tasks, key=lambda task: float(need_of(estimates[task.fingerprint])))
        need = need_of(estimates[task.fingerprint])
        if have is not None and need > have:
            message = (
                f"not enough {what}: '{task.label}' needs about {size(need)} for a model of {parameters / 1e6:.1f} M "
                f"parameters, {size(have)} are free. {less_room(task)}{remedy}, or take a smaller model (model=tiny)."
            )
            found.append(shortage(what, need, have, message) | {"task": task.fingerprint[:12], "label": task.label})
    widest = max(tasks, key=ranks_of)
    if there.is_here and ranks_of(widest) > there.slots:
        message = (
            f"not enough slots: '{widest.label}' wants engine.ranks={ranks_of(widest)}, and there is room for {there.slots} at "
            f"once. Try: engine.ranks={there.slots}"
        )
        found.append({"what": "slots", "label": widest.label, "message": message})
    need = sum(estimates[task.fingerprint].disk_bytes for task in tasks)
    if there.disk_bytes is not None and need > there.disk_bytes:
        message = (
            f"not enough disk: the {len(tasks)} missing tasks write about {size(need)} to {there.home}, "
            f"{size(there.disk_bytes)} are free. Make room, or set PARE_HOME to a directory on a larger disk."
        )
        found.append(shortage("disk", need, there.disk_bytes, message))
    return found


def less_room(task: Task) -> str:
    """By which settings a training takes less room and learns the same; nothing for other tasks."""
    if task.type != "train":
        return ""
    settings, found = task.spec["settings"], []
    if (micro_batch := settings.get("micro_batch_size", 1)) > 1:
        found.append(f"micro_batch_size={micro_batch // 2} (it is {micro_batch}; the batch of a step stays)")
    if not settings.get("gradient_checkpointing"):
        found.append("gradient_checkpointing=true")
    return f"Try: {', '.join(found)}. Or: " if found else ""


def shortage(what: str, need: float, have: float, message: str) -> dict[str, Any]:
    return {"what": what, "need_bytes": round(need), "have_bytes": round(have), "message": message}


def check_feasible(
    plan: Plan, missing: list[Task], experiment: Experiment, home: Path, device: str, estimates: Estimates
) -> None:
    """Raises InfeasibleError when this machine cannot hold what is missing, naming need and supply."""
    slots = slots_for(experiment, device, missing, estimates) or most_slots(experiment, device)
    for short in shortages(plan, missing, estimates, supply(experiment, home, device, slots)):
        raise InfeasibleError(short["message"])


def slots_for(experiment: Experiment, device: str, missing: list[Task], estimates: Estimates) -> int | None:
    """Tasks that run at once: one per core, fewer where the largest of them do not fit into memory together.

    None: as many as there are shares of GPUs, or room on the cluster.
    """
    if experiment.cluster.slots or device == "cuda" or experiment.cluster.address != "local":
        return experiment.cluster.slots
    cores = hardware.cores()
    free, fit = hardware.free_memory(experiment.cluster.memory_gb), 0
    for peak in sorted((estimates[t.fingerprint].peak_bytes for t in missing if t.type not in TOGETHER), reverse=True)[:cores]:
        free -= int(peak)
        fit += free >= 0
    return max(1, fit) if missing else cores


def cores_for(experiment: Experiment, device: str) -> int:
    """Threads of a task that has the machine to itself."""
    return hardware.cores() if device == "cuda" else experiment.cluster.slots or hardware.cores()


def device_for(experiment: Experiment) -> str:
    """cpu or cuda; `auto` takes the GPU where one answers."""
    wanted = experiment.cluster.device
    if wanted == "cuda" and experiment.cluster.address == "local" and not hardware.gpus():
        raise InfeasibleError("cluster.device=cuda, but no GPU answers here (nvidia-smi). Try: cluster.device=auto")
    if experiment.cluster.gpus and experiment.cluster.address == "local":
        there = len(hardware.gpu_memory())
        if max(experiment.cluster.gpus) >= there:
            raise InfeasibleError(f"cluster.gpus={experiment.cluster.gpus}: this machine has {there} GPUs, numbered from 0")
    return wanted if wanted != "auto" else ("cuda" if hardware.gpus() else "cpu")


# -- what `pare plan` says ---------------------------------------------------------------------------------------------


def summary(
    plan: Plan,
    states: Mapping[str, str],
    history: History,
    there: Supply,
    estimates: Estimates | None = None,
    told: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What would run, why, and what it takes, as plain JSON.

    states: fingerprint -> new, late (both would run), cached or unneeded; told: see `explain.reasons`.
    """
    tasks = [task for fp, task in plan.tasks.items() if states[fp] in ("new", "late")]
    if estimates is None:
        estimates = estimates_of(plan, tasks, there.device, there.slots, history)
    durations = {task.fingerprint: estimates[task.fingerprint].wall_s for task in tasks}
    widths = {task.fingerprint: min(ranks_of(task), there.slots) for task in tasks}
    times = schedule(tasks, durations, there.slots, TOGETHER, widths)
    largest = max(tasks, key=lambda task: estimates[task.fingerprint].peak_bytes, default=None)
    why = reasons(plan, durations, history.records, told)
    return {
        "tasks": {"total_if_separate": plan.total_if_separate, "unique": len(plan.tasks), **Counter(states.values())},
        "slots": there.slots,
        "work_s": sum(durations.values()),
        "makespan_s": times.makespan_s,
        "critical_path_s": times.critical_s,
        "critical_path": [
            {"task": fp[:12], "label": plan.tasks[fp].label, "wall_s": durations[fp]} for fp in times.critical_path
        ],
        "gpu_hours": sum(estimates[fp].gpu_s for fp in durations) / 3600,
        "peak_bytes": round(estimates[largest.fingerprint].peak_bytes) if largest else 0,
        "peak_task": largest.label if largest else None,
        "peak_at_once_bytes": round(at_once(times.start_s, times.end_s, {fp: estimates[fp].peak_bytes for fp in durations})),
        "gpu_peak_bytes": round(max((estimates[fp].gpu_bytes for fp in durations), default=0)),
        "disk_bytes": round(sum(estimates[fp].disk_bytes for fp in durations)),
        "cannot_fit": shortages(plan, tasks, estimates, there),
        "estimated_from": dict(Counter(estimates[fp].source for fp in durations)),
        "new": {
            fp: {"why": why[fp], "wall_s": e.wall_s, "peak_bytes": round(e.peak_bytes), "disk_bytes": round(e.disk_bytes),
                 "estimated_from": e.source}
            for fp in durations
            for e in [estimates[fp]]
        },
    }  # fmt: skip


def at_once(start: Mapping[str, float], end: Mapping[str, float], need: Mapping[str, float]) -> float:
    """The most that tasks which run at the same time need together."""
    changes = sorted([(end[fp], 0, -need[fp]) for fp in start] + [(start[fp], 1, need[fp]) for fp in start])
    held = most = 0.0
    for _, _, change in changes:
        held += change
        most = max(most, held)
    return most


def footer(said: Mapping[str, Any]) -> list[str]:
    """A summary in a few lines, for the foot of the table."""
    if not said["work_s"]:
        return ["nothing to run"]
    gpu = f", {said['gpu_hours']:.2f} GPU-hours" if said["gpu_hours"] else ""
    known = said["estimated_from"]
    total = sum(known.values())
    guessed = known.get("shape", 0)
    basis = f"{total - guessed} of {total} tasks from what their like have cost"
    if guessed == total:
        basis = "from the model's shape: nothing like it has run here, so a factor of 2 either way"
    elif guessed:
        basis += ", the others from the model's shape"
    path = " > ".join(step["label"] for step in said["critical_path"])
    slots = "1 slot" if said["slots"] == 1 else f"{said['slots']} slots"
    return [
        f"about {duration(said['makespan_s'])} on {slots} ({duration(said['work_s'])} of work{gpu})",
        f"estimated {basis}",
        f"longest chain {duration(said['critical_path_s'])}: {path}",
        f"memory up to {size(said['peak_at_once_bytes'])} at once ({said['peak_task']}: {size(said['peak_bytes'])}), "
        f"disk {size(said['disk_bytes'])}",
    ]


def duration(seconds: float) -> str:
    """`< 1 s`, `45 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 1:
        return "< 1 s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(n: float) -> str:
    """`430 kB`, `12.5 MB`, `1.9 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{n / 1e3:.1f} kB"
