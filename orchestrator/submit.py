"""`pare submit ray` and `pare jobs`: a command of Pare as a job of a running Ray cluster, through Ray's Jobs API.

What travels: Pare itself as a wheel (`py_modules`), the user's directory (`working_dir`), the command. What has to be on
the nodes: Python, pip and Pare's dependencies; `--pip FILE` has Ray install requirements where nodes reach an index.
The id of a submission is a digest of all that travels, so the same request is never at work twice.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shlex
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from pare.orchestrator.commands import SCHEMA_VERSION, say, show_json
from pare.orchestrator.errors import ConfigError, InfeasibleError, nearest
from pare.orchestrator.jobs_api import DEFAULT_ADDRESS, PATIENCE_S, Cluster, LostError, dashboard
from pare.orchestrator.packing import build_wheel, pack_directory
from pare.orchestrator.ray_pool import WORKERS_ENV

DRIVERS = ("run", "resume", "retry-failed", "rerun")
"""Verbs that run tasks: they get `cluster.address=auto`, and need a store that every node sees."""
NOT_REMOTE = ("submit", "jobs", "ui")
SECRET = re.compile(r"token|secret|passw|api_?key|access_?key|credential", re.IGNORECASE)
STOP_WAIT_S = 60
"""How long `pare jobs stop` leaves a driver to publish what it has; Ray's own default is 3 s."""


def add_parsers(verbs: Any) -> None:
    """Adds `submit` and `jobs` to the verbs of the command line."""

    def verb(place: Any, name: str, text: str, example: str = "") -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = place.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example: {example}" if example else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        return made

    def addressed(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--address",
            metavar="URL",
            help=f"the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, else {DEFAULT_ADDRESS}",
        )

    example = "pare submit ray --address http://head:8265 experiment=demo store.url=s3://bucket/pare"
    submit = verb(verbs, "submit", "Run a command of Pare on a cluster; its exit code is the job's.", example)
    ray = verb(
        submit.add_subparsers(dest="target", metavar="TARGET", required=True),
        "ray",
        "Submit to a running Ray cluster, follow the log, return the job's exit code. Ctrl-C detaches; the job goes on.\n"
        "The same request attaches to a job that is still at work. Nodes need Python, pip and Pare's dependencies; Pare\n"
        "itself travels with the job.",
        example,
    )
    addressed(ray)
    ray.add_argument("--name", help="a name to show in lists; default: the command")
    ray.add_argument("--no-wait", action="store_true", help="print the job's id and return")
    ray.add_argument("--dry-run", action="store_true", help="print the request as JSON and send nothing")
    ray.add_argument("--working-dir", metavar="DIR", default=".", help="the directory to send (default: this one)")
    ray.add_argument("--env", metavar="K[=V]", action="append", default=[], help="set a variable in the job; K alone copies it")
    ray.add_argument("--pip", metavar="FILE", help="requirements that Ray installs on the nodes, which then need an index")
    ray.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="a verb (default: run) with its arguments")

    jobs = verb(verbs, "jobs", "List, read and stop submitted jobs.", "pare jobs logs --follow")
    what = jobs.add_subparsers(dest="what", metavar="list|logs|stop", required=True)
    listing = verb(what, "list", "The jobs that Pare has submitted to the cluster.", "pare jobs list --json")
    listing.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    logs = verb(what, "logs", "Print a job's log.", "pare jobs logs --follow")
    logs.add_argument("-f", "--follow", action="store_true", help="until the job ends; the exit code is the job's")
    stop = verb(what, "stop", "Stop a job; what it has finished is kept.", "pare jobs stop pare-1f0c2b7a9d3e-1")
    for parser in (listing, logs, stop):
        addressed(parser)
    for parser in (logs, stop):
        parser.add_argument("id", nargs="?", help="the job's id or its beginning; default: the latest (stop: at work)")


# -- what is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """All that is sent."""

    command: list[str]
    """Of `python -m pare`."""
    store: str | None
    """`store.url` of the command."""
    archive: Path
    """The user's directory."""
    wheel: Path
    """Pare."""
    files: dict[str, int]
    """Name in the archive -> bytes before compression."""
    env: dict[str, str]
    pip: list[str]

    @functools.cached_property
    def base(self) -> str:
        """The id but for its number. Secrets stay out: a token that was renewed makes no other request."""
        sent = [self.command, hidden(self.env), self.pip, self.wheel.name, sha256(self.archive.read_bytes()).hexdigest()]
        return f"pare-{sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()[:12]}"

    @property
    def entrypoint(self) -> str:
        """`-P`: the directory may hold a folder called pare, which is not to be imported. `exec`: signals reach the driver."""
        return "exec python -P -m pare " + shlex.join(self.command)

    def runtime_env(self) -> dict[str, Any]:
        """For Ray; paths of this machine are replaced by what was uploaded."""
        return {
            "working_dir": str(self.archive),
            "py_modules": [str(self.wheel)],
            "env_vars": {
                # A disk of the node where the driver is; the truth that outlives the node lies in the store.
                "PARE_HOME": f"/tmp/{self.base}",
                "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
                **WORKERS_ENV,
                **self.env,
            },
            **({"pip": self.pip} if self.pip else {}),
        }


def prepare(arguments: argparse.Namespace, home: Path, scratch: Path) -> Request:
    """Checks the command and packs what it needs into `scratch`."""
    directory = Path(arguments.working_dir).absolute()
    if not directory.is_dir():
        raise ConfigError(f"--working-dir {arguments.working_dir}: there is no such directory")
    env, pip = variables(arguments.env), requirements(arguments.pip)
    command, store = read_command(arguments.command, directory)
    archive = scratch / "directory.zip"
    sizes = pack_directory(directory, home, archive)
    return Request(command, store, archive, build_wheel(scratch), sizes, env, pip)


def read_command(given: list[str], directory: Path) -> tuple[list[str], str | None]:
    """(the command of the job, its store.url). A command that cannot work is refused here, not on the cluster."""
    words = given[1:] if given[:1] == ["--"] else list(given)
    if not words:
        raise ConfigError("nothing to submit. Try: pare submit ray experiment=demo store.url=s3://BUCKET/PREFIX")
    if "=" in words[0] or words[0][0] in "+~":
        words.insert(0, "run")
    if words[0].startswith("-"):
        return words, None
    from pare.orchestrator import cli

    parser = cli.parser()
    known = set(next(a for a in parser._actions if a.dest == "verb").choices or ()) - set(NOT_REMOTE)
    if words[0] not in known:
        raise ConfigError(f"{words[0]!r} is no command that runs on a cluster.{nearest(words[0], known)}")
    parsed, unknown = parser.parse_known_args(words)
    written = [word.split("=", 1)[1] for word in words if re.match(r"\+{0,2}store\.url=", word)]
    store = written[-1] if written else None
    if words[0] in ("run", "plan"):
        store = composed_store([*parsed.overrides, *unknown], parsed, directory) or store
    if store is not None and "://" not in store and not Path(store).is_absolute():
        raise ConfigError(
            f"store.url must be a URL or an absolute path that every node sees, got {store!r}: a job's own directory is "
            "deleted with it. Try: store.url=s3://BUCKET/PREFIX or store.url=/shared/pare"
        )
    if words[0] in DRIVERS and not any(word.startswith("cluster.address=") for word in words):
        words.append("cluster.address=auto")
    return words, store


def composed_store(overrides: list[str], parsed: argparse.Namespace, directory: Path) -> str | None:
    """Composes and checks the config as the job will, from the directory that it will be in."""
    from omegaconf import OmegaConf

    from pare.orchestrator import config

    with contextlib.chdir(directory), config.session(overrides, parsed.config_dir, parsed.config_name) as composer:
        composer.experiment()
        url = OmegaConf.select(composer.top(), "store.url")
    return None if url is None else str(url)


def variables(given: list[str]) -> dict[str, str]:
    """`K=V`, or `K` for the value that it has here."""
    found = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not name:
            raise ConfigError(f"--env {word}: the name is missing. Try: --env HF_HOME=/shared/hf")
        if not equals and name not in os.environ:
            raise ConfigError(f"--env {name}: it is not set here. Try: --env {name}=VALUE")
        found[name] = value if equals else os.environ[name]
    return found


def requirements(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except OSError as e:
        raise ConfigError(f"--pip {path}: cannot be read ({e.strerror}); name a requirements file") from e
    return [line for line in lines if line and not line.startswith("#")]


def hidden(env: dict[str, str]) -> dict[str, str]:
    """Without the values that may be secrets."""
    return {name: "***" if SECRET.search(name) else value for name, value in env.items()}


def shown(request: Request, address: str, name: str) -> dict[str, Any]:
    """What `--dry-run` prints."""
    env = request.runtime_env()
    return {
        "schema_version": SCHEMA_VERSION,
        "address": address,
        "submission_id": f"{request.base}-<n>",
        "name": name,
        "entrypoint": request.entrypoint,
        "store": request.store,
        "runtime_env": {
            **env,
            "working_dir": request.archive.name,
            "py_modules": [request.wheel.name],
            "env_vars": hidden(env["env_vars"]),
        },
        "bytes": {"directory": request.archive.stat().st_size, "wheel": request.wheel.stat().st_size},
        "files": [{"file": file, "bytes": size} for file, size in request.files.items()],
    }


# -- the verbs --------------------------------------------------------------------------------------------------------


def submit(arguments: argparse.Namespace, home: Path) -> int:
    """`pare submit ray`."""
    with tempfile.TemporaryDirectory(prefix="pare-submit-") as scratch:
        request = prepare(arguments, home, Path(scratch))
        name = arguments.name or "pare " + shlex.join(request.command)
        if arguments.dry_run:
            show_json(shown(request, dashboard(arguments.address), name))
            return 0
        cluster = Cluster(arguments.address)
        check_store(request, cluster)
        job = start(request, cluster, name)
    if arguments.no_wait:
        print(job)
        say(f"follow it:  pare jobs logs {job} --follow{cluster.option}\nstop it:    pare jobs stop {job}{cluster.option}")
        return 0
    return follow(cluster, job)


def check_store(request: Request, cluster: Cluster) -> None:
    """Refuses a driver whose workers would each write to a disk of their own."""
    if request.store is not None or request.command[0] not in DRIVERS:
        return
    n = cluster.nodes()
    if n > 1:
        raise ConfigError(
            f"the cluster has {n} nodes and store.url is not set: what one node makes the others must see. "
            "Add store.url=s3://BUCKET/PREFIX, or store.url=/PATH of a file system that all nodes share."
        )
    say(f"the store will be on the cluster's only node, in {request.runtime_env()['env_vars']['PARE_HOME']}/store")


def start(request: Request, cluster: Cluster, name: str) -> str:
    """The id of the job that does this request: one that is at work already, or a new one."""
    mine = [job for job in cluster.jobs() if job.submission_id.rpartition("-")[0] == request.base]
    for job in mine:
        if not job.status.is_terminal():
            say(f"this request is {str(job.status).lower()} already: attached to {job.submission_id}")
            return str(job.submission_id)
    id = f"{request.base}-{1 + max((int(job.submission_id.rpartition('-')[2]) for job in mine), default=0)}"
    say(
        f"submitting {id} to {cluster.address}: {len(request.files)} files "
        f"({request.archive.stat().st_size / 2**20:.1f} MiB) and Pare {request.wheel.name.split('-')[1]}"
    )
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            cluster.ask(
                lambda: cluster.client.submit_job(
                    entrypoint=request.entrypoint,
                    submission_id=id,
                    runtime_env=request.runtime_env(),
                    metadata={"pare": shlex.join(request.command), "job_name": name},
                )
            )
            return id
        except InfeasibleError as e:
            if "already exists" in str(e):
                say(f"the same request was submitted by another process just now: attached to {id}")
                return id
            # A head that has only just started answers before its agent does.
            if "No available agent" not in str(e) or time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def follow(cluster: Cluster, job: str) -> int:
    """The job's log to its end; Ctrl-C leaves the job at work."""
    try:
        return cluster.follow(job)
    except KeyboardInterrupt:
        say(
            f"\ndetached; {job} goes on.\n  come back:  pare jobs logs {job} --follow{cluster.option}\n"
            f"  stop it:    pare jobs stop {job}{cluster.option}"
        )
        return 130


def jobs(arguments: argparse.Namespace, home: Path) -> int:
    """`pare jobs list|logs|stop`."""
    cluster = Cluster(arguments.address)
    if arguments.what == "list":
        rows = [row(job) for job in cluster.jobs()]
        if arguments.json:
            show_json({"schema_version": SCHEMA_VERSION, "address": cluster.address, "jobs": rows})
            return 0
        for r in rows:
            print(f"{r['id']}  {r['status']:9}  {r['started'] or '-':20}  {r['name']}")
        return 0
    job = cluster.find(arguments.id, live=arguments.what == "stop")
    if arguments.what == "stop":
        return stop(cluster, job)
    if arguments.follow:
        return follow(cluster, job.submission_id)
    print(cluster.ask(lambda: cluster.client.get_job_logs(job.submission_id)), end="")
    return 0


def row(job: Any) -> dict[str, Any]:
    def when(milliseconds: int | None) -> str | None:
        return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if milliseconds else None

    return {
        "id": job.submission_id,
        "name": job.metadata.get("job_name"),
        "command": job.metadata["pare"],
        "status": str(job.status).lower(),
        "exit_code": job.driver_exit_code,
        "started": when(job.start_time),
        "ended": when(job.end_time),
    }


def stop(cluster: Cluster, job: Any) -> int:
    """Asks the job to end, and waits until it has."""
    id = job.submission_id
    if not job.status.is_terminal():
        cluster.ask(lambda: cluster.client.stop_job(id))
        deadline = time.monotonic() + STOP_WAIT_S + 15
        while not (job := cluster.ask(lambda: cluster.client.get_job_info(id))).status.is_terminal():
            if time.monotonic() > deadline:
                raise LostError(f"{id} was asked to stop {STOP_WAIT_S + 15} s ago and is still {job.status}; look at its log")
            time.sleep(0.5)
    print(f"{id} {str(job.status).lower()}")
    return 0
