"""Submission without a cluster: what is sent, under which id, and what its end means. `tests/test_cluster.py` has real ones."""

import base64
import dataclasses
import hashlib
import json
import os
import random
import socket
import tomllib
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pare.orchestrator import cli, jobs_api, packing, submit
from pare.orchestrator.errors import ConfigError, InfeasibleError

ROOT = Path(__file__).parents[2]
PLAN = ["plan", "recipe=rtn", "model=tiny"]
REPORT = ["report", "demo"]
"""A command that composes no config."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's directory, with nothing set that concerns Ray and no token in the home directory."""
    for name in [n for n in os.environ if n.startswith(("RAY_", "PARE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "nobody")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packing.build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def request_of(here: Path, tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., submit.Request]:
    """The request that a command line makes."""
    monkeypatch.setattr(submit, "build_wheel", lambda directory: wheel)

    def make(*words: str) -> submit.Request:
        arguments = cli.parser().parse_args(["submit", "ray", *words])
        return submit.prepare(arguments, here / ".pare", tmp_path)

    return make


# -- the wheel --------------------------------------------------------------------------------------------------------


def test_the_wheel_holds_exactly_what_the_package_list_says(tmp_path: Path) -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    expected = set()
    for package in tool["packages"]:
        parts = package.split(".")
        directory = ROOT.joinpath(tool["package-dir"][".".join(parts[:2])], *parts[2:])
        for pattern in ["*.py", *tool["package-data"].get(package, [])]:
            expected |= {f"{'/'.join(parts)}/{file.relative_to(directory)}" for file in directory.glob(pattern)}

    with zipfile.ZipFile(packing.build_wheel(tmp_path)) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}

    assert found == expected
    assert "pare/workers/run.py" in found


def test_the_wheel_asks_for_nothing_and_its_record_is_true(tmp_path: Path) -> None:
    path = packing.build_wheel(tmp_path)

    with zipfile.ZipFile(path) as wheel:
        about = path.name.removesuffix("-py3-none-any.whl") + ".dist-info"
        assert "Requires-Dist" not in wheel.read(f"{about}/METADATA").decode()
        rows = [line.split(",") for line in wheel.read(f"{about}/RECORD").decode().splitlines()]
        for name, digest, size in rows[:-1]:
            data = wheel.read(name)
            assert digest == "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert int(size) == len(data)
    assert {row[0] for row in rows} == set(wheel.namelist())


def test_the_name_of_the_wheel_tells_its_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes two wheels of one name for the same file."""
    import importlib.util

    names = []
    for text in ("a = 1\n", "a = 1\n", "a = 2\n"):
        place = tmp_path / str(len(names))
        (place / "pare").mkdir(parents=True)
        (place / "pare" / "__init__.py").write_text(text)
        spec = SimpleNamespace(submodule_search_locations=[str(place / "pare")])
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
            names.append(packing.build_wheel(place).name)

    assert names[0] == names[1] != names[2]


# -- the directory ----------------------------------------------------------------------------------------------------


def test_the_directory_is_packed_by_rays_own_rules_without_pares_results(here: Path, tmp_path: Path) -> None:
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import create_package

    def put(name: str, text: str = "x") -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text)

    put(".gitignore", "*.bin\n!keep.bin\n/big\n")
    put("src/.gitignore", "secret.txt\n")
    put("src/.rayignore", "*.log\n")
    for name in ("a.txt", "x.bin", "keep.bin", "big/f", "src/secret.txt", "src/run.log", "run.log", "src/m.py"):
        put(name)
    for name in (".git/config", ".venv/f", "venv/f", "src/__pycache__/m.pyc"):
        put(name)
    theirs = tmp_path / "theirs.zip"
    create_package(str(here), theirs, include_gitignore=True, excludes=ray_constants.get_runtime_env_default_excludes())
    for name in (".pare/store/f", "results/store/f"):
        put(name)

    ours = packing.files_to_send(here, here / "results")

    assert set(ours) == {n for n in zipfile.ZipFile(theirs).namelist() if not n.endswith("/")}
    assert set(ours) == {
        ".gitignore", "a.txt", "keep.bin", "run.log", "src/.gitignore", "src/.rayignore", "src/m.py",
    }  # fmt: skip


def test_packing_the_same_files_again_gives_the_same_bytes(here: Path, tmp_path: Path) -> None:
    (here / "tool.sh").write_text("echo\n")
    (here / "tool.sh").chmod(0o755)
    archives = []
    for stamp in (1e9, 1.5e9):
        os.utime(here / "tool.sh", (stamp, stamp))
        archives.append(tmp_path / f"{stamp}.zip")
        packing.pack({"tool.sh": here / "tool.sh"}, archives[-1])

    assert archives[0].read_bytes() == archives[1].read_bytes()
    info = zipfile.ZipFile(archives[0]).getinfo("tool.sh")
    assert info.external_attr >> 16 & 0o777 == 0o755


def test_a_directory_that_is_too_large_is_refused_with_its_ten_largest_files(
    here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "LIMIT_BYTES", 100_000)
    noise = random.Random(0)
    for i in range(12):
        (here / f"part{i:02}.bin").write_bytes(noise.randbytes(20_000 + i))

    assert cli.main(["submit", "ray", *PLAN]) == 2

    error = capsys.readouterr().err
    named = [line.split()[-1] for line in error.splitlines() if " MiB  part" in line]
    assert named == [f"part{i:02}.bin" for i in range(11, 1, -1)]
    assert ".rayignore" in error
    assert "--working-dir" in error


def test_the_limit_counts_what_travels_not_what_lies_on_disk(
    request_of: Callable[..., submit.Request], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "LIMIT_BYTES", 100_000)
    (here / "zeros.bin").write_bytes(bytes(1_000_000))

    assert request_of(*PLAN).files == {"zeros.bin": 1_000_000}


# -- the request ------------------------------------------------------------------------------------------------------


def test_the_same_request_has_the_same_id_and_another_has_another(
    request_of: Callable[..., submit.Request], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "plugin.py").write_text("a = 1\n")
    monkeypatch.setenv("HF_TOKEN", "first")
    first = request_of("--env", "A=1", "--env", "HF_TOKEN", *REPORT).base

    assert request_of("--env", "HF_TOKEN", "--env", "A=1", "--name", "x", *REPORT).base == first
    monkeypatch.setenv("HF_TOKEN", "renewed")
    assert request_of("--env", "A=1", "--env", "HF_TOKEN", *REPORT).base == first
    assert request_of("--env", "A=2", "--env", "HF_TOKEN", *REPORT).base != first
    assert request_of("--env", "A=1", "--env", "HF_TOKEN", *REPORT, "--json").base != first
    (here / "plugin.py").write_text("a = 2\n")
    assert request_of("--env", "A=1", "--env", "HF_TOKEN", *REPORT).base != first


def test_dry_run_prints_the_request_and_opens_no_connection(
    here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "create_connection", refuse)
    (here / "notes.txt").write_text("four")
    (here / "needs.txt").write_text("# for the nodes\nscipy==1.17.1\n\n")

    code = cli.main(
        ["submit", "ray", "--dry-run", "--name", "mine", "--address", "head:8265", "--env", "HF_TOKEN=abc", "--env", "A=b",
         "--pip", "needs.txt", "recipe=rtn", "model=tiny", "store.url=/shared/pare"]
    )  # fmt: skip

    out = capsys.readouterr().out
    shown = json.loads(out)
    assert code == 0
    assert shown["address"] == "http://head:8265"
    assert shown["entrypoint"] == (
        "exec python -P -m pare run recipe=rtn model=tiny store.url=/shared/pare cluster.address=auto"
    )
    assert shown["store"] == "/shared/pare"
    assert shown["runtime_env"]["env_vars"]["A"] == "b"
    assert "abc" not in out
    assert shown["runtime_env"]["pip"] == ["scipy==1.17.1"]
    assert {"file": "notes.txt", "bytes": 4} in shown["files"]
    assert shown["runtime_env"]["env_vars"]["PARE_HOME"] == "/tmp/" + shown["submission_id"].removesuffix("-<n>")


@pytest.mark.parametrize(
    ("given", "command"),
    [
        (["recipe=rtn", "model=tiny"], ["run", "recipe=rtn", "model=tiny", "cluster.address=auto"]),
        (["run", "recipe=rtn", "cluster.address=h:1"], ["run", "recipe=rtn", "cluster.address=h:1"]),
        (["plan", "recipe=rtn", "--json"], ["plan", "recipe=rtn", "--json"]),
        (["--", "--version"], ["--version"]),
        (["report", "demo", "--format", "md"], ["report", "demo", "--format", "md"]),
    ],
)
def test_a_command_without_a_verb_is_a_run_and_a_run_works_on_the_cluster(
    here: Path, given: list[str], command: list[str]
) -> None:
    assert submit.read_command(given, here)[0] == command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to submit"),
        (["rnu", "recipe=rtn"], "Did you mean 'run'"),
        (["ui"], "no command that runs on a cluster"),
        (["recipe=rtn", "recipe.quantize.bitz=3"], "recipe.quantize.bits"),
        (["recipe=rtn", "store.url=results"], "store.url must be a URL or an absolute path"),
        (["--working-dir", "nowhere", "recipe=rtn"], "there is no such directory"),
        (["--env", "=x", "recipe=rtn"], "the name is missing"),
        (["--env", "NOT_SET_HERE", "recipe=rtn"], "it is not set here"),
        (["--pip", "nowhere.txt", "recipe=rtn"], "name a requirements file"),
        (["--address", "ray://h:10001", "--dry-run", *PLAN], "--address must be http://HOST:PORT"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(
    here: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    assert cli.main(["submit", "ray", *words]) == 2

    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


# -- the cluster ------------------------------------------------------------------------------------------------------


def test_the_address_is_the_options_then_the_environments(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jobs_api.dashboard(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of the cluster itself, not of its dashboard
    assert jobs_api.dashboard(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "https://h:1/")
    assert jobs_api.dashboard(None) == "https://h:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://h:2")
    assert jobs_api.dashboard(None) == "http://h:2"
    assert jobs_api.dashboard("h:3") == "http://h:3"


def test_the_token_is_looked_for_where_ray_looks(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jobs_api.auth_token() == (None, "")
    default = Path.home() / ".ray" / "auth_token"
    default.parent.mkdir(parents=True)
    default.write_text("of-home\n")
    assert jobs_api.auth_token() == ("of-home", str(default))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH=.* cannot be read"):
        jobs_api.auth_token()
    (tmp_path / "token").write_text("of-file")
    assert jobs_api.auth_token() == ("of-file", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-environment")
    assert jobs_api.auth_token() == ("of-environment", "RAY_AUTH_TOKEN")


def job(id: str, status: str = "RUNNING", **fields: Any) -> Any:
    """A job as Ray's client describes it."""
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobStatus

    described = {"start_time": 1, "metadata": {"pare": "run", "job_name": "pare run"}, **fields}
    return JobDetails(type="SUBMISSION", submission_id=id, status=JobStatus(status), entrypoint="", **described)


class FakeClient:
    """Ray's client, as far as Pare uses it, of a cluster that lives in this process."""

    def __init__(self, address: str, headers: dict[str, str]) -> None:
        self.jobs: list[Any] = []
        self.sent: list[dict[str, Any]] = []
        self.streams: list[list[str | Exception]] = []

    def list_jobs(self) -> list[Any]:
        return self.jobs

    def submit_job(self, **sent: Any) -> str:
        self.sent.append(sent)
        return str(sent["submission_id"])

    def get_job_info(self, id: str) -> Any:
        return next(j for j in self.jobs if j.submission_id == id)

    async def tail_job_logs(self, id: str) -> AsyncIterator[str]:
        for text in self.streams.pop(0):
            if isinstance(text, Exception):
                raise text
            yield text


@pytest.fixture
def cluster(here: Path, monkeypatch: pytest.MonkeyPatch) -> jobs_api.Cluster:
    import ray.job_submission

    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", FakeClient)
    monkeypatch.setattr(jobs_api.Cluster, "answers", lambda self: None)
    monkeypatch.setattr(jobs_api.time, "sleep", lambda s: None)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://h:1")  # is set by what follows, and is to be put back
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    return jobs_api.Cluster(None)


def test_a_request_that_is_at_work_is_attached_to_and_an_ended_one_gets_the_next_number(
    cluster: jobs_api.Cluster, request_of: Callable[..., submit.Request], capsys: pytest.CaptureFixture
) -> None:
    request = request_of(*REPORT)

    assert submit.start(request, cluster, "x") == f"{request.base}-1"
    cluster.client.jobs = [job(f"{request.base}-9", "FAILED"), job(f"{request.base}-10", "SUCCEEDED"), job("pare-other-30")]
    assert submit.start(request, cluster, "x") == f"{request.base}-11"
    cluster.client.jobs.append(job(f"{request.base}-11", "PENDING"))
    assert submit.start(request, cluster, "x") == f"{request.base}-11"

    assert [sent["submission_id"] for sent in cluster.client.sent] == [f"{request.base}-1", f"{request.base}-11"]
    assert "pending already: attached" in capsys.readouterr().err


def test_of_two_that_submit_at_once_the_second_attaches(
    cluster: jobs_api.Cluster, request_of: Callable[..., submit.Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(**sent: Any) -> str:
        raise RuntimeError(f"Job with submission_id {sent['submission_id']} already exists.")

    monkeypatch.setattr(cluster.client, "submit_job", taken)
    request = request_of(*REPORT)

    assert submit.start(request, cluster, "x") == f"{request.base}-1"


def test_a_head_that_has_only_just_started_is_asked_again(
    cluster: jobs_api.Cluster, request_of: Callable[..., submit.Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([RuntimeError("500: No available agent to submit job"), None, RuntimeError("500: no space")])

    def submit_job(**sent: Any) -> None:
        if answer := next(answers):
            raise answer

    monkeypatch.setattr(cluster.client, "submit_job", submit_job)
    request = request_of(*REPORT)

    assert submit.start(request, cluster, "x") == f"{request.base}-1"
    with pytest.raises(InfeasibleError, match="500: no space"):
        submit.start(request, cluster, "x")


def test_several_nodes_need_a_store_that_all_see(
    cluster: jobs_api.Cluster, request_of: Callable[..., submit.Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = request_of(*REPORT)
    run = dataclasses.replace(report, command=["run", "recipe=rtn"])
    monkeypatch.setattr(cluster, "nodes", lambda: 3)
    submit.check_store(report, cluster)
    submit.check_store(dataclasses.replace(run, store="s3://bucket/pare"), cluster)
    with pytest.raises(ConfigError, match=r"3 nodes and store.url is not set.*store.url=s3://"):
        submit.check_store(run, cluster)
    monkeypatch.setattr(cluster, "nodes", lambda: 1)
    submit.check_store(run, cluster)


def test_the_log_is_printed_once_across_a_lost_connection(cluster: jobs_api.Cluster, capsys: pytest.CaptureFixture) -> None:
    cluster.client.jobs = [job("pare-a-1", "SUCCEEDED")]
    cluster.client.streams = [["one\ntw", RuntimeError("gone")], ["one\n", OSError("again")], ["one\ntwo\nth", "ree\n"]]

    assert cluster.follow("pare-a-1") == 0

    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_a_cluster_that_stays_away_is_lost_and_the_way_back_is_said(
    cluster: jobs_api.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_api, "PATIENCE_S", -1.0)
    cluster.client.streams = [[OSError("gone")]]

    with pytest.raises(jobs_api.LostError, match="pare jobs logs pare-a-1 --follow") as lost:
        cluster.follow("pare-a-1")

    assert lost.value.exit_code == 5


def test_ctrl_c_detaches_and_says_how_to_come_back(
    cluster: jobs_api.Cluster, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupted(id: str) -> AsyncIterator[str]:
        yield "one\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster.client, "tail_job_logs", interrupted)

    assert submit.follow(cluster, "pare-a-1") == 130

    error = capsys.readouterr().err
    assert "pare jobs logs pare-a-1 --follow" in error
    assert "pare jobs stop pare-a-1" in error


@pytest.mark.parametrize(
    ("status", "fields", "code"),
    [
        ("SUCCEEDED", {"driver_exit_code": 0}, 0),
        ("FAILED", {"driver_exit_code": 3}, 3),
        ("FAILED", {"driver_exit_code": -9}, 137),
        ("STOPPED", {}, 143),
    ],
)
def test_the_exit_code_is_that_of_the_driver(cluster: jobs_api.Cluster, status: str, fields: dict[str, Any], code: int) -> None:
    assert cluster.outcome(job("pare-a-1", status, **fields)) == code


def test_a_job_that_never_ran_and_one_that_was_lost_say_why(cluster: jobs_api.Cluster) -> None:
    setup = {"error_type": "RUNTIME_ENV_SETUP_FAILURE", "message": "Traceback\n  a\n  b\n  c\nno pip"}
    with pytest.raises(InfeasibleError, match=r"(?s)could not start.*no pip.*pip on their PATH") as start:
        cluster.outcome(job("pare-a-1", "FAILED", **setup))
    with pytest.raises(jobs_api.LostError, match="lost with its node"):
        cluster.outcome(job("pare-a-1", "FAILED", error_type="JOB_SUPERVISOR_ACTOR_DIED", message="node died"))

    assert "Traceback" not in str(start.value)


def test_jobs_are_found_by_the_beginning_of_their_id_or_the_latest(cluster: jobs_api.Cluster) -> None:
    cluster.client.jobs = [
        job("pare-a-1", "RUNNING", start_time=1),
        job("pare-b-1", "FAILED", start_time=2),
        job("raysubmit_x", metadata={}),
    ]

    assert cluster.find(None).submission_id == "pare-b-1"
    assert cluster.find(None, live=True).submission_id == "pare-a-1"
    assert cluster.find("pare-a").submission_id == "pare-a-1"
    with pytest.raises(ConfigError, match="there is no job 'raysubmit_x'"):
        cluster.find("raysubmit_x")
    cluster.client.jobs = []
    with pytest.raises(ConfigError, match="no job of Pare is at work"):
        cluster.find(None, live=True)


def test_nothing_at_the_address_is_said_at_once(here: Path, capsys: pytest.CaptureFixture) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]

        assert cli.main(["jobs", "list", "--address", f"http://127.0.0.1:{port}"]) == 4

    error = capsys.readouterr().err
    assert f"no cluster answers at http://127.0.0.1:{port}" in error
    assert "--address" in error
