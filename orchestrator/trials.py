"""What a sweep consists of: trials, their stages, and what holds for all; built from plain data, with every check.

A trial is put together from *parts*: the groups of its config and the stages of its recipe. Trials that say the same in a
part hold the same object, which keeps ten thousand of them cheap; so nothing that a trial holds may be changed in place.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import graphlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from pare.methods.contract import METHODS, AllocateMethod, LayerMethod, MergeMethod, Method, SettingsError
from pare.orchestrator.errors import ConfigError, nearest
from pare.orchestrator.schema import (
    DTYPES,
    GROUPS,
    PLAIN,
    Budget,
    Cluster,
    Data,
    Engine,
    Evaluation,
    Export,
    Model,
    Query,
    StoreOptions,
    Tracking,
    need,
)

TRIAL_PARTS = ("model", "data", "evaluation", "engine", "export", "seed", "dtype")
"""Top-level keys that belong to a trial; beside them each stage of its recipe is a part, `recipe.NAME`."""

SWEEP_PARTS = ("cluster", "tracking", "store", "budget")
"""Top-level keys that hold for all trials and change no result."""

STAGE_KEYS: dict[str, dict[str, tuple[Any, Any]]] = {
    "merge": {"members": (Query, field(default_factory=Query))},
    "allocate": {"levels": (Any, None), "vary": (dict[str, Any], field(default_factory=dict))},
}
"""Kind of method -> what a stage with it has beside the method's settings: key -> (type, default)."""

TEACHERS: dict[str, tuple[Any, Any]] = {"teachers": (dict[str, float], field(default_factory=dict))}
"""The same, of a method that `has_teachers`."""

BASE = "model"
"""What a recipe calls the base model of the trial, where it names models by their stages."""


def keys_beside(cls: type[Method]) -> dict[str, tuple[Any, Any]]:
    """What a stage has beside its method's settings: key -> (type, default)."""
    return STAGE_KEYS.get(cls.kind, {}) | (TEACHERS if getattr(cls, "has_teachers", False) else {})


@dataclass
class Stage:
    """One method with settings at one place of a recipe."""

    name: str
    method: str
    settings: Method
    members: Query | None = None
    """The trials that a merge is made of."""
    levels: Stage | None = None
    """The layer method whose results an allocation chooses among."""
    vary: dict[str, list[Any]] = field(default_factory=dict)
    """The one setting of `levels` that makes the levels, with its values."""
    teachers: dict[str, float] = field(default_factory=dict)
    """Models that the method learns from, with their weights: `model`, an earlier stage, ORG/NAME of the hub, ./DIRECTORY."""


@dataclass
class Trial:
    """A recipe with every value fixed."""

    name: str
    block: str
    recipe: str
    overrides: dict[str, Any]
    config: dict[str, Any]
    """Everything that decides its result, as plain data. Parts of it belong to other trials as well: read only."""
    model: Model
    data: Data
    evaluation: Evaluation
    engine: Engine
    export: Export
    seed: int
    dtype: str
    stages: list[Stage] = field(default_factory=list)
    skipped: str | None = None
    """Why the trial is not run (`sweep.invalid=skip`)."""


@dataclass
class Request:
    """What was typed."""

    overrides: list[str] = field(default_factory=list)
    config_dir: str | None = None
    config_name: str = "config"


@dataclass
class Experiment:
    """All trials, and what holds for the whole sweep."""

    name: str
    trials: list[Trial]
    cluster: Cluster
    tracking: Tracking
    store: StoreOptions = field(default_factory=StoreOptions)
    budget: Budget = field(default_factory=Budget)
    plugins: list[str] = field(default_factory=list)
    request: Request = field(default_factory=Request)

    def common(self) -> dict[str, Any]:
        """What belongs to the sweep and not to a trial, as plain JSON for the ledger; `restore` takes it back."""
        own = {part: dataclasses.asdict(getattr(self, part)) for part in (*SWEEP_PARTS, "request")}
        return {"name": self.name, "plugins": self.plugins, **own}


NODES: dict[type, type] = {}


def node_class(cls: type[Method]) -> type:
    """The shape of a stage with this method: its settings, `method`, and the keys that its kind of stage has."""
    if cls not in NODES:
        extra = keys_beside(cls)
        for f in dataclasses.fields(cls):  # type: ignore[arg-type]
            if f.name in {"method", *extra}:
                raise ConfigError(f"method {cls.name!r}: a setting cannot be called {f.name!r}, a key of the stage itself")
        fields = [("method", str, field(default=cls.name)), *((key, *shape) for key, shape in extra.items())]
        NODES[cls] = dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,))
    return NODES[cls]


# --- parts --------------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """One group or stage of a trial: what the config says, and the object that this makes."""

    plain: Any
    built: Any
    refused: ConfigError | None = None
    """Why there is no object, where a setting of a stage is outside its range."""


MakePart = Callable[[str, Any], Part]
"""(name of the part, plain data) -> the part."""


def interned() -> MakePart:
    """`made`, with one part for all that say the same."""
    known: dict[tuple[str, str], Part] = {}

    def make(part: str, plain: Any) -> Part:
        key = part, json.dumps(plain, default=str)
        if key not in known:
            known[key] = made(part, plain)
        return known[key]

    return make


def assemble(name: str, block: str, recipe: str, shown: dict[str, Any], parts: Mapping[str, Part], skip: bool) -> Trial:
    """A trial from its parts; one with refused settings is marked as skipped, or refused as a whole."""
    stages = {key.removeprefix("recipe."): part for key, part in parts.items() if key not in TRIAL_PARTS}
    refused = next((part.refused for part in stages.values() if part.refused), None)
    if refused and not skip:
        raise ConfigError(f"block {block!r}: {refused}") from refused
    whole = {key: parts[key] for key in TRIAL_PARTS}
    return Trial(
        name=name,
        block=block,
        recipe=recipe,
        overrides=shown,
        config={key: part.plain for key, part in whole.items()}
        | {"recipe": {key: part.plain for key, part in stages.items()}, "recipe_name": recipe},
        **{key: part.built for key, part in whole.items()},
        stages=[] if refused else [part.built for part in stages.values()],
        skipped=str(refused) if refused else None,
    )


def made(part: str, plain: Any) -> Part:
    """The object that one part makes. Raises ConfigError, for a stage only where more than a range is wrong."""
    if part in GROUPS:
        return Part(plain, built_group(part, plain))
    if part.startswith("recipe."):
        check_given(part, plain)
        try:
            return Part(plain, stage(part, plain))
        except Refused as e:
            return Part(plain, None, e)
    if part == "dtype":
        need(plain in DTYPES, "dtype", plain, "one of " + ", ".join(DTYPES), "dtype=float32")
    else:
        fits = isinstance(plain, int) and not isinstance(plain, bool) and plain >= 0
        need(fits, "seed", plain, "an integer >= 0", "seed=0")
    return Part(plain, plain)


class Refused(ConfigError):
    """A setting of a method is outside its range; `sweep.invalid=skip` passes over it."""


def stage(where: str, plain: Mapping[str, Any]) -> Stage:
    """One stage of a recipe, `where` it stands, from plain data of the right types."""
    cls = method_at(where, plain)
    extra = keys_beside(cls)
    values = {key: copy.copy(value) for key, value in plain.items() if key != "method" and key not in extra}
    try:
        found = Stage(where.rpartition(".")[2], cls.name, cls(**values))
    except SettingsError as e:
        plain_defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}  # type: ignore[arg-type]
        known = e.setting in plain_defaults
        hint = f" Try: {where}.{e.setting}={plain_defaults[e.setting]}" if known else ""
        raise Refused(f"{where}.{e.setting} must be {e.allowed}, got {e.got!r}.{hint}") from e
    if "members" in extra:
        found.members = query = Query(**(plain.get("members") or {}))
        key = f"{where}.members"
        need(bool(query.blocks or query.paths), f"{key}.blocks", query.blocks,
             f"a list of blocks of the sweep, unless {key}.paths names directories", f"{key}.blocks=[lora]")  # fmt: skip
        need(query.top is None or query.top >= 1, f"{key}.top", query.top, ">= 1 (null: all)", f"{key}.top=null")
    if "teachers" in extra:
        found.teachers = plain.get("teachers") or {BASE: 1.0}
        for name, weight in found.teachers.items():
            need(0 < weight < math.inf, f"{where}.teachers.{name}", weight, "> 0 and finite", f"{where}.teachers.{name}=1")
    if "levels" in extra:
        if not plain.get("levels"):
            raise ConfigError(
                f"{where}.levels: {cls.name} chooses among the results of a layer method. Try: +method@{where}.levels=gptq, "
                f"or among the defaults of the recipe: /method@{where.removeprefix('recipe.')}.levels: gptq"
            )
        found.levels = stage(f"{where}.levels", plain["levels"])
        found.vary = varied(f"{where}.vary", plain.get("vary") or {}, found.levels)
        if isinstance(found.settings, AllocateMethod):
            ((varies, levels),) = found.vary.items()
            try:
                found.settings.check_levels(levels)
            except SettingsError as e:
                raise Refused(f"{where}.{e.setting} must be {e.allowed} ({varies}: {levels}), got {e.got!r}") from e
    return found


def varied(where: str, vary: Mapping[str, Any], levels: Stage) -> dict[str, list[Any]]:
    """The values that make the levels, ascending, of the type of their setting and each checked by the method."""
    cls, settings = METHODS[levels.method], levels.settings
    parent = where.rpartition(".")[0]
    if cls.kind != "layer":
        layers = sorted(name for name, other in METHODS.items() if other.kind == "layer")
        raise ConfigError(f"{parent}.levels: {levels.method} is a method of kind {cls.kind!r}; levels are made by a method "
                          f"of kind 'layer': {', '.join(layers)}")  # fmt: skip
    if issubclass(cls, LayerMethod) and cls.folds:
        raise ConfigError(f"{parent}.levels: {levels.method} folds factors into what stands before its linears, so levels of "
                          f"two linears cannot be mixed. Let it come before the search as a stage of its own that only scales, "
                          f"and choose among levels of gptq or rtn")  # fmt: skip
    if len(vary) != 1:
        given = f"names {', '.join(vary)}. Drop all but one: ~{where}.{next(iter(vary))}" if vary else "is empty"
        raise ConfigError(f"{where} {given}{'' if vary else f'. Try: +{where}.bits=[2,3,4]'}. "
                          f"It takes one setting of {levels.method}, with the values that make the levels")  # fmt: skip
    ((key, given),) = vary.items()
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if key not in known:
        raise ConfigError(f"{where}.{key}: {levels.method} has no setting {key!r}.{nearest(key, known)}")
    node, values = OmegaConf.structured(node_class(cls)), []
    for value in given if isinstance(given, list) else [given]:
        try:
            node[key] = value
            values.append(contained(node)[key])
            dataclasses.replace(settings, **{key: values[-1]})  # type: ignore[type-var]
        except OmegaConfBaseException as e:
            raise ConfigError(f"{where}.{key}: {one_line(e)}") from e
        except SettingsError as e:
            raise Refused(f"{where}.{key}: {e.setting} must be {e.allowed}, got {e.got!r}") from e
    numbers = {value for value in values if isinstance(value, int | float) and not isinstance(value, bool)}
    if len(numbers) != len(values) or len(values) < 2:
        raise ConfigError(f"{where}.{key} must be two or more different numbers, got {given!r}. Try: {where}.{key}=[2,3,4]")
    return {key: sorted(values)}


def method_at(where: str, node: Any) -> type[Method]:
    """The method of a stage, after a check that every key there is one of its own."""
    if not isinstance(node, Mapping | DictConfig) or "method" not in node:
        raise ConfigError(
            f"{where}: not a method. A recipe lists them as defaults: [/method@{where.removeprefix('recipe.')}: gptq]"
        )
    if node["method"] not in METHODS:
        raise ConfigError(f"{where}: unknown method {node['method']!r}.{nearest(str(node['method']), METHODS)}")
    cls = METHODS[node["method"]]
    fields = {f.name for f in dataclasses.fields(node_class(cls))}
    for key in map(str, node):
        if key not in fields:
            known = {f"{where}.{k}" for k in fields - {"method"}}
            raise ConfigError(f"unknown setting {f'{where}.{key}'!r}.{nearest(f'{where}.{key}', known)}")
    return cls


def is_imported(trial: Trial) -> bool:
    """Whether the trial is a checkpoint made elsewhere: all of it is an export, and there is nothing to work on."""
    return any(METHODS[stage.method].kind == "import" for stage in trial.stages)


def check_members(trials: list[Trial]) -> None:
    """Refuses merges that stand at a wrong place or whose queries find nothing or each other, and stages beside an import."""
    blocks = {trial.block for trial in trials}
    for trial in trials:
        if is_imported(trial) and len(trial.stages) > 1:
            other = next(stage.name for stage in trial.stages if METHODS[stage.method].kind != "import")
            raise ConfigError(
                f"block {trial.block!r}: a checkpoint made elsewhere is measured as it is, and no other stage can stand beside "
                f"it. Drop recipe.{other}; a dense model that is to be worked on is named by model.path"
            )
    edges: dict[str, set[str]] = {}
    for trial in trials:
        for position, stage in enumerate(trial.stages):
            if stage.members is None:
                continue
            where = f"block {trial.block!r}: recipe.{stage.name}"
            if position:
                raise ConfigError(
                    f"{where}: {stage.method} is a merge and can only be the first stage of a recipe: its members, other "
                    f"trials of the sweep, stand in place of a stage before it. Move {trial.stages[0].name!r} behind it, or "
                    "into the recipe of the members"
                )
            for block in stage.members.blocks:
                if not matching([block], blocks):
                    raise ConfigError(
                        f"{where}.members.blocks: there is no block {block!r} in this sweep.{nearest(block, blocks)} "
                        f"A merge takes trials of its own sweep, for example: recipe=lora,{trial.recipe}; or directories: "
                        f"{where.partition(': ')[2]}.members={{blocks: [], paths: [DIRECTORY]}}"
                    )
            foreign = next((t for t in candidates(trial, trials) if is_imported(t)), None)
            if foreign:
                raise ConfigError(
                    f"{where}.members.blocks: {foreign.name!r} was made elsewhere, and nothing is known of what it is made of. "
                    "A merge takes trials that this sweep makes"
                )
            prompted = next((t for t in candidates(trial, trials) if any(map(learns_prompt, t.stages))), None)
            if prompted:
                raise ConfigError(
                    f"{where}.members.blocks: {prompted.name!r} learns a prompt, which is no weight and cannot be merged. "
                    "Learn it against the merged model, as the stage after the merge"
                )
            edges.setdefault(trial.block, set()).update(matching(stage.members.blocks, blocks))
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as e:
        circle = " -> ".join(reversed(e.args[1]))
        raise ConfigError(f"members.blocks go in a circle: {circle}. A merge cannot be made of itself") from e
    for trial in trials:
        if not trial.stages or trial.stages[0].members is None:
            continue
        stage, query = trial.stages[0], trial.stages[0].members
        where, found = f"block {trial.block!r}: recipe.{stage.name}", candidates(trial, trials)
        if not found and not query.paths:
            raise ConfigError(
                f"{where}.members: no trial of {', '.join(query.blocks)} runs on the base model of {trial.name!r}"
            )
        names = [*(t.name for t in found), *query.foreign]
        if len(set(names)) < len(names):
            raise ConfigError(f"{where}.members: {names[-1]!r} is what members.paths calls its members; rename the block")
        assert isinstance(stage.settings, MergeMethod)
        try:
            stage.settings.check_members(names, query.top)
        except SettingsError as e:
            raise ConfigError(f"{where}.{e.setting} must be {e.allowed}, got {e.got!r}") from e


def check_teachers(trials: list[Trial]) -> None:
    """Refuses names of teachers that mean no model."""
    for trial in trials:
        for position, stage in enumerate(trial.stages):
            earlier = [BASE, *(other.name for other in trial.stages[:position])]
            for name in stage.teachers:
                if name not in earlier and not is_place(name):
                    later = " comes later, and" if name in [other.name for other in trial.stages] else ""
                    raise ConfigError(
                        f"block {trial.block!r}: recipe.{stage.name}.teachers: {name!r}{later} is no model that it can learn "
                        f"from.{nearest(name, earlier)} It can learn from {', '.join(earlier)}, from ORG/NAME of the hub, or a "
                        "directory: ./DIRECTORY"
                    )


def learns_prompt(stage: Stage) -> bool:
    """Whether what it makes is a prompt."""
    return bool(getattr(METHODS[stage.method], "learns_prompt", False))


def check_prompts(trials: list[Trial]) -> None:
    """Refuses what stands behind a prompt or cannot honour it."""
    for trial in trials:
        for stage, after in itertools.zip_longest(trial.stages, trial.stages[1:]):
            if not learns_prompt(stage):
                continue
            where = f"block {trial.block!r}: recipe.{stage.name}"
            if after is not None:
                raise ConfigError(
                    f"{where}: a prompt is learnt against the model as it is: make it the last stage, behind {after.name!r}"
                )
            if trial.data.train.packing == "separate":
                raise ConfigError(
                    f"{where}: data.train.packing=separate: of the documents of a row only the first would see the prompt of "
                    f"{stage.method}. Try: data.train.packing=padded"
                )
            if trial.export.format not in ("auto", "adapter"):
                raise ConfigError(
                    f"{where}: export.format={trial.export.format}: a prompt ships as an adapter beside its base, for weights "
                    "cannot say it. Try: export.format=auto"
                )


def is_place(name: str) -> bool:
    """Whether a teacher is named by where it lies, on the hub or in a directory, and not by a stage."""
    return "/" in name


def candidates(trial: Trial, trials: Iterable[Trial]) -> list[Trial]:
    """The trials that the query of a merge ranges over: those of its blocks that run, on the same base model."""
    query = trial.stages[0].members if trial.stages else None
    blocks = matching(query.blocks if query else [], {t.block for t in trials})
    return [t for t in trials if t.block in blocks and not t.skipped and t.model == trial.model]


def matching(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """The names that one of the patterns (`*` and `?` as in file names) stands for."""
    return {name for name in names for pattern in patterns if fnmatchcase(name, pattern)}


# --- shapes -------------------------------------------------------------------------------------------------------------


def typed(config: DictConfig) -> DictConfig:
    """The config with the schema of every group and stage laid beneath it, so that values are checked when they are set."""
    known = {*GROUPS, *PLAIN}
    for key in config:
        if key not in known:
            raise ConfigError(f"unknown setting {key!r}.{nearest(str(key), known)}")
    with open_dict(config):
        for key, default in PLAIN.items():
            config.setdefault(key, default)
        for group in GROUPS:
            config[group] = with_types(group, GROUPS[group], config.get(group))
        for name, node in (config.recipe or {}).items():
            config.recipe[name] = typed_stage(f"recipe.{name}", node)
    OmegaConf.set_struct(config, True)
    return config


def typed_stage(where: str, node: Any) -> DictConfig:
    """A stage with the types of its method's settings."""
    cls = method_at(where, node)
    if OmegaConf.get_type(node) is not dict and not issubclass(OmegaConf.get_type(node), cls):  # type: ignore[arg-type]
        raise ConfigError(f"{where}.method cannot be set; choose another method with method@{where}={node.method}")
    node = with_types(where, node_class(cls), node)
    if "levels" in keys_beside(cls) and node.levels is not None:
        node.levels = typed_stage(f"{where}.levels", node.levels)
    return node


def with_types(where: str, cls: type, given: Any) -> DictConfig:
    """A node with the types of its schema; keys and types checked, ranges not. Mappings within take new keys."""
    schema = OmegaConf.structured(cls)
    try:
        node: Any = OmegaConf.merge(schema, given or {})
    except OmegaConfBaseException as e:
        text = one_line(e)
        if match := re.search(r"Key '([^']+)' not in '([^']+)'", text):
            full = f"{where}.{getattr(e, 'full_key', None) or match[1]}"
            raise ConfigError(f"unknown setting {full!r}.{nearest(full, keys_of(schema, f'{where}.'))}") from e
        raise ConfigError(f"{where}.{getattr(e, 'full_key', '') or ''}: {text}") from e
    for path, value in leaves(contained(given, resolve=False)):
        if value == "???":  # a merge takes the schema's default for what is still to be given
            OmegaConf.update(node, ".".join(path), value)
    for key in node:
        if OmegaConf.get_type(node, key) is dict:
            OmegaConf.set_struct(node[key], False)
    return node


def built_group(group: str, node: Any) -> Any:
    """A group as the object of its schema, ranges checked."""
    plain = contained(node, where=group)
    check_given(group, plain)
    return instance(GROUPS[group], plain)


def check_given(where: str, plain: Any) -> None:
    """Refuses values that a config leaves to be given: `path: ???`."""
    for path, value in leaves(plain):
        if value == "???":
            key = ".".join([where, *path])
            raise ConfigError(f"{key} has to be given. Try: {key}=VALUE")


def instance(cls: type, values: Mapping[str, Any]) -> Any:
    """A dataclass, and those inside it, from plain data of the right types."""
    types = hints(cls)
    return cls(**{k: instance(types[k], v) if dataclasses.is_dataclass(types[k]) else v for k, v in values.items()})


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def contained(node: Any, resolve: bool = True, where: str = "") -> Any:
    """A config node as plain data."""
    if not OmegaConf.is_config(node):
        return node
    try:
        return OmegaConf.to_container(node, resolve=resolve)
    except OmegaConfBaseException as e:
        raise ConfigError(f"{where}: {one_line(e)}") from e


# --- nested mappings ----------------------------------------------------------------------------------------------------


def part_of(key: str) -> str:
    """The part of a config that a key belongs to: `data`, `recipe.quantize`."""
    return ".".join(key.split(".")[: 2 if key.startswith("recipe.") else 1])


def leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of everything in nested mappings that is no mapping."""
    if isinstance(node, Mapping):
        for key, child in node.items():
            yield from leaves(child, (*path, str(key)))
    else:
        yield path, node


def put(node: Any, path: Sequence[str], value: Any) -> Any:
    """Sets a value in nested mappings of one's own; the value itself where the path is empty."""
    if not path:
        return value
    inner = node
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    inner[path[-1]] = value
    return node


def keys_of(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of all nodes and leaves of a config."""
    keys = []
    for key in config:
        node = OmegaConf.select(config, str(key)) if OmegaConf.is_config(config) else config[key]
        keys.append(f"{prefix}{key}")
        if OmegaConf.is_dict(node):
            keys += keys_of(node, f"{prefix}{key}.")
    return keys


def one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
