"""A metric that the user has written: a Python function, checked at plan time without running it, called on the export.

    def rhymes(model, tokenizer, windows):
        ...
        return 0.42          # or {"couplets": 0.4, "triplets": 0.1}

`model` is the exported model in evaluation mode, `windows` the test windows, int64 (sequences, length), on the CPU. The call
is made without gradients, in the fresh process that has opened the export. No torch is imported at plan time.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pare.workers.corpus import SourceError
from pare.workers.files import digest_file

SETTING = "evaluation.metrics"
ARGUMENTS = ("model", "tokenizer", "windows")


def resolve_metric(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a metric function: the digest of the file that it stands in. spec: `name`, `function`.

    Raises:
        SourceError: there is no such file or function, or it cannot be called with the three arguments.
    """
    function = spec["function"].rpartition(":")[2]
    file = source_of_metric(spec)
    where = f"{SETTING}: {spec['name']}"
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except SyntaxError as e:
        raise SourceError(f"{where}: {file}:{e.lineno}: {e.msg}", SETTING) from e
    defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if function not in defined:
        has = ", ".join(defined) or "none"
        raise SourceError(f"{where}: {file} defines no function {function!r} at its top level; it has: {has}", SETTING)
    signature = defined[function].args
    positional = [*signature.posonlyargs, *signature.args]
    needed = len(positional) - len(signature.defaults)
    keyword_only = [a.arg for a, default in zip(signature.kwonlyargs, signature.kw_defaults, strict=True) if default is None]
    takes = needed <= len(ARGUMENTS) and (len(positional) >= len(ARGUMENTS) or signature.vararg is not None)
    if not takes or keyword_only:
        raise SourceError(
            f"{where}: {file}:{defined[function].lineno}: {function}({ast.unparse(signature)}) is called as "
            f"{function}({', '.join(ARGUMENTS)})",
            SETTING,
        )
    return {"digest": digest_file(file)}


def source_of_metric(spec: Mapping[str, Any]) -> Path:
    """The file that `function` names by its path or its module; no package but those above the module is imported."""
    place = spec["function"].rpartition(":")[0]
    where = f"{SETTING}: {spec['name']}: function={spec['function']}"
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise SourceError(f"{where}: there is no file {place}", SETTING)
        return Path(place).resolve()
    try:
        found = importlib.util.find_spec(place)
    except (ImportError, ValueError) as e:
        raise SourceError(f"{where}: no module {place!r} ({e})", SETTING) from e
    if found is None or found.origin is None:
        raise SourceError(f"{where}: there is no module {place!r}. Give FILE.py:FUNCTION or MODULE:FUNCTION", SETTING)
    return Path(found.origin)


def call(spec: Mapping[str, Any], file: Path, model: Any, tokenizer: Any, windows: Any) -> dict[str, float]:
    """`quality/NAME`, or `quality/NAME/KEY` for each number of a dict. spec: `name`, `function`, `identity`.

    Raises:
        TaskError: the file is not what was planned, the function raised, or returned something else than finite numbers.
    """
    import torch

    from pare.workers.task import TaskError

    name = spec["name"]
    found = digest_file(file)
    if found != spec["identity"]["digest"]:
        raise TaskError(f"{SETTING}: {name}: {file} has changed since the plan was made. Type the same command again")
    place, _, function = spec["function"].rpartition(":")
    try:
        measure = getattr(loaded(place, file), function)
        with torch.no_grad():
            value = measure(model, tokenizer, windows)
    except Exception as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        own = [frame for frame in traceback.extract_tb(e.__traceback__) if Path(frame.filename) == file]
        at = own[-1] if own else last
        said = traceback.format_exception_only(e)[-1].strip()
        raise TaskError(f"{SETTING}: {name} failed at {at.filename}:{at.lineno}, in {at.name}: {said}") from e
    values = value if isinstance(value, Mapping) else {None: value}
    metrics = {}
    for key, number in values.items():
        number = number.item() if hasattr(number, "item") and getattr(number, "numel", lambda: 1)() == 1 else number
        what = f"{SETTING}: {name}" + (f"[{key!r}]" if key is not None else "")
        if isinstance(number, bool) or not isinstance(number, int | float) or not (key is None or isinstance(key, str)):
            raise TaskError(f"{what} must be a number, or a dict of names and numbers, got {number!r}")
        if not math.isfinite(number):
            raise TaskError(f"{what} is {number}", "nonfinite")
        metrics[f"quality/{name}" + (f"/{key}" if key is not None else "")] = float(number)
    if not metrics:
        raise TaskError(f"{SETTING}: {name} returned an empty dict; it must hold at least one number")
    return metrics


def loaded(place: str, file: Path) -> Any:
    """The module, from its file where one was named."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    name = f"pare_metric_{file.stem}"
    found = importlib.util.spec_from_file_location(name, file)
    if found is None or found.loader is None:
        raise ImportError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module
