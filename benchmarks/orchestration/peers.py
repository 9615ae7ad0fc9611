"""What others take for a task that does nothing, and what the disk takes: the floors that Pare's figures stand beside.

Runs without Pare, in the virtualenv of the peers: `python -m benchmarks.orchestration.peers NAME N`.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

SLOTS = 2
WARM = 20
"""Trials or calls that are over before the clock starts."""

Reading = dict[str, float]


def ray_tasks(n: int) -> Reading:
    """n calls of warm Ray actors, one at a time on each: `ms` a call."""
    ray = start_ray()

    class Actor:
        def run(self, number: int) -> dict[str, int]:
            return {"value": number}

    actors = [ray.remote(Actor).remote() for _ in range(SLOTS)]
    ray.get([actor.run.remote(0) for actor in actors for _ in range(WARM)])
    start = time.perf_counter()
    running = {actor.run.remote(i): actor for i, actor in enumerate(actors)}
    sent = len(running)
    while running:
        (done,), _ = ray.wait(list(running))
        ray.get(done)
        actor = running.pop(done)
        if sent < n:
            running[actor.run.remote(sent)] = actor
            sent += 1
    return {"ms": 1e3 * (time.perf_counter() - start) / n}


def tune_trials(n: int, tracked: bool = False) -> Reading:
    """n trials of Ray Tune, each of one report: `ms` a trial once the first ones are over, `whole_ms` from the start.

    tracked: with Tune's own callback for MLflow, into SQLite.
    """
    start_ray()
    from ray import tune

    ends: list[float] = []

    def trial(config: dict[str, Any]) -> None:
        tune.report({"value": config["number"]})

    class Ends(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[Any] = [Ends()]
        if tracked:
            from ray.air.integrations.mlflow import MLflowLoggerCallback

            callbacks = [MLflowLoggerCallback(f"sqlite:///{folder}/mlflow.db", experiment_name="bench"), Ends()]
        start = time.perf_counter()
        results = tune.Tuner(
            tune.with_resources(trial, {"cpu": 1}),
            param_space={"number": tune.grid_search(list(range(n)))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=callbacks),
        ).fit()
        wall_s = time.perf_counter() - start
    if len(results) != n or results.num_errors:
        raise RuntimeError(f"{results.num_errors} errors in {len(results)} of {n} trials")
    return {"ms": 1e3 * (ends[-1] - ends[WARM - 1]) / (n - WARM), "whole_ms": 1e3 * wall_s / n}


def mlflow_runs(n: int) -> Reading:
    """n runs written with MLflow's own client into SQLite, with three metrics and three params each: `ms` a run."""
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    start = 0.0
    with tempfile.TemporaryDirectory() as folder:
        client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
        experiment = client.create_experiment("bench", f"file://{folder}/artifacts")
        for number in range(WARM + n):
            if number == WARM:
                start = time.perf_counter()
            run = client.create_run(experiment, run_name=f"run {number}").info.run_id
            metrics = [Metric(name, float(number), 0, 0) for name in "abc"]
            client.log_batch(run, metrics, [Param(name, str(number)) for name in "xyz"])
            client.set_terminated(run)
        return {"ms": 1e3 * (time.perf_counter() - start) / n}


def prototype(n: int) -> Reading:
    """n results published in one process with what safety needs and nothing more: two files that are on the disk before
    their directory gets its name, and a committed row. `ms` a result."""
    with tempfile.TemporaryDirectory() as folder, closing(sqlite3.connect(f"{folder}/ledger.db")) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("CREATE TABLE task (number INTEGER PRIMARY KEY, result TEXT)")
        objects = Path(folder) / "objects"
        objects.mkdir()
        start = time.perf_counter()
        for number in range(n):
            attempt = Path(folder) / f"attempt-{number}"
            attempt.mkdir()
            for name in ("value.txt", "manifest.json"):
                (attempt / name).write_text(str(number))
                sync(attempt / name)
            sync(attempt)
            os.rename(attempt, objects / str(number))
            sync(objects)
            db.execute("INSERT INTO task VALUES (?, ?)", (number, "{}"))
            db.commit()
        return {"ms": 1e3 * (time.perf_counter() - start) / n}


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def start_ray() -> Any:
    """A Ray as bare as Pare's own."""
    import ray

    ray.init(address="local", num_cpus=SLOTS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    return ray


LEGS: dict[str, Callable[[int], Reading]] = {
    "ray_tasks": ray_tasks,
    "tune_trials": tune_trials,
    "tune_tracked": lambda n: tune_trials(n, tracked=True),
    "mlflow_runs": mlflow_runs,
    "prototype": prototype,
}

if __name__ == "__main__":
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    print(json.dumps(LEGS[sys.argv[1]](int(sys.argv[2]))))
