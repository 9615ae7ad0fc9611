"""The front: trials that no other trial beats on every objective at once."""

from __future__ import annotations

from collections.abc import Sequence

from pare.tracking.record import Record, Trial, direction, has_deployment_speed, measured, metric

Objective = tuple[str, str]
"""(name of a metric, "min" or "max")."""

SIZE_AND_PERPLEXITY: tuple[Objective, ...] = (("size/bytes", "min"), ("quality/ppl", "min"))


def objective(record: Record, name: str) -> Objective:
    """A metric as an objective of the front, with the direction that its trials declare."""
    return name, "min" if direction(record, name) == "lower" else "max"


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether a is nowhere worse than b and somewhere better, all to be minimised."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def front(record: Record, objectives: Sequence[Objective] = SIZE_AND_PERPLEXITY) -> list[Trial]:
    """The finished trials that no other dominates, best in the first objective first; trials equal in all stay together.

    Only equal kinds of figures share a front: a trial that lacks one of the metrics, or has NaN for it, is no member, nor
    is one whose speed or memory is noted to be no deployment figure when the objectives ask for speed or memory.
    """
    for name, best in objectives:
        if best not in ("min", "max"):
            raise ValueError(f"the direction of objective {name!r} must be 'min' or 'max', got {best!r}")
    of_runtime = any(name.startswith(("speed/", "memory/")) for name, _ in objectives)
    signs = {name: 1.0 if best == "min" else -1.0 for name, best in objectives}

    def point(trial: Trial) -> tuple[float, ...]:
        return tuple(sign * value for name, sign in signs.items() if (value := metric(trial, name)) is not None)

    # What dominates a point stands before it in this order, and among what stands before, a member of the front does.
    members: list[Trial] = []
    points: dict[tuple[float, ...], None] = {}
    for at, trial in sorted(((point(trial), trial) for trial in measured(record, *signs)), key=lambda pair: pair[0]):
        if of_runtime and not has_deployment_speed(trial):
            continue
        if not any(dominates(other, at) for other in points):
            members.append(trial)
            points[at] = None
    return members


def mark_front(record: Record, objectives: Sequence[Objective] = SIZE_AND_PERPLEXITY) -> list[Trial]:
    """Sets `pareto` of every trial of the record and returns the front."""
    members = front(record, objectives)
    on_front = set(map(id, members))
    for trial in record["trials"]:
        trial["pareto"] = id(trial) in on_front
    return members
