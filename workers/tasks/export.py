"""Writes a model artifact in a form that others can open, and says how many bytes that takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pare.workers.export.adapter import export_adapter
from pare.workers.export.card import OPEN, model_card
from pare.workers.export.choose import choose_format
from pare.workers.export.compressed_tensors import export_compressed_tensors
from pare.workers.export.dense import export_dense
from pare.workers.export.files import TensorSize, tensor_sizes, weight_files
from pare.workers.export.pare_form import export_pare
from pare.workers.models import ModelArtifact
from pare.workers.task import TaskContext


def run(ctx: TaskContext) -> dict[str, Any]:
    """Input: model. Spec: card, what the model card says of how the model was made."""
    artifact = ModelArtifact(ctx.inputs["model"], ctx.resolve)
    name, reason = choose_format(artifact)
    opens_with, how_to_open, dequantize = "transformers", OPEN["plain"], False
    if name == "adapter":
        opens_with, how_to_open = export_adapter(artifact, ctx.out)
    elif name == "dense":
        export_dense(artifact, ctx.out)
    elif name == "pare":
        export_pare(artifact, ctx.out)
        opens_with, how_to_open = "pare", OPEN["pare"]
    else:
        dequantize = not export_compressed_tensors(artifact, ctx.out)
        opens_with = "transformers + compressed-tensors" + (", dequantize=True" if dequantize else "")
        how_to_open = OPEN["dequantize" if dequantize else "plain"]
    facts = {"format": name, "opens_with": opens_with, "reason": reason, **sizes(artifact, ctx.out)}
    (ctx.out / "README.md").write_text(model_card(ctx.spec.get("card", {}), facts, how_to_open))
    (ctx.out / "export.json").write_text(json.dumps({**facts, "dequantize": dequantize}, indent=1))
    # That no common form says it belongs beside the trial's figures; the other reasons are what one expects.
    is_noted = name in ("dense", "pare") and artifact.compressed_names()
    return facts | {"notes": [f"exported as {name}: {reason}"] if is_noted else []}


def sizes(artifact: ModelArtifact, out: Path) -> dict[str, float]:
    """`size/...` of an export: bytes of all its weight files with headers, an adapter's base included.

    Bits per weight count the weights of the base, whatever the export has made of them. Over the linears they count what
    is stored for the weights that are compressed or tuned: codes, scales, zero points, shapes, adapters.
    """
    base = tensor_sizes(artifact.dense.directory)
    parameters = sum(size.numbers for size in base.values())
    total = sum(file.stat().st_size for file in weight_files(out))
    metrics = {"size/bytes": total, "size/bits_per_weight": 8 * total / parameters, "parameters": parameters}
    compressed = artifact.compressed_names()
    if compressed:
        stored = stored_bytes(tensor_sizes(out), {name.removesuffix(".weight") for name in compressed})
        metrics["size/linear_bits_per_weight"] = 8 * stored / sum(base[name].numbers for name in compressed)
    return metrics


def stored_bytes(tensors: dict[str, TensorSize], modules: set[str]) -> int:
    """Bytes of the tensors that belong to one of the modules."""

    def belongs(name: str) -> bool:
        # PEFT puts a prefix before a module's name; what the module stores comes after it.
        parts = name.removeprefix("base_model.model.").split(".")
        return any(".".join(parts[:i]) in modules for i in range(1, len(parts)))

    return sum(size.bytes for name, size in tensors.items() if belongs(name))
