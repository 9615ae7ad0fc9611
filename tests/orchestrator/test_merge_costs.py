"""What a merge cost: its own part, and all that its members took to make."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pare.orchestrator import costs
from pare.orchestrator.ledger import Ledger
from pare.orchestrator.record import build_record, one_trial
from pare.workers.store import Store
from tests.orchestrator import homes


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "experiment").mkdir()
    first = "first: {recipe: soup, sweep: {recipe.merge.members.top: 1}}"
    blocks = f"{{lora: {{recipe: lora, sweep: {{recipe.tune.rank: '2,4,8'}}}}, soup: {{recipe: soup}}, {first}}}"
    (tmp_path / "experiment" / "merged.yaml").write_text(f"# @package _global_\nname: merged\nblocks: {blocks}\n")
    homes.ran(tmp_path / "home", "experiment=merged", config_dir=tmp_path)
    return tmp_path / "home"


def record_of(home: Path) -> dict[str, Any]:
    with closing(Ledger(home)) as ledger:
        return build_record(ledger, Store(home / "store"), "merged")


def test_a_soup_costs_what_its_ingredients_cost_and_what_it_took_itself(home: Path) -> None:
    """Every task takes two seconds; a training of one rank is one task, and the data it reads is shared by all."""
    record = record_of(home)
    trials = {t["trial"]: t for t in record["trials"]}

    own = sum(2.0 / task["shared_by"] for task in trials["soup"]["tasks"])
    (train_tokens,) = {task["task"] for task in trials["lora-rank=2"]["tasks"] if task["label"] == "train tokens"}
    assert train_tokens not in {task["task"] for task in trials["soup"]["tasks"]}
    assert trials["soup"]["metrics"]["cost/wall_s"] == pytest.approx(own + 3 * 2.0 + 2.0)  # three trainings and their data
    assert trials["soup"]["metrics"]["cost/tokens"] >= 3 * 1000
    assert record["cost"]["trials"]["soup"]["wall_s"] == trials["soup"]["metrics"]["cost/wall_s"]
    assert record["cost"]["trials"]["soup"]["alone_s"] == pytest.approx(2.0 * len(trials["soup"]["tasks"]) + 4 * 2.0)
    members = [t for name, t in trials.items() if name.startswith("lora")]
    assert all(
        t["metrics"]["cost/wall_s"] == pytest.approx(sum(2.0 / task["shared_by"] for task in t["tasks"])) for t in members
    )


def test_a_soup_of_the_best_alone_pays_for_no_other_and_the_members_are_told_the_best_first(home: Path) -> None:
    trials = {t["trial"]: t for t in record_of(home)["trials"]}
    (first,) = (t for t in trials.values() if t["block"] == "first")

    own = sum(2.0 / task["shared_by"] for task in first["tasks"])
    assert first["metrics"]["cost/wall_s"] == pytest.approx(own + 2.0 + 2.0)
    assert len(trials["soup"]["members"]) == 3
    assert trials["soup"]["members"][:1] == first["members"]
    assert trials["lora-rank=2"]["members"] == []


def test_a_trial_that_is_read_alone_costs_what_it_does_in_the_whole_record(home: Path) -> None:
    record = record_of(home)
    with closing(Ledger(home)) as ledger:
        alone = one_trial(ledger, Store(home / "store"), record["sweep"], "soup", {})

    (soup,) = (t for t in record["trials"] if t["trial"] == "soup")
    assert alone["metrics"] == soup["metrics"]
    assert alone["members"] == soup["members"]


def test_soups_of_soups_pay_for_all_beneath_them_once() -> None:
    tasks = {
        name: {"record": {"inputs": dict(enumerate(inputs))}}
        for name, inputs in {
            "base": [], "a": ["base"], "b": ["base"], "soup": ["base", "a", "b"], "c": ["base"], "top": ["base", "soup", "c"],
        }.items()
    }  # fmt: skip

    goals = {"artifact": "top", "tasks": ["base", "top"], "members": ["soup", "c"]}
    assert sorted(costs.ingredients(goals, tasks)) == ["a", "b", "c", "soup"]
    assert costs.ingredients({"artifact": "top", "tasks": ["base", "top"]}, tasks) == []
    assert costs.ingredients(None, tasks) == []
