"""The record: one plain JSON object that says everything about a sweep. All of tracking reads it, the orchestrator makes it.

    schema_version  1
    sweep, name     id of the sweep; name of the experiment
    about           command, started_at, finished_at, wall_s, status, base {name, parameters, bytes}, data, evaluation,
                    hardware, versions
    tasks           total_if_separate, unique, executed, cached
    saving          tasks_not_repeated, wall_s_saved, shared [{label, used_by, wall_s}]
    cost            total, methods {name: ...}, trials {name: ...}: each wall_s, cpu_s, gpu_s, tokens, disk_bytes, peak_bytes,
                    with tasks (their number) or, for a trial, alone_s (had it shared nothing); failed_attempts {attempts,
                    wall_s}; saved {by_sharing_s, by_cache_s}; estimates, see `orchestrator.estimate.accuracy`
    trials          [{trial, block, recipe, overrides, status, metrics, artifact, export_path, opens_with, pareto, error,
                    notes, tasks [{task, type, label, status, wall_s, shared_by}], config, curves {name: [[step, value]]},
                    windows {nll: [sum over each test window], tokens: [...]}, answers {metric: a character for each question:
                    1 right, 0 wrong, 5 half}, directions {metric: "higher" or "lower"}, members [names of what a merge was made
                    of, the best on the selection split first], uid}]

Times are ISO 8601. A metric that was not measured is absent or null. An error is {failure, message, task or null}.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]
Trial = dict[str, Any]

BASE_RECIPE = "base"
"""Recipe of the trial that exports the base model as it is: what others are compared with."""

NO_DEPLOYMENT_FIGURE = "no deployment figure"
"""A note of a trial that contains these words takes its speed and memory out of every comparison."""


def metric(trial: Trial, name: str) -> float | None:
    """The value of a metric, or None where it is missing, NaN or infinite."""
    value = trial["metrics"].get(name)
    return float(value) if value is not None and math.isfinite(value) else None


def measured(record: Record, *names: str) -> list[Trial]:
    """The finished trials that have all these metrics."""
    return [t for t in record["trials"] if t["status"] == "done" and all(metric(t, name) is not None for name in names)]


def base_trial(record: Record) -> Trial | None:
    """The finished trial of the uncompressed, untuned model, if there is one."""
    return next((t for t in measured(record, "quality/ppl") if t["recipe"] == BASE_RECIPE), None)


LOWER = ("quality/ppl", "quality/kl", "size/", "memory/", "cost/")
"""Beginnings of the names of metrics of which less is better; of others more is, unless a trial says otherwise."""


def direction(record: Record, name: str) -> str:
    """Which is better of a metric: `lower` or `higher`."""
    said = (t["directions"][name] for t in record["trials"] if name in (t.get("directions") or {}))
    return next(said, "lower" if name.startswith(LOWER) else "higher")


def has_deployment_speed(trial: Trial) -> bool:
    return not any(NO_DEPLOYMENT_FIGURE in note.lower() for note in trial["notes"])


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key -> as few of its last words as tell it from the others.

    >>> short_keys(["recipe.quantize.bits", "recipe.tune.rank", "recipe.quantize.rank"])
    {'recipe.quantize.bits': 'bits', 'recipe.tune.rank': 'tune.rank', 'recipe.quantize.rank': 'quantize.rank'}
    """
    words = {key: key.split(".") for key in keys}

    def short(key: str) -> str:
        for n in range(1, len(words[key]) + 1):
            tail = words[key][-n:]
            if not any(other != key and words[other][-n:] == tail for other in words):
                return ".".join(tail)
        return key

    return {key: short(key) for key in words}


def text(value: Any) -> str:
    """An override's value as one would type it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def settings(record: Record) -> dict[str, dict[str, str]]:
    """Trial -> its overrides that tell trials apart, under short names.

    An override that has one value wherever it occurs says nothing and is left out, unless only some trials of a recipe have it.
    """
    trials = record["trials"]
    keys = list(dict.fromkeys(key for t in trials for key in t["overrides"]))

    def tells(key: str) -> bool:
        having = [t for t in trials if key in t["overrides"]]
        recipes = {t["recipe"] for t in having}
        return len({text(t["overrides"][key]) for t in having}) > 1 or any(
            t["recipe"] in recipes and key not in t["overrides"] for t in trials
        )

    shown = short_keys([key for key in keys if tells(key)] or keys)
    return {t["trial"]: {shown[k]: text(v) for k, v in t["overrides"].items() if k in shown} for t in trials}


def labels(record: Record) -> dict[str, str]:
    """Trial -> what it is called in plots and sentences: its block, and the settings that tell it from its like."""
    chosen = settings(record)
    named = {t["trial"]: t["block"] + "".join(f" {k}={v}" for k, v in chosen[t["trial"]].items()) for t in record["trials"]}
    uses = Counter(clipped(name, 44) for name in named.values())
    return {trial: clipped(name, 44) if uses[clipped(name, 44)] == 1 else trial for trial, name in named.items()}


def clipped(string: str, width: int) -> str:
    """At most `width` characters; a cut shows as an ellipsis."""
    return string if len(string) <= width else string[: width - 1] + "…"


def plain(value: Any) -> Any:
    """The same JSON with NaN and infinities, for which JSON has no word, as null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
