"""Export of codes as a checkpoint of compressed-tensors, which transformers opens by itself.

`config.json` says how to read the codes (pare/workers/export/schemes.py): linears of one scheme form a config group. Weights
that are stored dense, changed or not, are written beside them in the dtype of the base.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pare.workers.export.files import copy_companions, write_weights
from pare.workers.export.schemes import Inexpressible, Scheme, is_dense, scheme_of, stored_of
from pare.workers.models import ModelArtifact, load_skeleton

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that vLLM computes as one."""


def schemes(artifact: ModelArtifact) -> dict[str, Scheme]:
    """Module name -> scheme, for every linear that is made of codes.

    Raises:
        Inexpressible: the artifact as a whole cannot be written in this format.
    """
    linears = set(linear_names(artifact.dense.directory))
    found: dict[str, Scheme] = {}
    dense = []
    for name in artifact.compressed_names():
        formula, module = artifact.effective(name), name.removesuffix(".weight")
        if is_dense(formula):
            dense.append(module)
            continue
        if module not in linears:
            raise Inexpressible(f"{name} is not the weight of a linear layer")
        try:
            found[module] = scheme_of(formula)
        except Inexpressible as e:
            raise Inexpressible(f"{module} {e}") from None
    if not found:
        raise Inexpressible(f"{dense[0]} is stored as dense, and so is all else" if dense else "no weight is compressed")
    if any(scheme.needs_dequantize for scheme in found.values()) and len(set(found.values())) > 1:
        raise Inexpressible("zero points of less than 8 bits can be opened only where all layers have the same bits and group")
    return found


def how_opened(found: dict[str, Scheme]) -> str:
    """How transformers opens it: `plain`, with `dequantize`, or in `bfloat16` only."""
    if any(scheme.needs_dequantize for scheme in found.values()):
        return "dequantize"
    return "bfloat16" if any(scheme.needs_bfloat16 for scheme in found.values()) else "plain"


def unlike_siblings(found: dict[str, Scheme]) -> list[str]:
    """Names of linears whose schemes differ from those that vLLM would fuse them with, one for each such set."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name in found)
    sets = [[f"{parent}.{leaf}" for leaf in leaves] for parent in parents for leaves in FUSED]
    return [names[0] for names in sets if len({found.get(name) for name in names}) > 1]


def describe_schemes(found: dict[str, Scheme]) -> str:
    """The reason given for this format, with what it does not reach."""
    formats = ", ".join(sorted({scheme.format for scheme in found.values()}))
    unlike = unlike_siblings(found)
    text = f"all {len(found)} compressed weights are codes that it has words for ({formats})"
    if unlike:
        text += (
            f"; transformers opens it, vLLM does not: it fuses q/k/v and gate/up, whose schemes differ in {len(unlike)} "
            f"places, first at {unlike[0]}"
        )
    return text


def export_compressed_tensors(artifact: ModelArtifact, out: Path, found: dict[str, Scheme] | None = None) -> str:
    """Writes the checkpoint to `out`; returns how it is opened (`how_opened`)."""
    found = schemes(artifact) if found is None else found
    by_scheme: dict[Scheme, list[str]] = {}
    for module, scheme in found.items():
        by_scheme.setdefault(scheme, []).append(module)
    source = artifact.dense.directory
    # The class name is what most readers know best; with several schemes each linear must be named.
    groups = [scheme.config(["Linear"] if len(by_scheme) == 1 else modules) for scheme, modules in sorted(by_scheme.items())]
    formats = {scheme.format for scheme in by_scheme}
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": [name for name in linear_names(source) if name not in found],
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    copy_companions(source, out)
    write_weights(stored_tensors(artifact, found), out)
    return how_opened(found)


def stored_tensors(artifact: ModelArtifact, found: dict[str, Scheme]) -> Iterator[tuple[str, Tensor]]:
    changed = set(artifact.compressed_names())
    for name in artifact.parameter_names():
        module = name.removesuffix(".weight")
        if module in found:
            for key, tensor in stored_of(artifact.effective(name), found[module]).items():
                yield f"{module}.{key}", tensor
        else:
            stored = artifact.stored(name)
            yield name, artifact.materialise(name).view(stored.shape).to(stored.dtype) if name in changed else stored


def linear_names(directory: Path) -> list[str]:
    """Names of all linear layers of the model in a dense directory; no weight is read."""
    return [name for name, module in load_skeleton(directory).named_modules() if isinstance(module, torch.nn.Linear)]
