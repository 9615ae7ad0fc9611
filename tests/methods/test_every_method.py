"""What every registered method keeps, asked of it or not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pare.methods.contract import METHODS, Context, InputGroup, LayerMethod, Method, TrainMethod, family, field_docs, load_all
from pare.methods.parts.formula import Formula
from pare.methods.settings import SettingsError

LAYER = sorted(name for name, cls in load_all().items() if issubclass(cls, LayerMethod))
TRAIN = sorted(name for name, cls in METHODS.items() if issubclass(cls, TrainMethod))
every = pytest.mark.parametrize("name", sorted(METHODS))
every_layer = pytest.mark.parametrize("name", LAYER)

SHAPES = {"x.a.weight": (24, 128), "x.b.weight": (8, 128)}


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
    return InputGroup("x.ab", weights, statistics=statistics)


def compressed(name: str, of: InputGroup) -> dict[str, Formula]:
    cls: Any = METHODS[name]
    formulas: dict[str, Formula] = cls().compress(of, Context(torch.device("cpu"), seed=3))
    return formulas


def test_both_kinds_are_there() -> None:
    assert {"rtn", "gptq"} <= set(LAYER)
    assert {"lora", "qlora"} <= set(TRAIN)


@every
def test_it_says_where_it_comes_from_and_what_it_is(name: str) -> None:
    cls = METHODS[name]
    assert cls.name == name
    assert any(character.isdigit() for character in cls.source), "no year, number or equation in its source"
    assert cls.kind in ("layer", "train")
    assert family(cls)
    assert all(need.name for need in cls.needs)


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
        return of.weights | of.statistics

    assert tensors(given).keys() == tensors(fresh).keys()
    assert all(torch.equal(t, tensors(fresh)[key]) for key, t in tensors(given).items())


@every_layer
def test_there_is_a_finite_formula_of_the_right_shape_for_every_weight_and_no_other(name: str) -> None:
    given = group(name)
    formulas = compressed(name, given)
    assert formulas.keys() == SHAPES.keys()
    for weight, formula in formulas.items():
        assert formula.shape == SHAPES[weight]
        dense = formula.materialise()
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
