from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, mse_loss
from transformers import LlamaConfig, LlamaForCausalLM

from pare.methods.contract import Context, Member
from pare.methods.finetune.lora import Lora
from pare.methods.merge.model_soups import ModelSoups
from pare.methods.parts.codebooks import Integer
from pare.methods.parts.codes import Codes, Rows
from pare.methods.parts.formula import Dense, Formula, LowRank, Part
from pare.methods.settings import SettingsError

CONTEXT = Context(torch.device("cpu"))
Candidate = Iterable[tuple[str, Formula]]


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def member(name: str, formulas: dict[str, Formula], score: float = 1.0) -> Member:
    return Member(name, score, list(formulas), formulas.get)


def dense(name: str, weight: Tensor, score: float = 1.0) -> Member:
    return member(name, {"w": Formula([Dense(weight)])}, score)


def adapter(name: str, rank: int, seed: int, scale: float = 2.0) -> Member:
    """An update of a weight (12, 16)."""
    part = LowRank(random(rank, 16, seed=seed), random(12, rank, seed=seed + 100), scale)
    return member(name, {"w": Formula([part], "add")})


def no_base(name: str) -> Tensor:
    raise AssertionError(f"the base's {name} was read, which this merge has no need of")


def refuse(candidate: Candidate) -> float:
    raise AssertionError("a candidate was scored, which this merge has no need of")


def uniform(*members: Member, base: Callable[[str], Tensor] = no_base) -> dict[str, Formula]:
    return dict(ModelSoups(mode="uniform").merge(members, base, lambda candidate: 0.0, CONTEXT).formulas)


def scored(by: dict[frozenset[float], float]) -> Callable[[Candidate], float]:
    """An evaluator of members that are told apart by one number: what each set of them scores, as `by` says."""

    def evaluate(candidate: Candidate) -> float:
        mean = dict(candidate)["w"].materialise().item()
        return next(score for chosen, score in by.items() if math.isclose(sum(chosen) / len(chosen), mean, rel_tol=1e-5))

    return evaluate


def numbered(name: str, number: float, score: float) -> Member:
    return dense(name, torch.tensor([[float(number)]]), score)


# --- what a weight becomes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_a_soup_of_identical_members_is_the_member_bit_for_bit(n: int) -> None:
    weight, update = random(12, 16, seed=0), LowRank(random(4, 16, seed=1), random(12, 4, seed=2), 16 / math.sqrt(4) / 3)
    members = [member(f"m{i}", {"d": Formula([Dense(weight)]), "a": Formula([update], "add")}) for i in range(n)]

    formulas = uniform(*members)

    assert torch.equal(formulas["d"].materialise(), weight)
    assert torch.equal(formulas["a"].materialise(), update.materialise())
    assert formulas["a"].tensors().keys() == {"0.a", "0.b"}
    assert formulas["a"].nbytes == update.nbytes


def test_dense_members_are_averaged_as_if_at_once_and_left_as_they_were() -> None:
    weights = [random(40, 30, seed=seed, scale=3) for seed in range(9)]

    soup = uniform(*[dense(f"m{i}", w) for i, w in enumerate(weights)])["w"].materialise()

    assert torch.allclose(soup, torch.stack(weights).double().mean(0).float(), atol=1e-6)
    assert torch.equal(weights[0], random(40, 30, seed=0, scale=3)), "the first weight was changed in place"


def test_dense_members_are_averaged_in_float32_and_cast_once() -> None:
    weights = [random(32, 32, seed=seed).bfloat16() for seed in range(5)]

    soup = uniform(*[dense(f"m{i}", w) for i, w in enumerate(weights)])["w"]

    assert soup.op == "replace"
    assert soup.tensors()["0.weight"].dtype == torch.bfloat16
    exact = torch.stack([w.double() for w in weights]).mean(0)
    ulp = exact.abs() * 2**-8 + 1e-6
    assert ((soup.materialise().double() - exact).abs() <= ulp).all()
    step_by_step = weights[0]
    for k, w in enumerate(weights[1:], start=2):
        step_by_step = step_by_step + (w - step_by_step) / k
    assert not torch.equal(soup.tensors()["0.weight"], step_by_step)


@pytest.mark.parametrize("ranks", [(4, 4), (2, 5, 3)])
def test_adapters_of_any_ranks_are_averaged_exactly(ranks: tuple[int, ...]) -> None:
    members = [adapter(f"m{i}", rank, seed=i, scale=0.5 + i) for i, rank in enumerate(ranks)]

    soup = uniform(*members)["w"]

    mean = torch.stack([m.formula("w").materialise() for m in members]).double().mean(0)  # type: ignore[union-attr]
    assert soup.op == "add"
    assert [type(part) for part in soup.parts] == [LowRank]
    assert soup.tensors()["0.a"].shape == (sum(ranks), 16)
    assert torch.allclose(soup.materialise().double(), mean, atol=1e-5)


def test_equal_updates_are_set_down_once_with_the_weight_of_all_of_them() -> None:
    twice, once = adapter("x", 4, seed=0), adapter("y", 3, seed=1)

    soup = uniform(twice, Member("x2", 1.0, twice.names, twice.formula), once)["w"]

    mean = (2 * twice.formula("w").materialise() + once.formula("w").materialise()) / 3  # type: ignore[union-attr]
    assert soup.tensors()["0.a"].shape[0] == 4 + 3
    assert torch.allclose(soup.materialise(), mean, atol=1e-5)


def test_averaging_the_factors_would_be_something_else() -> None:
    members = [adapter(f"m{i}", 4, seed=i) for i in range(2)]
    parts: list[Any] = [m.formula("w").parts[0] for m in members]  # type: ignore[union-attr]

    soup = uniform(*members)["w"].materialise()
    factors = LowRank((parts[0].a + parts[1].a) / 2, (parts[0].b + parts[1].b) / 2, 2.0).materialise()

    assert (factors - soup).norm() > 0.5 * soup.norm()


def test_the_soup_of_adapters_is_what_peft_concatenates_with_equal_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    start = LlamaForCausalLM(config).state_dict()

    def llama() -> nn.Module:
        model = LlamaForCausalLM(config).eval()
        model.load_state_dict(start)
        return model

    settings = [{"rank": 4}, {"rank": 8, "alpha": 5, "rslora": True}, {"rank": 2, "alpha": 3}]
    members = []
    for i, own in enumerate(settings):
        method = Lora(**own)  # type: ignore[arg-type]
        model = method.prepare(llama(), CONTEXT)
        torch.manual_seed(i)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        members.append(member(f"m{i}", method.finish(model, tmp_path / f"m{i}")))

    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "m0" / "adapter", adapter_name="m0")
    for i in (1, 2):
        theirs.load_adapter(tmp_path / f"m{i}" / "adapter", f"m{i}")
    theirs.add_weighted_adapter(["m0", "m1", "m2"], [1 / 3] * 3, "soup", combination_type="cat")
    theirs.set_adapter("soup")
    merged = dict(theirs.merge_and_unload().named_parameters())

    soup = uniform(*members)
    assert len(soup) == 14
    for name, formula in soup.items():
        assert torch.allclose(start[name] + formula.materialise(), merged[name], atol=1e-5), name
        assert formula.shape == start[name].shape


def test_a_member_that_leaves_a_weight_alone_has_the_bases_share_in_it() -> None:
    base = random(12, 16, seed=9)
    one, other = adapter("one", 4, seed=0), dense("other", random(12, 16, seed=5))
    untouched = member("untouched", {})

    added = uniform(one, untouched)["w"]
    replaced = uniform(other, untouched, base=lambda name: base)["w"]
    mixed = uniform(one, other, base=lambda name: base)["w"]

    update, weight = one.formula("w").materialise(), other.formula("w").materialise()  # type: ignore[union-attr]
    assert added.op == "add"
    assert torch.allclose(added.materialise(), update / 2, atol=1e-6)
    assert replaced.op == mixed.op == "replace"
    assert torch.allclose(replaced.materialise(), (weight + base) / 2, atol=1e-6)
    assert torch.allclose(mixed.materialise(), (weight + base + update) / 2, atol=1e-6)


def codes(seed: int) -> Codes:
    values = torch.randint(16, (12, 16), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    return Codes.of(values, Integer(4, signed=True), Rows(16), torch.full((12, 1), 0.1))


def test_adapters_on_equal_codes_leave_the_codes_as_they_are() -> None:
    updates = [LowRank(random(3, 16, seed=i), random(12, 3, seed=i + 50)) for i in range(2)]
    chains: list[list[Part]] = [[codes(1), updates[0]], [codes(1), updates[1]], [codes(1)]]

    soup = uniform(*[member(f"m{i}", {"w": Formula(parts)}) for i, parts in enumerate(chains)])["w"]

    assert soup.op == "replace"
    assert torch.equal(soup.parts[0].tensors()["codes"], codes(1).tensors()["codes"])
    expected = codes(1).materialise() + (updates[0].materialise() + updates[1].materialise()) / 3
    assert torch.allclose(soup.materialise(), expected, atol=1e-5)


def test_codes_that_differ_are_refused_with_the_reason_and_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"made of codes that differ between one, two.*not on their grid\. Try: merge first"):
        uniform(member("one", {"w": Formula([codes(1)])}), member("two", {"w": Formula([codes(2)])}))

    with pytest.raises(ValueError, match="w is made of codes that differ between plain, quantised"):
        uniform(member("plain", {}), member("quantised", {"w": Formula([codes(1)])}))


def test_one_weight_of_each_member_is_held_at_a_time() -> None:
    read: list[str] = []

    def watched(name: str) -> Member:
        def formula(weight: str) -> Formula:
            read.append(weight)
            return Formula([Dense(torch.ones(2, 2))])

        return Member(name, 1.0, ["w1", "w2", "w3"], formula)

    formulas = iter(ModelSoups(mode="uniform").merge([watched("a"), watched("b")], no_base, lambda c: 0.0, CONTEXT).formulas)

    assert not read
    next(formulas)
    assert read == ["w1", "w1"]
    next(formulas)
    assert read == ["w1", "w1", "w2", "w2"]


# --- which members go in ------------------------------------------------------------------------------------------------


def test_greedy_takes_in_what_makes_the_score_better_and_leaves_the_rest() -> None:
    members = [numbered("a", 1, 3.0), numbered("b", 10, 3.1), numbered("c", 100, 3.2), numbered("d", 1000, 3.3)]
    score = scored({frozenset({1, 10}): 2.9, frozenset({1, 10, 100}): 2.95, frozenset({1, 10, 1000}): 2.5})

    merged = ModelSoups().merge(members, no_base, score, CONTEXT)

    assert merged.weights == {"a": 1 / 3, "b": 1 / 3, "d": 1 / 3}
    assert merged.score == 2.5
    assert dict(merged.formulas)["w"].materialise().item() == pytest.approx(1011 / 3)
    assert [(d["member"], d["soup_score"], d["accepted"]) for d in merged.decisions] == [
        ("a", 3.0, True), ("b", 2.9, True), ("c", 2.95, False), ("d", 2.5, True),
    ]  # fmt: skip


def test_the_greedy_soup_is_never_worse_than_the_best_member_and_asks_once_for_each_other_member() -> None:
    for seed in range(20):
        draw = torch.rand(20, generator=torch.Generator().manual_seed(seed)).tolist()
        members = [numbered(f"m{i}", i + 1, draw[i]) for i in range(8)]
        asked: list[float] = []

        def evaluate(candidate: Candidate, asked: list[float] = asked, draw: list[float] = draw) -> float:
            list(candidate)
            asked.append(draw[8 + len(asked)])
            return asked[-1]

        merged = ModelSoups().merge(members, no_base, evaluate, CONTEXT)

        assert len(asked) == 7
        assert merged.score == min(draw[:8] + asked) <= min(draw[:8])


def test_a_soup_that_is_just_as_good_is_not_taken_and_a_margin_asks_for_more() -> None:
    members = [numbered("a", 1, 3.0), numbered("b", 10, 3.0)]

    def weights(score: float, margin: float) -> dict[str, float]:
        merged = ModelSoups(margin=margin).merge(members, no_base, lambda candidate: score, CONTEXT)
        return merged.weights

    assert weights(3.0, 0.0) == {"a": 1.0}
    assert weights(2.75, 0.0) == {"a": 0.5, "b": 0.5}
    assert weights(2.75, 0.25) == {"a": 1.0}
    assert weights(2.5, 0.25) == {"a": 0.5, "b": 0.5}


def test_the_order_is_by_score_then_by_name_however_the_members_come() -> None:
    members = [numbered("c", 1, 3.0), numbered("a", 10, 3.0), numbered("d", 1000, 2.0), numbered("b", 100, 3.0)]
    orders = []
    for given in (members, members[::-1], sorted(members, key=lambda m: m.name)):
        merged = ModelSoups().merge(given, no_base, lambda candidate: 5.0, CONTEXT)
        orders.append([d["member"] for d in merged.decisions])

    assert orders == [["d", "a", "b", "c"]] * 3


def test_a_candidate_without_a_finite_score_is_not_taken() -> None:
    members = [numbered("a", 1, 3.0), numbered("b", 10, 3.0)]

    for score in (math.inf, math.nan):
        merged = ModelSoups().merge(members, no_base, lambda candidate, score=score: score, CONTEXT)  # type: ignore[misc]
        assert merged.weights == {"a": 1.0}
        assert merged.decisions[1]["soup_score"] is None


def test_uniform_takes_all_and_scores_the_soup_once() -> None:
    members = [numbered(f"m{i}", 10.0**i, 3.0 + i) for i in range(3)]
    asked: list[float] = []

    def evaluate(candidate: Candidate) -> float:
        asked.append(dict(candidate)["w"].materialise().item())
        return 4.5

    merged = ModelSoups(mode="uniform").merge(members, no_base, evaluate, CONTEXT)

    assert merged.weights == {f"m{i}": float(Fraction(1, 3)) for i in range(3)}
    assert asked == [pytest.approx(37)]
    assert merged.score == 4.5


@pytest.mark.parametrize("mode", ["greedy", "uniform"])
def test_one_member_is_its_own_soup_at_no_cost(mode: str) -> None:
    merged = ModelSoups(mode=mode).merge([numbered("only", 7, 3.0)], no_base, refuse, CONTEXT)

    assert merged.weights == {"only": 1.0}
    assert merged.score == 3.0
    assert dict(merged.formulas)["w"].materialise().item() == 7


@pytest.mark.parametrize(
    ("setting", "value", "allowed"), [("mode", "grand", "one of greedy, uniform, learned"), ("margin", -0.1, r"in \[0")]
)
def test_a_setting_out_of_range_is_refused_by_name(setting: str, value: Any, allowed: str) -> None:
    with pytest.raises(SettingsError, match=rf"model_soups\.{setting} must be {allowed}"):
        ModelSoups(**{setting: value})


# --- why it works, and where it does not --------------------------------------------------------------------------------


def test_where_the_loss_is_convex_the_soup_is_at_most_as_bad_as_its_members_on_average() -> None:
    x, truth = random(64, 10, seed=0), random(3, 10, seed=1)
    y = linear(x, truth) + random(64, 3, seed=2, scale=0.1)

    def loss(weight: Tensor) -> float:
        return mse_loss(linear(x, weight), y).item()

    for seed in range(10):
        weights = [truth + random(3, 10, seed=100 * seed + i, scale=0.5) for i in range(4)]
        soup = uniform(*[dense(f"m{i}", w) for i, w in enumerate(weights)])["w"].materialise()
        losses = [loss(w) for w in weights]
        assert loss(soup) < sum(losses) / len(losses)


def test_models_trained_from_one_start_average_well_and_models_of_different_starts_do_not() -> None:
    x = random(256, 8, seed=0)
    labels = (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] * x[:, 3] > 0).long()

    def net(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 48, bias=False), nn.ReLU(), nn.Linear(48, 4, bias=False))

    def trained(model: nn.Module, steps: int, rate: float, batch_seed: int) -> dict[str, Tensor]:
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        generator = torch.Generator().manual_seed(batch_seed)
        for _ in range(steps):
            rows = torch.randint(256, (64,), generator=generator)
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), labels[rows]).backward()
            optimizer.step()
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def loss(weights: dict[str, Tensor]) -> float:
        return cross_entropy(torch.func.functional_call(net(0), weights, x), labels).item()

    def soup(models: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        members = [member(f"m{i}", {name: Formula([Dense(w)]) for name, w in model.items()}) for i, model in enumerate(models)]
        return {name: formula.materialise() for name, formula in uniform(*members).items()}

    start = trained(net(0), 300, 1e-2, 0)

    def tuned(seed: int) -> dict[str, Tensor]:
        model = net(0)
        model.load_state_dict(start)
        return trained(model, 60, 3e-3, seed)

    family, strangers = [tuned(1), tuned(2)], [start, trained(net(5), 300, 1e-2, 1)]
    worst = max(map(loss, [*family, *strangers]))
    assert worst < 0.25
    assert loss(soup(family)) < 1.05 * max(map(loss, family))
    assert loss(soup(strangers)) > 3 * worst
