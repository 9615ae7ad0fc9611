"""Writes a model artifact in a form that others can open, and says how many bytes that takes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from pare.methods.anatomy.views import parse
from pare.workers.export.adapter import export_adapter
from pare.workers.export.card import PARE, model_card
from pare.workers.export.choose import choose_format
from pare.workers.export.compressed_tensors import export_compressed_tensors
from pare.workers.export.dense import export_dense
from pare.workers.export.files import TensorSize, digests, tensor_sizes, weight_files
from pare.workers.export.gguf_form import export_gguf
from pare.workers.export.pare_form import export_pare
from pare.workers.export.schemes import Inexpressible
from pare.workers.export.stock import OPENED, SUFFIX
from pare.workers.models import ModelArtifact
from pare.workers.task import TaskContext, TaskError


@dataclass
class Export:
    """What has been written."""

    opens_with: str
    opening: str
    """The lines of Python that open it; `{directory}` stands for where it lies."""
    tensors: dict[str, TensorSize]
    """What is stored, by name."""
    how: str = "plain"
    """How it, or its base, is opened: a key of `stock.OPENED`."""
    more: str = ""
    """What is to be added to the reason for the form."""


def run(ctx: TaskContext) -> dict[str, Any]:
    """Input: model. Spec: card, what the model card says of how the model was made; format, one of `choose.FORMATS`."""
    artifact, wanted = ModelArtifact(ctx.inputs["model"], ctx.resolve), ctx.spec.get("format", "auto")
    try:
        name, reason = choose_format(artifact, wanted)
        written = write(name, artifact, ctx)
    except Inexpressible as e:
        raise TaskError(f"export.format={wanted} cannot say what this model is: {e}. Try: export.format=auto") from e
    reason += written.more
    facts = {"format": name, "opens_with": written.opens_with, "reason": reason, **sizes(artifact, ctx, written)}
    (ctx.out / "README.md").write_text(model_card(ctx.spec.get("card", {}), facts, written.opening))
    content = {**facts, "open": written.how, "digests": digests(ctx.out)}
    (ctx.out / "export.json").write_text(json.dumps(content, indent=1))
    # That no common form says it belongs beside the trial's figures; the other reasons are what one expects.
    is_noted = (name in ("dense", "pare") and artifact.compressed_names()) or "vLLM does not" in reason
    return facts | {"notes": [f"exported as {name}: {reason}"] if is_noted else []}


def write(name: str, artifact: ModelArtifact, ctx: TaskContext) -> Export:
    """Writes the artifact in the form of that name.

    Raises:
        Inexpressible: the form cannot say it.
    """
    if name == "gguf":
        tensors, types = export_gguf(artifact, ctx.out, ctx.spec.get("card", {}).get("base", "model"))
        return Export("transformers + gguf", OPENED["gguf"], tensors, "gguf", f"; {types}")
    if name == "adapter":
        made = export_adapter(artifact, ctx.out)
        return Export(made.libraries, made.opening, tensor_sizes(ctx.out), made.how)
    if name == "pare":
        export_pare(artifact, ctx.out)
        return Export("pare", PARE, tensor_sizes(ctx.out))
    if name == "dense":
        export_dense(artifact, ctx.out)
        return Export("transformers", OPENED["plain"], tensor_sizes(ctx.out))
    how = export_compressed_tensors(artifact, ctx.out)
    return Export("transformers + compressed-tensors" + SUFFIX[how], OPENED[how], tensor_sizes(ctx.out), how)


def sizes(artifact: ModelArtifact, ctx: TaskContext, written: Export) -> dict[str, float]:
    """`size/...` of an export: bytes of all its weight files with headers, an adapter's base included.

    Bits per weight count the weights of the base, whatever the export has made of them. Over the linears they count what
    is stored for the weights that are compressed or tuned: codes, scales, zero points, shapes, adapters.
    """
    base = tensor_sizes(artifact.dense.directory)
    parameters = sum(size.numbers for size in base.values())
    total = sum(file.stat().st_size for file in weight_files(ctx.out))
    metrics = {"size/bytes": total, "size/bits_per_weight": 8 * total / parameters, "parameters": parameters}
    compressed = {parse(name).parameter for name in artifact.compressed_names()}
    if compressed:
        stored = stored_bytes(written.tensors, {name.removesuffix(".weight") for name in compressed})
        metrics["size/linear_bits_per_weight"] = 8 * stored / sum(base[name].numbers for name in compressed)
    return metrics


def stored_bytes(tensors: dict[str, TensorSize], modules: set[str]) -> int:
    """Bytes of the tensors that belong to one of the modules, biases left out."""

    def belongs(name: str) -> bool:
        # PEFT puts a prefix before a module's name; what the module stores, or which part of it, comes after it.
        parts = re.split(r"[\[^:]", name.removeprefix("base_model.model."))[0].split(".")
        return any(".".join(parts[: i + 1]) in modules for i in range(len(parts)))

    return sum(size.bytes for name, size in tensors.items() if belongs(name) and not name.endswith(".bias"))
