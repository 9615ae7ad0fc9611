"""Makes the corpus: `train.jsonl`, `validation.jsonl`, `selection.jsonl`, `test.jsonl`, a document per line.

spec: `data` (the config; `fractions` and `seed` are read), `identity` (from `sources.resolve_data`), `where` (from
`sources.locate_data`). Result: for each split the numbers of `documents` and `characters`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pare.workers.corpus import (
    Document,
    SourceError,
    dataset_documents,
    pydoc_digest,
    pydoc_documents,
    split_documents,
    text_documents,
    write_split,
)
from pare.workers.files import digest_file
from pare.workers.hub import cached_snapshot
from pare.workers.model_files import digest_directory
from pare.workers.sources import check_unchanged, data_files
from pare.workers.table import digest_table, table_documents, table_files
from pare.workers.task import TaskContext, TaskError


def run(ctx: TaskContext) -> dict[str, Any]:
    data = ctx.spec["data"]
    try:
        documents = read_documents(ctx.spec["identity"], ctx.spec.get("where") or {})
        splits = split_documents(documents, data["fractions"], data["seed"])
    except SourceError as e:
        raise TaskError(str(e)) from e
    for name, members in splits.items():
        write_split(ctx.out, name, members)
    return {
        name: {"documents": len(members), "characters": sum(len(d.text) for d in members)} for name, members in splits.items()
    }


def read_documents(identity: dict[str, Any], where: dict[str, Any]) -> list[Document]:
    """The documents of a source, after a check that it still is what the plan saw."""
    if identity["source"] == "pydoc":
        check_unchanged(pydoc_digest(), identity, "the standard library of this worker's Python")
        return pydoc_documents()
    if identity["source"] == "text":
        path = Path(where["path"])
        documents = text_documents(path)
        check_unchanged(digest_file(path), identity, str(path))
        return documents
    if identity["source"] == "table":
        files = table_files(where["path"])
        table = table_documents(files, identity)
        check_unchanged(digest_table(files), identity, ", ".join(where["path"]))
        return table
    if "commit" in identity:
        cached = cached_snapshot(where["name"], identity["commit"], "dataset")
        commit = None if cached else identity["commit"]
        return dataset_documents(cached, where["name"], commit, identity["config"], identity["column"])
    path = Path(where["path"])
    check_unchanged(digest_directory(path, data_files(path)), identity, str(path))
    return dataset_documents(path, None, None, identity["config"], identity["column"])
