"""What every registered method keeps, asked of it or not."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pare.methods.contract import (
    METHODS,
    AllocateMethod,
    Context,
    InputGroup,
    LayerMethod,
    LevelTable,
    Member,
    Merged,
    MergeMethod,
    Method,
    Problem,
    State,
    TrainMethod,
    family,
    field_docs,
    load_all,
)
from pare.methods.parts.formula import Dense, Formula, LowRank
from pare.methods.settings import SettingsError

LAYER = sorted(name for name, cls in load_all().items() if issubclass(cls, LayerMethod))
TRAIN = sorted(name for name, cls in METHODS.items() if issubclass(cls, TrainMethod))
MERGE = sorted(name for name, cls in METHODS.items() if issubclass(cls, MergeMethod))
ALLOCATE = sorted(name for name, cls in METHODS.items() if issubclass(cls, AllocateMethod))
every = pytest.mark.parametrize("name", sorted(METHODS))
every_layer = pytest.mark.parametrize("name", LAYER)
every_merge = pytest.mark.parametrize("name", MERGE)
every_allocate = pytest.mark.parametrize("name", ALLOCATE)

SHAPES = {"x.a.weight": (96, 128), "x.b.weight": (80, 128)}


def group(name: str) -> InputGroup:
    """Two linears that read 96 correlated vectors, and the statistics of these that the method needs."""
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(shape, generator=generator) * 0.02 for n, shape in SHAPES.items()}
    x = torch.randn(96, 40, generator=generator) @ torch.randn(40, 128, generator=generator)
    statistics = {}
    for need in METHODS[name].needs:
        statistic = need()
        statistic.start(128, torch.device("cpu"))
        for chunk in x.split(40):
            statistic.add(chunk)
        statistics[need.name] = statistic.finish()
    for need_of_weight in METHODS[name].needs_gradients:
        for n, shape in SHAPES.items():
            of_gradients = need_of_weight()
            of_gradients.start(shape, torch.device("cpu"))
            for _ in range(2):
                of_gradients.add(torch.randn(shape, generator=generator) * 1e-3)
            statistics[f"{need_of_weight.name}:{n}"] = of_gradients.finish()
    original = {n: w + 0.004 * torch.randn(w.shape, generator=generator) for n, w in weights.items()}
    return InputGroup("x.ab", weights, statistics=statistics, original=original if reads_original(name) else {})


def reads_original(name: str) -> bool:
    cls = METHODS[name]
    return issubclass(cls, LayerMethod) and cls.reads_original


def compressed(name: str, of: InputGroup) -> dict[str, Formula]:
    cls: Any = METHODS[name]
    formulas: dict[str, Formula] = cls().compress(of, Context(torch.device("cpu"), seed=3))
    return formulas


def test_all_kinds_are_there() -> None:
    assert {"rtn", "gptq"} <= set(LAYER)
    assert {"lora", "qlora"} <= set(TRAIN)
    assert {"model_soups", "ties", "slerp", "evolved"} <= set(MERGE)
    assert {"evopress", "ilp"} <= set(ALLOCATE)


@every
def test_it_says_where_it_comes_from_and_what_it_is(name: str) -> None:
    cls = METHODS[name]
    assert cls.name == name
    assert any(character.isdigit() for character in cls.source), "no year, number or equation in its source"
    assert cls.kind in ("layer", "train", "merge", "allocate", "import")
    assert family(cls)
    assert all(need.name for need in (*cls.needs, *cls.needs_gradients))


@every
def test_every_setting_has_a_default_and_a_doc_string_beneath_it(name: str) -> None:
    cls: Any = METHODS[name]
    assert dataclasses.is_dataclass(cls)
    docs = field_docs(cls)
    for setting in dataclasses.fields(cls):
        assert setting.default is not dataclasses.MISSING or setting.default_factory is not dataclasses.MISSING, setting.name
        assert len(docs.get(setting.name, "")) > 15, f"{name}.{setting.name} has no string literal beneath it"


@every
def test_settings_survive_a_round_trip_through_plain_json(name: str) -> None:
    cls: Any = METHODS[name]
    settings: Method = cls()
    plain = json.loads(json.dumps(dataclasses.asdict(settings)))  # type: ignore[call-overload]
    assert cls(**plain) == settings


@every_layer
def test_equal_inputs_give_equal_formulas(name: str) -> None:
    first, second = compressed(name, group(name)), compressed(name, group(name))
    for weight, formula in first.items():
        assert formula.spec() == second[weight].spec()
        assert formula.tensors().keys() == second[weight].tensors().keys()
        assert all(torch.equal(t, second[weight].tensors()[key]) for key, t in formula.tensors().items())


@every_layer
def test_what_it_is_given_is_left_as_it_was(name: str) -> None:
    given, fresh = group(name), group(name)
    compressed(name, given)

    def tensors(of: InputGroup) -> dict[str, Tensor]:
        return of.weights | of.statistics | {f"original {n}": w for n, w in of.original.items()}

    assert tensors(given).keys() == tensors(fresh).keys()
    assert all(torch.equal(t, tensors(fresh)[key]) for key, t in tensors(given).items())


@every_layer
def test_there_is_a_finite_formula_of_the_right_shape_for_every_weight_and_no_other(name: str) -> None:
    given = group(name)
    formulas = compressed(name, given)
    assert formulas.keys() == SHAPES.keys()
    for weight, formula in formulas.items():
        assert formula.shape == SHAPES[weight]
        dense = formula.materialise() + (given.weights[weight] if formula.op == "add" else 0.0)
        assert dense.dtype == torch.float32
        assert dense.isfinite().all()
        assert (dense - given.weights[weight]).norm() < given.weights[weight].norm()


@every_layer
def test_what_it_makes_comes_back_from_a_file_bit_for_bit(name: str, tmp_path: Path) -> None:
    for weight, formula in compressed(name, group(name)).items():
        save_file(formula.tensors(), tmp_path / "operands.safetensors")
        spec = json.loads(json.dumps(formula.spec()))
        again = Formula.from_tensors(spec, load_file(tmp_path / "operands.safetensors"))
        assert torch.equal(again.materialise(), formula.materialise()), weight


@every_layer
def test_shapes_are_checked_without_weights_and_a_refusal_names_the_layer(name: str) -> None:
    cls: Any = METHODS[name]

    def refusal(shapes: dict[str, tuple[int, int]]) -> str:
        try:
            cls().check_shapes(shapes)
        except SettingsError as e:
            return str(e)
        return ""

    assert not refusal(SHAPES)
    odd = refusal({"model.layers.7.odd.weight": (8, 97)})
    assert not odd or (odd.startswith(name) and "model.layers.7.odd.weight" in odd)


BASE = {name: torch.randn(shape, generator=torch.Generator().manual_seed(7)) for name, shape in SHAPES.items()}


def members() -> dict[str, dict[str, Formula]]:
    """What three models make of the two weights: low-rank updates of one, another dense weight, or nothing."""
    made = {}
    for i, name in enumerate(("third", "first", "second")):
        generator = torch.Generator().manual_seed(i)
        update = LowRank(torch.randn(4, 128, generator=generator), torch.randn(96, 4, generator=generator), 0.01)
        weight = BASE["x.b.weight"] + 0.01 * torch.randn(80, 128, generator=generator)
        made[name] = {"x.a.weight": Formula([update], "add"), "x.b.weight": Formula([Dense(weight)])}
    del made["third"]["x.b.weight"]
    return made


def merged(name: str, of: dict[str, dict[str, Formula]], order: Iterable[str]) -> tuple[Merged, dict[str, Formula]]:
    cls: Any = METHODS[name]
    scores = {"first": 2.0, "second": 2.5, "third": 2.5}

    def evaluate(candidate: Iterable[tuple[str, Formula]]) -> float:
        return 1.5 + sum(formula.materialise().norm().item() for _, formula in candidate) / 100

    most = cls.takes[1] or len(of)
    chosen = [member for member in order if member in sorted(of)[:most]]
    given = [Member(member, scores[member], list(of[member]), of[member].get) for member in chosen]
    answer: Merged = cls().merge(given, BASE.__getitem__, evaluate, Context(torch.device("cpu"), seed=3))
    return answer, dict(answer.formulas)


@every_merge
def test_a_merge_does_not_depend_on_the_order_in_which_its_members_come(name: str) -> None:
    one, formulas = merged(name, members(), ("first", "second", "third"))
    two, again = merged(name, members(), ("third", "second", "first"))

    assert (list(one.weights.items()), one.score, one.decisions) == (list(two.weights.items()), two.score, two.decisions)
    assert list(formulas) == list(again)
    assert all(torch.equal(formula.materialise(), again[weight].materialise()) for weight, formula in formulas.items())


@every_merge
def test_a_merge_gives_finite_weights_of_the_right_shape_that_come_back_from_a_file(name: str, tmp_path: Path) -> None:
    answer, formulas = merged(name, members(), ("first", "second", "third"))

    assert set(answer.weights) <= {"first", "second", "third"}
    assert answer.weights
    assert json.loads(json.dumps(answer.decisions, allow_nan=False)) == answer.decisions
    assert formulas.keys() == SHAPES.keys()
    for weight, formula in formulas.items():
        assert formula.shape == SHAPES[weight]
        assert formula.materialise().isfinite().all()
        save_file(formula.tensors(), tmp_path / "operands.safetensors")
        again = Formula.from_tensors(json.loads(json.dumps(formula.spec())), load_file(tmp_path / "operands.safetensors"))
        assert torch.equal(again.materialise(), formula.materialise()), weight


@every_merge
def test_a_merge_leaves_its_members_and_the_base_as_they_were(name: str) -> None:
    given, base = members(), {weight: t.clone() for weight, t in BASE.items()}
    merged(name, given, ("first", "second", "third"))

    for member, formulas in members().items():
        for weight, formula in formulas.items():
            assert torch.equal(given[member][weight].materialise(), formula.materialise()), (member, weight)
    assert all(torch.equal(BASE[weight], t) for weight, t in base.items())


TOY = LevelTable(
    linears=[f"model.layers.{i // 4}.{i}.weight" for i in range(12)],
    blocks=[i // 4 for i in range(12)],
    sizes=[640 if i % 4 else 1280 for i in range(12)],
    levels=[2, 3, 4, 8],
    cost=[[(640 if i % 4 else 1280) * bits // 8 + 10 for bits in (2, 3, 4, 8)] for i in range(12)],
    error=[[(1 + (7 * i) % 5) ** 2 * 4.0 ** (2 - bits) for bits in (2, 3, 4, 8)] for i in range(12)],
)
PROBLEM = Problem(TOY, windows=16, length=512, seed=3)


def kl_of(choice: list[int]) -> float:
    """Nearly additive: neighbours make each other's harm a little worse."""
    harm = [TOY.error[i][k] for i, k in enumerate(choice)]
    return sum(harm) / 100 + sum(a * b for a, b in itertools.pairwise(harm)) / 1e4


def tell(method: AllocateMethod, state: State, n: int = 1000) -> State:
    questions = method.ask(PROBLEM, state, n)
    tokens = sum(tokens for question in questions for _, tokens in question.pieces)
    return method.tell(PROBLEM, state, [kl_of(question.choice) for question in questions], tokens)


def searched(method: AllocateMethod) -> list[State]:
    """The states of a whole search."""
    states = [method.start(PROBLEM)]
    while method.ask(PROBLEM, states[-1], 1):
        states.append(tell(method, states[-1]))
        assert len(states) < 1000
    return states


@every_allocate
@pytest.mark.parametrize("target", [2, 2.3, 3, 5.5, 8])
def test_an_allocation_stays_within_the_bytes_of_its_target(name: str, target: float) -> None:
    cls: Any = METHODS[name]
    method: AllocateMethod = cls(target=target)
    budget, uniform = method.budget(TOY), [TOY.bytes([k] * 12) for k in range(4)]
    choice = method.answer(PROBLEM, searched(method)[-1])

    assert uniform[0] <= budget <= uniform[-1]
    assert target not in TOY.levels or budget == uniform[TOY.levels.index(target)]
    assert set(TOY.allocation(choice)) == set(TOY.linears)
    assert budget - 640 * 4 // 8 < TOY.bytes(choice) <= budget
    if target == 8:
        assert choice == [3] * 12


@every_allocate
def test_a_search_that_is_stopped_anywhere_goes_on_to_the_same_answer(name: str) -> None:
    cls: Any = METHODS[name]
    states = searched(cls())
    plain = [json.loads(json.dumps(state, allow_nan=False)) for state in states]

    assert plain == states
    for before, after in itertools.pairwise(plain):
        kept = json.dumps(before)
        assert tell(cls(), before) == after
        assert json.dumps(before) == kept, "tell changed the state it was given"
    assert searched(cls())[-1] == states[-1]


@every_allocate
def test_answers_may_be_told_in_any_portions(name: str) -> None:
    cls: Any = METHODS[name]
    method: AllocateMethod = cls()
    state = method.start(PROBLEM)
    while questions := method.ask(PROBLEM, state, 3):
        assert len(questions) <= 3
        assert method.ask(PROBLEM, state, 3) == questions
        state = tell(method, state, 3)

    assert state == searched(method)[-1]


@every_allocate
def test_a_target_out_of_reach_is_refused_with_the_range_before_anything_runs(name: str) -> None:
    cls: Any = METHODS[name]

    for target in (1.9, 8.5):
        with pytest.raises(SettingsError, match=rf"{name}.target must be in \[2, 8\], the range of the levels, got {target}"):
            cls(target=target).check_levels([4, 2, 8])
    with pytest.raises(SettingsError, match="one of the levels, of which there are none"):
        cls().check_levels([])
