"""Real clusters: `ray start` with token authentication, on nodes whose Python cannot import Pare. `make test-slow`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = ["evaluation.windows={sequences: 4, length: 128}", "evaluation.questions.n=0", "evaluation.speed.repeats=0"]
SWEEP = ["run", "recipe=rtn,gptq", "model=tiny", "recipe.quantize.bits=4,3", *SMALL, "tracking.enabled=false"]


@dataclass
class Nodes:
    """A cluster of one machine: a head and any number of further raylets, all of one Python, home and token."""

    home: Path
    python: Path
    env: dict[str, str]
    port: int
    dashboard_port: int
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def add(self, *options: str) -> subprocess.Popen[bytes]:
        """Starts one node in the foreground of a process of its own."""
        command = [str(self.python), "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1"]
        # A port of its own: an agent that finds the usual one taken by another Ray of this machine takes no jobs.
        command += ["--dashboard-agent-listen-port", str(free_port())]
        command += ["--object-store-memory", "80000000", "--min-worker-port", "0", "--max-worker-port", "0", *options]
        number = len(self.started)
        env = {**self.env, "PARE_TEST_NODE": f"{self.home}/{number}"}
        with (self.home / f"node{number}.log").open("w") as log:
            self.started.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))
        return self.started[-1]

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """Takes a node away at once, with all that runs on it."""
        killed("PARE_TEST_NODE", f"{self.home}/{self.started.index(node)}")
        node.wait()

    def ask(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {(self.home / 'token').read_text()}"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=5) as reply:
            return json.load(reply)

    def alive(self) -> int:
        try:
            found = self.ask("/api/v0/nodes")["data"]["result"]["result"]
        except OSError:  # the head is not up yet
            return 0
        return sum(node["state"] == "ALIVE" for node in found)

    def log(self) -> str:
        return "\n".join(file.read_text()[-3000:] for file in sorted(self.home.glob("node*.log")))


def processes(variable: str, value: str) -> list[psutil.Process]:
    """Every living process that was started, at any remove, with this environment variable."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it ended while we looked
            continue
    return found


def killed(variable: str, value: str) -> int:
    """Kills all such processes; how many there were. A dying one may start another."""
    found = processes(variable, value)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return len(found)


def wait_until(condition: Callable[[], bool], what: Callable[[], str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def python_without_pare(directory: Path) -> Path:
    """A Python that finds every library of this one, but not Pare: the path file of an editable install is not read there."""
    venv.create(directory, with_pip=False)
    python = directory / "bin" / "python"
    here = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    (next(directory.glob("lib/python*/site-packages")) / "libraries.pth").write_text("\n".join(here))
    pip = directory / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec {python} -m pip "$@"\n')
    pip.chmod(0o755)
    found = subprocess.run([python, "-E", "-c", "import ray, torch; import pare"], capture_output=True, text=True, cwd="/")
    if "No module named 'pare'" not in found.stderr:
        pytest.skip("Pare is installed among the libraries themselves; this test wants an editable install")
    return python


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A running head. Nothing that was started for it outlives the module."""
    home = Path(tempfile.mkdtemp(prefix="pare-ray-", dir="/tmp"))  # a short path: Ray puts sockets beneath it
    python = python_without_pare(home / "python")
    (home / "token").write_text("0123456789abcdef" * 2)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PARE_", "PYTHON", "MLFLOW_"))}
    env = {
        **kept,
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PARE_TEST_CLUSTER": str(home),
    }
    cluster = Nodes(home, python, env, free_port(), free_port())
    try:
        cluster.add(
            "--head", "--port", str(cluster.port), "--dashboard-port", str(cluster.dashboard_port), "--temp-dir", f"{home}/r"
        )
        wait_until(lambda: cluster.alive() == 1, cluster.log)
        yield cluster
    finally:
        wait_until(lambda: not killed("PARE_TEST_CLUSTER", str(home)), lambda: "a process of the cluster is left", 60)
        shutil.rmtree(home)


@dataclass
class User:
    """Somebody with a directory of their own and the cluster's address and token in their environment."""

    directory: Path
    home: Path
    env: dict[str, str]

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "pare", *words],
            env={**self.env, "PARE_HOME": str(self.home)},
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pare(self, *words: str, code: int = 0) -> tuple[str, str]:
        """(stdout, stderr) of a command that must end with this code."""
        process = self.start(*words)
        out, error = process.communicate(timeout=500)
        assert process.returncode == code, f"exit {process.returncode}\n{out[-6000:]}\n{error[-3000:]}"
        return out, error

    def jobs(self) -> dict[str, dict[str, Any]]:
        return {job["id"]: job for job in json.loads(self.pare("jobs", "list", "--json")[0])["jobs"]}


@pytest.fixture
def user(nodes: Nodes, tmp_path: Path) -> User:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PARE_", "PYTEST", "MLFLOW_"))}
    env = {**kept, "RAY_AUTH_TOKEN_PATH": str(nodes.home / "token"), "RAY_API_SERVER_ADDRESS": nodes.url}
    directory = tmp_path / "work"
    directory.mkdir()
    # Run by whoever composes the config: this process, where WAIT is not set, and then the job.
    (directory / "wait.py").write_text(
        "import os, time\n"
        "if 'WAIT' in os.environ:\n"
        "    print('waiting', flush=True)\n"
        "    time.sleep(float(os.environ['WAIT']))\n"
    )
    return User(directory, tmp_path / "home", env)


WAITS = ["plan", "recipe=rtn", "model=tiny", "plugins=[wait.py]"]


def test_a_node_without_pare_runs_it_from_the_wheel_that_travels(user: User, nodes: Nodes) -> None:
    """From a directory with folders named like Pare's own, as a checkout has them."""
    for folder in ("pare", "methods", "conf"):
        (user.directory / folder).mkdir()
        (user.directory / folder / "__init__.py").write_text("raise RuntimeError('the user\\'s own folder was imported')\n")

    assert "pare 0." in user.pare("submit", "ray", "--", "--version")[0]
    out, error = user.pare("submit", "ray", "plan", "experiment=smoke", "--json")

    plan = json.loads(out[out.index("{") : out.rindex("}") + 1])
    assert plan["tasks"]["new"] > 10
    assert "submitting pare-" in error
    assert {job["status"] for job in user.jobs().values()} == {"succeeded"}


def test_the_workers_of_a_job_import_pare_too(user: User) -> None:
    (user.directory / "reach.py").write_text(
        "import os\n"
        "if 'REACH' in os.environ:\n"
        "    import ray\n"
        "    ray.init(address='auto', log_to_driver=False)\n"
        "    @ray.remote(num_cpus=1)\n"
        "    def place():\n"
        "        import pare.workers.run\n"
        "        return pare.workers.run.__file__\n"
        "    print('imported', ray.get(place.remote()), flush=True)\n"
    )

    out, _ = user.pare("submit", "ray", "--env", "REACH=1", "plan", "recipe=rtn", "model=tiny", "plugins=[reach.py]")

    assert "py_modules_files/pare_lm-" in next(line for line in out.splitlines() if line.startswith("imported"))


def test_the_exit_code_of_the_job_is_the_exit_code_of_the_submission(user: User) -> None:
    out, _ = user.pare("submit", "ray", "report", code=2)

    assert "there is no sweep" in out
    assert [job["exit_code"] for job in user.jobs().values() if job["command"] == "report"] == [2]


def test_the_same_request_twice_is_one_job_until_it_has_ended(user: User) -> None:
    submit = ["submit", "ray", "--env", "WAIT=8", *WAITS]
    first = user.pare("submit", "ray", "--no-wait", *submit[2:])[0].strip()

    out, error = user.pare(*submit)

    assert f"attached to {first}" in error
    assert "waiting" in out
    assert user.pare("jobs", "logs", first)[0] == out
    again = user.pare("submit", "ray", "--no-wait", *submit[2:])[0].strip()
    assert (first[-2:], again) == ("-1", first[:-1] + "2")
    assert user.pare("jobs", "stop", again)[0] == f"{again} stopped\n"


def test_ctrl_c_detaches_and_stop_ends_the_job(user: User) -> None:
    attached = user.start("submit", "ray", "--env", "WAIT=300", *WAITS)
    assert attached.stdout is not None
    for line in attached.stdout:
        if line == "waiting\n":
            break
    attached.send_signal(signal.SIGINT)
    _, error = attached.communicate(timeout=30)

    assert attached.returncode == 130
    job = next(id for id, row in user.jobs().items() if row["status"] == "running")
    assert f"pare jobs logs {job} --follow" in error
    assert "Traceback" not in error
    following = user.start("jobs", "logs", "--follow", job)
    assert user.pare("jobs", "stop")[0] == f"{job} stopped\n"
    out, error = following.communicate(timeout=60)
    assert following.returncode == 143
    assert "waiting" in out
    assert "was stopped" in error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RAY_AUTH_TOKEN": "wrong"}, "the token of RAY_AUTH_TOKEN is not the cluster's"),
        ({"RAY_AUTH_TOKEN_PATH": None, "HOME": "/nonexistent"}, "no token was found"),
        ({"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{free_port()}"}, "no cluster answers"),
    ],
)
def test_a_wrong_token_and_a_wrong_address_are_told_apart(user: User, change: dict[str, str | None], words: str) -> None:
    user.env = {k: v for k, v in {**user.env, **change}.items() if v is not None}

    _, error = user.pare("submit", "ray", *WAITS, code=4)

    assert words in error
    assert "Traceback" not in error


def test_two_nodes_refuse_a_run_without_a_store_that_both_see(user: User, nodes: Nodes) -> None:
    node = nodes.add("--address", f"127.0.0.1:{nodes.port}")
    try:
        wait_until(lambda: nodes.alive() == 2, nodes.log)
        _, error = user.pare("submit", "ray", *SWEEP, code=2)
    finally:
        nodes.kill(node)
        wait_until(lambda: nodes.alive() == 1, nodes.log)

    assert "the cluster has 2 nodes and store.url is not set" in error


def test_a_submitted_sweep_that_loses_a_node_ends_like_a_local_one(user: User, nodes: Nodes, tmp_path: Path) -> None:
    store = f"store.url={tmp_path / 'shared'}"
    node = nodes.add("--address", f"127.0.0.1:{nodes.port}", "--num-gpus", "2")
    wait_until(lambda: nodes.alive() == 2, nodes.log)
    job = user.pare("submit", "ray", "--no-wait", *SWEEP, store, "cluster.device=cpu")[0].strip()
    wait_until(
        lambda: published(tmp_path / "shared") >= 6 or user.jobs()[job]["status"] not in ("pending", "running"),
        lambda: user.pare("jobs", "logs", job)[0],
        300,
    )
    assert user.jobs()[job]["status"] == "running", user.pare("jobs", "logs", job)[0]
    nodes.kill(node)

    user.pare("jobs", "logs", "--follow", job)

    again = json.loads(user.pare(*SWEEP, store, "cluster.device=cpu", "--json")[0])
    user.home = tmp_path / "elsewhere"
    undisturbed = json.loads(user.pare(*SWEEP, "cluster.device=cpu", "--json")[0])
    assert again["tasks"]["executed"] == 0
    assert undisturbed["tasks"]["executed"] == undisturbed["tasks"]["unique"]
    assert measured(again) == measured(undisturbed)


def published(store: Path) -> int:
    return len(list(store.rglob("manifest.json")))


def measured(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Trial -> what does not depend on time or place."""
    return {
        trial["trial"]: {k: v for k, v in trial["metrics"].items() if k.startswith(("quality/", "size/"))}
        for trial in report["trials"]
    }
