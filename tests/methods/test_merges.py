"""Merge methods but the soups: hand numbers, slow versions in float64, limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.utils.merge_utils import ties
from torch import Tensor

from pare.methods.contract import METHODS, Candidate, Context, Member, load_all
from pare.methods.merge.compeft import Compeft
from pare.methods.merge.geometric import ModelStock, Slerp
from pare.methods.merge.linear import TaskArithmetic, WiseFt
from pare.methods.merge.sparsified import Breadcrumbs, Dare, Della, Ties
from pare.methods.parts.codebooks import Integer
from pare.methods.parts.codes import Codes, Rows
from pare.methods.parts.formula import Dense, Formula, LowRank
from pare.methods.parts.masked import Indexed, Masked
from pare.methods.settings import SettingsError

load_all()

Vectors = dict[str, dict[str, Tensor]]
"""Weight -> member -> what training has added."""

EVERYTHING: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"scaling": 1.0},
    "wise_ft": {"alpha": 1.0},
    "ties": {"density": 1.0},
    "dare": {"density": 1.0},
    "della": {"density": 1.0, "epsilon": 0.0},
    "breadcrumbs": {"density": 1.0, "gamma": 0.0},
}
"""Method -> settings with which it keeps all of one member."""

NOTHING: dict[str, dict[str, Any]] = {name: {"scaling": 0.0} for name in EVERYTHING} | {"wise_ft": {"alpha": 0.0}}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def member(name: str, formulas: dict[str, Formula], score: float = 1.0) -> Member:
    return Member(name, score, list(formulas), formulas.get)


def adapter(name: str, rank: int, seed: int) -> Member:
    """An update of a weight (12, 16)."""
    part = LowRank(random(rank, 16, seed=seed), random(12, rank, seed=seed + 50), 0.5)
    return member(name, {"w": Formula([part], "add")})


def made(method: Any, members: list[Member], base: dict[str, Tensor], seed: int = 0) -> dict[str, Formula]:
    context = Context(torch.device("cpu"), seed)
    return dict(method.merge(members, base.__getitem__, lambda candidate: float(len(list(candidate))), context).formulas)


def result(method: Any, vectors: Vectors, base: float = 0.0, seed: int = 0) -> dict[str, Tensor]:
    """Weight -> what a merge makes of dense members, less the base."""
    start = {w: torch.full_like(next(iter(own.values())), base) for w, own in vectors.items()}
    names = dict.fromkeys(name for own in vectors.values() for name in own)
    members = [
        member(name, {w: Formula([Dense(start[w] + own[name])]) for w, own in vectors.items() if name in own}) for name in names
    ]
    found = made(method, members, start, seed)
    return {w: whole(found.get(w), start[w]) - start[w] for w in vectors}


def whole(formula: Formula | None, base: Tensor) -> Tensor:
    if formula is None:
        return base
    return formula.materialise() if formula.op == "replace" else base + formula.materialise()


def one(method: Any, **vectors: Tensor) -> Tensor:
    return result(method, {"w": vectors})["w"]


# --- all of them --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERYTHING)
def test_one_member_that_is_kept_whole_comes_out_as_it_went_in_and_a_scaling_of_zero_gives_the_base(name: str) -> None:
    cls: Any = METHODS[name]
    weight, base = random(12, 16, seed=0), random(12, 16, seed=1)
    members = [member("m", {"w": Formula([Dense(weight)])})]

    assert torch.allclose(made(cls(**EVERYTHING[name]), members, {"w": base})["w"].materialise(), weight, atol=1e-6)
    assert torch.equal(whole(made(cls(**NOTHING[name]), members, {"w": base}).get("w"), base), base)


@pytest.mark.parametrize("name", sorted(n for n, cls in METHODS.items() if cls.kind == "merge"))
def test_weights_of_bfloat16_are_merged_in_float32(name: str) -> None:
    """What comes out lies where the same merge of the same numbers in float32 does, to the last bit that is kept."""
    cls: Any = METHODS[name]
    base = random(8, 32, seed=0).bfloat16().float()
    low = {f"m{i}": (base + 0.1 * random(8, 32, seed=i + 1)).bfloat16() for i in range(2)}

    rounded, exact = (
        whole(made(cls(), [member(m, {"w": Formula([Dense(cast(w))])}) for m, w in low.items()], {"w": base}).get("w"), base)
        for cast in (lambda w: w, lambda w: w.float())
    )

    assert torch.equal(rounded.bfloat16(), exact.bfloat16())


@pytest.mark.parametrize("name", sorted(n for n, cls in METHODS.items() if cls.kind == "merge"))
def test_codes_that_differ_are_refused_by_all(name: str) -> None:
    cls: Any = METHODS[name]

    def codes(seed: int) -> Codes:
        values = torch.randint(16, (12, 16), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
        return Codes.of(values, Integer(4, signed=True), Rows(16), torch.full((12, 1), 0.1))

    members = [member(f"m{i}", {"w": Formula([codes(i)])}) for i in range(2)]
    options = {"mode": "uniform"} if name == "model_soups" else {}
    with pytest.raises(ValueError, match=r"w is made of codes that differ between m0, m1.*Try: merge first"):
        made(cls(**options), members, {"w": torch.zeros(12, 16)})


@pytest.mark.parametrize("cls", [TaskArithmetic, Ties, Dare, Della, Breadcrumbs, Compeft], ids=lambda cls: cls.name)
def test_members_on_equal_codes_are_merged_on_them(cls: Any) -> None:
    """Their task vectors are the updates, whatever rounding took from the base."""
    values = torch.randint(16, (12, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    codes = Codes.of(values, Integer(4, signed=True), Rows(16), torch.full((12, 1), 0.1))
    updates = {f"m{i}": adapter(f"m{i}", 2, i).formula("w").parts[0] for i in range(2)}  # type: ignore[union-attr]

    on_codes = made(cls(), [member(m, {"w": Formula([codes, u])}) for m, u in updates.items()], {"w": random(12, 16, seed=9)})
    alone = made(cls(), [member(m, {"w": Formula([u], "add")}) for m, u in updates.items()], {"w": torch.zeros(12, 16)})

    assert on_codes["w"].op == "replace"
    assert torch.allclose(on_codes["w"].materialise(), codes.materialise() + alone["w"].materialise(), atol=1e-5)


# --- linear -------------------------------------------------------------------------------------------------------------


def test_task_vectors_are_added_with_their_weights_and_scaled() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, -4.0]])

    assert torch.allclose(one(TaskArithmetic(), a=a, b=b), 0.4 * (a + b))
    assert torch.allclose(one(TaskArithmetic(weights={"a": 0.5}, scaling=2.0), a=a, b=b), torch.tensor([[21.0, -6.0]]))
    halves = TaskArithmetic(weights={"a": 3.0}, scaling=1.0, normalise=True)
    assert torch.allclose(one(halves, a=a, b=b), torch.tensor([[3.25, 0.5]]))


def test_linear_merges_of_adapters_are_adapters_and_exact() -> None:
    members = [adapter("m0", 2, seed=0), adapter("m1", 3, seed=1), member("idle", {})]
    updates = [m.formula("w").materialise().double() for m in members[:2]]  # type: ignore[union-attr]
    weights = {"m0": 0.7, "m1": -0.2}

    for method, expected in (
        (TaskArithmetic(weights=weights, scaling=1.5), 1.5 * (0.7 * updates[0] - 0.2 * updates[1])),
        (WiseFt(alpha=0.3), 0.3 / 3 * (updates[0] + updates[1])),
    ):
        found = made(method, members, {"w": torch.zeros(12, 16)})["w"]
        assert (found.op, [part.kind for part in found.parts]) == ("add", ["low_rank"])
        assert found.tensors()["0.a"].shape == (5, 16)
        assert torch.allclose(found.materialise().double(), expected, atol=1e-5)


def test_wise_ft_lies_on_the_line_between_the_base_and_the_mean_of_the_members() -> None:
    base, weights = random(6, 8, seed=0), [random(6, 8, seed=i) for i in (1, 2)]
    members = [member(f"m{i}", {"w": Formula([Dense(w)])}) for i, w in enumerate(weights)]

    found = made(WiseFt(alpha=0.25), members, {"w": base})["w"].materialise()

    assert torch.allclose(found, 0.75 * base + 0.125 * (weights[0] + weights[1]), atol=1e-6)


@pytest.mark.parametrize("cls", [TaskArithmetic, Ties, Compeft], ids=lambda cls: cls.name)
def test_weights_of_nobody_and_weights_without_a_sum_are_refused(cls: Any) -> None:
    with pytest.raises(SettingsError, match=rf"{cls.name}.weights must be named after members: a, b, got 'c'"):
        cls(weights={"c": 1.0}).check_members(["a", "b"])
    with pytest.raises(SettingsError, match=r"weights must be of a sum other than 0, or normalise=false"):
        cls(weights={"a": 1.0, "b": -1.0}, normalise=True).shares(["a", "b"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name, cls in sorted(METHODS.items()) if cls.kind == "merge"),
        ("model_soups", {"mode": "uniform"}),
        ("model_soups", {"mode": "learned"}),
    ],
)
def test_members_that_have_changed_nothing_make_the_base(name: str, settings: dict[str, Any]) -> None:
    """Such as directories that hold the base itself, and adapters of which nothing was trained."""

    class Level:
        def __call__(self, candidate: Candidate) -> float:
            assert all(not whole(formula, torch.zeros(12, 16)).any() for _, formula in candidate)
            return 1.0

        def slopes(self, candidate: Candidate, along: Any) -> tuple[float, dict[str, list[float]]]:
            return self(candidate), {}

    cls: Any = METHODS[name]
    untrained = {"w": Formula([LowRank(random(2, 16, seed=0), torch.zeros(12, 2))], "add")}
    for formulas in ({}, untrained, {"w": Formula([Dense(torch.zeros(12, 16))])}):
        members = [member("m0", formulas), member("m1", formulas)]
        merged = cls(**settings).merge(members, lambda weight: torch.zeros(12, 16), Level(), Context(torch.device("cpu")))

        Level()(merged.formulas)
        assert merged.score == 1.0
        assert all(math.isfinite(weight) for weight in merged.weights.values())


# --- ties ---------------------------------------------------------------------------------------------------------------


def test_ties_elects_a_sign_for_each_entry_and_takes_the_mean_of_those_that_have_it() -> None:
    vectors = {"a": torch.tensor([[1.0, 0.5]]), "b": torch.tensor([[-0.2, -2.0]]), "c": torch.tensor([[0.9, 0.4]])}

    assert torch.allclose(one(Ties(density=1.0), **vectors), torch.tensor([[0.95, -2.0]]))
    assert torch.allclose(one(Ties(density=1.0, normalise=False), **vectors), torch.tensor([[1.9, -2.0]]))
    assert torch.allclose(one(Ties(density=1.0, scaling=0.5), **vectors), torch.tensor([[0.475, -1.0]]))
    # With a weight of 3 the small negative entry still loses; with 20 it wins, unless the vote is unweighted.
    assert torch.allclose(one(Ties(density=1.0, weights={"b": 20.0}), **vectors)[0, 0], torch.tensor(-0.2))
    unweighted = Ties(density=1.0, weights={"b": 20.0, "c": 3.0}, elect_weighted=False)
    assert torch.allclose(one(unweighted, **vectors)[0, 0], torch.tensor((1 + 3 * 0.9) / 4))


def test_ties_takes_plus_where_the_signs_weigh_the_same_and_leaves_out_zeros() -> None:
    assert one(Ties(density=1.0), a=torch.tensor([[2.0, 0.0]]), b=torch.tensor([[-2.0, 0.0]])).tolist() == [[2.0, 0.0]]
    assert one(Ties(density=1.0), a=torch.tensor([[0.0, 3.0]]), b=torch.tensor([[-1.0, 0.0]])).tolist() == [[-1.0, 3.0]]


def test_ties_is_what_peft_makes_of_equal_weights() -> None:
    vectors = {f"m{i}": random(12, 20, seed=i) for i in range(4)}

    theirs = ties(list(vectors.values()), torch.ones(4), density=0.3)

    assert torch.allclose(one(Ties(density=0.3), **vectors), theirs, atol=1e-6)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.29, 0.5, 1.0])
def test_trimming_a_tensor_keeps_exactly_its_share_of_the_entries_the_largest(density: float) -> None:
    vector = random(10, 10, seed=3)

    kept = one(Ties(density=density), a=vector)

    n = math.floor(100 * density + 1e-9)
    assert int((kept != 0).sum()) == n
    assert torch.equal(kept[kept != 0].abs().sort().values, vector.abs().flatten().sort().values[100 - n :])


def test_a_global_trim_looks_for_the_largest_among_all_weights_of_the_member() -> None:
    """A tensor a thousand times as large takes the places of all others, of its own member alone."""
    one_member = {"big": {"a": 1000 * random(6, 8, seed=0)}, "small": {"a": random(9, 8, seed=2)}}
    two_members = {"big": {**one_member["big"], "b": random(6, 8, seed=1)}, "small": {"b": random(9, 8, seed=4)}}
    method = Ties(density=0.4, trim_scope="global")

    alone, beside = result(method, one_member), result(method, two_members)

    assert int((alone["big"].abs() > 5).sum()) == int(0.4 * (48 + 72)) == 48
    assert not alone["small"].any()
    assert beside["small"].any(), "of b, whose weights are all of one size"


def test_a_global_trim_is_what_sorting_everything_at_once_gives() -> None:
    shapes = {"x": (7, 5), "y": (30, 11), "v": (1, 9)}
    vectors = {w: {"a": random(*shape, seed=i)} for i, (w, shape) in enumerate(shapes.items())}
    flat = torch.cat([own["a"].flatten() for own in vectors.values()])

    found = result(Ties(density=0.35, trim_scope="global"), vectors)

    edge = flat.abs().sort(descending=True).values[int(0.35 * len(flat)) - 1]
    for w, own in vectors.items():
        assert torch.equal(found[w], torch.where(own["a"].abs() >= edge, own["a"], 0.0)), w


# --- dare and della -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Dare(density=0.3), Della(density=0.4, epsilon=0.2)], ids=["dare", "della"])
def test_what_is_drawn_is_the_vector_on_average_and_the_same_for_the_same_seed(method: Any) -> None:
    vector = random(3, 4, seed=0)

    draws = torch.stack([method.thin(vector, "w", "a", None, Context(torch.device("cpu"), seed)) for seed in range(2000)])

    error = draws.std(0) / math.sqrt(2000)
    assert ((draws.mean(0) - vector).abs() < 4 * error).all()
    assert ((draws.mean(0) - vector).abs() < 3 * error).float().mean() > 0.9
    assert torch.equal(method.thin(vector, "w", "a", None, Context(torch.device("cpu"), 7)), draws[7])
    large, context = random(30, 40, seed=0), Context(torch.device("cpu"), 7)
    one_draw, *others = (method.thin(large, *of, None, context) for of in (("w", "a"), ("v", "a"), ("w", "b")))
    assert not any(torch.equal(one_draw, other) for other in others)


def test_dare_keeps_its_share_and_divides_by_it() -> None:
    vector = random(200, 300, seed=0)

    kept = one(Dare(density=0.25), a=vector)

    assert int((kept != 0).sum()) == pytest.approx(15000, abs=4 * math.sqrt(60000 * 0.25 * 0.75))
    assert torch.allclose(kept[kept != 0], 4 * vector[kept != 0])


def test_della_keeps_large_entries_more_often_than_small_ones() -> None:
    """The rank within the row decides: the probabilities of a row of five are 0.3, 0.4, 0.5, 0.6, 0.7."""
    vector = torch.tensor([[0.1, -5.0, 2.0, 0.5, -3.0]]).repeat(20000, 1)

    kept = Della(density=0.5, epsilon=0.2).thin(vector, "w", "a", None, Context(torch.device("cpu"), 1))

    expected = torch.tensor([0.3, 0.7, 0.5, 0.4, 0.6])
    assert torch.allclose((kept != 0).float().mean(0), expected, atol=0.015)
    assert torch.allclose(kept.abs().amax(0), vector[0].abs() / expected, rtol=1e-5)


def test_dare_can_elect_signs() -> None:
    vectors = {"a": torch.tensor([[1.0]]), "b": torch.tensor([[-0.2]])}
    assert one(Dare(density=1.0, combine="ties"), **vectors).item() == 1.0
    assert one(Dare(density=1.0), **vectors).item() == pytest.approx(0.4)


# --- breadcrumbs --------------------------------------------------------------------------------------------------------


def test_breadcrumbs_drops_the_largest_and_the_smallest() -> None:
    vector = torch.tensor([[0.1, -9.0, 3.0, -0.2, 5.0, 0.3, -1.0, 2.0, 0.4, -4.0]])

    kept = one(Breadcrumbs(density=0.5, gamma=0.2), a=vector)

    assert kept.tolist() == [[0.0, 0.0, 3.0, 0.0, 0.0, 0.0, -1.0, 2.0, pytest.approx(0.4), -4.0]]


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_breadcrumbs_without_outliers_is_a_trim(density: float) -> None:
    vector = random(9, 11, seed=2)
    trimmed = one(Ties(density=density, combine="linear"), a=vector)

    assert torch.equal(one(Breadcrumbs(density=density, gamma=0.0), a=vector), trimmed)
    assert trimmed.any()


# --- slerp and model stock ----------------------------------------------------------------------------------------------


def test_slerp_goes_along_the_circle() -> None:
    u, v = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])

    assert torch.allclose(one(Slerp(), a=u, b=v), torch.full((1, 2), 3 / math.sqrt(2)))
    third = one(Slerp(t=1 / 3), a=u, b=v)
    assert torch.allclose(third, 3 * torch.tensor([[math.cos(math.pi / 6), math.sin(math.pi / 6)]]))


@pytest.mark.parametrize("on", ["deltas", "weights"])
def test_slerp_ends_at_its_members_the_better_one_at_zero_and_keeps_an_equal_norm(on: str) -> None:
    u, v = random(6, 8, seed=0), random(6, 8, seed=1)
    v = v * u.norm() / v.norm()
    base = {"w": random(6, 8, seed=2) if on == "deltas" else torch.zeros(6, 8)}
    worse, better = (Formula([Dense(base["w"] + x)]) for x in (u, v))
    members = [member("worse", {"w": worse}, 2.0), member("better", {"w": better}, 1.0)]

    def at(t: float) -> Tensor:
        return whole(made(Slerp(t=t, on=on), members, base)["w"], base["w"]) - base["w"]

    assert torch.allclose(at(0.0), v, atol=1e-6)
    assert torch.allclose(at(1.0), u, atol=1e-6)
    for t in (0.2, 0.5, 0.9):
        assert at(t).norm().item() == pytest.approx(u.norm().item(), rel=1e-5)


def test_slerp_is_a_straight_line_where_there_is_no_angle() -> None:
    u = random(6, 8, seed=0)
    assert torch.allclose(one(Slerp(t=0.25), a=u, b=3 * u), 1.5 * u, atol=1e-5)
    assert torch.allclose(one(Slerp(t=0.25), a=u, b=torch.zeros(6, 8)), 0.75 * u, atol=1e-6)


def test_slerp_takes_two_members_and_model_stock_at_least_two() -> None:
    for n in (1, 3):
        with pytest.raises(SettingsError, match=rf"slerp.members must be exactly 2, got {n}"):
            Slerp().check_members([f"m{i}" for i in range(n)])
    Slerp().check_members(["a", "b", "c"], most=2)
    with pytest.raises(SettingsError, match=r"model_stock.members must be at least 2, got 1"):
        ModelStock().check_members(["a"])


def test_model_stock_goes_to_the_mean_as_far_as_the_members_agree() -> None:
    u, v = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    sixty = 2 * torch.tensor([[0.5, math.sqrt(3) / 2]])

    assert torch.allclose(one(ModelStock(), a=u, b=u.clone()), u)
    assert not one(ModelStock(), a=u, b=v).any()
    assert not one(ModelStock(), a=u, b=-u).any()
    assert torch.allclose(one(ModelStock(), a=u, b=sixty), 2 / 3 * (u + sixty) / 2)  # c = 1/2: r = 2 c / (1 + c) = 2/3
    three = {"a": u, "b": sixty, "c": u.clone()}  # c = (1/2 + 1 + 1/2) / 3 = 2/3: r = 3 c / (1 + 2 c) = 6/7
    assert torch.allclose(one(ModelStock(), **three), 6 / 7 * (2 * u + sixty) / 3)


@pytest.mark.parametrize("method", [Slerp(), ModelStock()], ids=["slerp", "model_stock"])
def test_merges_by_angle_leave_adapters_adapters(method: Any) -> None:
    members = [adapter("m0", 2, seed=0), adapter("m1", 3, seed=1)]

    found = made(method, members, {"w": torch.zeros(12, 16)})
    expected = one(method, **{m.name: m.formula("w").materialise() for m in members})  # type: ignore[union-attr]

    assert all(part.kind == "low_rank" for formula in found.values() for part in formula.parts)
    assert torch.allclose(whole(found.get("w"), torch.zeros(12, 16)), expected, atol=1e-5)


# --- compeft ------------------------------------------------------------------------------------------------------------


def parts_of(method: Any, vectors: dict[str, Tensor]) -> dict[str, Any]:
    base = {w: torch.zeros_like(v) for w, v in vectors.items()}
    found = made(method, [member("a", {w: Formula([Dense(v)], "add") for w, v in vectors.items()})], base)
    return {w: formula.parts[0] for w, formula in found.items()}


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_compeft_has_three_values_and_keeps_signs_and_places_of_the_largest(density: float) -> None:
    vectors = {"x": random(40, 50, seed=0), "y": random(30, 20, seed=1)}
    flat = torch.cat([v.flatten() for v in vectors.values()])

    parts = parts_of(Compeft(density=density, alpha=1.5), vectors)

    magnitude = 1.5 * flat.std().item()
    kept = torch.cat([parts[w].materialise().flatten() for w in vectors])
    assert len(kept.unique()) == 3
    assert kept.abs().max().item() == pytest.approx(magnitude, rel=1e-5)
    assert int((kept != 0).sum()) == int(density * len(flat))
    assert torch.equal(kept[kept != 0].sign(), flat[kept != 0].sign())
    assert flat[kept != 0].abs().min() >= flat[kept == 0].abs().max()
    assert (kept * flat).sum() > 0


def test_compeft_looks_for_the_largest_among_all_weights() -> None:
    parts = parts_of(Compeft(density=0.4), {"big": 1000 * random(10, 10, seed=0), "small": random(10, 10, seed=1)})

    assert list(parts) == ["big"]
    assert int((parts["big"].materialise() != 0).sum()) == 80


def test_compeft_scales_with_its_member() -> None:
    vector = random(20, 30, seed=0)

    assert torch.allclose(one(Compeft(), a=8 * vector), 8 * one(Compeft(), a=vector), rtol=1e-6)


def test_compeft_stores_a_bit_for_each_sign_and_what_is_less_of_a_mask_and_columns() -> None:
    vector = random(64, 256, seed=0)
    n = vector.numel()

    masked, indexed = (parts_of(Compeft(density=d), {"w": vector})["w"] for d in (0.3, 0.02))

    assert isinstance(masked, Masked)
    assert masked.logical_bits == n + int(0.3 * n) + 32
    assert isinstance(indexed, Indexed)
    assert indexed.logical_bits == 8 * int(0.02 * n) + 32 * 64 + int(0.02 * n) + 32
    assert masked.nbytes < 0.17 * n
    assert indexed.nbytes < 0.05 * n


def test_compeft_says_how_small_the_best_code_of_all_members_would_be() -> None:
    said: dict[str, float] = {}
    members = [member(name, {"w": Formula([Dense(random(10, 10, seed=0))], "add")}) for name in ("a", "b")]

    Compeft(density=0.5).merge(
        members,
        lambda name: torch.zeros(10, 10),
        lambda c: 1.0,
        Context(torch.device("cpu"), 0, said.__setitem__),  # type: ignore[arg-type]
    )

    assert said == {"compeft/entropy_bytes": pytest.approx(2 * 1.5 * 100 / 8)}


def test_several_members_of_compeft_are_added_up_each_with_a_magnitude_of_its_own() -> None:
    a, b = random(20, 30, seed=0), 5 * random(20, 30, seed=1)

    both = one(Compeft(weights={"a": 3.0}), a=a, b=b)

    assert torch.allclose(both, 0.75 * one(Compeft(), a=a) + 0.25 * one(Compeft(), b=b), atol=1e-5)


# --- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ties(density=0.0), r"ties.density must be in \(0, 1\]"),
        (lambda: Ties(trim_scope="row"), r"ties.trim_scope must be one of tensor, global"),
        (lambda: Dare(combine="vote"), r"dare.combine must be one of linear, ties"),
        (lambda: Della(density=0.1, epsilon=0.1), r"della.epsilon must be >= 0, below density and at most 0.1"),
        (lambda: Della(density=0.9, epsilon=0.15), r"della.epsilon must be .* at most 0.1 \(density=0.9\)"),
        (lambda: Breadcrumbs(density=0.9, gamma=0.2), r"breadcrumbs.gamma must be in \[0, 0.1\] with density=0.9"),
        (lambda: WiseFt(alpha=1.1), r"wise_ft.alpha must be in \[0, 1\]"),
        (lambda: Slerp(on="heads"), r"slerp.on must be one of deltas, weights"),
        (lambda: Compeft(alpha=0.0), r"compeft.alpha must be in \(0"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make()
