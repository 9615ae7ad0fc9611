"""Export of integer codes as a `pack-quantized` checkpoint of compressed-tensors, which transformers opens by itself.

The codes are not touched: operands of `Codes` (pare/methods/parts/codes.py) get other names, and `config.json` says how
to read them. Linears of one scheme (bits, group, symmetric or not) form a config group.

What transformers 5.23 with compressed-tensors 0.20 can open was tried out and decides what is refused here: symmetric codes
open plainly, also with a scheme for each layer. Zero points open only with `CompressedTensorsConfig(dequantize=True)`, and that
way of loading reads *every* weight by the first config group, so that a second scheme would be misread.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pare.methods.parts.codebooks import Integer
from pare.methods.parts.codes import Codes, Rows
from pare.methods.parts.formula import Formula
from pare.workers.export.files import copy_companions, write_weights
from pare.workers.models import ModelArtifact, load_skeleton


@dataclass(frozen=True, order=True)
class Scheme:
    """What a config group says of its linears."""

    bits: int
    group: int
    """Columns that share a scale; -1: the whole row."""
    symmetric: bool

    def config(self, targets: list[str]) -> dict[str, Any]:
        weights: dict[str, Any] = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False}
        weights |= {"strategy": "channel"} if self.group == -1 else {"strategy": "group", "group_size": self.group}
        return {"targets": targets, "weights": weights, "format": "pack-quantized"}


class Inexpressible(Exception):
    """The format has no words for a weight; the message says why."""


def schemes(artifact: ModelArtifact) -> dict[str, Scheme]:
    """Module name -> scheme, for every compressed linear.

    Raises:
        Inexpressible: the artifact as a whole cannot be written in this format.
    """
    linears = set(linear_names(artifact.dense.directory))
    found: dict[str, Scheme] = {}
    for name in artifact.compressed_names():
        module = name.removesuffix(".weight")
        if module not in linears:
            raise Inexpressible(f"{name} is not the weight of a linear layer")
        try:
            found[module] = scheme_of(artifact.effective(name))
        except Inexpressible as e:
            raise Inexpressible(f"{module} {e}") from None
    if not all(scheme.symmetric for scheme in found.values()) and len(set(found.values())) > 1:
        raise Inexpressible("zero points can be opened only where all layers have the same bits and group")
    return found


def scheme_of(formula: Formula) -> Scheme:
    codes = formula.parts[0]
    if len(formula.parts) > 1:
        raise Inexpressible(f"is a sum of parts ({', '.join(part.kind for part in formula.parts)})")
    if not isinstance(codes, Codes):
        raise Inexpressible(f"is stored as {codes.kind}")
    if not isinstance(codes.codebook, Integer):
        raise Inexpressible(f"has codes of the table {codes.codebook.spec().get('name') or 'stored with it'}, not integers")
    if not isinstance(codes.index, Rows) or codes.index.g_idx is not None:
        raise Inexpressible("has groups that are not consecutive columns of a row")
    if not isinstance(codes.scale, Tensor):
        raise Inexpressible("has scales that are codes themselves")
    if codes.offset is not None:
        raise Inexpressible("has an offset")
    columns, group = codes.shape[1], codes.index.group
    if group != -1 and columns % group:
        raise Inexpressible(f"has {columns} columns, which groups of {group} do not divide")
    if codes.zero is None and not codes.codebook.signed:
        raise Inexpressible("has unsigned codes without a zero point")
    return Scheme(codes.codebook.bits, -1 if group == columns else group, codes.zero is None)


def export_compressed_tensors(artifact: ModelArtifact, out: Path) -> bool:
    """Writes the checkpoint to `out`; returns whether it opens plainly (else only with `dequantize=True`)."""
    found = schemes(artifact)
    by_scheme: dict[Scheme, list[str]] = {}
    for module, scheme in found.items():
        by_scheme.setdefault(scheme, []).append(module)
    source = artifact.dense.directory
    # The class name is what most readers know best; with several schemes each linear must be named.
    groups = [scheme.config(["Linear"] if len(by_scheme) == 1 else modules) for scheme, modules in sorted(by_scheme.items())]
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "pack-quantized",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": [name for name in linear_names(source) if name not in found],
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    copy_companions(source, out)
    write_weights(packed_weights(artifact, found), out)
    return all(scheme.symmetric for scheme in found.values())


def packed_weights(artifact: ModelArtifact, found: dict[str, Scheme]) -> Iterator[tuple[str, Tensor]]:
    for name in artifact.parameter_names():
        module = name.removesuffix(".weight")
        if module not in found:
            yield name, artifact.stored(name)
            continue
        operands = artifact.effective(name).parts[0].tensors()
        yield f"{module}.weight_packed", operands["codes"]
        yield f"{module}.weight_scale", operands["scale"]
        yield f"{module}.weight_shape", torch.tensor(artifact.stored(name).shape)
        if "zero" in operands:
            yield f"{module}.weight_zero_point", operands["zero"]


def linear_names(directory: Path) -> list[str]:
    """Names of all linear layers of the model in a dense directory; no weight is read."""
    return [name for name, module in load_skeleton(directory).named_modules() if isinstance(module, torch.nn.Linear)]
