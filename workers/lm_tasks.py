"""Finding lm-eval's tasks by name, at plan time: what they say, what data they read, and what identifies both.

A name is looked up in the user's own folder first (`evaluation.include_path`), then among the tasks that lm-eval brings.
A group or a tag stands for the tasks in it. lm-eval's own index reads 14,000 YAML files; here only those are parsed whose
text has the name in it. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from blake3 import blake3

from pare.workers.corpus import SourceError
from pare.workers.files import digest_file
from pare.workers.hub import hub_commit
from pare.workers.sources import data_files, digest_directory

SETTING = "evaluation.tasks"
LOADERS = ("json", "csv", "parquet", "text", "arrow")
"""Values of `dataset_path` with which the data are files that `dataset_kwargs` names."""

NAMED = re.compile(r"^[\"']?(?:task|group)[\"']?:[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)
INCLUDED = re.compile(r"^[\"']?include[\"']?:[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)
SHARED_KEYS = ("task", "group", "tag", "task_list", "include", "class", "group_alias", "task_alias", "aggregate_metric_list",
               "aggregate_metric", "metadata")  # fmt: skip
"""Keys of a group that are not handed down to its tasks."""


@dataclass(frozen=True)
class Leaf:
    """One task, as a YAML file defines it."""

    name: str
    file: Path
    config: dict[str, Any]
    """What the file and those it includes say; functions as the text of where they are."""
    overrides: dict[str, Any]
    """What the group through which it was found says beyond that."""
    own: bool
    """Whether it lies in the user's folder and not in lm-eval."""


def find(name: str, include_path: str | None) -> list[Leaf]:
    """The tasks that a name stands for.

    Raises:
        SourceError: there is no such task, a file of the user's folder cannot be read, or the task is of a kind that
            cannot be measured here.
    """
    leaves = expand(name, Path(include_path).resolve() if include_path else None, {}, ())
    for leaf in leaves:
        check(leaf)
    return leaves


def expand(name: str, folder: Path | None, overrides: dict[str, Any], within: tuple[str, ...]) -> list[Leaf]:
    if name in within:
        raise SourceError(f"{SETTING}: the group {name} contains itself ({' > '.join([*within, name])})", SETTING)
    for place in [folder, shipped()] if folder else [shipped()]:
        definitions = own_definitions(place) if place == folder else shipped_definitions(name)
        for file, config in definitions.items():
            if name not in (config.get("group"), config.get("task")):
                continue
            if "group" not in config:
                return [Leaf(name, file, config, overrides, place == folder)]
            handed = {k: v for k, v in config.items() if k not in SHARED_KEYS} | overrides
            members = config["task"] if isinstance(config.get("task"), list) else [config.get("task")]
            return [leaf for m in members for leaf in expand(*member(m, name, handed, folder), (*within, name))]
        tagged = sorted(c["task"] for c in definitions.values() if name in tags(c) and isinstance(c.get("task"), str))
        if tagged:
            return [leaf for m in tagged for leaf in expand(m, folder, overrides, (*within, name))]
    known = [*(str(c.get("group") or c.get("task")) for c in own_definitions(folder).values()), *shipped_names()]
    close = get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else "`lm-eval ls tasks` lists them."
    own = f" and {folder}" if folder else "; a folder of your own: evaluation.include_path=DIRECTORY"
    raise SourceError(f"{SETTING}: there is no task {name!r} in lm-eval{own}. {hint}", SETTING)


def member(entry: Any, group: str, handed: dict[str, Any], folder: Path | None) -> tuple[str, Path | None, dict[str, Any]]:
    """Arguments to `expand` a group's entry with."""
    if isinstance(entry, str):
        return entry, folder, handed
    if isinstance(entry, dict) and isinstance(entry.get("task"), str) and "group" not in entry:
        return entry["task"], folder, {**handed, **{k: v for k, v in entry.items() if k not in SHARED_KEYS}}
    raise SourceError(
        f"{SETTING}: the group {group} defines members in place, which is not read; name its tasks instead", SETTING
    )


def tags(config: Mapping[str, Any]) -> list[str]:
    said = config.get("tag") or []
    return [said] if isinstance(said, str) else list(said)


def check(leaf: Leaf) -> None:
    """Refuses what cannot be measured here."""
    config = {**leaf.config, **leaf.overrides}
    metrics = config.get("metric_list") or []
    reason = (
        "is a Python class that brings its own data" if "class" in config
        else "runs code that the model writes" if config.get("unsafe_code")
        else "fetches a metric from the hub (hf_evaluate)" if any(isinstance(m, dict) and m.get("hf_evaluate") for m in metrics)
        else None
    )  # fmt: skip
    if reason:
        raise SourceError(
            f"{SETTING}: {leaf.name} {reason}, which Pare does not run. Leave it out, or measure it by a function of your own: "
            "evaluation.metrics",
            SETTING,
        )


@functools.cache
def shipped() -> Path:
    """The folder of the tasks that lm-eval brings."""
    package = importlib.util.find_spec("lm_eval")
    if package is None or not package.submodule_search_locations:
        raise SourceError(f"{SETTING} needs lm-eval, which is not installed. Type: pip install 'lm-eval>=0.4.13,<0.5'", SETTING)
    return Path(package.submodule_search_locations[0]) / "tasks"


@functools.cache
def shipped_texts() -> dict[Path, str]:
    return {file: file.read_text(errors="replace") for file in sorted(shipped().rglob("*.yaml"))}


@functools.cache
def shipped_names() -> dict[str, list[Path]]:
    """Name of a task or group -> the files that begin a line with it."""
    found: dict[str, list[Path]] = {}
    for file, text in shipped_texts().items():
        for match in NAMED.finditer(text):
            found.setdefault(match[1], []).append(file)
    return found


@functools.cache
def shipped_includes() -> list[tuple[Path, Path]]:
    """(file, file beside it that it includes)."""
    found = ((file, INCLUDED.search(text)) for file, text in shipped_texts().items())
    return [(file, file.parent / match[1]) for file, match in found if match]


@functools.cache
def shipped_definitions(name: str) -> dict[Path, dict[str, Any]]:
    """The files of lm-eval that may define the name, or have it for a tag, parsed."""
    files = set(shipped_names().get(name, ()))
    if not files:
        word = re.compile(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])")
        files = {file for file, text in shipped_texts().items() if name in text and word.search(text)}
        files |= {file for file, included in shipped_includes() if included in files}  # it has the tag, too
    return {file: read_definition(file) for file in sorted(files)}


def own_definitions(folder: Path | None) -> dict[Path, dict[str, Any]]:
    """The files of the user's folder that define a task or a group, parsed."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise SourceError(f"evaluation.include_path={folder}: no such directory", "evaluation.include_path")
    read = {file: read_definition(file) for file in sorted(folder.rglob("*.yaml"))}
    return {file: config for file, config in read.items() if "task" in config or "group" in config}


def read_definition(file: Path) -> dict[str, Any]:
    """What a YAML file and those that it includes say, by lm-eval's own reader."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config: dict[str, Any] = load_yaml(file, resolve_func=False)
    except Exception as e:
        raise SourceError(f"{SETTING}: {file} cannot be read: {' '.join(str(e).split())}", SETTING) from e
    return config


# --- data ---------------------------------------------------------------------------------------------------------------


def data_of(leaf: Leaf, start: Path) -> dict[str, Any]:
    """Where a task's data lie: {"loader", "files": {split: [path]}}, {"directory"}, {"name"} of the hub, or nothing where a
    function of the task makes them. A relative path is looked for beside the YAML file, then below `start`."""
    config = {**leaf.config, **leaf.overrides}
    path, arguments = config.get("dataset_path"), dict(config.get("dataset_kwargs") or {})
    if "custom_dataset" in config or path is None:
        return {}
    if path in LOADERS:
        named = arguments.get("data_files")
        if not named:
            raise SourceError(f"{SETTING}: {leaf.file}: dataset_path {path} needs dataset_kwargs.data_files", SETTING)
        by_split = named if isinstance(named, dict) else {"train": named}
        listed = {split: [files] if isinstance(files, str) else files for split, files in by_split.items()}
        return {"loader": path, "files": {s: [str(local(leaf, f, start)) for f in files] for s, files in listed.items()}}
    for place in (leaf.file.parent / path, start / path):
        if place.is_dir():
            return {"directory": str(place.resolve())}
    if "revision" in arguments:
        return {"name": path, "revision": arguments["revision"]}
    return {"name": path}


def local(leaf: Leaf, file: str, start: Path) -> Path:
    places = [leaf.file.parent / file, start / file]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise SourceError(
            f"{SETTING}: {leaf.name} reads {file}, which is neither {' nor '.join(map(str, places))} ({leaf.file}); give a "
            "local file",
            SETTING,
        )
    return found.resolve()


def identity_of(leaf: Leaf, start: Path) -> dict[str, Any]:
    """Plain JSON that changes with what the task asks: digests of its configuration, its functions and its data."""
    root = str(leaf.file.resolve().parent)
    text = json.dumps([leaf.config, leaf.overrides], sort_keys=True, default=str).replace(root, "")
    functions = sorted(p.relative_to(leaf.file.parent).as_posix() for p in leaf.file.parent.rglob("*.py")) if leaf.own else []
    place = data_of(leaf, start)
    if "files" in place:
        data: Any = {split: [digest_file(Path(file)) for file in files] for split, files in place["files"].items()}
    elif "directory" in place:
        data = digest_directory(Path(place["directory"]), data_files(Path(place["directory"])))
    else:
        data = commit_of(leaf, place) if place else None
    return {
        "config": blake3(text.encode()).hexdigest(),
        "functions": digest_directory(leaf.file.parent, functions) if functions else None,
        "data": data,
    }


def commit_of(leaf: Leaf, place: Mapping[str, str]) -> str:
    """The commit of a data set of the hub."""
    try:
        return hub_commit(place, "dataset")
    except SourceError as e:
        raise SourceError(
            f"{SETTING}: {leaf.name} reads the data set {place['name']} of the hub, which cannot be had here. Fetch it on a "
            f"node with a connection by `pare prefetch` with the same settings, or name a task with local files. ({e})",
            SETTING,
        ) from e


def resolve_benchmark(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of what a name stands for: task -> its own. spec: `name`, `include_path`, `start`."""
    return {leaf.name: identity_of(leaf, Path(spec["start"])) for leaf in find(spec["name"], spec["include_path"])}
