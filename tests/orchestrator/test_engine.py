"""The ready loop over toy tasks: order, sharing, failures, another driver after a crash."""

from pathlib import Path
from typing import Any

import pytest

from pare.orchestrator.engine import BRIEF_S, RETRIES, SHARE
from pare.orchestrator.errors import BusyError
from pare.orchestrator.ledger import Ledger, new_id
from pare.orchestrator.pool import Room
from pare.orchestrator.ray_pool import Usual
from pare.workers.store import Store
from tests.orchestrator import fakes


@pytest.fixture
def toy(tmp_path: Path) -> fakes.Toy:
    return fakes.Toy(Store(tmp_path / "store"))


def test_equal_tasks_of_two_trials_run_once_and_producers_run_first(tmp_path: Path, toy: fakes.Toy) -> None:
    plan = fakes.toy_plan()

    _, listener, ledger = fakes.execute(tmp_path, plan, toy)

    assert plan.total_if_separate == 10
    assert len(plan.tasks) == 9
    assert set(toy.times().values()) == {1}
    assert toy.ran.index("import") < toy.ran.index("compress a") < toy.ran.index("export a") < toy.ran.index("evaluate a")
    assert listener.trials == {"a": "done", "b": "done"}
    assert ledger.last_run("toy")["executed"] == 9
    ledger.close()


def test_speed_is_measured_last_and_in_one_batch(tmp_path: Path, toy: fakes.Toy) -> None:
    *_, ledger = fakes.execute(tmp_path, fakes.toy_plan(), toy)

    assert toy.batches[-1] == ["speed a", "speed b"]
    ledger.close()


def test_a_second_run_executes_nothing(tmp_path: Path, toy: fakes.Toy) -> None:
    fakes.execute(tmp_path, fakes.toy_plan(), toy)[2].close()
    before = len(toy.ran)

    _, listener, ledger = fakes.execute(tmp_path, fakes.toy_plan(), toy)

    assert len(toy.ran) == before
    assert ledger.last_run("toy")["executed"] == 0
    assert listener.trials == {"a": "done", "b": "done"}
    ledger.close()


def test_a_new_trial_executes_only_its_own_tasks(tmp_path: Path, toy: fakes.Toy) -> None:
    fakes.execute(tmp_path, fakes.toy_plan(), toy)[2].close()
    toy.ran.clear()
    plan = fakes.toy_plan(("a", "b", "c"))

    planned = {task.label for task in plan.missing(toy.store)}
    fakes.execute(tmp_path, plan, toy)[2].close()

    assert set(toy.ran) == planned == {"compress c", "export c", "evaluate c", "speed c"}


def test_a_removed_intermediate_is_not_made_again_when_its_results_are_there(tmp_path: Path, toy: fakes.Toy) -> None:
    plan = fakes.toy_plan()
    fakes.execute(tmp_path, plan, toy)[2].close()
    toy.store.quarantine(plan.goals["a"].artifact)

    assert plan.missing(toy.store) == []


@pytest.mark.parametrize("failure", ["lost_worker", "oom_host", "unknown"])
def test_a_passing_failure_gets_further_attempts(tmp_path: Path, toy: fakes.Toy, failure: str) -> None:
    toy.fail["compress a"] = [failure] * RETRIES[failure]

    _, listener, ledger = fakes.execute(tmp_path, fakes.toy_plan(), toy)

    assert listener.trials["a"] == "done"
    assert toy.times()["compress a"] == RETRIES[failure] + 1
    ledger.close()


@pytest.mark.parametrize("failure", sorted(RETRIES))
def test_attempts_are_never_endless_and_other_trials_go_on(tmp_path: Path, toy: fakes.Toy, failure: str) -> None:
    toy.fail["compress a"] = [failure] * 50

    engine, listener, ledger = fakes.execute(tmp_path, fakes.toy_plan(), toy)

    assert toy.times()["compress a"] == RETRIES[failure] + 1
    assert listener.trials == {"a": "failed", "b": "done"}
    assert "evaluate a" not in toy.ran
    row = next(t for t in ledger.trials("toy") if t["name"] == "a")
    assert failure in row["failure"]
    assert "compress a" in row["failure"]
    assert engine.failed
    ledger.close()


def test_nothing_is_spent_on_a_trial_that_cannot_be_done_any_more(tmp_path: Path, toy: fakes.Toy) -> None:
    toy.fail["questions"] = ["user_error"]

    _, listener, ledger = fakes.execute(tmp_path, fakes.toy_plan(asked=("a", "b")), toy)

    assert toy.ran == ["questions"], "what is made of text comes first, and without it no trial can be done"
    assert listener.trials == {"a": "failed", "b": "failed"}
    ledger.close()


def test_what_another_trial_waits_for_is_still_made(tmp_path: Path, toy: fakes.Toy) -> None:
    toy.fail["questions"] = ["user_error"]

    _, listener, ledger = fakes.execute(tmp_path, fakes.toy_plan(("a", "b", "c"), asked=("a", "b")), toy)

    assert set(toy.ran) == {"questions", "import", "compress c", "export c", "evaluate c", "speed c"}
    assert toy.batches[-1] == ["speed c"], "that of a trial that is done already"
    assert listener.trials == {"a": "failed", "b": "failed", "c": "done"}
    ledger.close()


def test_a_task_of_several_ranks_waits_until_they_fit_and_is_not_overtaken_for_ever(tmp_path: Path, toy: fakes.Toy) -> None:
    plan = fakes.toy_plan(("a", "b", "c", "d"))
    (wide,) = (task for task in plan.tasks.values() if task.label == "compress b")
    wide.spec["ranks"] = 2
    beside: list[list[str]] = []

    class Pool(fakes.ToyPool):
        def __init__(self, toy: fakes.Toy) -> None:
            super().__init__(toy)
            self.slots = 2

        def ranks(self) -> int:
            return self.idle()

        def submit(self, job: int, requests: list[dict[str, Any]], room: Room, behind: int | None = None) -> None:
            if requests[0]["ranks"] == 2:
                beside.append([queued[0]["label"] for _, queued in self._queue])
            super().submit(job, [{**request, "ranks": 1} for request in requests], room, behind)

    fakes.execute(tmp_path, plan, toy, pool=Pool)[2].close()

    assert beside == [[]], "both slots were free"
    assert toy.ran.index("compress b") < toy.ran.index("compress d")
    assert set(toy.ran) == {task.label for task in plan.tasks.values()}


def test_tasks_that_are_over_at_once_go_to_a_worker_in_shares(tmp_path: Path, toy: fakes.Toy) -> None:
    plan = fakes.toy_plan(tuple(f"t{i:02d}" for i in range(40)))
    toy.wall_s = 0.001

    _, listener, ledger = fakes.execute(tmp_path, plan, toy)

    shares = [len(batch) for batch in toy.batches if not batch[0].startswith("speed")]
    assert set(toy.times().values()) == {1}
    assert set(listener.trials.values()) == {"done"}
    assert max(shares) == SHARE
    assert len(shares) < 40
    ledger.close()


def test_tasks_that_take_their_time_go_one_by_one(tmp_path: Path, toy: fakes.Toy) -> None:
    toy.wall_s = 2 * BRIEF_S

    fakes.execute(tmp_path, fakes.toy_plan(tuple("abcdef")), toy)[2].close()

    assert {len(batch) for batch in toy.batches if not batch[0].startswith("speed")} == {1}


def test_of_a_share_whose_worker_died_what_was_published_counts_and_the_rest_goes_alone(tmp_path: Path) -> None:
    class Dies(fakes.Toy):
        lost: list[str] | None = None

        def __call__(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
            if self.lost is None and len(requests) > 4:
                self.lost = [request["label"] for request in requests[3:]]
                super().__call__(requests[:3])
                return [{"ok": False, "failure": "lost_worker", "message": "as told", "cost": {}}]
            return super().__call__(requests)

    toy = Dies(Store(tmp_path / "store"))
    toy.wall_s = 0.001

    _, listener, ledger = fakes.execute(tmp_path, fakes.toy_plan(tuple(f"t{i:02d}" for i in range(40))), toy)

    assert set(toy.times().values()) == {1}
    assert set(listener.trials.values()) == {"done"}
    assert toy.lost
    assert all([label] in toy.batches for label in toy.lost), "nobody is lost for another a second time"
    states = [row["status"] for row in ledger.rows("SELECT status FROM attempt")]
    assert states.count("failed") == len(toy.lost)
    assert states.count("done") == len(set(toy.ran))
    ledger.close()


def test_a_worker_is_exchanged_for_what_it_keeps_and_not_for_libraries_that_a_new_kind_of_task_brings() -> None:
    usual, mb = Usual(), 10**6

    assert not usual.is_exceeded("tokens None", 500 * mb)
    assert not usual.is_exceeded("train lora", 900 * mb), "the first of its kind"
    assert not usual.is_exceeded("tokens None", 900 * mb), "what training has imported"
    assert not usual.is_exceeded("tokens None", 1040 * mb)
    assert usual.is_exceeded("tokens None", 1060 * mb)


def test_fail_fast_starts_nothing_more(tmp_path: Path, toy: fakes.Toy) -> None:
    toy.fail["compress a"] = ["user_error"]

    _, listener, ledger = fakes.execute(tmp_path, fakes.toy_plan(), toy, keep_going=False)

    assert listener.trials == {"a": "failed"}
    assert "compress b" not in toy.ran
    ledger.close()


def test_a_damaged_input_is_quarantined_made_anew_and_the_task_goes_on(tmp_path: Path, toy: fakes.Toy) -> None:
    plan = fakes.toy_plan(("a",))
    fakes.execute(tmp_path, plan, toy)[2].close()
    (toy.store.path(plan.goals["a"].export) / "value.txt").write_text("tampered")
    toy.store.quarantine(plan.goals["a"].evaluate)
    fresh = fakes.Toy(Store(tmp_path / "store"))

    _, listener, ledger = fakes.execute(tmp_path, plan, fresh)

    assert fresh.ran == ["evaluate a", "export a", "evaluate a"]
    assert listener.trials == {"a": "done"}
    ledger.close()


def test_a_driver_that_dies_leaves_what_is_finished_to_the_next(tmp_path: Path, toy: fakes.Toy) -> None:
    toy.die_at = "evaluate a"
    with pytest.raises(KeyboardInterrupt):
        fakes.execute(tmp_path, fakes.toy_plan(), toy)
    toy.die_at = None

    _, listener, ledger = fakes.execute(tmp_path, fakes.toy_plan(), toy)

    assert set(toy.times().values()) == {1}, "no finished task runs twice"
    assert listener.trials == {"a": "done", "b": "done"}
    assert [a["status"] for a in ledger.rows("SELECT status FROM attempt WHERE status = 'lost'")] == ["lost"]
    ledger.close()


def test_a_result_published_by_a_driver_that_died_before_its_ledger_row_is_taken_over(tmp_path: Path, toy: fakes.Toy) -> None:
    plan = fakes.toy_plan(("a",))
    task = next(t for t in plan.tasks.values() if t.label == "import")
    toy.one({"fingerprint": task.fingerprint, "type": task.type, "label": task.label, "inputs": {}})
    toy.ran.clear()

    *_, ledger = fakes.execute(tmp_path, plan, toy)

    assert "import" not in toy.ran
    assert ledger.tasks([task.fingerprint])[task.fingerprint]["status"] == "done"
    ledger.close()


def test_two_drivers_do_not_work_in_one_home(tmp_path: Path) -> None:
    first = Ledger(tmp_path, write=True)

    with pytest.raises(BusyError, match="another `pare run`"):
        Ledger(tmp_path, write=True)

    first.close()
    Ledger(tmp_path, write=True).close()


def test_what_ran_out_of_gpu_memory_is_tried_again_with_more_room_and_smaller_micro_batches(
    tmp_path: Path, toy: fakes.Toy
) -> None:
    toy.fail["compress a"] = ["oom_gpu", "oom_gpu"]

    fakes.execute(tmp_path, fakes.toy_plan(), toy)[2].close()

    assert toy.halvings["compress a"] == [0, 1, 2]
    assert toy.halvings["compress b"] == [0]
    assert toy.rooms["compress a"] == [Room.SLOT, Room.DEVICE, Room.DEVICE]


def test_what_ran_out_of_host_memory_is_tried_again_with_nothing_beside_it(tmp_path: Path, toy: fakes.Toy) -> None:
    toy.fail["compress a"] = ["oom_host"]

    fakes.execute(tmp_path, fakes.toy_plan(), toy)[2].close()

    assert toy.rooms["compress a"] == [Room.SLOT, Room.MACHINE]


def test_ids_of_rows_grow_and_are_never_the_same() -> None:
    ids = [new_id() for _ in range(20_000)]

    assert ids == sorted(set(ids))
