"""MLflow as a projection of the record, on a real SQLite store: what is written twice stands there once."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import create_engine

from pare.tracking import mlflow_log
from pare.tracking.mlflow_log import MlflowTracker, TrackingError
from pare.tracking.pareto import mark_front
from tests.tracking import records


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables and nothing in them: making one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow_log.client_of(f"sqlite:///{path}")
    return path


@pytest.fixture
def home(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def tracker(home: Path) -> MlflowTracker:
    return MlflowTracker("auto", home / "artifacts", "pare")


def small() -> dict[str, Any]:
    """Base, GPTQ and LoRA of the demo."""
    every = records.demo()["trials"]
    record = records.record([every[0], every[4], every[6]])
    mark_front(record)
    return record


def runs(home: Path) -> list[Any]:
    client = mlflow_log.client_of(f"sqlite:///{home / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'pare'")
    return list(client.search_runs([experiment.experiment_id]))


def run_of(home: Path, trial: dict[str, Any] | None) -> Any:
    (run,) = [r for r in runs(home) if r.data.tags.get("pare.trial_uid") == (trial["uid"] if trial else None)]
    return run


def metric_rows(home: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(home / "mlflow.db")) as db:
        return sorted(db.execute("SELECT run_uuid, key, step, value, timestamp, is_nan FROM metrics"))


def files(run: Any) -> Path:
    return Path(mlflow_log.unquote(run.info.artifact_uri.removeprefix("file://")))


def test_a_sweep_is_a_parent_run_and_a_child_run_for_each_trial(home: Path) -> None:
    record = small()
    gptq = record["trials"][1]

    tracker(home).sync(record)

    parent, child = run_of(home, None), run_of(home, gptq)
    assert len(runs(home)) == 4
    assert parent.info.run_name == record["sweep"]
    assert parent.data.metrics["trials/done"] == 3
    assert "mlflow.parentRunId" not in parent.data.tags
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.info.run_name == gptq["trial"]
    assert child.data.params == {"recipe": "gptq", "bits": "3"}
    assert child.data.metrics == gptq["metrics"]
    expected = {"pare.sweep": "demo-3f2c9a1b", "pare.recipe": "gptq", "pare.block": "gptq", "pare.pareto": "true"}
    expected |= {"pare.status": "done", "pare.artifact": gptq["artifact"], "pare.base": "SmolLM2-135M-Instruct"}
    assert child.data.tags.items() >= expected.items()
    parents = [f"{t['type']}:{t['task']}" for t in gptq["tasks"] if t["type"] in ("import_model", "compress")]
    assert child.data.tags["pare.parent_artifacts"].split(",") == parents
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert child.info.end_time - child.info.start_time == round(1000 * gptq["metrics"]["cost/wall_s"])


def test_the_same_record_twice_leaves_one_run_a_trial_and_one_row_a_point(home: Path) -> None:
    record = small()
    tracker(home).sync(record)
    before = metric_rows(home)

    tracker(home).sync(record)
    with closing(sqlite3.connect(home / "mlflow.db")) as db, db:
        db.execute("DELETE FROM tags WHERE key = 'pare.digest'")  # as after a crash in mid-write
    tracker(home).sync(record)

    assert len(runs(home)) == 4
    assert metric_rows(home) == before
    assert len({row[:3] for row in before}) == len(before)


def test_a_metric_bears_the_time_of_its_runs_start_so_that_a_reply_lost_in_between_doubles_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = small()
    sink = tracker(home)
    client: Any = sink._connect()
    log_batch = client.log_batch

    def unheard(*given: Any, **named: Any) -> None:
        log_batch(*given, **named)
        raise ConnectionResetError("the reply was lost")

    monkeypatch.setattr(client, "log_batch", unheard)
    for _ in range(3):
        with pytest.raises(TrackingError, match="the reply was lost"):
            sink.sync(record)
    monkeypatch.setattr(client, "log_batch", log_batch)
    sink.sync(record)

    assert len(runs(home)) == 4
    assert {row[4] for row in metric_rows(home)} == {mlflow_log.milliseconds(record["about"]["started_at"])}
    assert len({row[:3] for row in metric_rows(home)}) == len(metric_rows(home))


def test_what_is_up_to_date_is_not_written_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = small()
    tracker(home).sync(record)
    again = tracker(home)
    again.sync(record)
    client: Any = again._client

    for write in ("create_run", "log_batch", "set_tag", "log_text", "set_terminated"):
        monkeypatch.setattr(client, write, lambda *_a, **_k: pytest.fail("wrote although nothing had changed"))

    again.sync(copy.deepcopy(record))


def test_a_sweep_that_runs_is_logged_trial_by_trial_and_then_completed(home: Path, tmp_path: Path) -> None:
    record = small()
    partial = copy.deepcopy(record)
    partial["about"] |= {"status": "running", "finished_at": None}
    partial["trials"][1] |= {"status": "running", "metrics": {}}
    partial["trials"][2] |= {"status": "pending", "metrics": {}}
    sink = tracker(home)

    sink.sync(partial)
    states = {r.info.run_name: r.info.status for r in runs(home)}
    sink.sync(record)

    assert states == {
        record["sweep"]: "RUNNING",
        record["trials"][0]["trial"]: "FINISHED",
        record["trials"][1]["trial"]: "RUNNING",
    }
    assert {r.info.status for r in runs(home)} == {"FINISHED"}
    assert len(runs(home)) == 4
    assert len({row[:3] for row in metric_rows(home)}) == len(metric_rows(home))


def test_a_failed_trial_is_a_failed_run_and_one_retried_forgets_its_failure(home: Path) -> None:
    record = small()
    broken = copy.deepcopy(record)
    broken["trials"][1] = records.failed(broken["trials"][1])
    sink = tracker(home)

    sink.sync(broken)
    first = run_of(home, record["trials"][1])
    sink.sync(record)
    second = run_of(home, record["trials"][1])

    assert first.info.status == "FAILED"
    assert first.data.tags["pare.error"] == "out_of_memory"
    assert "14.2 GiB needed" in first.data.tags["mlflow.note.content"]
    assert second.info.run_id == first.info.run_id
    assert second.info.status == "FINISHED"
    assert "pare.error" not in second.data.tags
    assert "GiB needed" not in second.data.tags["mlflow.note.content"]


def test_a_sweep_run_again_later_keeps_its_runs_and_their_metric_rows(home: Path) -> None:
    record = small()
    tracker(home).sync(record)
    before = metric_rows(home)
    record["about"] |= {"started_at": "2026-12-01T00:00:00+00:00", "finished_at": "2026-12-01T00:08:32.3+00:00"}

    tracker(home).sync(record)

    assert len(runs(home)) == 4
    assert metric_rows(home) == before


def test_a_metric_measured_anew_shows_its_new_value(home: Path) -> None:
    record = small()
    tracker(home).sync(record)
    record["trials"][1]["metrics"]["quality/ppl"] = 21.0
    tracker(home).sync(record)
    record["trials"][1]["metrics"]["quality/ppl"] = 24.4

    tracker(home).sync(record)

    assert run_of(home, record["trials"][1]).data.metrics["quality/ppl"] == 24.4


def test_training_curves_keep_their_steps(home: Path) -> None:
    record = small()
    lora = record["trials"][2]
    lora["curves"]["train/loss"][3][1] = None

    tracker(home).sync(record)

    client = mlflow_log.client_of(f"sqlite:///{home / 'mlflow.db'}")
    history = client.get_metric_history(run_of(home, lora).info.run_id, "train/loss")
    assert [[m.step, m.value] for m in history] == [p for p in lora["curves"]["train/loss"] if p[1] is not None]


def test_values_beyond_mlflows_limits_are_shortened_visibly_and_whole_in_the_files(home: Path) -> None:
    record = small()
    trial = record["trials"][1]
    trial["overrides"] = {"recipe.quantize.skip": "x" * 9000, "recipe.@odd key=?": [1, 2], "k" * 300: 1}
    trial["notes"] = ["n" * 9000]

    tracker(home).sync(record)

    run = run_of(home, trial)
    assert run.data.params["skip"].endswith("… (9,000 characters; whole in trial.json)")
    assert len(run.data.params["skip"]) == mlflow_log.MAX_PARAM
    assert run.data.params["_odd key__"] == "[1, 2]"
    assert any(key.startswith("kkkk") and len(key) == mlflow_log.MAX_KEY for key in run.data.params)
    assert run.data.tags["mlflow.note.content"].endswith("(9,000 characters; a file of this run has it whole)")
    whole = json.loads((files(run) / "trial.json").read_text())
    assert whole["overrides"] == trial["overrides"]
    assert whole["notes"] == trial["notes"]


def test_keys_that_become_equal_are_told_apart() -> None:
    fit = mlflow_log.fitted({"a@b": "1", "a?b": "2", "a=b": "3"}, "trial.json")

    assert fit == {"a_b": "1", "a_b_2": "2", "a_b_3": "3"}


@pytest.mark.parametrize("key", ["../up", "/root", "a//b", "a/./b", "a/", "Ω", "plain/name", "speed/trans.former-x y/tok_s"])
def test_every_cleaned_key_is_one_that_mlflow_takes(key: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    cleaned = mlflow_log.clean_key(key)

    _validate_metric_name(cleaned)
    assert cleaned == key or key not in ("plain/name", "speed/trans.former-x y/tok_s")


def test_what_is_no_number_is_kept_and_named_in_a_tag(home: Path) -> None:
    record = small()
    trial = record["trials"][1]
    trial["metrics"] |= {"quality/kl": math.nan, "quality/ppl_high": math.inf, "quality/acc/x": None}

    tracker(home).sync(record)
    before = metric_rows(home)
    tracker(home).sync(record)

    run = run_of(home, trial)
    assert math.isnan(run.data.metrics["quality/kl"])
    assert run.data.metrics["quality/ppl_high"] > 1e308
    assert "quality/acc/x" not in run.data.metrics
    assert run.data.tags["pare.nonfinite"] == "quality/ppl_high,quality/kl"
    assert metric_rows(home) == before


def test_config_report_and_plots_lie_with_the_runs(home: Path, tmp_path: Path) -> None:
    record = small()
    directory = tmp_path / "report"
    (directory / "plots").mkdir(parents=True)
    (directory / "report.html").write_text("<p>first")
    (directory / "plots" / "front.png").write_bytes(b"png")
    sink = tracker(home)

    sink.sync(record, directory)
    (directory / "report.html").write_text("<p>second")
    sink.sync(record, directory)

    parent, child = files(run_of(home, None)), files(run_of(home, record["trials"][1]))
    assert (parent / "report.html").read_text() == "<p>second"
    assert (parent / "plots" / "front.png").read_bytes() == b"png"
    assert yaml.safe_load((child / "config.yaml").read_text()) == record["trials"][1]["config"]


def test_two_sweeps_with_a_trial_in_common_have_a_run_each(home: Path) -> None:
    one, other = small(), small()
    other["sweep"] = "demo-00000000"

    for record in (one, other):
        tracker(home).sync(record)

    assert len(runs(home)) == 8


def test_only_pares_own_file_is_written_without_waiting_for_the_disk_at_each_commit(tmp_path: Path) -> None:
    def modes(file: Path) -> tuple[str, int]:
        with create_engine(f"sqlite:///{file}").connect() as db:
            return db.exec_driver_sql("PRAGMA journal_mode").scalar(), db.exec_driver_sql("PRAGMA synchronous").scalar()

    own, other, old = tmp_path / "home" / "mlflow.db", tmp_path / "other.db", tmp_path / "old.db"
    with closing(sqlite3.connect(old)) as db:
        db.execute("CREATE TABLE t (a)")
    for file in (own, old):
        mlflow_log.flush_seldom(file)

    assert modes(own) == ("wal", 1)
    assert modes(other) == modes(old) == ("delete", 2), "without a log of its own a file could be torn"


def test_the_environment_wins_over_auto_and_a_named_store_over_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")

    assert MlflowTracker("auto", tmp_path / "a", "pare").uri == "http://127.0.0.1:1"
    assert MlflowTracker("sqlite:////x.db", tmp_path / "a", "pare").uri == "sqlite:////x.db"


def test_a_store_in_a_directory_with_an_odd_name_is_found(tmp_path: Path, empty_store: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    odd = tmp_path / "100%20 of #1?"
    odd.mkdir()
    shutil.copy(empty_store, odd / "mlflow.db")

    tracker(odd).sync(small())

    assert {p.name for p in odd.iterdir()} - {"mlflow.db-wal", "mlflow.db-shm"} == {"mlflow.db", "artifacts"}
    with closing(sqlite3.connect(odd / "mlflow.db")) as db:
        assert db.execute("SELECT count(*) FROM runs").fetchone() == (4,)
    assert len(list((odd / "artifacts").glob("*/artifacts/config.yaml"))) == 3


def not_a_database(path: Path) -> None:
    path.write_text("this is no database, and it is longer than a header of one would be" * 20)


def a_directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("spoil", [not_a_database, a_directory])
def test_a_store_that_cannot_be_written_is_told_within_seconds(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(tmp_path / "mlflow.db")
    start = time.monotonic()

    with pytest.raises(TrackingError, match=r"sqlite:///.*mlflow.db could not be written: .*The results are safe without it"):
        MlflowTracker(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "artifacts", "pare").sync(small())

    assert time.monotonic() - start < 4


def test_a_password_in_the_address_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    with pytest.raises(TrackingError, match=r"MLflow at http://…@127\.0\.0\.1:1 could not be written") as told:
        MlflowTracker("http://me:secret@127.0.0.1:1", tmp_path / "artifacts", "pare").sync(small())

    assert "secret" not in str(told.value)


def test_a_store_whose_files_lie_elsewhere_is_told_with_what_to_do(home: Path) -> None:
    tracker(home).sync(small())

    with pytest.raises(TrackingError, match="was the directory moved"):
        MlflowTracker("auto", home / "elsewhere" / ".." / "other", "pare").sync(small())


def test_mlflow_is_told_to_keep_quiet_and_to_unpickle_nothing(home: Path) -> None:
    import os

    tracker(home).sync(records.record([]))

    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
