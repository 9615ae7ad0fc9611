"""From what a person typed to trials: compose with Hydra, expand the sweeps, build and check every settings object.

Hydra composes once per block and combination of *groups*; swept *values* are then set on copies, which keeps ten
thousand trials cheap. Sweeps are read by Hydra's own override grammar, wherever they stand (`sweep:` of a block or the
command line). Nothing is scheduled before every trial has been built.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import itertools
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pare.methods.contract import METHODS, Method, SettingsError, load_all
from pare.orchestrator.errors import ConfigError, nearest
from pare.orchestrator.schema import DTYPES, GROUPS, PLAIN, Cluster, Data, Evaluation, Model, SweepOptions, Tracking, need


@dataclass
class Stage:
    """One method with settings at one place of a recipe."""

    name: str
    method: str
    settings: Method


@dataclass
class Trial:
    """A recipe with every value fixed."""

    name: str
    block: str
    recipe: str
    overrides: dict[str, Any]
    config: dict[str, Any]
    model: Model
    data: Data
    evaluation: Evaluation
    seed: int
    dtype: str
    stages: list[Stage] = field(default_factory=list)
    skipped: str | None = None
    """Why the trial is not run (`sweep.invalid=skip`)."""


@dataclass
class Experiment:
    """All trials, and what holds for the whole sweep."""

    name: str
    trials: list[Trial]
    cluster: Cluster
    tracking: Tracking


def load(overrides: list[str], config_dir: str | None = None, config_name: str = "config") -> Experiment:
    """Composes, expands and checks. Raises ConfigError for anything that a person has to put right."""
    with session(overrides, config_dir, config_name) as composer:
        return composer.experiment()


class session:
    """A Hydra session over Pare's configs, with the methods registered as config group `method`."""

    def __init__(self, overrides: list[str], config_dir: str | None, config_name: str) -> None:
        self.overrides, self.config_dir, self.config_name = overrides, config_dir, config_name

    def __enter__(self) -> Composer:
        register_methods()
        GlobalHydra.instance().clear()
        root = Path(importlib.import_module("pare.conf").__path__[0])
        self._hydra = initialize_config_dir(str(root), version_base="1.3", job_name="pare")
        self._hydra.__enter__()
        extra = []
        if self.config_dir:
            directory = Path(self.config_dir).resolve()
            if not directory.is_dir():
                raise ConfigError(f"--config-dir {self.config_dir}: there is no such directory")
            extra = [f"hydra.searchpath=[file://{directory}]"]
        return Composer(self.overrides, extra, self.config_name)

    def __exit__(self, *error: Any) -> None:
        GlobalHydra.instance().clear()


def register_methods(plugins: list[str] | None = None) -> None:
    """Puts the settings class of every method into Hydra's ConfigStore, so that a recipe can name it."""
    for plugin in plugins or []:
        load_plugin(plugin)
    store = ConfigStore.instance()
    for name, cls in load_all().items():
        # The node says which method it is; a subclass adds that field so that the settings class stays free of it.
        node = dataclasses.make_dataclass(cls.__name__, [("method", str, field(default=name))], bases=(cls,))
        store.store(group="method", name=name, node=node)


def load_plugin(plugin: str) -> None:
    """Imports a module by name, or a file by path, that registers methods."""
    if not plugin.endswith(".py"):
        try:
            importlib.import_module(plugin)
        except ImportError as e:
            raise ConfigError(f"plugins: cannot import {plugin!r}: {e}") from e
        return
    path = Path(plugin).resolve()
    name = f"pare_plugin_{path.stem}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.exists():
        raise ConfigError(f"plugins: there is no file {plugin!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


class Composer:
    """Turns the overrides of one command into an experiment."""

    def __init__(self, overrides: list[str], extra: list[str], config_name: str) -> None:
        self.extra, self.config_name = extra, config_name
        self.loader = GlobalHydra.instance().config_loader()
        self.parser = OverridesParser.create(config_loader=self.loader)
        self.given = [self.parse(o) for o in overrides]

    def parse(self, text: str) -> Override:
        try:
            override = self.parser.parse_override(text)
        except HydraException as e:
            raise ConfigError(f"cannot read {text!r} as KEY=VALUE: {one_line(e)}") from e
        if not override.key_or_group:
            raise ConfigError(f"cannot read {text!r} as KEY=VALUE: the key is missing")
        return override

    def is_group(self, override: Override) -> bool:
        return bool(self.loader.get_group_options(override.key_or_group))

    def compose(self, overrides: list[str]) -> DictConfig:
        try:
            return compose(self.config_name, overrides=self.extra + overrides)
        except (HydraException, OmegaConfBaseException, ValueError) as e:
            raise self.explain(e, overrides) from e

    def explain(self, error: Exception, overrides: list[str]) -> ConfigError:
        """Hydra's error as one paragraph that names the nearest thing that exists."""
        text = str(error)
        if match := re.search(r"Could not override '([^']+)'", text):
            key = match[1]
            others = [o for o in overrides if self.parse(o).key_or_group != key]
            known = keys_of(self.compose(others)) if others != overrides else []
            return ConfigError(f"unknown setting {key!r}.{nearest(key, known)}")
        if match := re.search(r"(?:Could not find|In '[^']*': Could not find) '([^']+)'", text):
            group, _, option = match[1].rpartition("/")
            options = self.loader.get_group_options(group)
            return ConfigError(f"unknown {group or 'config'} {option!r}.{nearest(option, options)}")
        return ConfigError(one_line(error))

    def experiment(self) -> Experiment:
        """See `load`."""
        for override in self.given:
            if override.key_or_group == "plugins" and not override.is_sweep_override():
                register_methods([str(plugin) for plugin in override.value() or []])  # type: ignore[union-attr]
        scoped = [o for o in self.given if o.key_or_group.startswith("blocks.")]
        common = [o for o in self.given if o not in scoped]
        top = self.top()
        refuse_unknown(top)
        register_methods(list(top.plugins))
        blocks = self.blocks(top, common)
        for override in scoped:
            name = override.key_or_group.split(".")[1]
            if name not in blocks:
                raise ConfigError(f"{override.input_line}: there is no block {name!r}.{nearest(name, blocks)}")
        cluster, tracking = shaped(top, "cluster", Cluster), shaped(top, "tracking", Tracking)
        options = shaped(top, "sweep", SweepOptions)
        used: set[int] = set()
        trials: list[Trial] = []
        for name, block in blocks.items():
            own = [o for o in scoped if o.key_or_group.split(".")[1] == name]
            trials += self.expand(name, block, common, own, options, used)
        for override in common:
            if about_recipe(override) and id(override) not in used:
                known = {key for t in trials for key in keys_of(OmegaConf.create(t.config))}
                key = override.key_or_group
                raise ConfigError(f"unknown setting {key!r}: no recipe of this experiment has it.{nearest(key, known)}")
        if not trials:
            raise ConfigError("nothing to do: name an experiment (experiment=demo) or a recipe (recipe=gptq)")
        name = top.name or next((t.recipe for t in trials), "sweep")
        return Experiment(str(name), uniquely_named(trials), cluster, tracking)

    def top(self) -> DictConfig:
        """The composed config without what only holds for single blocks: recipes, sweeps, `blocks.NAME...`."""
        own = [
            o
            for o in self.given
            if not about_recipe(o) and not o.is_sweep_override() and not o.key_or_group.startswith("blocks.")
        ]
        return self.compose([line_of(o) for o in own])

    def blocks(self, top: DictConfig, common: list[Override]) -> dict[str, dict[str, Any]]:
        """The experiment's blocks; without an experiment, the recipe of the command line is the only one."""
        named: dict[str, Any] = OmegaConf.to_container(top.blocks, resolve=True)  # type: ignore[assignment]
        chosen = [o for o in common if o.key_or_group == "recipe"]
        if named and chosen:
            raise ConfigError(
                f"{chosen[0].input_line}: the experiment already names its recipes in its blocks ({', '.join(named)}). "
                "Drop experiment=..., or change one block: blocks.NAME.recipe=..."
            )
        if not named and chosen:
            label = "sweep" if chosen[0].is_sweep_override() else str(chosen[0].value())
            return {label: {"recipe": None, "sweep": {}}}
        for name, block in named.items():
            unknown = set(block) - {"recipe", "sweep"}
            if unknown:
                word = min(unknown)
                raise ConfigError(f"blocks.{name}: unknown key {word!r}.{nearest(word, ['recipe', 'sweep'])}")
            if not block.get("recipe"):
                raise ConfigError(f"blocks.{name}: names no recipe. Try: blocks.{name}.recipe=gptq")
        return named

    def expand(
        self,
        name: str,
        block: dict[str, Any],
        common: list[Override],
        own: list[Override],
        options: SweepOptions,
        used: set[int],
    ) -> list[Trial]:
        """The trials of one block. `used` collects the recipe overrides of the command line that this block took."""
        lines = {key: f"{key}={grammar(value)}" for key, value in (block.get("sweep") or {}).items()}
        for override in own:  # blocks.NAME.KEY=VALUE
            line = line_of(override).replace(f"blocks.{name}.", "", 1)
            lines[label(self.parse(line))] = line
        if block["recipe"] and "recipe" not in lines:
            lines = {"recipe": f"recipe={block['recipe']}", **lines}
        has_keys: set[str] = set()
        if block["recipe"] and any(about_recipe(o) for o in common):
            has_keys = set(keys_of(self.compose([lines["recipe"]])))
        mine = set(lines)
        for override in common:
            if about_recipe(override):
                if block["recipe"] and plain(override) and not override.package and override.key_or_group not in has_keys:
                    continue  # a setting of another block's recipe
                used.add(id(override))
                mine.add(label(override))
            lines[label(override)] = line_of(override)
        parsed = [self.parse(line) for line in lines.values()]
        axes = [o for o in parsed if o.is_sweep_override()]
        fixed = [o for o in parsed if not o.is_sweep_override()]
        swept = {label(o) for o in axes}
        composed: dict[tuple[str, ...], DictConfig] = {}
        trials = []
        for point in itertools.product(*(self.points(axis) for axis in axes)):
            chosen = {label(o): o for o in [*fixed, *point]}
            groups = [o for o in chosen.values() if self.is_group(o) or not plain(o)]
            key = tuple(line_of(o) for o in groups)
            if key not in composed:
                composed[key] = self.compose(list(key))
            config = copy.deepcopy(composed[key])
            for override in chosen.values():
                if override not in groups:
                    self.set_value(config, override)
            refuse_unknown(config)
            recipe = str(chosen["recipe"].value()) if "recipe" in chosen else name
            shown = {key: chosen[key].value() for key in lines if key in mine | swept and key != "recipe"}
            trials.append(build(name if block["recipe"] else recipe, recipe, shown, swept, config, options))
        return trials

    def points(self, axis: Override) -> list[Override]:
        """The values of one swept key, each as an override of its own."""
        prefix = line_of(axis).split("=", 1)[0]
        return [self.parse(f"{prefix}={value}") for value in axis.sweep_string_iterator()]

    def set_value(self, config: DictConfig, override: Override) -> None:
        """Sets one value on a composed config, with the type check of its schema."""
        key = override.key_or_group
        known = keys_of(config)
        if key not in known:
            raise ConfigError(f"unknown setting {key!r}.{nearest(key, known)}")
        try:
            OmegaConf.update(config, key, override.value(), merge=True)
        except OmegaConfBaseException as e:
            raise ConfigError(f"{override.input_line}: {one_line(e)}") from e


def build(block: str, recipe: str, shown: dict[str, Any], swept: set[str], config: DictConfig, options: SweepOptions) -> Trial:
    """One trial from its composed config; refuses wrong settings, or marks the trial as skipped."""
    plain_config: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    need(config.dtype in DTYPES, "dtype", config.dtype, "one of " + ", ".join(DTYPES), "dtype=float32")
    need(isinstance(config.seed, int) and config.seed >= 0, "seed", config.seed, "an integer >= 0", "seed=0")
    trial = Trial(
        name="-".join([block, *(f"{key.rsplit('.', 1)[-1]}={shown[key]}" for key in shown if key in swept)]),
        block=block,
        recipe=recipe,
        overrides=shown,
        config={key: value for key, value in plain_config.items() if key not in ("blocks", "sweep", "experiment", "name")},
        model=shaped(config, "model", Model),
        data=shaped(config, "data", Data),
        evaluation=shaped(config, "evaluation", Evaluation),
        seed=config.seed,
        dtype=config.dtype,
    )
    trial.config["recipe_name"] = recipe
    try:
        trial.stages = [stage(name, node) for name, node in (config.recipe or {}).items()]
    except ConfigError as e:
        if options.invalid != "skip":
            raise ConfigError(f"block {block!r}: {e}") from e
        trial.skipped = str(e)
    return trial


def stage(name: str, node: DictConfig) -> Stage:
    """The settings object of one stage of a recipe."""
    where = f"recipe.{name}"
    if not isinstance(node, DictConfig) or "method" not in node:
        raise ConfigError(f"{where}: not a method. A recipe lists them as defaults: [/method@{name}: gptq]")
    method = node.method
    if method not in METHODS:
        raise ConfigError(f"{where}: unknown method {method!r}.{nearest(method, METHODS)}")
    cls = METHODS[method]
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in map(str, node):
        if key not in fields | {"method"}:
            raise ConfigError(
                f"unknown setting {f'{where}.{key}'!r}.{nearest(f'{where}.{key}', {f'{where}.{k}' for k in fields})}"
            )
    expected = OmegaConf.get_type(node)
    if isinstance(expected, type) and expected is not dict and not issubclass(expected, cls):
        raise ConfigError(f"{where}.method cannot be set; choose another method with method@{where}={method}")
    values = {key: node[key] for key in fields if key in node}
    plain_values = {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in values.items()}
    try:
        return Stage(name, method, cls(**plain_values))
    except SettingsError as e:
        default = next((f.default for f in dataclasses.fields(cls) if f.name == e.setting), None)  # type: ignore[arg-type]
        raise ConfigError(f"{where}.{e.setting} must be {e.allowed}, got {e.got!r}. Try: {where}.{e.setting}={default}") from e


def shaped(config: DictConfig, group: str, cls: type) -> Any:
    """A config group as the object of its schema, keys, types and ranges checked."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), config[group]))
    except OmegaConfBaseException as e:
        text = one_line(e)
        if match := re.search(r"Key '([^']+)' not in '([^']+)'", text):
            full = getattr(e, "full_key", None) or match[1]
            known = [f"{group}.{key}" for key in keys_of(OmegaConf.structured(cls))]
            raise ConfigError(f"unknown setting '{group}.{full}'.{nearest(f'{group}.{full}', known)}") from e
        raise ConfigError(f"{group}.{getattr(e, 'full_key', '') or ''}: {text}") from e


def refuse_unknown(config: DictConfig) -> None:
    """Top-level keys that nothing reads: `+typo=1` would otherwise be accepted in silence."""
    known = {*GROUPS, *PLAIN}
    for key in config:
        if key not in known:
            raise ConfigError(f"unknown setting {key!r}.{nearest(str(key), known)}")
    for group, cls in GROUPS.items():
        shaped(config, group, cls)


def about_recipe(override: Override) -> bool:
    return (
        override.key_or_group == "recipe"
        or override.key_or_group.startswith("recipe.")
        or (override.package is not None and override.package.startswith("recipe"))
    )


def line_of(override: Override) -> str:
    """An override as it was typed."""
    if override.input_line is None:
        raise ValueError(f"an override of {override.key_or_group} was not parsed from text")
    return override.input_line


def label(override: Override) -> str:
    """What an override is about: a key, or a group with the package it goes to (`method@recipe.heal`)."""
    return f"{override.key_or_group}@{override.package}" if override.package else override.key_or_group


def plain(override: Override) -> bool:
    """`key=value`, without `+`, `++` or `~`."""
    return not (override.is_add() or override.is_force_add() or override.is_delete())


def grammar(value: Any) -> str:
    """A YAML value of a `sweep:` mapping in Hydra's override grammar; strings already are."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ",".join(grammar(v) for v in value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def keys_of(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of all nodes and leaves of a config."""
    keys = []
    for key in config:
        node = OmegaConf.select(config, str(key)) if OmegaConf.is_config(config) else config[key]
        keys.append(f"{prefix}{key}")
        if OmegaConf.is_dict(node):
            keys += keys_of(node, f"{prefix}{key}.")
    return keys


def uniquely_named(trials: list[Trial]) -> list[Trial]:
    """Trials that would share a name get a number."""
    seen: dict[str, int] = {}
    for trial in trials:
        seen[trial.name] = seen.get(trial.name, 0) + 1
        if seen[trial.name] > 1:
            trial.name += f"#{seen[trial.name]}"
    return trials


def one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
