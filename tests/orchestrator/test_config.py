"""From typed overrides to trials: expansion, and every kind of mistake refused with the nearest thing that exists."""

import pytest

from pare.orchestrator import config
from pare.orchestrator.errors import ConfigError


def trials(*overrides: str) -> dict[str, dict]:
    return {trial.name: trial.overrides for trial in config.load(list(overrides)).trials}


def test_commas_sweep_any_key() -> None:
    found = trials("recipe=rtn", "recipe.quantize.bits=3,4", "seed=0,1")

    assert len(found) == 4
    assert found["rtn-bits=3-seed=1"] == {"recipe.quantize.bits": 3, "seed": 1}


def test_a_range_and_a_choice_are_read_by_hydras_grammar() -> None:
    assert list(trials("recipe=rtn", "recipe.quantize.bits=range(2,5)")) == ["rtn-bits=2", "rtn-bits=3", "rtn-bits=4"]
    assert len(trials("recipe=rtn", "recipe.quantize.bits=choice(2,8)")) == 2


def test_the_recipe_itself_can_be_swept() -> None:
    assert list(trials("recipe=rtn,gptq", "recipe.quantize.bits=3")) == ["rtn", "gptq"]


def test_trials_of_an_experiment_are_the_union_of_its_blocks() -> None:
    found = config.load(["experiment=demo"]).trials

    assert [t.block for t in found] == ["base", "rtn", "rtn", "qlora", "lora", "lora", "gptq", "gptq"]
    assert {t.name for t in found} >= {"base", "rtn-bits=4", "rtn-bits=3", "gptq-bits=4", "gptq-bits=3"}
    assert next(t for t in found if t.name == "gptq-bits=3").stages[0].settings.bits == 3


def test_a_recipe_key_on_the_command_line_reaches_the_blocks_that_have_it() -> None:
    found = config.load(["experiment=demo", "recipe.quantize.group_size=32"]).trials

    sizes = {t.name: t.stages[0].settings.group_size for t in found if t.stages and hasattr(t.stages[0].settings, "group_size")}
    assert set(sizes.values()) == {32}
    assert len(found) == 8


def test_one_block_is_addressed_by_its_name() -> None:
    found = trials("experiment=demo", "blocks.gptq.recipe.quantize.bits=4,3,2")

    assert [name for name in found if name.startswith("gptq")] == ["gptq-bits=4", "gptq-bits=3", "gptq-bits=2"]
    assert [name for name in found if name.startswith("rtn")] == ["rtn-bits=4", "rtn-bits=3"]


def test_a_further_method_joins_a_recipe_by_plus_group() -> None:
    trial = config.load(["recipe=rtn", "+method@recipe.again=gptq", "recipe.again.bits=3"]).trials[0]

    assert [stage.method for stage in trial.stages] == ["rtn", "gptq"]


def test_invalid_combinations_can_be_skipped_and_are_listed() -> None:
    found = config.load(["recipe=rtn", "recipe.quantize.bits=0,4", "sweep.invalid=skip"]).trials

    assert [bool(t.skipped) for t in found] == [True, False]
    assert "recipe.quantize.bits must be in" in (found[0].skipped or "")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["experiment=dmo"], ["unknown experiment 'dmo'", "'demo'"]),
        (["recipe=rtnn"], ["unknown recipe 'rtnn'", "'rtn'"]),
        (["recipe=rtn", "method@recipe.quantize=gtpq"], ["unknown method 'gtpq'", "'gptq'"]),
        (["recipe=rtn", "recipe.quantize.bitz=3"], ["'recipe.quantize.bitz'", "'recipe.quantize.bits'"]),
        (["recipe=rtn", "+recipe.quantize.bitz=3"], ["'recipe.quantize.bitz'", "'recipe.quantize.bits'"]),
        (["recipe=rtn", "+typo=1"], ["unknown setting 'typo'"]),
        (["recipe=rtn", "+model.dtpe=float16"], ["'model.dtpe'", "'model.dtype'"]),
        (
            ["recipe=rtn", "recipe.quantize.bits=0"],
            ["recipe.quantize.bits must be in [2, 8], got 0", "Try: recipe.quantize.bits=4"],
        ),
        (["recipe=rtn", "recipe.quantize.bits=abc"], ["recipe.quantize.bits=abc", "Integer"]),
        (["recipe=rtn", "recipe.quantize.method=gptq"], ["method@recipe.quantize=gptq"]),
        (["experiment=demo", "recipe.quantize.bitz=3"], ["no recipe of this experiment", "'recipe.quantize.bits'"]),
        (["experiment=demo", "blocks.gtpq.recipe.quantize.bits=3"], ["no block 'gtpq'", "'gptq'"]),
        (["experiment=demo", "recipe=rtn"], ["already names its recipes"]),
        (["model=hf", "recipe=rtn"], ["model.path"]),
        (["data=text", "recipe=rtn"], ["data.path=FILE"]),
        (["recipe=rtn", "evaluation.windows.length=0"], ["evaluation.windows.length must be >= 8"]),
        (["recipe=rtn", "sweep.invalid=maybe"], ["sweep.invalid must be error or skip"]),
        ([], ["experiment=demo", "recipe=gptq"]),
        (["recipe=rtn", "=3"], ["cannot read '=3' as KEY=VALUE"]),
    ],
)
def test_a_mistake_is_refused_with_what_to_type_instead(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        config.load(overrides)

    for word in words:
        assert word in str(error.value)


def test_every_experiment_and_recipe_file_can_be_loaded() -> None:
    from pathlib import Path

    import pare.conf

    root = Path(pare.conf.__path__[0])
    experiments = sorted(p.stem for p in (root / "experiment").glob("*.yaml"))
    recipes = sorted(p.stem for p in (root / "recipe").glob("*.yaml"))
    assert len(experiments) >= 2
    assert len(recipes) >= 5

    for name in experiments:
        assert config.load([f"experiment={name}"]).trials
    for name in recipes:
        assert config.load([f"recipe={name}"]).trials


def test_a_config_directory_of_ones_own_is_searched(tmp_path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nname: mine\nblocks:\n  r: {recipe: rtn, sweep: {recipe.quantize.bits: 5}}\n"
    )

    assert [t.name for t in config.load(["experiment=mine"], config_dir=str(tmp_path)).trials] == ["r"]


def test_a_plugin_file_brings_a_method(tmp_path) -> None:
    plugin = tmp_path / "noop_method.py"
    plugin.write_text(
        '"""No-op."""\nfrom dataclasses import dataclass\nfrom pare.methods.contract import LayerMethod, method\n'
        'from pare.methods.parts.formula import Dense, Formula\n\n@method("noop", source="test")\n@dataclass\n'
        "class Noop(LayerMethod):\n    factor: float = 1.0\n    def compress_weight(self, name, weight, statistics, context):\n"
        "        return Formula([Dense(weight)])\n"
    )
    from pare.methods.contract import METHODS

    try:
        trial = config.load([f"plugins=[{plugin}]", "recipe=base", "+method@recipe.x=noop", "recipe.x.factor=2"]).trials[0]

        assert trial.stages[0].settings.factor == 2.0
    finally:
        METHODS.pop("noop", None)
