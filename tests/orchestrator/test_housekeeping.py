"""fsck and gc: what is wrong is found, what is needed stays."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pare.orchestrator.housekeeping import Known, fsck, gc, in_use, known
from pare.workers import files
from pare.workers.store import Store

KIB = 1024


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAUSES_S", ())
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def fp(name: str) -> str:
    return name.encode().hex().ljust(64, "0")


class Sweep:
    """Rows of a ledger and the artifacts that belong to them."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.tasks: dict[str, dict[str, Any]] = {}
        self.trials: list[dict[str, Any]] = []

    def task(self, name: str, kind: str, kib: int, wall_s: float = 1.0, status: str = "done", **inputs: str) -> str:
        record = {"inputs": {role: fp(of) for role, of in inputs.items()}}
        self.tasks[name] = {
            "fingerprint": fp(name),
            "type": kind,
            "label": f"{kind} {name}",
            "status": status,
            "cost": json.dumps({"wall_s": wall_s}),
            "record": json.dumps(record),
        }
        if status == "done":
            publish(self.store, name, kib)
        return name

    def trial(self, name: str, status: str = "done", sweep: str = "s", **goals: str) -> None:
        tasks = [fp(task) for task in self.tasks if task in goals.values() or not task.endswith(("1", "2")) or task[-1] == name]
        row = {"tasks": tasks, **{role: fp(task) for role, task in goals.items()}}
        self.trials.append({"sweep": sweep, "name": name, "status": status, "goals": json.dumps(row)})

    @property
    def known(self) -> Known:
        return known(self.tasks.values(), self.trials)

    def held(self) -> set[str]:
        return {name for name in self.tasks if self.store.held(fp(name))}


def publish(store: Store, name: str, kib: int) -> None:
    with store.attempt() as out:
        (out / "light.json").write_text("")
        (out / "content.bin").write_bytes(name.encode().ljust(kib * KIB, b"."))
        store.publish(out, fp(name), "test", {}, {})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def sweep(store: Store) -> Sweep:
    """Two finished trials on one base: import -> statistics -> compress -> export -> evaluate."""
    sweep = Sweep(store)
    sweep.task("base", "import_model", 64, wall_s=2)
    sweep.task("stat", "calibrate", 128, wall_s=1000, model="base")
    for i in "12":
        sweep.task(f"mod{i}", "compress", 16, wall_s=10, model="base", statistics="stat")
        sweep.task(f"exp{i}", "export", 32, model=f"mod{i}")
        sweep.task(f"eva{i}", "evaluate", 1, export=f"exp{i}")
        sweep.trial(i, artifact=f"mod{i}", export=f"exp{i}", evaluate=f"eva{i}")
    return sweep


def names(items: list[dict[str, Any]]) -> list[str]:
    return [bytes.fromhex(item["name"]).rstrip(b"\0").decode() for item in items]


# -- gc --------------------------------------------------------------------------------------------------------------------


def test_keeping_all_drops_nothing(store: Store, sweep: Sweep) -> None:
    plan = gc(store, sweep.known, dry_run=False)

    assert plan["items"] == []
    assert plan["before_bytes"] == plan["after_bytes"] == (64 + 128 + 2 * (16 + 32 + 1)) * KIB
    assert sweep.held() == set(sweep.tasks)


def test_keeping_exports_drops_intermediates_whose_readers_are_done(store: Store, sweep: Sweep) -> None:
    plan = gc(store, sweep.known, keep="exports", dry_run=False)

    assert set(names(plan["items"])) == {"base", "stat", "mod1", "mod2"}
    assert {item["action"] for item in plan["items"]} == {"drop"}
    assert plan["before_bytes"] - plan["after_bytes"] == sum(i["bytes"] for i in plan["items"]) == (64 + 128 + 32) * KIB
    assert sweep.held() == {"exp1", "exp2", "eva1", "eva2"}
    assert all(store.has(fp(name)) for name in sweep.tasks)
    assert gc(store, sweep.known, keep="exports", dry_run=False)["items"] == []


def test_a_dry_run_says_the_same_and_touches_nothing(store: Store, sweep: Sweep) -> None:
    said = gc(store, sweep.known, keep="exports", dry_run=True)

    assert sweep.held() == set(sweep.tasks)
    done = gc(store, sweep.known, keep="exports", dry_run=False)
    assert {**said, "dry_run": False} == done


def test_keeping_the_front_drops_exports_beside_it(store: Store, sweep: Sweep) -> None:
    gc(store, sweep.known, keep="pareto", front={("s", "2")}, dry_run=False)

    assert sweep.held() == {"exp2", "eva1", "eva2"}


def test_the_export_of_a_trial_that_is_not_over_is_kept_whatever_the_front(store: Store, sweep: Sweep) -> None:
    sweep.trials[0]["status"] = "running"

    gc(store, sweep.known, keep="pareto", dry_run=False)

    assert "exp1" in sweep.held()
    assert "exp2" not in sweep.held()


@pytest.mark.parametrize("status", ["pending", "running", "failed"])
def test_inputs_of_a_task_that_is_wanted_and_not_done_stay_with_what_they_stand_on(
    store: Store, sweep: Sweep, status: str
) -> None:
    store.remove(fp("exp1"))
    sweep.tasks["exp1"]["status"] = status

    gc(store, sweep.known, keep="exports", dry_run=False)

    assert in_use(sweep.known) == {fp("mod1"), fp("base")}
    # exp1 reads mod1, which refers to base; the statistics went into mod1 and are not referred to.
    assert {"mod1", "base"} <= sweep.held()
    assert sweep.held() & {"stat", "mod2"} == set()


def test_a_task_that_no_trial_wants_any_more_holds_nothing(store: Store, sweep: Sweep) -> None:
    sweep.task("stood for what a query chose", "merge", 0, status="pending", model="base")
    sweep.trials = sweep.trials[:2]

    assert in_use(sweep.known) == set()


def test_what_a_trial_that_merges_others_may_still_choose_stays(store: Store, sweep: Sweep) -> None:
    goals = {"tasks": [fp("not known yet")], "artifact": fp("not known yet")}
    sweep.trials.append({"sweep": "s", "name": "soup", "status": "pending", "goals": json.dumps(goals)})

    gc(store, sweep.known, keep="exports", dry_run=False)

    assert {"mod1", "mod2", "base"} <= sweep.held()
    assert "stat" not in sweep.held()


def test_under_a_limit_most_bytes_per_second_of_remaking_go_first_and_only_as_far_as_needed(store: Store, sweep: Sweep) -> None:
    sweep.task("wide", "score", 100, wall_s=1, model="base")
    sweep.task("slow", "score", 100, wall_s=500, model="base")
    before = gc(store, sweep.known)["before_bytes"]

    plan = gc(store, sweep.known, limit_bytes=before - 110 * KIB, dry_run=False)

    # The base is cheap to make and large, but the models stand on it.
    assert names(plan["items"]) == ["wide", "mod1"]
    assert plan["after_bytes"] <= before - 110 * KIB
    assert plan["over_limit_bytes"] == 0
    assert {"base", "slow", "stat", "mod2"} <= sweep.held()


def test_a_base_may_go_when_what_stood_on_it_went(store: Store, sweep: Sweep) -> None:
    plan = gc(store, sweep.known, limit_bytes=128 * KIB, dry_run=False)

    assert names(plan["items"])[-1] == "base"
    assert "stat" in sweep.held() or "stat" in names(plan["items"])


def test_what_holds_only_small_json_is_not_dropped_for_nothing(store: Store, sweep: Sweep) -> None:
    with store.attempt() as out:
        (out / "allocation.json").write_text("{}")
        store.publish(out, fp("found"), "allocate", {}, {})
    sweep.task("found", "allocate", 0, status="published", model="base")
    sweep.tasks["found"]["status"] = "done"

    gc(store, sweep.known, keep="exports", dry_run=False)

    assert "found" in sweep.held()


def test_a_limit_that_cannot_be_met_is_told_and_exports_stay(store: Store, sweep: Sweep) -> None:
    plan = gc(store, sweep.known, limit_bytes=10 * KIB, dry_run=False)

    assert plan["over_limit_bytes"] == (2 * 32 + 2 * 1 - 10) * KIB
    assert sweep.held() == {"exp1", "exp2", "eva1", "eva2"}


def test_bytes_that_artifacts_share_by_hard_links_count_once_and_go_with_the_last(store: Store) -> None:
    sweep = Sweep(store)
    sweep.task("base", "import_model", 64)
    with store.attempt() as out:
        os.link(store.path(fp("base")) / "content.bin", out / "linked.bin")
        store.publish(out, fp("exp1"), "export", {}, {})
    sweep.task("exp1", "export", 0, status="published", model="base")
    sweep.tasks["exp1"]["status"] = "done"
    sweep.trial("1", artifact="base", export="exp1")

    plan = gc(store, sweep.known, keep="exports", dry_run=False)

    assert plan["before_bytes"] == plan["after_bytes"] == 64 * KIB
    assert [(i["action"], i["bytes"]) for i in plan["items"]] == [("drop", 0)]
    assert (store.open(fp("exp1")) / "linked.bin").stat().st_size == 64 * KIB


def test_what_no_ledger_knows_is_removed_only_when_old_and_without_a_lease(store: Store, sweep: Sweep) -> None:
    for name in ("young", "old", "leased", "theirs"):
        publish(store, name, 8)
    store.blobs.create(f"leases/{fp('leased')}", b"{}")

    assert gc(store, sweep.known)["items"] == []
    plan = gc(store, sweep.known, grace_s=-1, spared={fp("theirs")}, dry_run=False)

    assert sorted(names(plan["items"])) == ["old", "young"]
    assert {i["action"] for i in plan["items"]} == {"remove"}
    assert not store.has(fp("old"))
    assert store.has(fp("leased"))
    assert store.has(fp("theirs"))


def test_what_another_ledger_knows_is_never_removed_and_held_while_that_one_needs_it(store: Store, sweep: Sweep) -> None:
    other = Sweep(store)
    other.tasks["base"] = sweep.tasks["base"]
    other.task("late", "compress", 0, status="running", model="base")
    other.trial("1", status="running", sweep="t", artifact="late")
    both = known([*sweep.tasks.values(), *other.tasks.values()], [*sweep.trials, *other.trials])

    gc(store, both, keep="exports", grace_s=-1, dry_run=False)

    assert "base" in sweep.held()
    assert "mod1" not in sweep.held()


def test_a_leased_task_holds_its_inputs(store: Store, sweep: Sweep) -> None:
    store.blobs.create(f"leases/{fp('mod1')}", b"{}")

    gc(store, sweep.known, keep="exports", dry_run=False)

    assert sweep.held() == {"base", "stat", "mod1", "exp1", "exp2", "eva1", "eva2"}


def test_a_task_is_done_when_one_of_several_ledgers_says_so(sweep: Sweep) -> None:
    pending = {**sweep.tasks["base"], "status": "pending"}

    assert known([sweep.tasks["base"], pending], []).tasks[fp("base")].done
    assert known([pending, sweep.tasks["base"]], []).tasks[fp("base")].done
    assert not known([pending], []).tasks[fp("base")].done


def test_old_checkpoints_of_what_is_done_or_unknown_go_but_not_under_a_lease(store: Store, sweep: Sweep) -> None:
    sweep.task("todo", "compress", 0, status="running", model="base")
    for name in ("mod1", "todo", "unknown", "leased"):
        store.blobs.write(f"checkpoints/{fp(name)}/00000001-aa.pt", b"x" * KIB)
    store.blobs.create(f"leases/{fp('leased')}", b"{}")

    assert gc(store, sweep.known)["items"] == []
    plan = gc(store, sweep.known, grace_s=-1, dry_run=False)

    assert [(i["type"], i["name"], i["bytes"]) for i in plan["items"]] == [
        ("checkpoint", f"checkpoints/{fp(name)}", KIB) for name in sorted(("mod1", "unknown"), key=fp)
    ]
    assert {key.split("/")[1] for key in store.blobs.list("checkpoints")} == {fp("todo"), fp("leased")}


def test_folders_in_which_nothing_is_left_are_taken_away_but_no_attempt_is(store: Store, sweep: Sweep) -> None:
    for folder in ("objects/zz", "checkpoints/x/pieces", f"attempts/{os.getpid()}-running"):
        (store.root / folder).mkdir(parents=True)

    gc(store, sweep.known, dry_run=False)

    assert not (store.root / "objects" / "zz").exists()
    assert not (store.root / "checkpoints").exists()
    assert (store.root / "attempts" / f"{os.getpid()}-running").exists()


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(store: Store, sweep: Sweep) -> None:
    dead = store.root / "attempts" / "999999999-x"
    dead.mkdir()
    (dead / "half").write_bytes(b"x" * 100)
    (store.root / "attempts" / f"{os.getpid()}-y").mkdir()

    plan = gc(store, sweep.known, dry_run=False)

    assert [(i["action"], i["bytes"]) for i in plan["items"]] == [("discard", 100)]
    assert [p.name for p in (store.root / "attempts").iterdir()] == [f"{os.getpid()}-y"]


def test_an_unknown_way_of_keeping_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match=r"store.keep must be one of all, pareto, exports, got 'some'"):
        gc(store, Known(), keep="some")


# -- fsck ------------------------------------------------------------------------------------------------------------------


def test_a_sound_store_has_no_findings(store: Store, sweep: Sweep) -> None:
    assert fsck(store, sweep.known) == []


def test_every_kind_of_damage_is_found_and_moved_only_with_repair(store: Store, sweep: Sweep) -> None:
    directory = {name: store.path(fp(name)) for name in sweep.tasks}
    (directory["base"] / "content.bin").write_bytes(b"flipped".ljust(64 * KIB, b"."))
    (directory["stat"] / "content.bin").unlink()
    (directory["mod1"] / "manifest.json").write_text("{")
    (directory["mod2"] / "manifest.json").unlink()
    (directory["exp1"] / "planted.json").write_text("{}")

    found = {f["name"]: f for f in fsck(store, sweep.known)}

    assert {name: found[fp(name)]["message"] for name in ("base", "stat", "mod2", "exp1")} == {
        "base": "import_model base: content.bin differs from its digest",
        "stat": "calibrate stat: content.bin is missing",
        "mod2": "compress mod2: manifest.json is missing",
        "exp1": "export exp1: planted.json is not in its manifest",
    }
    assert "its manifest is damaged" in found[fp("mod1")]["message"]
    assert len(found) == 5
    assert {(f["kind"], f["repaired"]) for f in found.values()} == {("damaged", False)}
    assert set(store.artifacts()) == {fp(name) for name in sweep.tasks}

    assert all(f["repaired"] for f in fsck(store, sweep.known, repair=True))
    after = fsck(store, sweep.known)
    assert {f["kind"] for f in after} == {"lost"}
    assert {f["name"] for f in after} == set(found)
    assert len(list((store.root / "quarantine").iterdir())) == 5


def test_a_task_that_the_ledger_has_as_done_without_an_artifact_is_found(store: Store, sweep: Sweep) -> None:
    store.remove(fp("exp1"))
    sweep.task("todo", "export", 0, status="pending")

    assert [(f["kind"], f["name"]) for f in fsck(store, sweep.known)] == [("lost", fp("exp1"))]


def test_a_drop_that_was_cut_short_is_found_and_finished(store: Store, sweep: Sweep) -> None:
    content = (store.path(fp("base")) / "content.bin").read_bytes()
    store.drop_files(fp("base"))
    (store.path(fp("base")) / "content.bin").write_bytes(content)

    (finding,) = fsck(store, sweep.known, repair=True)

    assert finding["kind"] == "unfinished"
    assert fsck(store, sweep.known) == []
    assert store.has(fp("base"))
    assert not store.held(fp("base"))


def test_leftovers_are_found_once_their_process_is_gone_or_they_are_old(store: Store) -> None:
    for name in ("999999999-a", f"{os.getpid()}-b", "999999999-c@elsewhere"):
        (store.root / "attempts" / name).mkdir(parents=True)
    (store.root / "leases").mkdir()
    (store.root / "leases" / "x.123.partial").write_bytes(b"abc")

    assert [f["name"] for f in fsck(store, Known())] == ["attempts/999999999-a"]
    assert len(fsck(store, Known(), repair=True, grace_s=-1)) == 4
    assert fsck(store, Known(), grace_s=-1) == []


def test_an_artifact_of_a_newer_format_is_told_of_and_left_alone(store: Store, sweep: Sweep) -> None:
    file = store.path(fp("base")) / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))

    (finding,) = fsck(store, sweep.known, repair=True)

    assert "has format 99" in finding["message"]
    assert not finding["repaired"]
    assert store.has(fp("base"))
