"""A running Ray cluster behind its dashboard, through Ray's Jobs API. What goes wrong is said in Pare's words."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pare.orchestrator.commands import say
from pare.orchestrator.errors import ConfigError, InfeasibleError, PareError, nearest

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_S, QUIET_S, PATIENCE_S = 10.0, 60.0, 120.0
"""For a connection; without a line of the log before the connection is checked; for a cluster that does not answer."""


class LostError(PareError):
    """The cluster went away while the job was at work; the same command goes on."""

    exit_code = 5


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
