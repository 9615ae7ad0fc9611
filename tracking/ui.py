"""MLflow's pages over the runs of a sweep: `mlflow server` on the loopback address, ended with the program."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pare.tracking.mlflow_log import ENVIRONMENT, TrackingError, database_of, redacted, resolve_uri

DEFAULT_PORT = 5000
START_S, STOP_S = 120.0, 10.0
"""Seconds that the server has to answer, and to end by itself."""

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks without a proxy: the server is on this machine."""


class UiError(TrackingError):
    """The pages cannot be shown."""


def serve(
    uri: str,
    artifact_root: Path | str,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    experiment: str = "pare",
    sweep: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serves MLflow's pages until Ctrl-C, saying where. If the default port is taken, a free one serves as well.

    sweep: the run to point at; the latest if None.
    """
    resolved = resolve_uri(uri, Path(artifact_root))
    if resolved.startswith(("http://", "https://")):
        say(f"Tracking goes to a server that runs already: {redacted(deep_link(resolved, experiment, sweep))}")
        return
    number = chosen_port(checked_host(host), port)
    if number != port:
        say(f"Port {port} is taken, so it is {number}.")
    try:
        with ended_by_sigterm(), running(resolved, Path(artifact_root), host, number) as (process, address):
            say(f"MLflow: {deep_link(address, experiment, sweep)}")
            say("Ctrl-C ends it.")
            process.wait()
    except KeyboardInterrupt:
        return
    raise UiError(f"mlflow server ended by itself with code {process.returncode}; {log_tail(Path(artifact_root))}")


@contextmanager
def running(uri: str, artifact_root: Path, host: str, port: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server that answers, and its address. On leaving, it and its workers are gone."""
    database = database_of(uri)
    if database is not None and not database.exists():
        raise UiError(f"nothing was tracked yet: there is no {database}. `pare run experiment=demo` makes it.")
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--host",
        host,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += ["--default-artifact-root", artifact_root.absolute().as_uri(), "--no-serve-artifacts"]
    environment = {**ENVIRONMENT, **os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    artifact_root.mkdir(parents=True, exist_ok=True)
    with open(log_file(artifact_root), "wb") as log:
        # Its own session, so that Ctrl-C reaches only this program, which then ends server and workers together.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_S
        while not answers(address):
            if process.poll() is not None:
                raise UiError(f"mlflow server did not start (code {process.returncode}); {log_tail(artifact_root)}")
            if time.monotonic() > deadline:
                raise UiError(f"mlflow server did not answer within {START_S:.0f} s; {log_tail(artifact_root)}")
            time.sleep(0.2)
        yield process, address
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(STOP_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM leaves the block as an exit with 143, so that what has to be cleaned up is."""

    def leave(_signal: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(143)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def checked_host(host: str) -> str:
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise UiError(
            f"host must be a loopback address (127.0.0.1, ::1 or localhost), got {host!r}: the pages have no password. "
            "To look from another machine, forward the port: ssh -L 5000:127.0.0.1:5000 THIS_MACHINE"
        )
    return host


def chosen_port(host: str, port: int) -> int:
    """The port if it is free; in place of the default, any free one."""
    for candidate in (port, 0) if port == DEFAULT_PORT else (port,):
        try:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, candidate))
                return int(probe.getsockname()[1])
        except OSError as error:
            reason = error.strerror
        except OverflowError:
            reason = "ports go from 1 to 65535"
    raise UiError(f"port {port} on {host} cannot be used ({reason}): name another, or none to get a free one")


def answers(address: str) -> bool:
    try:
        with DIRECT.open(f"{address}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def deep_link(address: str, experiment: str, sweep: str | None) -> str:
    """The page of a sweep's run; that of the experiment, or the front page, where there is none yet."""

    def ask(what: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{address}/api/2.0/mlflow/{what}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with DIRECT.open(request, timeout=20) as reply:
            return dict(json.load(reply))

    try:
        quoted = experiment.replace("'", "\\'")
        experiments = ask("experiments/search", {"filter": f"name = '{quoted}'", "max_results": 1}).get("experiments", [])
        if not experiments:
            return address
        number = experiments[0]["experiment_id"]
        wanted = "tags.`pare.kind` = 'sweep'" + (f" AND tags.`pare.sweep` = '{sweep}'" if sweep else "")
        runs = ask(
            "runs/search",
            {"experiment_ids": [number], "filter": wanted, "order_by": ["attributes.start_time DESC"], "max_results": 1},
        ).get("runs", [])
    except (urllib.error.URLError, TimeoutError) as error:
        raise UiError(f"MLflow at {redacted(address)} does not answer: {error}") from error
    # The workflow type opens the pages for runs and metrics; without it they show those for prompts and traces.
    page = f"/runs/{runs[0]['info']['run_id']}" if runs else "/runs"
    return f"{address}/#/experiments/{number}{page}?workflowType=machine_learning"


def log_file(artifact_root: Path) -> Path:
    return artifact_root.absolute().parent / "ui.log"


def log_tail(artifact_root: Path) -> str:
    log = log_file(artifact_root)
    lines = log.read_text(errors="replace").strip().splitlines()[-3:] if log.exists() else []
    return f"it said ({log}): " + " / ".join(lines or ["nothing"])
