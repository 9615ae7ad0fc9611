"""Takes a model or a LoRA adapter made elsewhere into the store as a member of merges: as what it adds to the base.

spec: `identity` (from `members.resolve_member`), `where` (from `members.locate_member`). Input: `model`, the base. Writes
formulas on the base: dense weights where they differ from the base's; of an adapter low-rank updates, with it beside them.
Result: `format`, `weights` (how many differ).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pare.methods.anatomy.views import name_of
from pare.methods.ops.adapters import write_adapter
from pare.methods.parts.formula import Dense, Formula, LowRank
from pare.workers.corpus import SourceError
from pare.workers.members import ADDED, HEAD, check_tokenizer, tokens_of
from pare.workers.model_files import digest_directory, model_files
from pare.workers.models import FormulaWriter, ModelArtifact, as_written, dense_index, load_skeleton
from pare.workers.sources import check_unchanged
from pare.workers.task import TaskContext, TaskError


def run(ctx: TaskContext) -> dict[str, Any]:
    identity, source, base = ctx.spec["identity"], Path(ctx.spec["where"]["path"]), ctx.inputs["model"]
    try:
        check_unchanged(digest_directory(source, model_files(source)), identity, str(source))
        check_tokenizer(source, tokens_of(base), str(source), "members.paths")
    except SourceError as e:
        raise TaskError(str(e)) from e
    writer, n = FormulaWriter(ctx.out), 0
    formulas: Iterable[tuple[str, Formula]]
    if identity["format"] == "adapter":
        updates = dict(updates_in(source))
        write_adapter(updates, load_skeleton(base), ctx.out / "adapter")
        formulas = ((name, Formula([update], "add")) for name, update in updates.items())
    else:
        formulas = changes(source, ModelArtifact(base, ctx.resolve), ctx)
    for name, formula in formulas:
        writer.add(*as_written({name: formula}, {}))
        n += 1
    writer.close(ctx.fingerprint_of["model"])
    return {"format": identity["format"], "weights": n}


def changes(source: Path, base: ModelArtifact, ctx: TaskContext) -> Iterator[tuple[str, Formula]]:
    """The weights of a full model that are not the base's, one after another."""
    where, names = dense_index(source), base.parameter_names()

    def stored(name: str) -> Tensor:
        with safe_open(where[name], framework="pt") as f:
            found: Tensor = f.get_tensor(name)
        return found

    absent = [name for name in names if name not in where]
    if absent:
        raise TaskError(f"{source}: has no {absent[0]}, among {len(absent)}; save it again with the installed transformers")
    if HEAD in where and HEAD not in names and not torch.equal(stored(HEAD), stored(embedding_of(base))):
        raise TaskError(
            f"{source}: {HEAD} is not its embedding, and in the base they are one weight, of which there cannot be two means. "
            "Name a base whose head is its own: model=hf model.path=BASE; or give a member that was trained with the two as one"
        )
    for i, name in enumerate(names):
        weight, own = stored(name), base.stored(name)
        ctx.progress(i + 1, len(names), "weights")
        if weight.shape != own.shape:
            raise TaskError(f"{source}: {name} is of shape {list(weight.shape)}, in the base of shape {list(own.shape)}")
        if torch.equal(weight.float(), own.float()):
            continue
        if weight.dim() == 3:  # a stack of matrices
            yield from ((name_of(name, k), Formula([Dense(part)])) for k, part in enumerate(weight))
        else:
            yield name, Formula([Dense(torch.atleast_2d(weight))])


def embedding_of(base: ModelArtifact) -> str:
    """Name of the parameter that turns tokens into vectors."""
    model = load_skeleton(base.dense.directory)
    weight = model.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is weight)


def updates_in(source: Path) -> Iterator[tuple[str, LowRank]]:
    """Parameter name -> its update, by the ranks and scales of the adapter's config."""
    from peft.utils.other import get_pattern_key

    config = json.loads((source / "adapter_config.json").read_text())

    def of(module: str, patterns: Mapping[str, float] | None, otherwise: float) -> float:
        patterns = patterns or {}
        return patterns.get(get_pattern_key(list(patterns), module), otherwise)

    with safe_open(source / "adapter_model.safetensors", framework="pt") as f:
        for key in sorted(key for key in f.keys() if key.endswith(".lora_A.weight")):  # noqa: SIM118
            module = key.removeprefix(ADDED).removesuffix(".lora_A.weight")
            a, b = f.get_tensor(key), f.get_tensor(key.replace(".lora_A.", ".lora_B."))
            alpha = of(module, config.get("alpha_pattern"), config["lora_alpha"])
            rank = of(module, config.get("rank_pattern"), config["r"])
            yield f"{module}.weight", LowRank(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
