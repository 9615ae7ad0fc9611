"""Brings one of lm-eval's tasks, or a group of them, into the store: definitions and data, so that evaluation needs no more.

spec: `identity` (from `lm_tasks.resolve_benchmark`), `where` {name, include_path, start}. Writes `tasks.json`, {"name",
"tasks": [{"name", "file", "own", "overrides", "splits"}]}; `definitions/` with the user's YAML and Python files; and for each
task with data `data/<number>/<split>.parquet`. Result: `tasks`, `documents` (of all splits).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pare.workers import lm_tasks
from pare.workers.corpus import SourceError
from pare.workers.hub import hub_errors
from pare.workers.lm_tasks import Leaf
from pare.workers.task import TaskContext, TaskError

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def run(ctx: TaskContext) -> dict[str, Any]:
    where = ctx.spec["where"]
    start, folder = Path(where["start"]), where["include_path"]
    try:
        leaves = lm_tasks.find(where["name"], folder)
        for leaf in leaves:
            found = lm_tasks.identity_of(leaf, start)
            if found != ctx.spec["identity"].get(leaf.name):
                raise SourceError(
                    f"the task {leaf.name} is not what it was when the plan was made. Type the same command again to plan anew",
                    lm_tasks.SETTING,
                )
        if folder and any(leaf.own for leaf in leaves):
            copy_definitions(Path(folder).resolve(), ctx.out / "definitions")
        listed, documents = [], 0
        for i, leaf in enumerate(leaves):
            splits = write_data(leaf, start, ctx.spec["identity"][leaf.name]["data"], ctx.out / "data" / str(i))
            root = Path(folder).resolve() if leaf.own and folder else lm_tasks.shipped()
            file = leaf.file.relative_to(root).as_posix()
            listed.append({"name": leaf.name, "file": file, "own": leaf.own, "overrides": leaf.overrides, "splits": splits})
            documents += sum(splits.values())
            ctx.progress(i + 1, len(leaves), "tasks")
    except SourceError as e:
        raise TaskError(str(e)) from e
    (ctx.out / "tasks.json").write_text(json.dumps({"name": where["name"], "tasks": listed}, indent=1))
    return {"tasks": len(listed), "documents": documents}


def copy_definitions(folder: Path, target: Path) -> None:
    """The user's YAML and Python files, in their places."""
    for file in sorted(p for p in folder.rglob("*") if p.suffix in (".yaml", ".py") and "__pycache__" not in p.parts):
        (target / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / file.relative_to(folder))


def write_data(leaf: Leaf, start: Path, commit: Any, target: Path) -> dict[str, int]:
    """The splits that the task reads as Parquet; split -> number of documents."""
    import datasets

    config = {**leaf.config, **leaf.overrides}
    place = lm_tasks.data_of(leaf, start)
    if not place:
        return {}
    arguments = {k: v for k, v in (config.get("dataset_kwargs") or {}).items() if k not in ("data_files", "trust_remote_code")}
    with tempfile.TemporaryDirectory() as cache:  # the cache of `datasets` goes by a file's path and time, not its content
        if "files" in place:
            data = datasets.load_dataset(place["loader"], data_files=place["files"], cache_dir=cache, **arguments)
        elif "directory" in place:
            data = datasets.load_dataset(place["directory"], config.get("dataset_name"), cache_dir=cache, **arguments)
        else:
            with hub_errors({"name": place["name"], "revision": commit}, "dataset"):
                arguments["revision"] = commit
                data = datasets.load_dataset(place["name"], config.get("dataset_name"), cache_dir=cache, **arguments)
        wanted = dict.fromkeys(str(config[key]) for key in SPLITS if config.get(key))
        if missing := [split for split in wanted if split not in data]:
            raise SourceError(
                f"{lm_tasks.SETTING}: {leaf.name} reads the split {missing[0]!r}; its data have {', '.join(data)} "
                f"({leaf.file})",
                lm_tasks.SETTING,
            )
        target.mkdir(parents=True)
        for split in wanted:
            data[split].to_parquet(str(target / f"{split}.parquet"))
        return {split: len(data[split]) for split in wanted}
