"""Fingerprints: the address of a task's result is a hash of everything that can change it, and of nothing else.

The pre-image is canonical JSON with the record type first: task type, spec, input fingerprints, versions of the
libraries that the task's numbers depend on, device class where it matters, and a digest of the code. The code digest
covers the syntax tree (without comments and docstrings) of every Pare or plugin module that the task's entry module
imports, found by reading the source, never by importing it. Known limits: the tree's notation belongs to a Python
minor version, so another minor version computes afresh; a module imported under a computed name is seen only if it is
listed in `IMPORTED_BY_NAME`.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import json
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blake3 import blake3

RECORD = "pare.task/1"

CANNOT_CHANGE_A_NUMBER = frozenset(
    {f"pare.workers.{name}" for name in ("blobs", "checkpoint", "loading", "plugins", "run", "store", "task")}
)
"""How a task is fed, run and published; not what it computes."""

IMPORTED_BY_NAME = {"pare.methods.parts.formula": ("pare.methods.parts",)}
"""Module -> packages whose modules it imports by a computed name."""

LIBRARIES = {
    "import_model": ("torch", "transformers", "gguf", "tokenizers"),
    "adopt": ("torch", "transformers", "compressed-tensors", "peft", "bitsandbytes", "gguf"),
    "member": ("torch", "transformers", "peft"),
    "corpus": (),
    "questions": (),
    "pairs": (),
    "benchmark": ("lm-eval", "datasets"),
    "tokens": ("transformers", "tokenizers"),
    "calibrate": ("torch", "transformers"),
    "gradients": ("torch", "transformers"),
    "compress": ("torch", "transformers"),
    "teach": ("torch", "transformers"),
    "train": ("torch", "transformers", "peft", "bitsandbytes"),
    "merge": ("torch", "transformers", "peft"),
    "levels": ("torch",),
    "allocate": ("torch", "transformers", "scipy"),
    "assemble": (),
    "score": ("torch", "transformers"),
    "export": ("torch", "transformers", "compressed-tensors", "peft", "bitsandbytes"),
    "evaluate": ("torch", "transformers", "compressed-tensors", "peft", "bitsandbytes", "lm-eval"),
    "speed": ("torch", "transformers", "compressed-tensors", "peft", "bitsandbytes"),
}
"""Task type -> distributions whose version enters the fingerprint."""

DEPENDS_ON_DEVICE = frozenset(
    {"calibrate", "gradients", "compress", "teach", "train", "merge", "allocate", "score", "evaluate", "speed"}
)
"""Task types whose numbers differ between a CPU and a GPU."""


ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values have equal text in every process."""
    return ENCODER.encode(value)


def digest(value: Any) -> str:
    """BLAKE3 of the canonical JSON, 64 hexadecimal digits."""
    return blake3(canonical(value).encode()).hexdigest()


def task_record(
    kind: str, spec: dict[str, Any], inputs: dict[str, str], device: str, also: Iterable[str] = ()
) -> dict[str, Any]:
    """The pre-image of a task's fingerprint. `also`: further modules that take part (the method's)."""
    return {
        "record": RECORD,
        "type": kind,
        "spec": spec,
        "inputs": inputs,
        "libraries": libraries(kind) | ({"deepspeed": version("deepspeed")} if "zero" in spec else {}),
        "device": device if kind in DEPENDS_ON_DEVICE else None,
        "code": code_digest((kind if "." in kind else f"pare.workers.tasks.{kind}", *sorted(also))),
    }


@functools.cache
def libraries(kind: str) -> dict[str, str | None]:
    """Distribution -> version, one object for all tasks of a type."""
    return {name: version(name) for name in LIBRARIES.get(kind, ())}


@functools.cache
def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


CODE: dict[str, dict[str, str]] = {}
"""Every code digest that was asked for in this process -> what it covers: module -> digest of its tree."""


@functools.cache
def code_digest(entries: tuple[str, ...]) -> str:
    """Digest of the code that the modules `entries` run."""
    trees = {name: tree_digest(source_file(name)) for name in sorted(closure(entries))}
    found = digest(trees)
    CODE[found] = trees
    return found


def closure(entries: Iterable[str]) -> set[str]:
    """All Pare modules that `entries` import, directly or not, themselves included."""
    seen: set[str] = set()
    waiting = list(entries)
    while waiting:
        name = waiting.pop()
        if name in seen or name in CANNOT_CHANGE_A_NUMBER:
            continue
        seen.add(name)
        waiting += imports(name)
    return seen


@functools.cache
def imports(name: str) -> tuple[str, ...]:
    """Pare modules that one module's source names: imports at any depth, and module names given as strings
    (`python -m pare.workers.fresh`)."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source_file(name).read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("pare."):
            found.add(node.value)
    for package in IMPORTED_BY_NAME.get(name, ()):
        spec = importlib.util.find_spec(package)
        if spec is not None:
            found |= {f"{package}.{m.name}" for m in pkgutil.iter_modules(spec.submodule_search_locations)}
    return tuple(sorted(m for m in found if m.startswith("pare.") and is_module(m)))


@functools.cache
def is_module(name: str) -> bool:
    if not all(part.isidentifier() for part in name.split(".")):
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def source_file(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name}: no source file to take a fingerprint of")
    return Path(spec.origin)


def tree_digest(path: Path) -> str:
    """Digest of a module's syntax tree: comments, docstrings and layout do not count."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [s for s in node.body if not is_text(s)] or [ast.Pass()]
    return blake3(ast.dump(tree).encode()).hexdigest()


def is_text(statement: ast.stmt) -> bool:
    """A bare string: a docstring, or the documentation of a field."""
    return (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)
    )
