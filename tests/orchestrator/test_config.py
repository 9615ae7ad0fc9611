"""From typed overrides to trials: expansion, and every kind of mistake refused with the nearest thing that exists."""

import json
from pathlib import Path

import pytest

from pare.orchestrator import config
from pare.orchestrator.errors import ConfigError
from pare.orchestrator.trials import candidates


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

    assert [t.block for t in found] == ["base", "rtn", "rtn", "qlora", "lora", "lora", "gptq", "gptq", "soup", "search"]
    assert {t.name for t in found} >= {"base", "rtn-bits=4", "rtn-bits=3", "gptq-bits=4", "gptq-bits=3"}
    assert next(t for t in found if t.name == "gptq-bits=3").stages[0].settings.bits == 3


def test_a_recipe_key_on_the_command_line_reaches_the_blocks_that_have_it() -> None:
    found = config.load(["experiment=demo", "recipe.quantize.group_size=32"]).trials

    sizes = {t.name: t.stages[0].settings.group_size for t in found if t.stages and hasattr(t.stages[0].settings, "group_size")}
    assert set(sizes.values()) == {32}
    assert len(found) == 10


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
        (["recipe=rtn", "modle.dtype=float16,float32"], ["unknown setting 'modle.dtype'", "'model.dtype'"]),
        (["recipe=rtn", "recipe.quantize.bits=interval(2,4)"], ["recipe.quantize.bits=interval(2,4)", "CHOICE and RANGE"]),
        (["recipe=rtn", "cluster.slots=1,2"], ["cluster.slots=1,2", "cluster holds for the whole sweep"]),
        (["experiment=demo", "blocks.rtn.budget.wall_s=9"], ["budget.wall_s=9", "budget holds for the whole sweep"]),
        (["recipe=rtn", "seed=-1"], ["seed must be an integer >= 0"]),
        (["recipe=rtn", "store.keep=al"], ["store.keep must be all, pareto or exports, got 'al'"]),
        (["recipe=rtn", "store.kep=all"], ["unknown setting 'store.kep'", "'store.keep'"]),
        (["recipe=rtn", "store.limit_gb=0"], ["store.limit_gb must be > 0"]),
        (["recipe=rtn", "budget.gpu_hours=-1"], ["budget.gpu_hours must be > 0", "Try: budget.gpu_hours=null"]),
        (["recipe=rtn", "budget.trials=x"], ["budget.trials=x", "Integer"]),
        (["recipe=rtn", "cluster.address=head"], ["cluster.address must be local, auto, HOST:PORT or ray://HOST:PORT"]),
        (["recipe=rtn", "cluster.gpus=[1,1]"], ["cluster.gpus must be one or more different numbers >= 0"]),
        (["recipe=rtn", "cluster.gpus=[0]", "cluster.device=cpu"], ["cluster.gpus must be null with cluster.device=cpu"]),
        (["recipe=rtn", "cluster.stall_s=0"], ["cluster.stall_s must be > 0"]),
        (["recipe=rtn", "data.selection.length=2"], ["data.selection.length must be >= 8"]),
        (["recipe=rtn", "data.validation.sequences=0"], ["data.validation.sequences must be >= 1"]),
        (["recipe=rtn", "data.revision=main"], ["data.revision must be null unless data.name is a name of the hub"]),
        (["recipe=rtn", "data.config=en"], ["data.config must be null unless data=hf"]),
        (["recipe=soup"], ["there is no block 'lora'", "recipe=lora,soup"]),
        (["recipe=lora,soup", "recipe.merge.members.blocks=[lra]"], ["there is no block 'lra'", "Did you mean 'lora'?"]),
        (["recipe=lora,soup", "recipe.merge.members.blocks=[]"], ["recipe.merge.members.blocks must be a list of blocks"]),
        (["recipe=lora,soup", "recipe.merge.members.blocks=[soup]"], ["in a circle: soup -> soup"]),
        (["recipe=lora,soup", "recipe.merge.members.blocks=['*']"], ["in a circle: soup -> soup"]),
        (["recipe=lora,soup", "recipe.merge.members.top=0"], ["recipe.merge.members.top must be >= 1 (null: all), got 0"]),
        (["recipe=lora,soup", "recipe.merge.members.tp=1"], ["'recipe.merge.members.tp'", "'recipe.merge.members.top'"]),
        (
            ["recipe=lora", "+method@recipe.merge=model_soups", "+recipe.merge.members.blocks=[lora]"],
            ["block 'lora': recipe.merge", "can only be the first stage of a recipe", "Move 'tune' behind it"],
        ),
        (["recipe=rtn", "+recipe.quantize.members=x"], ["unknown setting 'recipe.quantize.members'"]),
        (["recipe=ilp", "recipe.search.levels.bitz=3"], ["'recipe.search.levels.bitz'", "'recipe.search.levels.bits'"]),
        (["recipe=ilp", "recipe.search.levels.damping=0"], ["recipe.search.levels.damping must be in (0"]),
        (["recipe=ilp", "recipe.search.levels.method=rtn"], ["method@recipe.search.levels=rtn"]),
        (
            ["recipe=ilp", "method@recipe.search.levels=lora"],
            ["recipe.search.levels: lora is a method of kind 'train'", "gptq"],
        ),
        (
            ["recipe=ilp", "method@recipe.search.levels=awq"],
            ["recipe.search.levels: awq folds factors into what stands before its linears", "gptq or rtn"],
        ),
        (["recipe=ilp", "recipe.search.vary.bits=[3]"], ["recipe.search.vary.bits must be two or more different numbers"]),
        (["recipe=ilp", "recipe.search.vary.bits=[3,x]"], ["recipe.search.vary.bits", "Integer"]),
        (["recipe=ilp", "recipe.search.vary.bits=[3,9]"], ["recipe.search.vary.bits: bits must be in [2, 8], got 9"]),
        (["recipe=ilp", "recipe.search.vary={group_size:[32,64]}"], ["names bits, group_size", "~recipe.search.vary.bits"]),
        (
            ["recipe=ilp", "~recipe.search.vary.bits", "+recipe.search.vary.bitz=[2,3]"],
            ["gptq has no setting 'bitz'", "Did you mean 'bits'?"],
        ),
        (["recipe=ilp", "recipe.search.target=9"], ["recipe.search.target must be in [2, 6]", "got 9"]),
        (["recipe=base", "+method@recipe.search=ilp"], ["recipe.search.levels", "+method@recipe.search.levels=gptq"]),
        (
            ["recipe=base", "+method@recipe.search=ilp", "+method@recipe.search.levels=rtn"],
            ["recipe.search.vary is empty", "+recipe.search.vary.bits=[2,3,4]"],
        ),
    ],
)
def test_a_mistake_is_refused_with_what_to_type_instead(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        config.load(overrides)

    for word in words:
        assert word in str(error.value)


def test_every_experiment_and_recipe_file_can_be_loaded() -> None:
    import pare.conf

    root = Path(pare.conf.__path__[0])
    experiments = sorted(p.stem for p in (root / "experiment").glob("*.yaml"))
    recipes = sorted(p.stem for p in (root / "recipe").glob("*.yaml"))
    assert len(experiments) >= 2
    assert len(recipes) >= 5

    for name in experiments:
        assert config.load([f"experiment={name}"]).trials
    for name in recipes:
        members = "lora," if name in ("soup", "merge") else ""
        assert config.load([f"recipe={members}{name}"]).trials


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


def test_trials_hold_one_object_where_they_say_the_same() -> None:
    found = config.load(["recipe=rtn,gptq", "recipe.quantize.bits=3,4", "recipe.quantize.group_size=32,64"]).trials

    assert len(found) == 8
    for part in ("model", "data", "evaluation"):
        assert len({id(getattr(t, part)) for t in found}) == 1
        assert len({id(t.config[part]) for t in found}) == 1
    assert len({id(t.stages[0].settings) for t in found}) == 8


def test_a_stage_is_shared_by_the_trials_that_differ_elsewhere() -> None:
    one, two = config.load(["recipe=gptq", "evaluation.windows.length=64,128"]).trials

    assert one.stages[0] is two.stages[0]
    assert one.config["recipe"]["quantize"] is two.config["recipe"]["quantize"]
    assert (one.evaluation.windows.length, two.evaluation.windows.length) == (64, 128)
    assert one.config["evaluation"]["windows"] == {"sequences": 8, "length": 64}


def test_a_swept_value_stays_within_its_trial() -> None:
    found = config.load(["recipe=gptq", "recipe.quantize.bits=2,3,4", "data.calibration.sequences=4,8"]).trials

    assert [(t.stages[0].settings.bits, t.data.calibration.sequences) for t in found] == [
        (2, 4), (2, 8), (3, 4), (3, 8), (4, 4), (4, 8)
    ]  # fmt: skip
    for t in found:
        assert t.config["recipe"]["quantize"]["bits"] == t.stages[0].settings.bits
        assert t.config["data"]["calibration"]["sequences"] == t.data.calibration.sequences


def test_values_are_converted_to_the_type_of_their_setting() -> None:
    trial = config.load(["recipe=gptq", "recipe.quantize.damping=1", "evaluation.tolerance=1", "recipe.quantize.mse=0"]).trials[
        0
    ]

    assert repr(trial.stages[0].settings.damping) == "1.0"
    assert trial.stages[0].settings.mse is False
    assert repr(trial.config["evaluation"]["tolerance"]) == "1.0"


def test_an_interpolation_follows_the_value_that_is_swept() -> None:
    found = config.load(["recipe=gptq", "data.seed=${seed}", "seed=1,2", "recipe.quantize.bits=3,4"]).trials

    assert [(t.seed, t.data.seed, t.stages[0].settings.bits) for t in found] == [(1, 1, 3), (1, 1, 4), (2, 2, 3), (2, 2, 4)]


def test_a_setting_reaches_the_swept_recipes_that_have_it() -> None:
    assert list(trials("recipe=rtn,lora", "recipe.quantize.bits=3,4")) == ["rtn-bits=3", "rtn-bits=4", "lora"]


def test_a_setting_of_a_method_that_was_added_can_be_swept() -> None:
    found = config.load(["recipe=rtn", "+method@recipe.again=gptq", "recipe.again.bits=2,3"]).trials

    assert [t.stages[1].settings.bits for t in found] == [2, 3]


def test_a_recipe_without_defaults_list_is_checked_like_any(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("quantize: {method: rtn, bits: 3}\n")
    (tmp_path / "recipe" / "typo.yaml").write_text("quantize: {method: rtn, bits: many}\n")

    trial = config.load(["recipe=mine", "recipe.quantize.group_size=32"], config_dir=str(tmp_path)).trials[0]

    assert (trial.stages[0].settings.bits, trial.stages[0].settings.group_size) == (3, 32)
    with pytest.raises(ConfigError, match=r"recipe\.quantize\.bits.*many"):
        config.load(["recipe=typo"], config_dir=str(tmp_path))


def test_a_root_config_of_ones_own_may_leave_groups_and_keys_out(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [{model: tiny}, {recipe: null}]\n")

    found = config.load(["recipe=rtn", "store.keep=exports"], config_dir=str(tmp_path), config_name="mine")

    assert (found.trials[0].seed, found.store.keep, found.cluster.address) == (0, "exports", "local")


def test_a_value_that_a_config_leaves_open_has_to_be_given(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("source: text\npath: ???\n")
    given = ["recipe=rtn", "data=mine"]

    with pytest.raises(ConfigError, match=r"data\.path has to be given\. Try: data\.path=VALUE"):
        config.load(given, config_dir=str(tmp_path))
    assert config.load([*given, "data.path=x.txt"], config_dir=str(tmp_path)).trials[0].data.path == "x.txt"


def test_what_holds_for_the_sweep_is_kept_apart_from_its_trials() -> None:
    typed = ["recipe=rtn", "cluster.gpus=[0,3]", "cluster.labels={zone: a}", "store.url=s3://b/p", "budget.wall_s=60"]

    found = config.load(typed)

    assert (found.cluster.gpus, found.cluster.labels) == ([0, 3], {"zone": "a"})
    assert (found.store.url, found.store.keep, found.budget.wall_s, found.budget.trials) == ("s3://b/p", "all", 60.0, None)
    assert found.request == config.Request(typed, None, "config")
    assert found.trials[0].config == config.load(["recipe=rtn"]).trials[0].config


@pytest.mark.parametrize("address", ["local", "auto", "10.0.0.1:6379", "ray://head:10001"])
def test_a_cluster_is_named_by_its_address(address: str) -> None:
    assert config.load(["recipe=rtn", f"cluster.address='{address}'"]).cluster.address == address


def test_a_merge_ranges_over_the_trials_of_its_blocks_on_the_same_base() -> None:
    typed = ["recipe=lora,rtn,soup", "recipe.tune.rank=2,4", "recipe.tune.alpha=4,8", "model=tiny,smollm2"]
    found = config.load([*typed, "recipe.merge.members={blocks: ['l*'], top: 2}"]).trials
    soups = [t for t in found if t.recipe == "soup"]

    assert [(s.stages[0].members.blocks, s.stages[0].members.top) for s in soups] == [(["l*"], 2)] * 2
    for soup in soups:
        names = {t.name for t in candidates(soup, found)}
        assert len(names) == 4
        assert names == {t.name for t in found if t.recipe == "lora" and t.model.source == soup.model.source}


def test_methods_of_a_stage_are_swept_in_the_recipes_that_have_the_stage() -> None:
    found = config.load(["recipe=base,lora,merge", "recipe.tune.rank=2,4", "method@recipe.merge=ties,dare"]).trials

    assert [(t.block, [s.method for s in t.stages]) for t in found] == [
        ("base", []), ("lora", ["lora"]), ("lora", ["lora"]), ("merge", ["ties"]), ("merge", ["dare"]),
    ]  # fmt: skip
    assert [t.name for t in found][3:] == ["merge-merge=ties", "merge-merge=dare"]
    with pytest.raises(ConfigError, match=r"method@recipe.mrge"):
        config.load(["recipe=lora,merge", "method@recipe.mrge=ties"])


def test_a_merge_whose_members_are_all_skipped_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no trial of lora runs on the base model of 'soup'"):
        config.load(["recipe=lora,soup", "recipe.tune.rank=0", "sweep.invalid=skip"])


def test_blocks_that_merge_one_another_are_refused_by_the_circle_they_make(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "circle.yaml").write_text(
        "# @package _global_\nblocks:\n  lora: {recipe: lora}\n"
        "  one: {recipe: soup, sweep: {recipe.merge.members.blocks: '[two]'}}\n"
        "  two: {recipe: soup, sweep: {recipe.merge.members.blocks: '[lora,one]'}}\n"
    )

    with pytest.raises(ConfigError, match=r"circle: (one -> two -> one|two -> one -> two)"):
        config.load(["experiment=circle"], config_dir=str(tmp_path))
    ring = config.load(["experiment=circle", "blocks.two.recipe.merge.members.blocks=[lora]"], config_dir=str(tmp_path))
    assert [t.name for t in ring.trials] == ["lora", "one", "two"]


def test_an_allocation_names_the_method_and_the_values_of_its_levels() -> None:
    found = config.load(["recipe=ilp", "recipe.search.vary.bits=[4,2,3]", "recipe.search.levels.group_size=32,64"]).trials

    for trial, size in zip(found, (32, 64), strict=True):
        (stage,) = trial.stages
        assert stage.vary == {"bits": [2, 3, 4]}
        assert (stage.levels.method, stage.levels.settings.group_size) == ("gptq", size)


def test_the_method_that_makes_the_levels_is_a_choice_like_any() -> None:
    found = config.load(["recipe=ilp", "method@recipe.search.levels=rtn,gptq"]).trials

    assert [t.stages[0].levels.method for t in found] == ["rtn", "gptq"]


def test_a_setting_with_the_name_of_a_stage_key_is_refused(tmp_path: Path) -> None:
    plugin = tmp_path / "clash_method.py"
    plugin.write_text(
        '"""Clash."""\nfrom dataclasses import dataclass\nfrom pare.methods.contract import MergeMethod, method\n\n'
        '@method("clash", source="test")\n@dataclass\nclass Clash(MergeMethod):\n    members: int = 1\n'
    )
    from pare.methods.contract import METHODS

    try:
        with pytest.raises(ConfigError, match="method 'clash': a setting cannot be called 'members'"):
            config.load([f"plugins=[{plugin}]", "recipe=rtn"])
    finally:
        METHODS.pop("clash", None)


def kept(experiment: config.Experiment) -> tuple[list[dict], dict]:
    """What the ledger keeps of an experiment."""
    rows = [
        {
            **{key: getattr(t, key) for key in ("name", "block", "recipe")},
            **{key: json.dumps(getattr(t, key)) for key in ("overrides", "config")},
            "status": "skipped" if t.skipped else "pending",
        }
        for t in experiment.trials
    ]
    return rows, json.loads(json.dumps(experiment.common()))


@pytest.mark.parametrize(
    "typed",
    [
        ["recipe=rtn,lora,soup,ilp", "recipe.quantize.bits=3,4", "recipe.tune.rank=2,4", "seed=1", "store.keep=pareto"],
        ["recipe=rtn", "recipe.quantize.bits=0,4", "sweep.invalid=skip", "cluster.labels={zone: a}", "budget.trials=3"],
        ["experiment=demo", "name=other", "data.seed=${seed}"],
    ],
)
def test_an_experiment_is_restored_from_what_the_ledger_keeps(typed: list[str]) -> None:
    experiment = config.load(typed)

    again = config.restore(*kept(experiment))

    assert again == experiment
    assert len({id(t.data) for t in again.trials}) == len({id(t.data) for t in experiment.trials}) == 1


def test_a_sweep_is_restored_without_the_directory_that_its_configs_came_from(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("defaults: [{/method@first: rtn}, {/method@second: lora}]\n")
    experiment = config.load(["recipe=mine", "recipe.first.bits=3,4"], config_dir=str(tmp_path))
    (tmp_path / "recipe" / "mine.yaml").unlink()

    again = config.restore(*kept(experiment), ["cluster.slots=1", "budget.wall_s=5"])

    assert again.trials == experiment.trials
    assert (again.cluster.slots, again.budget.wall_s) == (1, 5.0)
    assert again.request.config_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("recipe.quantize.bits=3", "only values beneath cluster, tracking, store, budget"),
        ("cluster=auto", "only values beneath cluster"),
        ("cluster.slots=1,2", "only one value"),
        ("+cluster.slots=1", "only one value"),
        ("cluster.slot=1", "Did you mean 'cluster.slots'?"),
        ("cluster.slots=many", "Integer"),
        ("budget.wall_s=0", "budget.wall_s must be > 0"),
    ],
)
def test_a_sweep_that_goes_on_refuses_what_would_make_it_another(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.restore(*kept(config.load(["recipe=rtn"])), [override])

    assert words in str(error.value)


def test_a_trial_is_made_again_with_other_values() -> None:
    trial = config.load(["recipe=gptq", "recipe.quantize.bits=3,4"]).trials[0]

    other = config.changed(trial, ["recipe.quantize.bits=2", "data.calibration.sequences=4", "recipe.quantize.damping=1"])

    assert other.name == "gptq-bits=2-sequences=4-damping=1"
    assert (other.stages[0].settings.bits, other.stages[0].settings.damping, other.data.calibration.sequences) == (2, 1.0, 4)
    assert other.overrides == {"recipe.quantize.bits": 2, "data.calibration.sequences": 4, "recipe.quantize.damping": 1}
    assert other.evaluation == trial.evaluation
    assert other.config["recipe"]["quantize"]["bits"] == 2
    assert (trial.stages[0].settings.bits, trial.config["recipe"]["quantize"]["bits"]) == (3, 3)


def test_a_trial_without_changes_is_itself() -> None:
    for trial in config.load(["recipe=lora,soup,ilp"]).trials:
        assert config.changed(trial, []) == trial


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("recipe.quantize.bitz=3", "Did you mean 'recipe.quantize.bits'?"),
        ("recipe.quantize.bits=9", "recipe.quantize.bits must be in [2, 8], got 9. Try: recipe.quantize.bits=4"),
        ("recipe.quantize.bits=x", "Integer"),
        ("recipe.quantize.method=gptq", "method@recipe.quantize=gptq"),
        ("method@recipe.quantize=gptq", "only one value for a key that is there"),
        ("recipe=gptq", "only values beneath model, data"),
        ("cluster.slots=1", "only values beneath model, data"),
        ("recipe.quantize.bits=2,3", "only one value"),
    ],
)
def test_a_wrong_change_of_a_trial_is_refused_like_any_mistake(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.changed(config.load(["recipe=rtn"]).trials[0], [override])

    assert words in str(error.value)
