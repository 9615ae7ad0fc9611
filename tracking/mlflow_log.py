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
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
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
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
"""Set before MLflow is imported, unless the user has set it."""

FORCED = {
    # MLflow would send a request again whose reply was lost, and of a `create_run` that makes a second run.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    # MLflow would print the address of each run that ends, password and all, among the results on stdout.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Set whatever the user says."""

SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")

EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Makes MLflow's pages open on runs and metrics; else they guess, and ask."""

DATABASE = "mlflow.db"
"""Beside the artifacts, unless the user names another store."""

MAX_PARAM, MAX_TAG, MAX_KEY = 6000, 8000, 250
"""Characters that MLflow stores; what is longer is cut there without a word, so it is shortened here with one."""

STATUS = {"done": "FINISHED", "failed": "FAILED", "running": "RUNNING", "interrupted": "KILLED", "skipped": "KILLED"}
"""Status of a sweep or trial -> status of its run; a pending trial has no run yet."""

PARTS_OF_A_MODEL = ("import_model", "train", "compress", "merge")
"""Types of task whose artifacts are ancestors of an export."""


AWAY = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED", "IO_ERROR"}
AWAY |= {"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED"}
"""Codes of MLflow's errors that would meet every other run as well."""

ROWS = 100
"""Metrics, params or tags that MLflow takes in one request, in which it writes the tags last."""


RELAXED: set[str] = set()
"""Databases that this process does not flush at every commit."""


class TrackingError(Exception):
    """MLflow could not be reached or written. The sweep goes on; the record can be written again later.

    only_this: the store answered, and it is this one run that it refused.
    """

    def __init__(self, message: str, only_this: bool = False) -> None:
        super().__init__(message)
        self.only_this = only_this


@dataclass
class Known:
    """What is remembered of a run, so that nothing need be asked of one that is up to date."""

    id: str
    start: int
    """Milliseconds since 1970; the time of all its metrics."""
    digest: str
    """Of what was last written whole; empty while it is being written."""
    status: str


def resolve_uri(uri: str, artifact_root: Path) -> str:
    """ "auto" means MLFLOW_TRACKING_URI where the user has set it, else an SQLite file beside the artifacts."""
    if uri != "auto":
        return uri
    beside = artifact_root.absolute().parent / DATABASE
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{quote(str(beside), safe='/ :')}"


def database_of(uri: str) -> Path | None:
    """The file of an SQLite store; None for a server or another kind of store."""
    return Path(unquote(uri.removeprefix("sqlite:///"))) if uri.startswith("sqlite:///") else None


def redacted(string: str) -> str:
    """The text without the user and password of any address in it, nor those that MLflow takes from the environment."""
    for name in SECRETS:
        if secret := os.environ.get(name):
            string = string.replace(secret, "…")
    string = re.sub(r"\b(Basic|Bearer) +[\w.~+/=-]+", r"\1 …", string)
    return re.sub(r"://[^/\s]*@", "://…@", string)


class MlflowTracker:
    """Writes records to one experiment of one MLflow store, whole or trial by trial. For one thread."""

    def __init__(self, uri: str, artifact_root: Path | str, experiment: str) -> None:
        self.artifact_root = Path(artifact_root).absolute()
        self.uri = resolve_uri(uri, self.artifact_root)
        self.experiment = experiment
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._runs: dict[str, dict[str, Known]] = {}  # sweep -> uid of the trial, or "" for the sweep itself -> its run
        self._doubtful: set[tuple[str, str]] = set()  # (sweep, uid) of writes that failed: look for the run before the next
        self._shaken: set[str] = set()  # sweeps with such a write: a request given up may still make a second run, later

    def sync(self, record: Record, report_dir: Path | None = None, wrote: Callable[[], None] = lambda: None) -> None:
        """Makes MLflow say what the record says, and attaches the files of `report_dir` to the sweep's run.

        To be called as often as one likes, with a sweep that is still running or one that has ended. Calls `wrote` after
        each run. A trial that MLflow refuses does not keep it from the others; it is complained of at the end.
        """
        sweep = record["sweep"]
        if sweep in self._shaken:
            self._runs.pop(sweep, None)
        self.write_sweep(record, report_dir)
        wrote()
        refused = None
        for trial in record["trials"]:
            try:
                self.write_trial(record, trial)
            except TrackingError as error:
                if not error.only_this:
                    raise
                refused = refused or error
            wrote()
        if refused:
            raise refused

    def write_sweep(self, record: Record, report_dir: Path | None = None) -> str:
        """Brings the sweep's own run up to date; of a record without trials only that it runs or ran. Returns its id."""
        with self._complaints(record["sweep"], ""):
            return self._write(record["sweep"], "", sweep_run(record, report_dir))

    def write_trial(self, record: Record, trial: Trial) -> None:
        """Brings one trial's run up to date, its parent's first. Of `record`, only what stands beside `trials` is read.

        A trial that waits has no run. Where the sweep has ended, one that says that it runs was killed.
        """
        sweep, uid = record["sweep"], trial["uid"]
        with self._complaints(sweep, uid):
            known = self._find(sweep, uid)
            if trial["status"] in ("pending", "running") and record["about"]["status"] != "running":
                if known is None or known.status != "RUNNING":
                    return
                trial = {**trial, "status": "interrupted"}
            elif trial["status"] == "pending":
                return
            parent = self._find(sweep, "")
            parent_id = parent.id if parent else self.write_sweep(record)
            self._write(sweep, uid, trial_run(record, trial) | {"parent": parent_id})

    def write_points(self, sweep: str, uid: str, points: Iterable[tuple[str, int, float]]) -> bool:
        """Adds (name, step, value) to the curves of a trial's run; False if there is no run yet.

        The same point written twice, live and at the end from the artifact, is one row, for its time is the run's start.
        """
        from mlflow.entities import Metric

        with self._complaints(sweep, uid):
            known = self._find(sweep, uid)
            if known is None:
                return False
            rows = [Metric(clean_key(name), stored(value), known.start, int(step)) for name, step, value in points]
            self._connect().log_batch(known.id, rows, synchronous=True)
            return True

    @contextmanager
    def _complaints(self, sweep: str, uid: str) -> Iterator[None]:
        """What was written to the run stands in doubt after an error; it is looked up again before the next try."""
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:  # MLflow lets errors of SQLAlchemy, requests and the file system through
            self._runs.get(sweep, {}).pop(uid, None)
            self._doubtful.add((sweep, uid))
            self._shaken.add(sweep)
            reason = (str(error).strip().splitlines() or [""])[0]
            # An artifact store that answers, if with a refusal, has a response; one that is away has none.
            away = isinstance(error, OSError | sqlite3.Error) and getattr(error, "response", None) is None
            away = away or getattr(error, "error_code", "") in AWAY
            raise TrackingError(
                f"MLflow at {redacted(self.uri)} could not be written: {type(error).__name__}: {redacted(reason)}. The results "
                "are safe without it; `pare sync` brings MLflow up to date once that is mended.",
                only_this=not away,
            ) from error

    def _connect(self) -> MlflowClient:
        if self._client is None:
            if (own := self.artifact_root.parent / DATABASE) == database_of(self.uri):
                flush_seldom(own)
            client = client_of(self.uri)
            self._experiment_id = self._find_experiment(client)
            self._client = client
        return self._client

    def _find_experiment(self, client: MlflowClient) -> str:
        found = client.get_experiment_by_name(self.experiment)
        database = database_of(self.uri)
        if found is None:
            if database is None:
                return str(client.create_experiment(self.experiment, tags=EXPERIMENT_TAGS))
            self.artifact_root.mkdir(parents=True, exist_ok=True)
            return str(client.create_experiment(self.experiment, self.artifact_root.as_uri(), tags=EXPERIMENT_TAGS))
        if found.lifecycle_stage != "active":
            client.restore_experiment(found.experiment_id)
        if database is not None and found.artifact_location != self.artifact_root.as_uri():
            raise TrackingError(
                f"experiment {self.experiment!r} in {self.uri} keeps its files in {found.artifact_location}, not in "
                f"{self.artifact_root.as_uri()}: was the directory moved? Move it back, or delete the database file; the next "
                "`pare sync` writes it anew."
            )
        return str(found.experiment_id)

    def _find(self, sweep: str, uid: str) -> Known | None:
        """The run of a trial, or of the sweep itself (""). All runs of a sweep are asked for once."""
        client = self._connect()
        if sweep not in self._runs:
            self._runs[sweep] = self._search(client, f"tags.`pare.sweep` = '{sweep}'")
            self._shaken.discard(sweep)
            self._doubtful = {(s, u) for s, u in self._doubtful if s != sweep}
        elif (sweep, uid) in self._doubtful:
            which = f"tags.`pare.trial_uid` = '{uid}'" if uid else "tags.`pare.kind` = 'sweep'"
            self._runs[sweep] |= self._search(client, f"tags.`pare.sweep` = '{sweep}' AND {which}")
            self._doubtful.discard((sweep, uid))
        return self._runs[sweep].get(uid)

    def _search(self, client: MlflowClient, wanted: str) -> dict[str, Known]:
        """uid -> run. Of several with the same tags the oldest stays, or one that is complete; the others are deleted."""
        found: dict[str, list[Known]] = {}
        token = None
        while True:
            page = client.search_runs([self._experiment_id], wanted, max_results=1000, page_token=token)
            for run in page:
                tags, info = run.data.tags, run.info
                known = Known(info.run_id, info.start_time, tags.get("pare.digest", ""), info.status)
                found.setdefault(tags.get("pare.trial_uid", ""), []).append(known)
            token = page.token
            if not token:
                break
        runs = {}
        for uid, same in found.items():
            runs[uid], *others = sorted(same, key=lambda run: (not run.digest, run.start, run.id))
            for run in others:
                client.delete_run(run.id)
        return runs

    def _write(self, sweep: str, uid: str, wanted: dict[str, Any]) -> str:
        """Creates the run or brings it up to date; nothing is sent where its digest says that it already is."""
        from mlflow.entities import Param, RunTag

        client, known = self._connect(), self._find(sweep, uid)
        # A run keeps the start that it was made with; which command went on with the sweep is no reason to write it anew.
        said = {key: value for key, value in wanted.items() if key not in ("start", "command")}
        digest = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).hexdigest()
        if known is not None and known.digest == digest:
            return known.id
        tags = {**wanted["tags"], "mlflow.source.name": redacted(wanted["command"])}
        tags |= {"mlflow.parentRunId": wanted["parent"]} if wanted["parent"] else {}
        tags = {key: shortened(value, MAX_TAG, "a file of this run has it whole") for key, value in tags.items()}
        if known is not None:
            run = client.get_run(known.id)
            known.digest = ""
        else:
            run = client.create_run(self._experiment_id, start_time=wanted["start"], tags=tags, run_name=wanted["name"])
            known = self._runs[sweep][uid] = Known(run.info.run_id, run.info.start_time, "", "RUNNING")
        there = run.data.tags
        for key in there:
            if key.startswith("pare.") and key not in tags and key != "pare.digest":
                client.delete_tag(known.id, key)
        metrics = [row for name, points in wanted["metrics"].items() for row in new_rows(client, run, name, points)]
        params = [Param(key, value) for key, value in wanted["params"].items() if run.data.params.get(key) != value]
        # What is cut off before the digest stands there is done again.
        if wanted["texts"] or wanted["files"] or len(metrics) + len(params) > ROWS:
            client.log_batch(known.id, metrics, params, synchronous=True)
            metrics, params = [], []
        if wanted["status"] != "RUNNING":
            end = wanted["end"] if "end" in wanted else known.start + wanted["duration"]
            client.set_terminated(known.id, wanted["status"], end_time=end)
        elif run.info.status != "RUNNING":
            client.update_run(known.id, status="RUNNING")
        known.status = wanted["status"]
        self._attach(run, wanted)
        changed = [RunTag(key, value) for key, value in tags.items() if there.get(key) != value]
        client.log_batch(known.id, metrics, params, [*changed, RunTag("pare.digest", digest)], synchronous=True)
        known.digest = digest
        return known.id

    def _attach(self, run: Run, wanted: dict[str, Any]) -> None:
        """Writes the files of a run. By its artifact address, for by its id MLflow would ask for the run again."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        if not wanted["texts"] and not wanted["files"]:
            return
        place = get_artifact_repository(run.info.artifact_uri, tracking_uri=self.uri)
        for name, (path, _) in wanted["files"].items():
            place.log_artifact(path, os.path.dirname(name) or None)
        with tempfile.TemporaryDirectory() as directory:
            for name, content in wanted["texts"].items():
                path = Path(directory, name)
                path.write_text(rendered(name, content), encoding="utf-8")
                place.log_artifact(str(path))


def client_of(uri: str) -> MlflowClient:
    """A client of the store, with MLflow quiet and set up as Pare wants it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.update(FORCED)
    from mlflow.tracking import MlflowClient

    for logger, level in (("mlflow", logging.WARNING), ("alembic", logging.WARNING), ("urllib3", logging.ERROR)):
        logging.getLogger(logger).setLevel(level)
    database = database_of(uri)
    if database is not None:
        # MLflow retries for minutes on a file that cannot be opened or written; asked directly, SQLite says so at once.
        database.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(database, timeout=20)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
    return MlflowClient(tracking_uri=uri)


def flush_seldom(database: Path) -> None:
    """Makes the file in WAL mode, in which it can be read while it is written, and has MLflow, which makes ten commits a run,
    wait for the disk only when the log is folded in. What a power cut takes away `pare sync` tells again.

    For Pare's own file: one that hosts share over a network does not bear WAL.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    if not database.exists():
        database.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(database, timeout=20)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")

    def relax(connection: Any, record: Any) -> None:
        if not isinstance(connection, sqlite3.Connection):
            return
        file = next(connection.execute("PRAGMA database_list"))[2]
        if file == str(database.resolve()) and next(connection.execute("PRAGMA journal_mode"))[0] == "wal":
            connection.execute("PRAGMA synchronous=NORMAL")

    if str(database) not in RELAXED:
        RELAXED.add(str(database))
        event.listen(Engine, "connect", relax)


# What a run should say. Plain data, so that its digest can be compared with that of what was written before: name, command,
# parent (id of its run), start, end or duration (ms), status, tags, params, metrics {name: [[step, value]]}, texts {name:
# data}, files {path: [source, digest]}.


def sweep_run(record: Record, report_dir: Path | None) -> dict[str, Any]:
    about = record["about"]
    start = milliseconds(about["started_at"])
    running = about["status"] == "running"
    end = milliseconds(about["finished_at"]) if about["finished_at"] else start + round(1000 * (about["wall_s"] or 0))
    tags = {
        "pare.kind": "sweep",
        "pare.sweep": record["sweep"],
        "pare.status": about["status"],
        "pare.base": about["base"]["name"],
        "pare.data": about["data"],
        "mlflow.source.type": "LOCAL",
        "mlflow.note.content": description(record),
        **{f"pare.version.{name}": str(version) for name, version in about["versions"].items()},
    }
    metrics = {}
    if not running and record["trials"]:
        # Counts of a running sweep change with every trial; each change would stay as a point of its own.
        metrics = {f"tasks/{name}": [[0, value]] for name, value in record["tasks"].items()}
        metrics |= {f"saving/{name}": [[0, record["saving"][name]]] for name in ("tasks_not_repeated", "wall_s_saved")}
        metrics |= {f"trials/{s}": [[0, sum(t["status"] == s for t in record["trials"])]] for s in ("done", "failed")}
        metrics["trials/front"] = [[0, sum(bool(t["pareto"]) for t in record["trials"])]]
        metrics["cost/wall_s"] = [[0, about["wall_s"]]]
    sources = sorted(p for p in report_dir.rglob("*") if p.is_file()) if report_dir else []
    return {
        "name": record["sweep"],
        "command": about["command"],
        "parent": "",
        "start": start,
        "end": None if running else end,
        "status": STATUS[about["status"]],
        "tags": tags,
        "params": fitted({"base": about["base"]["name"], "data": text(about["data"])}, "pare.version"),
        "metrics": {key: points for key, points in metrics.items() if points[0][1] is not None},
        "texts": {},
        "files": {p.relative_to(report_dir).as_posix(): [str(p), file_digest(p)] for p in sources if report_dir},
    }


def trial_run(record: Record, trial: Trial) -> dict[str, Any]:
    about, error = record["about"], trial["error"]
    # What a trial has measured so far, and its costs, change while it runs; each change would stay as a point of its own.
    ended = trial["status"] not in ("running", "interrupted")
    figures = {name: float(value) for name, value in trial["metrics"].items() if value is not None and ended}
    bad = [name for name, value in figures.items() if not math.isfinite(value)]
    curves = {name: [p for p in points if p[1] is not None] for name, points in trial["curves"].items() if ended}
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
        "mlflow.source.type": "LOCAL",
    }
    said = ([": ".join(report.failure(trial))] if error else []) + trial["notes"]
    short = short_keys(list(trial["overrides"]))
    params = {"recipe": trial["recipe"], **{short[key]: text(value) for key, value in trial["overrides"].items()}}
    return {
        "name": trial["trial"],
        "command": about["command"],
        "start": milliseconds(about["started_at"]),
        "duration": round(1000 * (metric(trial, "cost/wall_s") or 0)),
        "status": STATUS[trial["status"]],
        "tags": {key: value for key, value in tags.items() if value}
        | {"mlflow.note.content": "\n\n".join(map(report.md, said))},
        "params": fitted(params, "trial.json"),
        "metrics": {clean_key(n): p for n, p in ({n: [[0, v]] for n, v in figures.items()} | curves).items() if p},
        "texts": {"config.yaml": plain(trial["config"]), "trial.json": plain(trial)} if ended else {},
        "files": {},
    }


def rendered(name: str, data: Any) -> str:
    """The data as the file of that name says it: YAML or JSON."""
    if name.endswith(".json"):
        return json.dumps(data, indent=1, ensure_ascii=False)
    import yaml

    return str(yaml.dump(data, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False, allow_unicode=True))


def description(record: Record) -> str:
    """What the run page shows on top: the sentences of the report."""
    if record["about"]["status"] == "running" or not record["trials"]:
        return report.md(f"{record['about']['base']['name']} on {record['about']['data']}")
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
