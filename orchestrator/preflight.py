"""What a plan would need, compared with what there is, before anything is spent.

The figures are upper estimates from the model's parameter count; the ledger's history sharpens them in a later
version. They exist to refuse what cannot work, not to predict to the percent.
"""

from __future__ import annotations

from pathlib import Path

from pare.orchestrator import hardware
from pare.orchestrator.config import Experiment
from pare.orchestrator.errors import InfeasibleError
from pare.orchestrator.plan import Plan, Task

PROCESS_BYTES = 700e6
"""A worker with torch and transformers imported, before any model."""

COPIES = {
    "import_model": 2.0,
    "score": 1.5,
    "calibrate": 1.5,
    "compress": 1.0,
    "train": 4.0,
    "export": 1.0,
    "evaluate": 2.0,
    "speed": 1.5,
}
"""Task type -> peak memory in float32 copies of the model."""


def memory_need(task: Task, parameters: int) -> float:
    """Bytes of the peak of one task."""
    return PROCESS_BYTES + COPIES.get(task.type, 0) * 4 * parameters


def disk_need(task: Task, parameters: int) -> float:
    """Bytes that a task's artifact takes at most."""
    return {"import_model": 2.2, "calibrate": 4.0, "compress": 1.5, "train": 1.0, "export": 2.2}.get(
        task.type, 0.05
    ) * parameters


def check_feasible(plan: Plan, missing: list[Task], experiment: Experiment, home: Path, device: str) -> None:
    """Raises InfeasibleError when the machine cannot hold what is missing, naming need and supply."""
    if not missing:
        return
    parameters = max((model["n_parameters"] for model in plan.models.values()), default=0)
    free = hardware.free_memory(experiment.cluster.memory_gb)
    largest = max(missing, key=lambda task: memory_need(task, parameters))
    need = memory_need(largest, parameters)
    if device == "cpu" and need > free:
        raise InfeasibleError(
            f"not enough memory: '{largest.label}' needs about {need / 1e9:.1f} GB for a model of {parameters / 1e6:.0f} M "
            f"parameters, {free / 1e9:.1f} GB are free. Close other programs, raise cluster.memory_gb if you set it, or take a "
            "smaller model (model=tiny)."
        )
    need = sum(disk_need(task, parameters) for task in missing)
    free = hardware.free_disk(home, experiment.cluster.disk_gb)
    if need > free:
        raise InfeasibleError(
            f"not enough disk: the {len(missing)} missing tasks write about {need / 1e9:.1f} GB to {home}, "
            f"{free / 1e9:.1f} GB are free. Make room, or set PARE_HOME to a directory on a larger disk."
        )


def slots_for(experiment: Experiment, device: str, missing: list[Task], plan: Plan) -> int:
    """Tasks that run at once: one per core or GPU, fewer where memory does not hold so many."""
    if experiment.cluster.slots:
        return experiment.cluster.slots
    if device == "cuda":
        return max(1, len(hardware.gpus()))
    parameters = max((model["n_parameters"] for model in plan.models.values()), default=0)
    largest = max((memory_need(task, parameters) for task in missing), default=PROCESS_BYTES)
    by_memory = int(hardware.free_memory(experiment.cluster.memory_gb) // largest)
    return max(1, min(hardware.cores(), by_memory))


def cores_for(experiment: Experiment, device: str) -> int:
    """Threads of a task that has the machine to itself."""
    return hardware.cores() if device == "cuda" else experiment.cluster.slots or hardware.cores()


def device_for(experiment: Experiment) -> str:
    """cpu or cuda; `auto` takes the GPU where one answers."""
    wanted = experiment.cluster.device
    if wanted == "cuda" and not hardware.gpus():
        raise InfeasibleError("cluster.device=cuda, but no GPU answers here (nvidia-smi). Try: cluster.device=auto")
    return wanted if wanted != "auto" else ("cuda" if hardware.gpus() else "cpu")
