"""`pare prefetch`: what a sweep needs from the network is brought into the store, and the sweep then runs without one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pare.orchestrator import cli, prefetch
from pare.orchestrator.ledger import Ledger
from pare.orchestrator.pool import InlinePool, run_requests
from pare.tracking import plots
from pare.workers.store import Store
from tests.fake_hub import COMMIT, serving

MODEL = ["model=hf", "model.name=org/open"]
SMALL = ["evaluation.questions.n=0", "evaluation.speed.repeats=0", "tracking.enabled=false",
         "evaluation.windows={sequences: 2, length: 32}", "data.calibration={sequences: 2, length: 32}"]  # fmt: skip
Run = Callable[..., Any]


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    words = "\n\n\n".join(f"Paragraph {i}. " + "It says that all is well. " * 20 for i in range(120))
    (tmp_path / "text.txt").write_text(words)
    return ["data=text", f"data.path={tmp_path / 'text.txt'}"]


@pytest.fixture
def hub(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with serving(monkeypatch, tmp_path / "cache", {"models/org/open": tiny_model_dir}) as server:
        yield server


@pytest.fixture
def pare_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in a home of its own, tasks in this process; what it printed, as JSON where it was asked for that."""
    monkeypatch.setenv("PARE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    real = prefetch.run
    monkeypatch.setattr(prefetch, "run", lambda *given: real(*given, pool=InlinePool(run_requests)))
    monkeypatch.setattr(plots, "draw", lambda record: {})

    def run(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        found = cli.main(list(arguments))
        out, err = capsys.readouterr()
        assert found == code, f"exit {found}\n{out[-2000:]}\n{err[-2000:]}"
        # Libraries that a task imports may greet; a driver's stdout is free of that, for tasks run elsewhere.
        return json.loads(out[out.index("{\n") :]) if "--json" in arguments else out + err

    return run


def go_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, and none of what it has left on this machine outside the store."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    shutil.rmtree(tmp_path / "cache")


def test_after_a_prefetch_the_same_plan_is_made_offline_and_nothing_of_it_is_fetched(
    hub: Any, text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pare_says: Run
) -> None:
    sweep = ["recipe=base,rtn", *MODEL, *text, *SMALL]
    online = pare_says("plan", *sweep, "--json")

    said = pare_says("prefetch", *sweep, "--json")
    go_offline(monkeypatch, tmp_path)
    offline = pare_says("plan", *sweep, "--json")

    assert said["commits"] == {"model org/open@main": COMMIT}
    assert {(task["type"], task["state"]) for task in said["tasks"]} == {
        ("import_model", "fetched"), ("corpus", "fetched"), ("tokens", "fetched"),
    }  # fmt: skip
    assert said["status"] == "done"
    assert all(task["bytes"] > 0 for task in said["tasks"])
    assert [task["fingerprint"] for task in offline["plan"]] == [task["fingerprint"] for task in online["plan"]]
    new = {task["type"] for task in offline["plan"] if task["state"] == "new"}
    assert new == {"score", "compress", "export", "evaluate"}


def test_a_prefetch_leaves_the_trials_waiting_and_a_second_one_fetches_nothing(
    hub: Any, text: list[str], tmp_path: Path, pare_says: Run
) -> None:
    sweep = ["recipe=base", *MODEL, *text, *SMALL]
    shown = pare_says("prefetch", *sweep)
    asked = len(hub.asked)

    again = pare_says("prefetch", *sweep, "--json")

    assert f"model org/open@main is commit {COMMIT}" in shown
    assert "HF_HUB_OFFLINE=1" in shown
    assert {task["state"] for task in again["tasks"]} == {"there already"}
    assert not [path for path in hub.asked[asked:] if "/resolve/" in path]
    with closing(Ledger(tmp_path / "home")) as ledger:
        (row,) = ledger.trials(ledger.find_sweep(None)["id"])
        assert row["status"] == "pending"
        assert " run recipe=base" in ledger.find_sweep(None)["command"]
    assert "pending" in pare_says("status")


def test_what_was_prefetched_wins_over_an_older_commit_in_the_local_cache(
    hub: Any, text: list[str], tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, pare_says: Run
) -> None:
    sweep = ["recipe=base", *MODEL, *text, *SMALL]
    pare_says("prefetch", *sweep)
    go_offline(monkeypatch, tmp_path)
    older = tmp_path / "cache" / "models--org--open"
    shutil.copytree(tiny_model_dir, older / "snapshots" / ("f" * 40))
    (older / "refs").mkdir()
    (older / "refs" / "main").write_text("f" * 40)

    offline = pare_says("plan", *sweep, "--json")

    assert next(task["state"] for task in offline["plan"] if task["type"] == "import_model") == "cached"


def test_a_failed_fetch_is_named_and_ends_with_exit_code_3(hub: Any, text: list[str], tmp_path: Path, pare_says: Run) -> None:
    too_long = "evaluation.windows={sequences: 2000, length: 512}"

    said = pare_says("prefetch", "recipe=base", *MODEL, *text, *SMALL, too_long, "--json", code=3)

    states = {task["label"]: task["state"] for task in said["tasks"]}
    assert states == {"import org/open": "fetched", "corpus text": "fetched", "test tokens": "failed"}
    failed = next(task for task in said["tasks"] if task["state"] == "failed")
    assert "have only" in failed["message"]
    assert said["status"] == "failed"


def test_without_a_prefetch_an_offline_plan_says_how_to_get_there(
    hub: Any, text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pare_says: Run
) -> None:
    (tmp_path / "cache").mkdir()
    go_offline(monkeypatch, tmp_path)

    said = pare_says("plan", "recipe=base", *MODEL, *text, code=2)

    assert "HF_HUB_OFFLINE is set" in said
    assert "pare prefetch" in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_prefetched_sweep_runs_offline_to_its_end(
    hub: Any, text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pare_says: Run
) -> None:
    from pare.orchestrator import drive

    sweep = ["recipe=base,rtn", *MODEL, *text, *SMALL, "recipe.quantize.group_size=32"]
    pare_says("prefetch", *sweep)
    go_offline(monkeypatch, tmp_path)
    real = drive.run
    monkeypatch.setattr(drive, "run", lambda *given, **more: real(*given, pool=InlinePool(run_requests), **more))

    record = pare_says("run", *sweep, "--json")

    assert [trial["status"] for trial in record["trials"]] == ["done", "done"]
    assert Store(tmp_path / "home" / "store").path(record["trials"][0]["artifact"]).is_dir()
