"""`pare submit ray` and `pare jobs`: a command of Pare as a job of a running Ray cluster, through Ray's Jobs API.

What travels: Pare itself as a wheel (`py_modules`), the user's directory (`working_dir`), the command. What has to be on
the nodes: Python, pip and Pare's dependencies; `--pip FILE` has Ray install requirements where nodes reach an index.
The id of a submission is a digest of all that travels, so the same request is never at work twice.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import shlex
import socket
import stat
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from pare import __version__
from pare.orchestrator.commands import SCHEMA_VERSION, say, show_json
from pare.orchestrator.errors import ConfigError, InfeasibleError, PareError, nearest
from pare.orchestrator.ray_pool import WORKERS_ENV

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ROOMS = ("conf", "methods", "orchestrator", "tracking", "workers")
LIMIT_BYTES = 100 * 1024**2
"""Of the user's directory, compressed. Ray's dashboard takes no larger body."""
DRIVERS = ("run", "resume", "retry-failed", "rerun")
"""Verbs that run tasks: they get `cluster.address=auto`, and need a store that every node sees."""
NOT_REMOTE = ("submit", "jobs", "ui")
SECRET = re.compile(r"token|secret|passw|api_?key|access_?key|credential", re.IGNORECASE)
STOP_WAIT_S = 60
"""How long `pare jobs stop` leaves a driver to publish what it has; Ray's own default is 3 s."""
CONNECT_S, QUIET_S, PATIENCE_S = 10.0, 60.0, 120.0
"""For a connection; without a line of the log before the connection is checked; for a cluster that does not answer."""


class LostError(PareError):
    """The cluster went away while the job was at work; the same command goes on."""

    exit_code = 5


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
    sizes: dict[str, int] = {}
    try:
        files = files_to_send(directory, home)
        sizes = {name: file.stat().st_size for name, file in files.items()}
        pack(files, archive, LIMIT_BYTES)
    except TooLargeError:
        raise ConfigError(too_large(directory, sizes)) from None
    except OSError as e:
        raise ConfigError(f"cannot pack {e.filename or directory}: {e.strerror}. Leave it out with .rayignore") from e
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


# -- what is sent -----------------------------------------------------------------------------------------------------


class TooLargeError(Exception):
    """An archive outgrew its limit."""


def files_to_send(directory: Path, home: Path) -> dict[str, Path]:
    """Name in the archive -> file, by Ray's own rules: .gitignore and .rayignore of every folder, and Ray's defaults.

    Pare's results never travel.
    """
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    excludes = [*ray_constants.get_runtime_env_default_excludes(), ".pare"]
    if home.absolute().is_relative_to(directory):
        excludes.append(f"/{home.absolute().relative_to(directory)}")
    found: list[Path] = []
    _dir_travel(
        directory,
        [_get_excludes(directory, excludes)],
        found.append,
        include_gitignore=os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1",
        logger=logging.getLogger(__name__),
    )
    return {str(file.relative_to(directory)): file for file in sorted(found) if file.is_file()}


def too_large(directory: Path, sizes: dict[str, int]) -> str:
    """Says which files to leave out."""
    largest = sorted(sizes, key=lambda name: -sizes[name])[:10]
    return (
        f"{directory} is too large to send: {len(sizes)} files of {sum(sizes.values()) / 2**20:.0f} MiB are more than "
        f"{LIMIT_BYTES / 2**20:.0f} MiB compressed. The largest:\n"
        + "".join(f"  {sizes[name] / 2**20:9.1f} MiB  {name}\n" for name in largest)
        + "List what the job does not need in .gitignore or .rayignore, send another directory (--working-dir DIR), or put "
        "large files where the nodes can read them."
    )


def pack(files: Mapping[str, Path | bytes], target: Path, limit: int | None = None) -> None:
    """Writes a zip whose bytes depend on names, contents and modes alone. Raises TooLargeError beyond `limit` bytes."""
    with target.open("wb") as out, zipfile.ZipFile(out, "w") as archive:
        for name, source in files.items():
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            stream: IO[bytes]
            if isinstance(source, bytes):
                mode, info.file_size, stream = 0o644, len(source), io.BytesIO(source)
            else:
                mode, info.file_size, stream = source.stat().st_mode & 0o777, source.stat().st_size, source.open("rb")
            info.external_attr = (stat.S_IFREG | mode) << 16
            with stream, archive.open(info, "w") as sink:
                while chunk := stream.read(1 << 20):
                    sink.write(chunk)
                    if limit is not None and out.tell() > limit:
                        raise TooLargeError
    if limit is not None and target.stat().st_size > limit:
        raise TooLargeError


def build_wheel(directory: Path) -> Path:
    """Pare as it is imported here, from a checkout or an installation, as a wheel.

    Ray knows an uploaded wheel by its name alone, so the version carries a digest of the contents. It names no
    requirements: Ray installs it with `pip install --target`, which would fetch them all again, torch included.
    """
    files: dict[str, bytes] = {}
    for package in ("pare", *(f"pare.{room}" for room in ROOMS)):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise PareError(f"the package {package} of this installation cannot be found; install Pare again")
        root = Path(spec.submodule_search_locations[0])
        for file in root.rglob("*"):
            parts = file.relative_to(root).parts
            if file.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in parts):
                files["/".join((*package.split("."), *parts))] = file.read_bytes()
    digest = sha256(json.dumps(sorted((name, sha256(data).hexdigest()) for name, data in files.items())).encode())
    version = f"{__version__}+{digest.hexdigest()[:16]}"
    about = f"pare_lm-{version}.dist-info"
    files = dict(sorted(files.items()))
    files[f"{about}/METADATA"] = f"Metadata-Version: 2.1\nName: pare-lm\nVersion: {version}\n".encode()
    files[f"{about}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: pare\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = [
        f"{name},sha256={base64.urlsafe_b64encode(sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for name, data in files.items()
    ]
    files[f"{about}/RECORD"] = "\n".join([*record, f"{about}/RECORD,,", ""]).encode()
    wheel = directory / f"pare_lm-{version}-py3-none-any.whl"
    pack(files, wheel)
    return wheel


sha256 = hashlib.sha256


# -- the cluster ------------------------------------------------------------------------------------------------------


class Cluster:
    """A running cluster behind its dashboard. What goes wrong is said in Pare's words."""

    def __init__(self, wanted: str | None) -> None:
        self.address = dashboard(wanted)
        self.option = f" --address {self.address}" if wanted else ""
        self.token, self.token_source = auth_token()
        self.answers()
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address  # Ray's client lets it win over the address that it is given
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        self.client: Any = self.ask(lambda: JobSubmissionClient(self.address, headers=dict(self.headers)))

    def answers(self) -> None:
        """Raises InfeasibleError if nothing listens. Ray's client has no timeout of its own."""
        parts = urlsplit(self.address)
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S).close()
        except (OSError, ValueError) as e:
            raise InfeasibleError(
                f"no cluster answers at {self.address} ({e}). Give its dashboard with --address http://HEAD:8265; if it is "
                "behind a firewall, forward the port first (ssh -L 8265:localhost:8265 HEAD)."
            ) from e

    def ask(self, call: Callable[[], Any]) -> Any:
        """A call to Ray's client."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self._ask_once(call)
            except InfeasibleError as e:
                # A dashboard that has just come up has no agent yet that could take a job.
                if "try again later" not in str(e) or time.monotonic() > deadline:
                    raise
                time.sleep(2)

    def _ask_once(self, call: Callable[[], Any]) -> Any:
        from ray.exceptions import AuthenticationError

        try:
            return call()
        except AuthenticationError as e:
            got = f"the token of {self.token_source} is not the cluster's" if self.token else "no token was found"
            raise InfeasibleError(
                f"{self.address} asks for a token and {got}. Set RAY_AUTH_TOKEN_PATH to a file with the cluster's token, "
                "set RAY_AUTH_TOKEN, or put it into ~/.ray/auth_token."
            ) from e
        except OSError as e:  # among them every error of requests
            raise InfeasibleError(f"{self.address} does not answer as Ray's dashboard does: {e}") from e
        except RuntimeError as e:
            raise InfeasibleError(f"{self.address} refuses: {e}") from e

    def jobs(self) -> list[Any]:
        """The jobs that Pare has submitted, the latest first."""
        found = self.ask(self.client.list_jobs)
        mine = [job for job in found if job.submission_id and "pare" in (job.metadata or {})]
        return sorted(mine, key=lambda job: job.start_time or 0, reverse=True)

    def find(self, wanted: str | None, live: bool = False) -> Any:
        """The job of that id or beginning of an id; the latest (at work, if `live`) if none is named."""
        jobs = self.jobs()
        if wanted:
            fits = [job for job in jobs if job.submission_id.startswith(wanted)]
        else:
            fits = [job for job in jobs if not (live and job.status.is_terminal())]
        if fits:
            return fits[0]
        if wanted:
            known = nearest(wanted, [job.submission_id for job in jobs])
            raise ConfigError(f"there is no job {wanted!r} on {self.address}.{known}")
        raise ConfigError(f"no job of Pare is {'at work' if live else 'known'} on {self.address}. Try: pare submit ray ...")

    def nodes(self) -> int:
        """How many nodes are alive."""
        import requests

        def call() -> Any:
            reply = requests.get(f"{self.address}/api/v0/nodes", headers=self.headers, timeout=CONNECT_S)
            reply.raise_for_status()
            return reply.json()["data"]["result"]["result"]

        return sum(node["state"] == "ALIVE" for node in self.ask(call))

    def follow(self, job: str) -> int:
        """Prints the job's log as it grows, across lost connections, and returns the job's exit code."""
        import asyncio

        import aiohttp

        printed, lost_at = 0, None

        async def tail() -> None:
            nonlocal printed, lost_at
            stream, seen = self.client.tail_job_logs(job), 0
            while True:
                step = asyncio.ensure_future(anext(stream, None))
                while not (await asyncio.wait({step}, timeout=QUIET_S))[0]:
                    await asyncio.to_thread(self.answers)
                text = step.result()
                if text is None:
                    return
                seen, lost_at = seen + len(text), None
                if seen > printed:  # a new connection begins at the beginning
                    print(text[len(text) - (seen - printed) :], end="", flush=True)
                    printed = seen

        while True:
            try:
                asyncio.run(tail())
                info, lost_at = self.client.get_job_info(job), None
            except (OSError, RuntimeError, aiohttp.ClientError, InfeasibleError) as e:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > PATIENCE_S:
                    raise LostError(
                        f"{self.address} has not answered for {PATIENCE_S:.0f} s: {e}\nThe job may be at work. Look with: "
                        f"pare jobs logs {job} --follow{self.option}"
                    ) from e
            else:
                if info.status.is_terminal():
                    return self.outcome(info)
            time.sleep(1.0)

    def outcome(self, job: Any) -> int:
        """The exit code of a job that has ended: that of its driver, if it came to run one."""
        if job.status == "SUCCEEDED":
            return 0
        if job.status == "STOPPED":
            say(f"{job.submission_id} was stopped; what it had finished is kept. The same command goes on.")
            return 143
        code, kind = job.driver_exit_code, str(job.error_type or "")
        message = "\n".join((job.message or "").strip().splitlines()[-3:])  # above it, Ray's own traceback
        if code is not None:
            return int(code) if code >= 0 else 128 - int(code)
        if "DIED" in kind:
            raise LostError(f"{job.submission_id} was lost with its node: {message}\nThe same command goes on where it was.")
        hint = "\nNodes need pip on their PATH to unpack Pare, and an index for --pip." if "RUNTIME_ENV" in kind else ""
        raise InfeasibleError(f"{job.submission_id} could not start ({kind or job.status}): {message}{hint}")


def dashboard(wanted: str | None) -> str:
    """`http(s)://HOST:PORT` of the dashboard that was named, by option or environment."""
    text = wanted or os.environ.get("RAY_API_SERVER_ADDRESS")
    if text is None and os.environ.get("RAY_ADDRESS", "").startswith("http"):
        text = os.environ["RAY_ADDRESS"]
    text = text or DEFAULT_ADDRESS
    text = (text if "://" in text else f"http://{text}").rstrip("/")
    if not re.fullmatch(r"https?://[^/?#@]+", text):
        raise ConfigError(
            f"--address must be http://HOST:PORT of the cluster's dashboard (its port is 8265 by default), got {text!r}"
        )
    return text


def auth_token() -> tuple[str | None, str]:
    """(the cluster's token, where it is from), looked for where Ray looks, in Ray's order."""
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return value, "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return file.read_text().strip() or None, str(file)
    except OSError as e:
        if named:
            raise ConfigError(f"RAY_AUTH_TOKEN_PATH={named} cannot be read: {e.strerror}") from e
        return None, ""


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
