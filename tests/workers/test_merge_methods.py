"""The task `merge` with methods that are more than an average, on adapters that were trained on a small random Llama."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pare.methods.contract import METHODS, load_all
from pare.methods.parts.formula import Dense, Formula
from pare.workers.blobs import LocalBlobs
from pare.workers.checkpoint import Checkpoint
from pare.workers.export.reader import open_export
from pare.workers.models import load_dense
from pare.workers.task import TaskError
from pare.workers.tasks import merge
from tests.workers.merging import Sweep, in_memory, logits

load_all()

ALL = sorted(name for name, cls in METHODS.items() if cls.kind == "merge")
QUICK: dict[str, dict[str, Any]] = {"evolved": {"evaluations": 8, "blocks": 2}, "model_soups": {"mode": "learned", "steps": 3}}
"""Settings with which a method of many questions asks few."""


def candidates(sweep: Sweep, *names: str) -> merge.Candidates:
    spec = sweep.merge_spec(names, scores=dict.fromkeys(names, 1.0))
    return merge.Candidates(sweep.context(spec, sweep.root, **sweep.inputs(spec)), sweep.open("base"), most=9)


@pytest.mark.parametrize("name", ALL)
def test_a_merge_scores_what_it_says_and_ships_what_it_scored(name: str, sweep: Sweep) -> None:
    result = sweep.merge(("a", "b"), method=name, **QUICK.get(name, {}))

    assert sweep.score("soup") == pytest.approx(result["merge/selection_nll"], abs=1e-12)
    assert math.isfinite(result["merge/selection_nll"])
    assert result["merge/evaluations"] <= METHODS[name](**QUICK.get(name, {})).questions(2)  # type: ignore[attr-defined]
    assert result["notes"][0].endswith("selection split (8 windows of 16 tokens); the test split chose nothing")
    out, exported = sweep.export()
    linear = {"task_arithmetic", "wise_ft", "slerp", "model_stock", "evolved", "model_soups"}
    assert exported["format"] == ("adapter" if name in linear else "dense")
    opened = open_export(out, torch.float32).model
    assert torch.allclose(logits(opened), in_memory(sweep), atol=0.02)  # dense exports are in the base's bfloat16


def test_weights_that_become_dense_are_stored_in_the_dtype_of_the_base(sweep: Sweep) -> None:
    sweep.merge(("a", "b"), method="ties")

    soup = sweep.open("soup")
    assert {soup.formula(name).tensors()["0.weight"].dtype for name in soup.table} == {torch.bfloat16}  # type: ignore[union-attr]
    assert not (soup.directory / "adapter").exists()


def test_a_merge_that_leaves_nothing_of_its_members_is_the_base(sweep: Sweep) -> None:
    result = sweep.merge(("a", "b"), method="wise_ft", alpha=0.0)

    assert result["merge/selection_nll"] == sweep.score("base")
    assert torch.equal(in_memory(sweep), logits(load_dense(sweep.places["base"], torch.float32)))
    assert sweep.export()[1]["format"] == "dense"


def test_two_members_are_asked_for_where_a_method_takes_two(sweep: Sweep) -> None:
    with pytest.raises(TaskError, match=r"slerp.members must be exactly 2, got 3: .*a"):
        sweep.merge(("a", "b", "c"), method="slerp")


# --- gradients ----------------------------------------------------------------------------------------------------------


def test_slopes_are_those_of_finite_differences_and_the_loss_that_of_the_score(sweep: Sweep) -> None:
    """Of weights and of a vector, in a dense model and in one with adapters, whatever was asked before."""
    base, evaluator = sweep.open("base"), candidates(sweep, "a")
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"]
    start = {name: torch.atleast_2d(base.materialise(name)) + 0.02 for name in names}
    ways = {name: torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) for name, w in start.items()}

    def moved(by: float) -> list[tuple[str, Formula]]:
        found = dict(start)
        return [
            (name, Formula([Dense(w + by * ways[name] - torch.atleast_2d(base.materialise(name)))], "add"))
            for name, w in found.items()
        ]

    evaluator([("model.layers.0.mlp.down_proj.weight", Formula([Dense(torch.zeros(64, 128))]))])
    loss, slopes = evaluator.slopes(
        moved(0.0), lambda name, gradient: [(gradient * ways[name]).sum().item(), float(gradient.shape[0])]
    )
    above, below = evaluator(moved(1e-3)), evaluator(moved(-1e-3))

    assert loss == pytest.approx(evaluator(moved(0.0)), abs=1e-5)
    assert sum(slope for slope, _ in slopes.values()) == pytest.approx((above - below) / 2e-3, rel=0.01)
    assert {name: int(rows) for name, (_, rows) in slopes.items()} == {name: len(w) for name, w in start.items()}
    assert evaluator([]) == sweep.score("base")


def test_no_gradient_outlives_its_question(sweep: Sweep) -> None:
    evaluator = candidates(sweep, "a")
    artifact = sweep.open("a")

    evaluator.slopes(((name, artifact.formula(name)) for name in artifact.table), lambda name, gradient: [])  # type: ignore[misc]

    assert evaluator.model is not None
    assert all(p.grad is None and not p.requires_grad for p in evaluator.model.parameters())


def test_a_candidate_that_is_no_model_has_an_infinite_loss_and_no_slopes(sweep: Sweep) -> None:
    broken = [("model.norm.weight", Formula([Dense(torch.full((1, 64), math.inf))]))]

    assert candidates(sweep, "a").slopes(broken, lambda name, gradient: [1.0]) == (math.inf, {})


def test_the_learned_soup_is_better_than_the_uniform_one_and_says_how_it_came_to_be(sweep: Sweep) -> None:
    uniform = sweep.merge(("a", "b", "c"), mode="uniform")
    learned = sweep.merge(("a", "b", "c"), mode="learned", steps=10, learning_rate=0.5)

    assert learned["merge/selection_nll"] < uniform["merge/selection_nll"] - 0.01
    losses = [entry["loss"] for entry in sweep.soup()["decisions"][:-1]]
    assert losses[0] == pytest.approx(uniform["merge/selection_nll"], abs=1e-4)
    assert min(losses) == pytest.approx(learned["merge/selection_nll"], abs=1e-4)
    shares = sweep.soup()["decisions"][-1]["shares"]
    assert list(shares) == ["model.layers.0", "model.layers.1"]
    assert shares["model.layers.0"] != shares["model.layers.1"]


# --- resume -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["evolved", "model_soups"])
def test_a_search_that_is_cut_short_asks_nothing_twice_and_ends_the_same(
    name: str,
    sweep: Sweep,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"evaluations": 13, "blocks": 2, "population": 4} if name == "evolved" else {"mode": "learned", "steps": 4}
    spec = sweep.merge_spec(("a", "b", "c"), method=name, **settings)
    undisturbed = sweep.run(merge, "undisturbed", spec, **sweep.inputs(spec))
    worked: list[int] = []
    put_in_place = merge.Candidates.put_in_place

    def counted(self: merge.Candidates, candidate: Any) -> Any:
        worked.append(self.asked)
        if len(worked) == 3:
            raise KeyboardInterrupt
        return put_in_place(self, candidate)

    monkeypatch.setattr(merge.Candidates, "put_in_place", counted)
    checkpoint: Callable[[], Checkpoint] = lambda: Checkpoint(LocalBlobs(sweep.root / "blobs"), "checkpoints/m")
    with pytest.raises(KeyboardInterrupt):
        sweep.run(merge, "resumed", spec, checkpoint(), **sweep.inputs(spec))
    resumed = sweep.run(merge, "resumed", spec, checkpoint(), **sweep.inputs(spec))

    asked = undisturbed["merge/evaluations"]
    assert worked == [1, 2, 3, *range(3, asked + 1)]
    assert resumed == undisturbed
    for file in ("soup.json", "tensors.json", "weights.safetensors"):
        one, other = (sweep.places[artifact] / file for artifact in ("resumed", "undisturbed"))
        assert one.read_bytes() == other.read_bytes(), file


# --- how much is held ---------------------------------------------------------------------------------------------------


def test_no_more_is_held_than_a_weight_of_each_member(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the result is written, operands of what was made before are no longer there than until a shard is full."""
    held: list[weakref.ref[Tensor]] = []
    most = 0
    as_stored = merge.as_stored

    def watched(base: Any, name: str, formula: Formula) -> Formula:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in held))
        held.extend(weakref.ref(t) for t in formula.tensors().values())
        return as_stored(base, name, formula)

    monkeypatch.setattr(merge, "as_stored", watched)
    monkeypatch.setattr("pare.workers.models.SHARD_BYTES", 1)
    sweep.merge(("a", "b", "c"), method="ties")

    assert len(held) == 2 * 14
    assert most <= 2
