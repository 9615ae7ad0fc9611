"""The record as MLflow runs: one parent for the sweep, one child for each trial.

MLflow is a projection: it can be thrown away and made again from the record. Writing the same record twice changes
nothing, because runs are found by tags before they are made, and a metric's time is that of its run's start.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from pare.tracking import reading, report
from pare.tracking.record import Record, Trial, metric, plain, short_keys, text

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    # Seven retries with growing pauses would hold the sweep up for minutes when a server is away.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
"""Set before MLflow is imported, unless the user has set it."""

EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Makes MLflow's pages open on runs and metrics; else they guess, and ask."""

MAX_PARAM, MAX_TAG, MAX_KEY = 6000, 8000, 250
"""Characters that MLflow stores; what is longer is cut there without a word, so it is shortened here with one."""

STATUS = {"done": "FINISHED", "failed": "FAILED", "running": "RUNNING", "interrupted": "KILLED", "skipped": "KILLED"}
"""Status of a sweep or trial -> status of its run; a pending trial has no run yet."""

PARTS_OF_A_MODEL = ("import_model", "train", "compress", "merge")
"""Types of task whose artifacts are ancestors of an export."""


class TrackingError(Exception):
    """MLflow could not be reached or written. The sweep goes on; the record can be written again later."""


def resolve_uri(uri: str, artifact_root: Path) -> str:
    """ "auto" means MLFLOW_TRACKING_URI where the user has set it, else an SQLite file beside the artifacts."""
    if uri != "auto":
        return uri
    beside = artifact_root.absolute().parent / "mlflow.db"
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{quote(str(beside), safe='/ :')}"


def database_of(uri: str) -> Path | None:
    """The file of an SQLite store; None for a server or another kind of store."""
    return Path(unquote(uri.removeprefix("sqlite:///"))) if uri.startswith("sqlite:///") else None


def redacted(string: str) -> str:
    """The text without the user and password of any address in it."""
    return re.sub(r"://[^/@\s]*@", "://…@", string)


class MlflowTracker:
    """Writes records to one experiment of one MLflow store."""

    def __init__(self, uri: str, artifact_root: Path | str, experiment: str) -> None:
        self.artifact_root = Path(artifact_root).absolute()
        self.uri = resolve_uri(uri, self.artifact_root)
        self.experiment = experiment
        self._client: MlflowClient | None = None
        self._experiment_id = ""

    def sync(self, record: Record, report_dir: Path | None = None) -> None:
        """Makes MLflow say what the record says, and attaches the files of `report_dir` to the sweep's run.

        To be called as often as one likes, with a sweep that is still running or one that has ended.
        """
        with self._complaints():
            client = self._connect()
            runs = self._runs(client, record["sweep"])
            parent = self._write(client, runs.get(""), sweep_run(record, report_dir), parent_id=None)
            for trial in record["trials"]:
                if trial["status"] != "pending":
                    self._write(client, runs.get(trial["uid"]), trial_run(record, trial), parent_id=parent)

    @contextmanager
    def _complaints(self) -> Iterator[None]:
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:  # MLflow lets errors of SQLAlchemy, requests and the file system through
            reason = (str(error).strip().splitlines() or [""])[0]
            raise TrackingError(
                f"MLflow at {redacted(self.uri)} could not be written: {type(error).__name__}: {redacted(reason)}. The results "
                "are safe without it; the same command brings MLflow up to date once that is mended."
            ) from error

    def _connect(self) -> MlflowClient:
        if self._client is None:
            client = client_of(self.uri)
            self._experiment_id = self._find_experiment(client)
            self._client = client
        return self._client

    def _find_experiment(self, client: MlflowClient) -> str:
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            if database_of(self.uri) is None:
                return str(client.create_experiment(self.experiment, tags=EXPERIMENT_TAGS))
            self.artifact_root.mkdir(parents=True, exist_ok=True)
            return str(client.create_experiment(self.experiment, self.artifact_root.as_uri(), tags=EXPERIMENT_TAGS))
        if found.lifecycle_stage != "active":
            client.restore_experiment(found.experiment_id)
        if database_of(self.uri) is not None and found.artifact_location != self.artifact_root.as_uri():
            raise TrackingError(
                f"experiment {self.experiment!r} in {self.uri} keeps its files in {found.artifact_location}, not in "
                f"{self.artifact_root.as_uri()}: was the directory moved? Move it back, or delete the database file; the next "
                "`pare run` of an experiment writes it anew."
            )
        return str(found.experiment_id)

    def _runs(self, client: MlflowClient, sweep: str) -> dict[str, Run]:
        """uid of the trial, or "" for the sweep itself -> its run; of runs with the same tags the oldest."""
        runs: dict[str, Run] = {}
        token = None
        while True:
            page = client.search_runs(
                [self._experiment_id],
                f"tags.`pare.sweep` = '{sweep}'",
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            for run in page:
                runs.setdefault(run.data.tags.get("pare.trial_uid", ""), run)
            token = page.token
            if not token:
                return runs

    def _write(self, client: MlflowClient, run: Run | None, wanted: dict[str, Any], parent_id: str | None) -> str:
        """Creates the run or brings it up to date; nothing is sent where its digest says that it already is."""
        from mlflow.entities import Param, RunTag

        tags = {key: shortened(value, MAX_TAG, "a file of this run has it whole") for key, value in wanted["tags"].items()}
        tags |= {"mlflow.parentRunId": parent_id} if parent_id else {}
        known = run.data.tags if run is not None else {}
        if run is None:
            run = client.create_run(self._experiment_id, start_time=wanted["start"], tags=tags, run_name=wanted["name"])
        said = {key: value for key, value in wanted.items() if key != "start"}  # a run keeps the start it was made with
        digest = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).hexdigest()
        run_id: str = run.info.run_id
        if known.get("pare.digest") == digest:
            return run_id
        metrics = [row for name, points in wanted["metrics"].items() for row in new_rows(client, run, name, points)]
        params = [Param(key, value) for key, value in wanted["params"].items() if run.data.params.get(key) != value]
        client.log_batch(run_id, metrics, params, [RunTag(key, value) for key, value in tags.items()], synchronous=True)
        for key in known:
            if key.startswith("pare.") and key not in tags and key != "pare.digest":
                client.delete_tag(run_id, key)
        for name, content in wanted["texts"].items():
            client.log_text(run_id, content, name)
        for name, (path, _) in wanted["files"].items():
            client.log_artifact(run_id, path, os.path.dirname(name) or None)
        if wanted["status"] == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        else:
            end = wanted["end"] if "end" in wanted else run.info.start_time + wanted["duration"]
            client.set_terminated(run_id, wanted["status"], end_time=end)
        # Last, so that whatever was cut off before is done again.
        client.set_tag(run_id, "pare.digest", digest)
        return run_id


def client_of(uri: str) -> MlflowClient:
    """A client of the store, with MLflow quiet and set up as Pare wants it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    database = database_of(uri)
    if database is not None:
        # MLflow retries for minutes on a file that cannot be opened or written; asked directly, SQLite says so at once.
        database.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(database, timeout=20)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
    return MlflowClient(tracking_uri=uri)


# What a run should say. Plain data, so that its digest can be compared with that of what was written before: name, start,
# end or duration (ms), status, tags, params, metrics {name: [[step, value]]}, texts {path: content}, files {path: [source,
# digest]}.


def sweep_run(record: Record, report_dir: Path | None) -> dict[str, Any]:
    about = record["about"]
    start = milliseconds(about["started_at"])
    end = milliseconds(about["finished_at"]) if about["finished_at"] else start + round(1000 * (about["wall_s"] or 0))
    tags = {
        "pare.kind": "sweep",
        "pare.sweep": record["sweep"],
        "pare.status": about["status"],
        "pare.base": about["base"]["name"],
        "pare.data": about["data"],
        "mlflow.source.name": about["command"],
        "mlflow.source.type": "LOCAL",
        "mlflow.note.content": description(record),
        **{f"pare.version.{name}": str(version) for name, version in about["versions"].items()},
    }
    metrics = {}
    if about["status"] != "running":
        # Counts of a running sweep change with every trial; each change would stay as a point of its own.
        metrics = {f"tasks/{name}": [[0, value]] for name, value in record["tasks"].items()}
        metrics |= {f"saving/{name}": [[0, record["saving"][name]]] for name in ("tasks_not_repeated", "wall_s_saved")}
        metrics |= {f"trials/{s}": [[0, sum(t["status"] == s for t in record["trials"])]] for s in ("done", "failed")}
        metrics["trials/front"] = [[0, sum(bool(t["pareto"]) for t in record["trials"])]]
        metrics["cost/wall_s"] = [[0, about["wall_s"]]]
    sources = sorted(p for p in report_dir.rglob("*") if p.is_file()) if report_dir else []
    return {
        "name": record["sweep"],
        "start": start,
        "end": end,
        "status": STATUS[about["status"]],
        "tags": tags,
        "params": fitted({"base": about["base"]["name"], "data": text(about["data"])}, "pare.version"),
        "metrics": {key: points for key, points in metrics.items() if points[0][1] is not None},
        "texts": {},
        "files": {p.relative_to(report_dir).as_posix(): [str(p), file_digest(p)] for p in sources if report_dir},
    }


def trial_run(record: Record, trial: Trial) -> dict[str, Any]:
    import yaml

    about, error = record["about"], trial["error"]
    figures = {name: float(value) for name, value in trial["metrics"].items() if value is not None}
    bad = [name for name, value in figures.items() if not math.isfinite(value)]
    curves = {name: [p for p in points if p[1] is not None] for name, points in trial["curves"].items()}
    parents = [f"{task['type']}:{task['task']}" for task in trial["tasks"] if task["type"] in PARTS_OF_A_MODEL]
    tags = {
        "pare.kind": "trial",
        "pare.sweep": record["sweep"],
        "pare.trial": trial["trial"],
        "pare.trial_uid": trial["uid"],
        "pare.recipe": trial["recipe"],
        "pare.block": trial["block"],
        "pare.status": trial["status"],
        "pare.pareto": str(bool(trial["pareto"])).lower(),
        "pare.base": about["base"]["name"],
        "pare.artifact": trial["artifact"] or "",
        "pare.parent_artifacts": ",".join(parents),
        "pare.export_path": trial["export_path"] or "",
        "pare.opens_with": trial["opens_with"] or "",
        "pare.error": error["failure"] if error else "",
        "pare.nonfinite": ",".join(bad),
        "mlflow.source.name": about["command"],
        "mlflow.source.type": "LOCAL",
    }
    said = ([": ".join(report.failure(trial))] if error else []) + trial["notes"]
    short = short_keys(list(trial["overrides"]))
    params = {"recipe": trial["recipe"], **{short[key]: text(value) for key, value in trial["overrides"].items()}}
    return {
        "name": trial["trial"],
        "start": milliseconds(about["started_at"]),
        "duration": round(1000 * (metric(trial, "cost/wall_s") or 0)),
        "status": STATUS[trial["status"]],
        "tags": {key: value for key, value in tags.items() if value}
        | {"mlflow.note.content": "\n\n".join(map(report.md, said))},
        "params": fitted(params, "trial.json"),
        "metrics": {clean_key(n): p for n, p in ({n: [[0, v]] for n, v in figures.items()} | curves).items() if p},
        "texts": {
            "config.yaml": yaml.safe_dump(plain(trial["config"]), sort_keys=False, allow_unicode=True),
            "trial.json": json.dumps(plain(trial), indent=1, ensure_ascii=False),
        },
        "files": {},
    }


def description(record: Record) -> str:
    """What the run page shows on top: the sentences of the report."""
    lines = [*reading.sentences(record), *reading.sharing(record)]
    return "\n".join([report.md(f"{report.headline(record)}."), "", *(f"- {report.md(line)}" for line in lines)])


def new_rows(client: MlflowClient, run: Run, name: str, points: Iterable[tuple[int, float]]) -> list[Any]:
    """The points that the run lacks. The time is the run's start, or later than that of a value they replace."""
    from mlflow.entities import Metric

    points = [(int(step), stored(value)) for step, value in points]
    latest = run.data.metrics.get(name)
    if latest is not None and len(points) == 1 and same(latest, points[0][1]):
        return []
    there: dict[int, tuple[int, float]] = {}
    for old in client.get_metric_history(run.info.run_id, name) if latest is not None else ():
        there[old.step] = max(there.get(old.step, (0, 0.0)), (old.timestamp, old.value), key=lambda pair: pair[0])
    rows = []
    for step, value in points:
        if step not in there:
            rows.append(Metric(name, value, run.info.start_time, step))
        elif not same(there[step][1], value):
            rows.append(Metric(name, value, there[step][0] + 1, step))
    return rows


def stored(value: float) -> float:
    """The value as MLflow's SQL store keeps it: infinities become the largest doubles."""
    most = 1.7976931348623157e308
    return float(value) if math.isnan(value) else max(-most, min(most, float(value)))


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def milliseconds(iso: str) -> int:
    return round(1000 * datetime.fromisoformat(iso).timestamp())


def clean_key(key: str) -> str:
    """The key in characters that MLflow allows, at most as long as it allows."""
    cleaned = "/".join(part.strip(". ") or "_" for part in re.sub(r"[^\w.\- /]", "_", key, flags=re.ASCII).split("/"))
    return (
        cleaned
        if len(cleaned) <= MAX_KEY
        else f"{cleaned[: MAX_KEY - 9]}_{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}"
    )


def shortened(value: str, limit: int, where: str) -> str:
    if len(value) <= limit:
        return value
    tail = f"… ({len(value):,} characters; {where})"
    return value[: limit - len(tail)] + tail


def fitted(params: Mapping[str, str], where: str) -> dict[str, str]:
    """Params within MLflow's limits. Two keys that become equal are told apart by a number."""
    fit: dict[str, str] = {}
    for key, value in params.items():
        name, n = clean_key(key), 2
        while name in fit:
            name, n = f"{clean_key(key)[: MAX_KEY - 4]}_{n}", n + 1
        fit[name] = shortened(value, MAX_PARAM, f"whole in {where}")
    return fit


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
