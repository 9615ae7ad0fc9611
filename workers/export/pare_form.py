"""Export in Pare's own form: the formulas as they are, for what no common format can say at its true size.

    pare.json                 format, and parameter name -> formula
    pare.safetensors          the operands (`NAME:0.codes`, ...) and the parameters that are the base's (or shards of it)
    config.json, tokenizer    the base's; of a model in shapes that its config cannot say, with a table of them
                              (see `methods/anatomy/architecture.py`)

The weights do not bear the name that transformers looks for, so it refuses the directory instead of making up weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pare.methods.anatomy.architecture import class_for, filled
from pare.methods.anatomy.shrink import Shrunk
from pare.methods.anatomy.views import name_of, parse, view
from pare.methods.parts.formula import Dense, Formula
from pare.workers.export.files import copy_companions, write_weights
from pare.workers.models import ModelArtifact, dense_index, load_skeleton, within_name
from pare.workers.quantised_inputs import quantise_inputs

FORMAT = 1
TABLE, STEM = "pare.json", "pare"


def export_pare(artifact: ModelArtifact, out: Path) -> None:
    """Writes table, weights, config, tokenizer and generation config to `out`."""
    source = artifact.dense.directory
    table: dict[str, Any] = {}
    shutil.copyfile(source / "config.json", out / "config.json")
    copy_companions(source, out)
    write_weights(operands(artifact, table), out, stem=STEM)
    (out / TABLE).write_text(json.dumps({"format": FORMAT, "tensors": table}, indent=1))


def export_shrunk(shrunk: Shrunk, stored: Callable[[str], Tensor], out: Path, source: Path | None = None) -> None:
    """Writes a model of which something was taken out: as any checkpoint of transformers where its config can say what is left,
    else in Pare's own form. One parameter is in memory at a time, and those of a shard.

    stored: name in the whole model -> value of the parameter. source: directory with tokenizer and licence, to be copied.
    """
    (out / "config.json").write_text(shrunk.config.to_json_string())
    if source is not None:
        copy_companions(source, out)
    write_weights(shrunk.tensors(stored), out, stem="model" if shrunk.is_plain else STEM)
    if not shrunk.is_plain:
        (out / TABLE).write_text(json.dumps({"format": FORMAT, "tensors": {}}, indent=1))


def operands(artifact: ModelArtifact, table: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that is stored; the formulas go into `table` on the way."""
    changed: dict[str, set[str]] = {}
    for name in artifact.compressed_names():
        changed.setdefault(parse(name).parameter, set()).add(name)
    for parameter in artifact.parameter_names():
        if parameter not in changed:
            yield parameter, artifact.stored(parameter)
            continue
        for name in whole(parameter, changed[parameter], artifact):
            own = name in changed[parameter]
            formula = artifact.effective(name) if own else Formula([Dense(view(artifact.stored(parameter), name))])
            table[name] = formula.spec()
            for key, tensor in formula.tensors().items():
                yield f"{name}:{key}", tensor


def whole(parameter: str, names: set[str], artifact: ModelArtifact) -> list[str]:
    """The names, and those of the other matrices where a parameter is a stack of them."""
    views = {parse(name).index: name for name in names}
    if None in views:
        return sorted(names)
    return [views.get(i, name_of(parameter, i)) for i in range(artifact.stored(parameter).shape[0])]


def open_pare(directory: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """The exported model, every weight worked out, in evaluation mode.

    Raises:
        ValueError: the directory is no such export, or one of another format or with parts that this Pare does not know.
    """
    if not (directory / TABLE).is_file():
        raise ValueError(f"{directory} has no {TABLE}: it is no export in Pare's own form. Its README.md says how to open it")
    said = json.loads((directory / TABLE).read_text())
    if said["format"] != FORMAT:
        raise ValueError(f"{directory}: format {said['format']} of Pare's own form; this Pare opens format {FORMAT}")
    skeleton = shaped_skeleton(directory)
    dtype = dtype or skeleton.config.dtype or torch.float32
    plain, formulas = read(directory, said["tensors"])
    weights = {name: weight.to(dtype) for name, weight in [*plain.items(), *worked_out(formulas, skeleton)]}
    model: nn.Module = filled(type(skeleton), skeleton.config, weights, dtype)
    quantise_inputs(model, formulas.items())
    return model.to(device).eval()


def shaped_skeleton(directory: Path) -> Any:
    """The model on the meta device, in the shapes that the config's own keys or its table of shapes say."""
    skeleton: Any = load_skeleton(directory)
    with torch.device("meta"):
        return class_for(type(skeleton), skeleton.config)(skeleton.config)


def read(directory: Path, table: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Formula]]:
    """(the parameters that are the base's, the formulas), by name."""
    where = dense_index(directory, STEM)
    files = {file: safe_open(file, framework="pt") for file in set(where.values())}
    plain: dict[str, Tensor] = {}
    operands: dict[str, dict[str, Tensor]] = {name: {} for name in table}
    for key, file in where.items():
        name = key.partition(":")[0]
        (operands[name] if name in table else plain)[key] = files[file].get_tensor(key)
    formulas = {name: Formula.from_tensors(table[name], within_name(name, tensors)) for name, tensors in operands.items()}
    for formula in formulas.values():
        formula.resolve(formulas.__getitem__)
    return plain, formulas


def worked_out(formulas: dict[str, Formula], skeleton: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, dense weight) of every parameter that formulas stand for."""
    stacks: dict[str, Tensor] = {}
    for name, formula in formulas.items():
        parameter = parse(name).parameter
        shape = skeleton.get_parameter(parameter).shape
        if parse(name).is_plain:
            yield parameter, formula.materialise().view(shape)
        else:
            view(stacks.setdefault(parameter, torch.empty(shape)), name).copy_(formula.materialise())
    yield from stacks.items()
