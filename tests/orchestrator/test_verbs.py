"""The verbs around a run: what would run and why, what came of it, what it cost, keeping a home in order, trying again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import pare
from pare.orchestrator import cli, config, costs, reading, upkeep
from pare.orchestrator import explain as explaining
from pare.orchestrator.engine import RETRIES
from pare.orchestrator.fingerprint import CODE, digest
from pare.orchestrator.ledger import Ledger
from pare.orchestrator.record import build_record
from pare.workers.store import Store
from tests.orchestrator import homes

SWEEP = ["recipe=rtn,gptq", "recipe.quantize.bits=3,4"]
FAILED = "export gptq-bits=4"
WIDER = [*homes.TINY, "recipe=rtn,gptq", "recipe.quantize.bits=2,3,4"]

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a sweep of four trials, one of which failed."""
    home = tmp_path_factory.mktemp("home")
    homes.ran(home, *SWEEP, fail={FAILED: ["user_error"]})
    return home


@pytest.fixture
def home(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(original, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def pare_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that has to end with `code`; what it printed, as JSON where it was asked for that."""
    monkeypatch.setenv("COLUMNS", "200")  # else a slow task widens its column, and words elsewhere break

    def run(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        found = cli.main(list(arguments))
        out, err = capsys.readouterr()
        assert found == code, f"exit {found}\n{out[-2000:]}\n{err[-2000:]}"
        return json.loads(out) if "--json" in arguments else out + err

    return run


def task_of(home: Path, label: str) -> str:
    with closing(Ledger(home)) as ledger:
        return str(ledger.rows("SELECT fingerprint FROM task WHERE label = ?", label)[0]["fingerprint"])


# -- plan --------------------------------------------------------------------------------------------------------------


def test_a_plan_says_of_every_task_whether_it_runs_and_why(home: Path, pare_says: Run) -> None:
    said = pare_says("plan", *WIDER, "--json")

    states = {task["label"]: (task["state"], task["why"]) for task in said["plan"]}
    assert states["import tiny"] == ("cached", "its result is in the store")
    assert states["rtn rtn-bits=2"][0] == "new"
    assert "spec.settings.bits" in states["rtn rtn-bits=2"][1]
    assert states["export rtn-bits=2"] == ("new", "its model is new: rtn rtn-bits=2")
    assert states[FAILED] == ("new", "it failed when it was last tried: user_error")
    new = [task for task in said["plan"] if task["state"] == "new"]
    assert said["work_s"] == pytest.approx(sum(task["wall_s"] for task in new))
    assert said["critical_path_s"] <= said["makespan_s"] <= said["work_s"]
    assert {task["estimated_from"] for task in new} == {"like"}
    assert said["schema_version"] == 1
    assert said["cannot_fit"] == []


def test_the_table_of_a_plan_ends_with_what_it_takes_and_can_be_drawn(home: Path, pare_says: Run, tmp_path: Path) -> None:
    said = pare_says("plan", *WIDER, "--svg", "plan.svg")

    assert "longest chain" in said
    assert "GPU-hours" not in said
    assert "10 of 10 tasks from what their like have cost" in said
    picture = ElementTree.parse(tmp_path / "plan.svg").getroot()
    assert len(picture.findall("{http://www.w3.org/2000/svg}g")) == 31


def test_a_large_plan_is_a_row_for_each_type_and_state(home: Path, pare_says: Run) -> None:
    many = f"recipe.quantize.damping={','.join(f'{i / 1000}' for i in range(1, 41))}"

    said = pare_says("plan", *homes.TINY, "recipe=gptq", "recipe.quantize.bits=3", many)

    assert len(said.splitlines()) < 40
    assert "39 x" in said, "one is that of the sweep before"
    assert len(pare_says("plan", *homes.TINY, "recipe=gptq", "recipe.quantize.bits=3", many, "--json")["plan"]) > 160


def test_a_plan_that_cannot_fit_shows_itself_and_exits_with_4(home: Path, pare_says: Run) -> None:
    said = pare_says("plan", *WIDER, "cluster.memory_gb=0.01", code=4)

    assert "longest chain" in said
    assert said.count("not enough memory") == 1
    assert pare_says("plan", *WIDER, "cluster.memory_gb=0.01", "--json", code=4)["cannot_fit"][0]["what"] == "memory"


def test_files_that_were_dropped_and_are_read_again_are_a_reason(home: Path, pare_says: Run) -> None:
    Store(home / "store").drop_files(task_of(home, "calibrate gram"))

    states = {task["label"]: task for task in pare_says("plan", *WIDER, "--json")["plan"]}

    assert states["calibrate gram"]["state"] == "new"
    assert "dropped" in states["calibrate gram"]["why"]
    assert states["gptq gptq-bits=3"]["state"] == "cached"


@pytest.fixture
def merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is typed for two fine-tunings and their soup, in a home where nothing has run."""
    (tmp_path / "experiment").mkdir()
    blocks = "{lora: {recipe: lora, sweep: {recipe.tune.rank: '2,4'}}, soup: {recipe: soup}}"
    (tmp_path / "experiment" / "merged.yaml").write_text(f"# @package _global_\nname: merged\nblocks: {blocks}\n")
    monkeypatch.setenv("PARE_HOME", str(tmp_path / "home"))
    return [*homes.TINY, "experiment=merged", "--config-dir", str(tmp_path)]


def test_a_query_whose_candidates_are_scored_is_answered_in_the_plan(tmp_path: Path, merged: list[str], pare_says: Run) -> None:

    before = pare_says("plan", *merged, "--json", "--check", code=10)
    homes.ran(tmp_path / "home", "experiment=merged", config_dir=tmp_path)
    after = pare_says("plan", *merged, "--json", "--check")

    assert before["tasks"]["late"] > 0
    assert set(after["tasks"]) == {"total_if_separate", "unique", "cached"}


def test_a_query_without_an_answer_is_not_work_that_waits(
    tmp_path: Path, merged: list[str], monkeypatch: pytest.MonkeyPatch, pare_says: Run
) -> None:
    monkeypatch.setattr(homes.Worker, "score", float("inf"))

    homes.ran(tmp_path / "home", "experiment=merged", config_dir=tmp_path)
    after = pare_says("plan", *merged, "--json", "--check")

    whys = {task["why"] for task in after["plan"] if task["state"] == "unneeded"}
    assert whys == {"none of the trials to be merged has a finite score: lora-rank=2, lora-rank=4"}
    assert "has a finite score" in pare_says("plan", *merged)


# -- explain -----------------------------------------------------------------------------------------------------------


def test_explain_names_the_fields_in_which_a_new_task_differs_from_the_nearest(home: Path, pare_says: Run) -> None:
    said = pare_says("explain", "gptq-bits=2", *WIDER, "--json")

    tasks = {task["label"]: task for task in said["tasks"]}
    assert tasks["calibrate gram"]["state"] == "cached"
    assert tasks["calibrate gram"]["differences"] == []
    new = tasks["gptq gptq-bits=2"]
    assert new["nearest_label"].startswith("gptq gptq-bits=")
    assert [(change["field"], change["is"]) for change in new["differences"]] == [("spec.settings.bits", "2")]
    (change,) = tasks["score gptq-bits=2"]["differences"]
    assert change["field"] == "inputs.model"
    assert change["is"] == f"{new['task']} (gptq gptq-bits=2)"
    assert "spec.settings.bits: " in pare_says("explain", "gptq-bits=2", *WIDER)


def test_explain_without_overrides_is_about_the_latest_sweep(home: Path, pare_says: Run) -> None:
    said = {task["label"]: task for task in pare_says("explain", "gptq-bits=4", "--json")["tasks"]}

    assert said["gptq gptq-bits=4"]["state"] == "cached"
    assert said[FAILED]["why"] == "it failed when it was last tried: user_error"
    assert said["evaluate gptq-bits=4"]["why"] == f"its export is new: {FAILED}"


def test_explain_takes_the_beginning_of_a_fingerprint(home: Path, pare_says: Run) -> None:
    (one,) = pare_says("explain", task_of(home, "calibrate gram")[:8], "--json")["tasks"]

    assert (one["label"], one["state"]) == ("calibrate gram", "cached")


def test_explain_compares_a_task_of_the_ledger_with_what_the_plan_has_in_its_place(home: Path, pare_says: Run) -> None:
    old = task_of(home, "gptq gptq-bits=3")

    (one,) = pare_says("explain", old[:12], *homes.TINY, "recipe=gptq", "recipe.quantize.bits=2", "--json")["tasks"]

    assert (one["state"], one["why"]) == ("done", "no task of this plan")
    assert one["nearest_label"] == "gptq gptq"
    assert [(c["field"], c["was"], c["is"]) for c in one["differences"]] == [("spec.settings.bits", "2", "3")]


def test_explain_names_the_modules_of_which_the_code_has_changed(home: Path, pare_says: Run) -> None:
    store = Store(home / "store")
    with closing(Ledger(home, write=True)) as ledger:  # as if all had been made by an earlier version of one module
        for row in ledger.rows("SELECT fingerprint, type, record FROM task WHERE type = 'compress'"):
            record = json.loads(row["record"])
            trees = {**CODE[record["code"]], "pare.methods.quantize.gptq": "0" * 64}
            record["code"] = digest(trees)
            store.blobs.create(f"code/{record['code']}.json", json.dumps(trees).encode())
            another = ("0" if row["fingerprint"][0] == "f" else "f") + row["fingerprint"][1:]
            fields = (json.dumps(record), another, row["fingerprint"])
            ledger.write("UPDATE task SET record = ?, fingerprint = ? WHERE fingerprint = ?", fields)
            store.remove(row["fingerprint"])
        store.remove(task_of(home, "export gptq-bits=3"))

    said = {t["label"]: t for t in pare_says("explain", "gptq-bits=3", "--json")["tasks"]}["gptq gptq-bits=3"]

    assert (said["state"], said["why"]) == ("new", "the code has changed")
    (change,) = said["differences"]
    assert (change["field"], change["modules"]) == ("code", ["pare.methods.quantize.gptq"])
    assert ", in pare.methods.quantize.gptq" in pare_says("explain", "gptq-bits=3")
    assert explaining.changed_modules(store.blobs, "never seen", change["is"]) is None


@pytest.mark.parametrize(("what", "words"), [("nope", "no task 'nope'"), ("gptq-bits=5", "Did you mean 'gptq-bits=")])
def test_explain_refuses_what_is_not_there(home: Path, pare_says: Run, what: str, words: str) -> None:
    assert words in pare_says("explain", what, code=2)


def test_a_prefix_of_several_tasks_is_refused_with_some_of_them(home: Path) -> None:
    with pytest.raises(reading.ConfigError, match="2 tasks begin with 'ab'"):
        reading.only_one("ab", {"abc", "abd"}, [])


# -- logs, status, stop --------------------------------------------------------------------------------------------------


def test_logs_of_a_failed_trial_are_those_of_the_task_that_failed(home: Path, pare_says: Run) -> None:
    assert pare_says("logs", "gptq-bits=4") == f"working on {FAILED}\n"
    whole = pare_says("logs", "gptq-bits=3")
    assert whole.index("working on import tiny") < whole.index("working on evaluate gptq-bits=3")
    assert "rtn" not in whole
    (one,) = pare_says("logs", task_of(home, "corpus pydoc")[:10], "--json")["logs"]
    assert (one["text"], one["status"]) == ("working on corpus pydoc\n", "done")
    assert "no task 'nope'" in pare_says("logs", "nope", code=2)


def test_without_the_log_itself_the_attempts_are_told(home: Path, pare_says: Run) -> None:
    shutil.rmtree(home / "logs")

    assert "attempt 1: failed user_error as told" in pare_says("logs", "gptq-bits=4")


def test_a_followed_log_is_printed_to_the_end_of_its_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, looks = tmp_path / "log", 0
    log.write_text("seen before\n")

    def goes_on() -> bool:
        nonlocal looks
        looks += 1
        with log.open("a") as f:
            print(f"line {looks}", file=f)
        return looks < 3

    reading.follow(log, len("seen before\n"), goes_on)

    assert capsys.readouterr().out == "line 1\nline 2\nline 3\n"


def test_a_sweep_whose_driver_died_is_interrupted_not_running(home: Path, pare_says: Run) -> None:
    with closing(Ledger(home, write=True)) as ledger:
        ledger.write("UPDATE run SET status = 'running'")

    assert pare_says("status", "--json")["status"] == "interrupted"
    with closing(Ledger(home, write=True)):
        assert pare_says("status", "--json")["status"] == "running"


def test_status_counts_tasks_and_names_failures(home: Path, pare_says: Run) -> None:
    said = pare_says("status", "--json")

    assert said["tasks"] == {"done": 21, "failed": 1, "pending": 1}
    assert {t["trial"]: t["status"] for t in said["trials"]}["gptq-bits=4"] == "failed"


DRIVER = """
import signal, sys, time
from pathlib import Path
from pare.orchestrator.fingerprint import CODE, digest
from pare.orchestrator.ledger import Ledger
signals = []
signal.signal(signal.SIGINT, lambda *_: signals.append(time.monotonic()))
ledger = Ledger(Path(sys.argv[1]), write=True)
print("ready", flush=True)
while len(signals) < int(sys.argv[2]):
    time.sleep(0.01)
"""


@pytest.mark.parametrize("now", [False, True])
def test_stop_signals_the_driver_and_waits_for_its_end(home: Path, pare_says: Run, now: bool) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(home), str(1 + now)], stdout=subprocess.PIPE)
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"ready\n"

        said = pare_says("stop", *(["--now"] if now else []))

        assert f"process {driver.pid}" in said
        assert driver.wait(5) == 0
    finally:
        driver.kill()
        driver.wait()


def test_stop_says_when_no_driver_is_at_work_whatever_its_lock_file_says(home: Path, pare_says: Run) -> None:
    (home / "driver.lock").write_text(str(os.getpid()))

    assert "no driver is at work" in pare_says("stop")
    assert "nothing to stop" in pare_says("stop", "rtn")


def test_stop_signals_no_process_that_only_has_the_drivers_number(home: Path, pare_says: Run) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with closing(Ledger(home, write=True)):
            (home / "driver.lock").write_text(str(stranger.pid))
            assert "does not run on this machine" in pare_says("stop", code=1)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_stop_of_another_sweep_than_the_one_at_work_is_refused(home: Path, pare_says: Run) -> None:
    homes.ran(home, "recipe=rtn", "name=other")
    with closing(Ledger(home, write=True)):
        said = pare_says("stop", "rtn", code=2)
    assert "is at sweep other-" in said


# -- trying again --------------------------------------------------------------------------------------------------------


def test_retry_failed_runs_what_the_failed_trials_lack_and_nothing_else(
    home: Path, pare_says: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = homes.by_hand(monkeypatch, home / "store")

    pare_says("retry-failed", "--json")

    assert worker.ran == [FAILED, "evaluate gptq-bits=4"]
    assert pare_says("status", "--json")["status"] == "done"
    assert "no failed trials" in pare_says("retry-failed")[0:200]


def test_retry_failed_can_be_kept_to_a_class_and_refuses_an_unknown_one(
    home: Path, pare_says: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = homes.by_hand(monkeypatch, home / "store")

    assert "1 user_error" in pare_says("retry-failed", "--class", "oom_host")
    said = pare_says("retry-failed", "rtn", "--class", "oom", code=2)

    assert all(name in said for name in RETRIES)
    assert worker.ran == []
    pare_says("retry-failed", "--class", "oom_host", "--class", "user_error", "--json")
    assert worker.ran == [FAILED, "evaluate gptq-bits=4"]


def test_rerun_runs_the_tasks_that_are_the_trials_own_again(
    home: Path, pare_says: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = homes.by_hand(monkeypatch, home / "store")
    before = pare_says("report", "--json")["sweep"]

    pare_says("rerun", "gptq-bits=3", "cluster.slots=1", "--json", code=3)

    assert worker.ran == [f"{what} gptq-bits=3" for what in ("gptq", "score", "export", "evaluate")]
    assert pare_says("report", "--json")["sweep"] == before
    assert {t["trial"]: t["status"] for t in pare_says("status", "--json")["trials"]}["gptq-bits=3"] == "done"


def test_rerun_with_other_values_is_a_sweep_of_its_own(home: Path, pare_says: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = homes.by_hand(monkeypatch, home / "store")

    record = pare_says("rerun", "gptq-bits=3", "recipe.quantize.damping=0.5", "--json")

    assert record["name"] == "rtn-gptq-bits=3"
    (trial,) = record["trials"]
    assert trial["config"]["recipe"]["quantize"]["damping"] == 0.5
    assert trial["config"]["recipe"]["quantize"]["bits"] == 3
    assert len(worker.ran) == 4
    assert len(pare_says("report", "rtn", "--json")["trials"]) in (1, 4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rerun", "gptq-bits=9"], "Did you mean 'gptq-bits="),
        (["rerun", "gptq-bits=3", "recipe.quantize.bitz=2"], "recipe.quantize.bits"),
        (["rerun", "gptq-bits=3", "recipe.quantize.bits=99"], "must be in [2, 8], got 99"),
        (["resume", "nope"], "there is no sweep 'nope'"),
    ],
)
def test_what_cannot_be_run_again_is_refused(home: Path, pare_says: Run, words: list[str], said: str) -> None:
    assert said in pare_says(*words, code=2)


# -- gc and fsck ---------------------------------------------------------------------------------------------------------


def held(home: Path) -> Counter[str]:
    """Type -> number of artifacts of which the files are there."""
    store = Store(home / "store")
    return Counter(store.manifest(fp)["type"] for fp in store.artifacts() if store.held(fp))


def test_gc_drops_intermediates_that_nothing_needs_and_a_dry_run_only_says_so(home: Path, pare_says: Run) -> None:
    before = held(home)

    said = pare_says("gc", "--keep", "exports", "--dry-run", "--json")

    assert held(home) == before
    done = pare_says("gc", "--keep", "exports", "--json")
    assert {**said, "dry_run": False} == done
    after = held(home)
    assert after["export"] == before["export"] == 3
    assert (before["calibrate"], after["calibrate"]) == (1, 0)
    assert after["compress"] == 1, "the failed trial's export still wants its model"
    assert "all that reads it is done" not in pare_says("gc", "--keep", "exports")
    assert pare_says("plan", *homes.TINY, *SWEEP, "--json")["tasks"]["new"] == 2


def test_gc_can_keep_the_exports_of_the_front_alone(home: Path, pare_says: Run) -> None:
    front = {t["trial"] for t in pare_says("report", "--json")["trials"] if t["pareto"]}

    pare_says("gc", "--keep", "pareto")

    store = Store(home / "store")
    for trial in ("rtn-bits=3", "rtn-bits=4", "gptq-bits=3"):
        assert store.held(task_of(home, f"export {trial}")) == (trial in front)
    assert 0 < len(front) < 3


def test_an_export_that_was_dropped_says_how_to_make_it_again(home: Path, pare_says: Run) -> None:
    Store(home / "store").drop_files(task_of(home, "export rtn-bits=3"))

    assert "pare rerun rtn-bits=3" in pare_says("export", "rtn-bits=3", code=2)


def test_gc_removes_old_checkpoints_of_what_is_done_or_unknown_and_empty_folders(home: Path, pare_says: Run) -> None:
    store = Store(home / "store")
    done, failed = task_of(home, "calibrate gram"), task_of(home, FAILED)
    for fingerprint in (done, failed, "f" * 64, "e" * 64):
        store.blobs.write(f"checkpoints/{fingerprint}/1.pt", b"state")
    old = time.time() - 30 * 86400
    for fingerprint in (done, failed, "f" * 64):
        os.utime(home / "store" / "checkpoints" / fingerprint / "1.pt", (old, old))
    (home / "store" / "objects" / "zz").mkdir()

    said = pare_says("gc", "--json")

    assert {item["name"] for item in said["items"]} == {f"checkpoints/{done}", f"checkpoints/{'f' * 64}"}
    assert {p.name for p in (home / "store" / "checkpoints").iterdir()} == {failed, "e" * 64}
    assert not (home / "store" / "objects" / "zz").exists()


def test_gc_leaves_what_another_ledger_still_needs(home: Path, pare_says: Run, tmp_path: Path) -> None:
    other = tmp_path / "other"
    homes.ran(
        other,
        "recipe=gptq",
        "recipe.quantize.bits=2",
        f"store.url={home / 'store'}",
        "name=theirs",
        fail={"gptq gptq": ["user_error"]},
    )

    pare_says("gc", "--keep", "exports")

    assert held(home)["calibrate"] == 1, "their failed task reads the statistics"
    assert held(home)["import_model"] == 1


def test_fsck_finds_damage_with_exit_code_8_and_repairs_it(home: Path, pare_says: Run) -> None:
    assert pare_says("fsck", "--json")["findings"] == []
    fingerprint = task_of(home, "calibrate gram")
    (Store(home / "store").path(fingerprint) / "content.bin").write_text("changed")

    (finding,) = pare_says("fsck", "--json", code=8)["findings"]

    assert (finding["kind"], finding["name"]) == ("damaged", fingerprint)
    assert "pare fsck --repair" in pare_says("fsck", code=8)
    assert "(repaired)" in pare_says("fsck", "--repair")
    assert [f["kind"] for f in pare_says("fsck", "--json", code=8)["findings"]] == ["lost"]


def test_a_store_of_a_newer_format_is_refused_with_exit_code_8(home: Path, pare_says: Run) -> None:
    (home / "store" / "format").write_text('{"format": 99}')

    for words in (["report"], ["gc"], ["fsck"], ["plan", *WIDER]):
        assert "has format 99" in pare_says(*words, code=8)


def test_gc_of_a_home_without_a_ledger_touches_nothing(home: Path, pare_says: Run) -> None:
    (home / "ledger.db").unlink()

    assert "there is no sweep" in pare_says("gc", code=2)
    assert sum(held(home).values()) == 21


def test_a_sweep_that_keeps_exports_alone_drops_the_rest_when_it_ends_and_stays_done(tmp_path: Path) -> None:
    words = ["recipe=rtn", "recipe.quantize.bits=3,4", "store.keep=exports"]
    homes.ran(tmp_path, *words)

    assert set(held(tmp_path)) == {"export", "evaluate"}
    assert homes.ran(tmp_path, *words).ran == []


def test_when_a_sweep_ends_only_what_is_its_own_is_dropped(home: Path) -> None:
    homes.ran(home, "recipe=rtn", "recipe.quantize.bits=3,5", "name=later")
    experiment = config.load([*homes.TINY, "recipe=rtn", "recipe.quantize.bits=3,5", "name=later", "store.keep=exports"])
    store = Store(home / "store")
    with closing(Ledger(home)) as ledger:
        record = build_record(ledger, store, "later")
        kept = [task_of(home, "rtn rtn-bits=3"), task_of(home, "calibrate gram"), task_of(home, "export rtn-bits=5")]

        said = upkeep.after_run(ledger, store, experiment, record)

        assert said is not None
        assert said.startswith("store.keep=exports: ")
        assert all(map(store.held, kept))
        assert not store.held(task_of(home, "rtn rtn-bits=5"))
        experiment.store.keep = "all"
        assert upkeep.after_run(ledger, store, experiment, record) is None
        experiment.store.limit_gb = 1e-5
        assert "limit" in (upkeep.after_run(ledger, store, experiment, record) or "")
        assert not store.held(task_of(home, "calibrate gram"))


# -- what it cost ----------------------------------------------------------------------------------------------------------


def test_the_cost_of_a_sweep_adds_up_by_method_and_by_trial(home: Path) -> None:
    with closing(Ledger(home)) as ledger:
        cost = build_record(ledger, Store(home / "store"), "rtn")["cost"]

    assert cost["total"]["tasks"] == 21
    assert cost["total"]["wall_s"] == 42.0
    assert sum(one["wall_s"] for one in cost["methods"].values()) == pytest.approx(42.0)
    assert sum(one["wall_s"] for one in cost["trials"].values()) == pytest.approx(42.0)
    assert cost["methods"]["gptq"]["tasks"] == 2
    assert cost["methods"]["calibrate"]["tokens"] == 16 * 512
    assert cost["failed_attempts"] == {"attempts": 1, "wall_s": 2.0}
    alone = sum(one["alone_s"] for one in cost["trials"].values())
    assert cost["saved"] == {"by_sharing_s": pytest.approx(alone - 42.0), "by_cache_s": 0}
    assert cost["estimates"]["tasks"] == 21


def test_what_was_there_before_a_run_was_saved_by_the_cache(home: Path) -> None:
    homes.ran(home, "recipe=rtn,gptq", "recipe.quantize.bits=3", "name=again")

    with closing(Ledger(home)) as ledger:
        cost = build_record(ledger, Store(home / "store"), "again")["cost"]

    assert cost["saved"]["by_cache_s"] == cost["total"]["wall_s"] > 0
    assert cost["estimates"] == {"tasks": 0}


def test_seconds_of_tasks_on_a_gpu_are_gpu_seconds_and_told_tokens_count() -> None:
    windows = {"record": {"spec": {"sequences": 4, "length": 8}}}
    record = {"device": "cuda", "inputs": {"tokens": "w"}}
    task = {"cost": {"wall_s": 3.0, "peak_rss_bytes": 7.0}, "record": record, "result": {}}

    found = costs.spent(task, {"w": windows})

    assert (found["gpu_s"], found["tokens"], found["peak_bytes"], found["cpu_s"]) == (3.0, 32, 7.0, 0.0)
    assert costs.spent({**task, "result": {"search/tokens": 99}}, {"w": windows})["tokens"] == 99
    assert costs.spent({**task, "cost": {}}, {"w": windows})["tokens"] == 0
    assert costs.spent({**task, "cost": {"wall_s": 3.0, "slot_s": 5.0}}, {"w": windows})["gpu_s"] == 5.0, "of two GPUs"
    assert costs.total([(found, 0.5), (found, 1.0)])["wall_s"] == 4.5


def test_the_report_says_what_it_cost_and_how_good_the_estimates_were(home: Path, pare_says: Run) -> None:
    for form in ("table", "md", "html"):
        said = pare_says("report", "--format", form)
        assert "21 tasks: 42.0 s of work" in said
        assert "Estimated before" in said


def test_results_are_a_data_frame_with_a_row_for_each_trial(home: Path, pare_says: Run) -> None:
    frame = pare.results(home=str(home)).set_index("trial")

    assert list(frame.index) == ["rtn-bits=3", "rtn-bits=4", "gptq-bits=3", "gptq-bits=4"]
    assert frame["recipe.quantize.bits"].tolist() == [3, 4, 3, 4]
    assert frame.loc["gptq-bits=4", "status"] == "failed"
    assert frame.loc["gptq-bits=3", "cost/alone_s"] == 22.0
    assert frame["quality/ppl"].notna().tolist() == [True, True, True, False]
    assert pare.results("rtn").shape[0] == 4


# -- a machine that knows only the store ---------------------------------------------------------------------------------


def test_a_second_machine_that_knows_only_the_store_reads_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pare_says: Run
) -> None:
    url = str(tmp_path / "shared")
    homes.ran(tmp_path / "first", *SWEEP, f"store.url={url}", fail={FAILED: ["user_error"]})
    shutil.rmtree(tmp_path / "first")
    url = str((tmp_path / "shared").rename(tmp_path / "mounted elsewhere"))
    monkeypatch.setenv("PARE_HOME", str(tmp_path / "second"))
    worker = homes.by_hand(monkeypatch, Path(url))

    assert pare_says("status", "--json", "--store", url)["tasks"] == {"done": 21, "failed": 1, "pending": 1}
    assert len(pare_says("report", "--json", "--store", url)["trials"]) == 4
    assert "failed user_error as told" in pare_says("logs", "gptq-bits=4", "--store", url)
    pare_says("export", "gptq-bits=3", "--store", url, "--to", str(tmp_path / "before"))
    pare_says("retry-failed", "--store", url, "--json")

    assert worker.ran == [FAILED, "evaluate gptq-bits=4"]
    pare_says("export", "gptq-bits=4", "--store", url, "--to", str(tmp_path / "model"))
    assert (tmp_path / "model" / "content.bin").exists()
    assert pare_says("fsck", "--store", url, "--json")["findings"] == []
    assert "knows no sweep yet" in pare_says("status", "--store", str(tmp_path / "empty"), code=2)
