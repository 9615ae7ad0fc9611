"""From what a person typed to trials: compose with Hydra, expand the sweeps, build and check every settings object.

Hydra composes once per block and combination of *groups*. What it made is turned into plain data once; swept *values* are
checked once each, and set on copies of the parts that they belong to. Sweeps are read by Hydra's own override grammar,
wherever they stand (`sweep:` of a block or the command line). Nothing is scheduled before every trial has been built.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer, ValueType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pare.methods.contract import load_all
from pare.methods.ops.tuner_kinds import NOT_OFFERED
from pare.orchestrator.errors import ConfigError, nearest
from pare.orchestrator.schema import GROUPS, PLAIN
from pare.orchestrator.trials import (
    SWEEP_PARTS,
    TRIAL_PARTS,
    Experiment,
    MakePart,
    Part,
    Request,
    Stage,
    Trial,
    assemble,
    built_group,
    check_members,
    check_prompts,
    check_teachers,
    contained,
    interned,
    keys_of,
    leaves,
    made,
    node_class,
    one_line,
    part_of,
    put,
    typed,
)
from pare.workers.plugins import PluginError
from pare.workers.plugins import load_plugin as load_plugin_

__all__ = ["Composer", "Experiment", "Request", "Stage", "Trial", "changed", "load", "restore", "session"]

# --- from the words of a command, by Hydra ----------------------------------------------------------------------------


def load(overrides: list[str], config_dir: str | None = None, config_name: str = "config") -> Experiment:
    """Composes, expands and checks. Raises ConfigError for anything that a person has to put right."""
    with session(overrides, config_dir, config_name) as composer:
        experiment = composer.experiment()
    experiment.request = Request(list(overrides), config_dir, config_name)
    return experiment


class session:
    """A Hydra session over Pare's configs, with the methods registered as config group `method`."""

    def __init__(self, overrides: list[str], config_dir: str | None, config_name: str) -> None:
        self.overrides, self.config_dir, self.config_name = overrides, config_dir, config_name

    def __enter__(self) -> Composer:
        register_methods()
        if self.config_dir and not Path(self.config_dir).is_dir():
            raise ConfigError(f"--config-dir {self.config_dir}: there is no such directory")
        OwnConfigs.directory = Path(self.config_dir).resolve() if self.config_dir else None
        Plugins.instance().register(OwnConfigs)
        GlobalHydra.instance().clear()
        root = Path(importlib.import_module("pare.conf").__path__[0])
        initialize_config_dir(str(root), version_base="1.3", job_name="pare")
        return Composer(self.overrides, self.config_name)

    def __exit__(self, *error: Any) -> None:
        GlobalHydra.instance().clear()


class OwnConfigs(SearchPathPlugin):
    """Puts `--config-dir` before Pare's own configs."""

    directory: ClassVar[Path | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.directory:
            search_path.prepend("command-line", f"file://{self.directory}")


IN_STORE: dict[str, type] = {}
"""Name -> the class whose settings the ConfigStore of this process has."""


def register_methods(plugins: Iterable[str] = ()) -> None:
    """Puts the settings class of every method into Hydra's ConfigStore, so that a recipe can name it."""
    for plugin in plugins:
        load_plugin(plugin)
    store = ConfigStore.instance()
    for name, cls in load_all().items():
        if IN_STORE.get(name) is not cls:
            store.store(group="method", name=name, node=node_class(cls))
            IN_STORE[name] = cls


def load_plugin(plugin: str) -> None:
    """Imports a module by name, or a file by path, that registers methods."""
    try:
        load_plugin_(plugin)
    except PluginError as e:
        raise ConfigError(f"plugins: {e}") from e


def located(plugin: str) -> str:
    """A file by its absolute path, so that a sweep can be resumed from anywhere on this machine."""
    return str(Path(plugin).resolve()) if plugin.endswith(".py") else plugin


class Composer:
    """Turns the overrides of one command into an experiment."""

    def __init__(self, overrides: list[str], config_name: str) -> None:
        self.config_name = config_name
        self.loader = GlobalHydra.instance().config_loader()
        self.parser = OverridesParser.create(config_loader=self.loader)
        self.given = [self.parse(o) for o in overrides]
        self._composed: dict[tuple[str, ...], Composed] = {}
        self._make = interned()

    def parse(self, text: str) -> Override:
        return parse(self.parser, text)

    @functools.cached_property
    def is_group(self) -> Any:
        """Whether a key names a config group; asking Hydra takes milliseconds, so each answer is kept."""
        return functools.cache(lambda key: bool(self.loader.get_group_options(key)))

    def is_value(self, override: Override) -> bool:
        """Whether an override only sets a value, and leaves what is composed as it is."""
        return plain(override) and not self.is_group(override.key_or_group)

    def compose(self, overrides: list[str]) -> DictConfig:
        try:
            return compose(self.config_name, overrides=overrides)
        except (HydraException, OmegaConfBaseException, ValueError) as e:
            raise self.explain(e, overrides) from e

    def composed(self, overrides: Iterable[Override]) -> Composed:
        """What Hydra makes of overrides that choose groups, add keys or delete them."""
        lines = tuple(line_of(o) for o in overrides)
        if lines not in self._composed:
            self._composed[lines] = Composed(self.compose(list(lines)), self._make)
        return self._composed[lines]

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
            if group == "method" and option in NOT_OFFERED:
                return ConfigError(f"{option} of peft is not offered: {NOT_OFFERED[option]}")
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
        register_methods(list(top.plugins))
        blocks = self.blocks(top, common)
        for override in scoped:
            name = override.key_or_group.split(".")[1]
            if name not in blocks:
                raise ConfigError(f"{override.input_line}: there is no block {name!r}.{nearest(name, blocks)}")
        whole = {group: built_group(group, top[group]) for group in (*SWEEP_PARTS, "sweep")}
        skip = whole.pop("sweep").invalid == "skip"
        used: set[str] = set()
        trials: list[Trial] = []
        for name, block in blocks.items():
            own = [o for o in scoped if o.key_or_group.split(".")[1] == name]
            trials += self.expand(name, block, common, own, skip, used)
        for override in common:
            if about_recipe(override) and label(override) not in used:
                known = {key for composed in self._composed.values() for key in composed.keys}
                key, named = label(override), override.package or override.key_or_group
                raise ConfigError(f"unknown setting {key!r}: no recipe of this experiment has it.{nearest(named, known)}")
        if not trials:
            raise ConfigError("nothing to do: name an experiment (experiment=demo) or a recipe (recipe=gptq)")
        check_members(trials)
        check_teachers(trials)
        check_prompts(trials)
        name = top.name or next((t.recipe for t in trials), "sweep")
        return Experiment(str(name), uniquely_named(trials), **whole, plugins=[located(str(plugin)) for plugin in top.plugins])

    def top(self) -> DictConfig:
        """The composed config without what only holds for single blocks: recipes, sweeps, `blocks.NAME...`."""
        own = [
            o
            for o in self.given
            if not about_recipe(o) and not o.is_sweep_override() and not o.key_or_group.startswith("blocks.")
        ]
        return self.composed(o for o in own if not self.is_value(o)).with_values([o for o in own if self.is_value(o)])

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
        skip: bool,
        used: set[str],
    ) -> Iterator[Trial]:
        """The trials of one block. `used` collects the recipe overrides of the command line that this block took."""
        lines = [f"{key}={grammar(value)}" for key, value in (block.get("sweep") or {}).items()]
        lines += [line_of(o).replace(f"blocks.{name}.", "", 1) for o in own]  # blocks.NAME.KEY=VALUE
        chosen = {label(o): o for o in map(self.parse, lines)}
        if block["recipe"] and "recipe" not in chosen:
            chosen = {"recipe": self.parse(f"recipe={block['recipe']}"), **chosen}
        mine = set(chosen)
        chosen.update({label(o): o for o in common})
        shared = {label(o) for o in common if about_recipe(o)}
        for key, override in chosen.items():
            part = override.key_or_group.split(".", 1)[0]
            if (key in mine or override.is_sweep_override()) and part in {*GROUPS, *PLAIN} - {*TRIAL_PARTS, "recipe"}:
                raise ConfigError(f"{override.input_line}: {part} holds for the whole sweep and takes one value")
        groups = [o for o in chosen.values() if not self.is_value(o)]
        for point in self.compositions(groups, shared):
            used |= {label(o) for o in point} & shared
            composed = self.composed(point)
            # A recipe's setting on the command line is for the recipes that have it.
            values = [
                o for key, o in chosen.items() if self.is_value(o) and (key not in shared or o.key_or_group in composed.keys)
            ]
            keys = [label(o) for o in (*point, *values)]
            used |= set(keys) & shared
            axes = {key for key in chosen if chosen[key].is_sweep_override()}
            shown = [key for key in chosen if key in {*axes, *mine, *shared} & set(keys) and key != "recipe"]
            routes = composed.routes(values)
            for setting in itertools.product(*map(points, values)):
                at = dict(zip(keys, (*point, *setting), strict=True))
                recipe = str(at["recipe"].value()) if "recipe" in at else name
                title = name if block["recipe"] else recipe
                words = [f"{key.rsplit('.', 1)[-1]}={at[key].value()}" for key in shown if key in axes]
                parts = {part: composed.part(part, [setting[i] for i in taken]) for part, taken in routes.items()}
                yield assemble("-".join([title, *words]), title, recipe, {key: at[key].value() for key in shown}, parts, skip)

    def compositions(self, groups: list[Override], shared: set[str]) -> Iterator[tuple[Override, ...]]:
        """The combinations of what has to be composed. A method that the command line chooses for a stage
        (`method@recipe.merge=ties`) is for the recipes that have the stage, where there are several."""
        several = any(o.key_or_group == "recipe" and o.is_sweep_override() for o in groups) or "recipe" not in shared
        methods = [o for o in groups if o.key_or_group == "method" and o.package and plain(o) and label(o) in shared]
        others = [o for o in groups if not several or o not in methods]
        for rest in itertools.product(*map(points, others)):
            own = [o for o in methods if several and o.package in self.composed(rest).keys]
            place = {label(o): i for i, o in enumerate(groups)}
            for chosen in itertools.product(*map(points, own)):
                yield tuple(sorted((*rest, *chosen), key=lambda o: place[label(o)]))


def points(axis: Override) -> list[Override]:
    """The values of one key, each as an override of its own."""
    if not axis.is_sweep_override():
        return [axis]
    try:
        values = list(axis.sweep_iterator())
    except HydraException as e:
        raise ConfigError(f"{axis.input_line}: {one_line(e)}") from e
    prefix = line_of(axis).split("=", 1)[0]
    return [
        dataclasses.replace(axis, value_type=ValueType.ELEMENT, _value=v, input_line=f"{prefix}={Transformer.str(v)}")
        for v in values
    ]


# --- from a composed config to trials ---------------------------------------------------------------------------------


class Composed:
    """A composed config, and the parts that have been made of it."""

    def __init__(self, config: DictConfig, make: MakePart) -> None:
        self.config, self._make = typed(config), make
        self.keys = dict.fromkeys(keys_of(self.config))
        names = [*TRIAL_PARTS, *(f"recipe.{name}" for name in self.config.recipe or {})]
        self.plain = {part: contained(OmegaConf.select(self.config, part), resolve=False) for part in names}
        self.open = {part for part, plain in self.plain.items() if "${" in json.dumps(plain, default=str)}
        """Parts that may read any other by an interpolation."""
        self._scratch = copy.deepcopy(self.config)
        self._effects: dict[str, list[tuple[tuple[str, ...], Any]]] = {}
        self._parts: dict[tuple[str, ...], Part] = {}

    def routes(self, values: Sequence[Override]) -> dict[str, list[int]]:
        """Part -> positions of the overrides (sweeps may be among them) that it depends on."""
        for override in values:
            self.check_known(override)
            if "${" in line_of(override):
                self.open.add(part_of(override.key_or_group))
        owners = [part_of(o.key_or_group) for o in values]
        return {part: [i for i, owner in enumerate(owners) if owner == part or part in self.open] for part in self.plain}

    def part(self, part: str, values: Sequence[Override]) -> Part:
        """One part with values set: its own values, or where it is `open` those of all parts."""
        key = (part, *(line_of(o) for o in values))
        if key not in self._parts:
            if part in self.open:
                plain = contained(OmegaConf.select(self.with_values(values), part), where=part)
            else:
                plain = copy.deepcopy(self.plain[part])
                for override in values:
                    for path, value in self.effects(override):
                        plain = put(plain, path, value)
            self._parts[key] = self._make(part, plain)
        return self._parts[key]

    def with_values(self, values: Iterable[Override]) -> DictConfig:
        """A copy of the config with values set."""
        config = copy.deepcopy(self.config)
        for override in values:
            self.set_value(config, override)
        return config

    def effects(self, override: Override) -> list[tuple[tuple[str, ...], Any]]:
        """What setting a value does: (path within the part, value as the schema converts it)."""
        line, key = line_of(override), override.key_or_group
        if line not in self._effects:
            self.set_value(self._scratch, override)
            inner = key.split(".")[len(part_of(key).split(".")) :]
            self._effects[line] = [
                ((*inner, *path), contained(OmegaConf.select(self._scratch, ".".join([key, *path])), resolve=False))
                for path, _ in leaves(override.value())
            ]
        return self._effects[line]

    def set_value(self, config: DictConfig, override: Override) -> None:
        """Sets one value on a copy of the config, with the type check of its schema."""
        self.check_known(override)
        key, value = override.key_or_group, override.value()
        where, _, last = key.rpartition(".")
        if key.startswith("recipe.") and last == "method" and value != OmegaConf.select(config, key):
            raise ConfigError(f"{key} cannot be set; choose another method with method@{where}={value}")
        try:
            OmegaConf.update(config, key, value, merge=True)
        except OmegaConfBaseException as e:
            raise ConfigError(f"{override.input_line}: {one_line(e)}") from e

    def check_known(self, override: Override) -> None:
        if override.key_or_group not in self.keys and not override.key_or_group.startswith("engine.config."):
            raise ConfigError(f"unknown setting {override.key_or_group!r}.{nearest(override.key_or_group, self.keys)}")


# --- from what the ledger keeps ---------------------------------------------------------------------------------------


def restore(rows: Iterable[Mapping[str, Any]], common: Mapping[str, Any], overrides: Sequence[str] = ()) -> Experiment:
    """An experiment from its trials in the ledger and `Experiment.common()`, without composing anything.

    rows: name, block, recipe, overrides, config, status of each trial, in order; objects or their JSON.
    overrides: values of cluster, tracking, store or budget that are to be others now.
    """
    register_methods(common["plugins"])
    make = interned()
    composed = Composed(OmegaConf.create({part: common[part] for part in SWEEP_PARTS}), make)
    config = composed.with_values(value_override(text, SWEEP_PARTS, "a sweep that goes on can change") for text in overrides)
    trials = []
    for row in rows:
        kept, shown = (json.loads(row[key]) if isinstance(row[key], str) else row[key] for key in ("config", "overrides"))
        plain = {key: kept.get(key, {}) for key in TRIAL_PARTS}
        plain |= {f"recipe.{key}": node for key, node in kept["recipe"].items()}
        parts = {part: make(part, said) for part, said in plain.items()}
        trials.append(assemble(row["name"], row["block"], row["recipe"], shown, parts, row["status"] == "skipped"))
    check_members(trials)
    check_teachers(trials)
    check_prompts(trials)
    return Experiment(
        common["name"],
        trials,
        **{part: built_group(part, config[part]) for part in SWEEP_PARTS},
        plugins=list(common["plugins"]),
        request=Request(**common["request"]),
    )


def changed(trial: Trial, overrides: Sequence[str]) -> Trial:
    """A copy of a trial with other values, checked like any. Only values: another method would be another recipe."""
    composed = Composed(OmegaConf.create({key: trial.config[key] for key in (*TRIAL_PARTS, "recipe")}), made)
    values = [value_override(text, (*TRIAL_PARTS, "recipe"), "can be changed for one trial") for text in overrides]
    name, shown = trial.name, dict(trial.overrides)
    for override in values:
        key, value = override.key_or_group, override.value()
        short = key.rsplit(".", 1)[-1]
        old, new = f"-{short}={shown.get(key)}-", f"-{short}={value}-"
        name = (f"{name}-".replace(old, new) if old in f"{name}-" else name + new).removesuffix("-")
        shown[key] = value
    routes = composed.routes(values)
    parts = {part: composed.part(part, [values[i] for i in taken]) for part, taken in routes.items()}
    return assemble(name, trial.block, trial.recipe, shown, parts, skip=False)


def value_override(text: str, allowed: Sequence[str], what: str) -> Override:
    """One `key=value` where nothing is composed any more."""
    override = parse(OverridesParser.create(), text)
    key = override.key_or_group
    if not plain(override) or override.package or override.is_sweep_override():
        raise ConfigError(f"{text}: only one value for a key that is there can be set here: KEY=VALUE")
    if key.split(".")[0] not in allowed or key in ("recipe", *GROUPS):
        raise ConfigError(f"{text}: only values beneath {', '.join(allowed)} {what}")
    return override


# --- overrides ---------------------------------------------------------------------------------------------------------


def parse(parser: OverridesParser, text: str) -> Override:
    try:
        override = parser.parse_override(text)
    except HydraException as e:
        raise ConfigError(f"cannot read {text!r} as KEY=VALUE: {one_line(e)}") from e
    if not override.key_or_group:
        raise ConfigError(f"cannot read {text!r} as KEY=VALUE: the key is missing")
    return override


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


def uniquely_named(trials: list[Trial]) -> list[Trial]:
    """Trials that would share a name get a number."""
    seen: dict[str, int] = {}
    for trial in trials:
        seen[trial.name] = seen.get(trial.name, 0) + 1
        if seen[trial.name] > 1:
            trial.name += f"#{seen[trial.name]}"
    return trials
