"""A model larger than the memory it may take: read block by block from its files, or spread over several devices.

Block by block: embedding, norm and head stay on the device; each block's weights come from disk once, all batches pass through
it, and they go again. Final hidden states are those of the whole model, for the same modules run in the same order with the
arguments that the model itself calls them with (`methods/anatomy/calls.py`). Activations wait on the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pare.methods.anatomy.calls import Call, block_inputs
from pare.methods.anatomy.describe import UnknownModel
from pare.methods.anatomy.reads import one_expert_at_a_time
from pare.methods.anatomy.views import parse, view
from pare.methods.parts.formula import Formula
from pare.workers.blocks import BlockByBlock, Read
from pare.workers.evaluation import LOGIT_BYTES, head_of
from pare.workers.export.pare_form import STEM, TABLE
from pare.workers.memory import free_on
from pare.workers.models import dense_index, within_name
from pare.workers.sources import directory_shapes
from pare.workers.task import TaskError

HEADROOM = 0.9
"""Part of the free memory that a model may take."""


class Streamed(BlockByBlock):
    """A model of which one block at a time is in memory, with embedding, norm and head; see `evaluation.Reader`."""

    remedy = "Give it more memory: evaluation.memory_gb"

    def __init__(self, directory: Path, read: Read, dtype: torch.dtype, device: torch.device, how: str = "plain") -> None:
        try:
            super().__init__(directory, read, dtype, device, how)
        except UnknownModel as e:
            raise TaskError(f"the model does not fit into memory, and cannot be read block by block: {e}", "infeasible") from e
        self.fill(self.model, "", self.around)
        self.model.tie_weights()
        self.head = head_of(self.model)

    @torch.inference_mode()
    def hidden(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Final hidden states of each batch of ids, on the device."""
        calls: dict[tuple[int, ...], list[Call]] = {}
        states = []
        for ids in batches:
            # Masks and positions depend on nothing but the shape, for there is no padding that a model is told of.
            (first,), called = block_inputs(self.model, self.anatomy, [ids.to(self.device)])
            calls.setdefault(tuple(ids.shape), called[len(ids)])
            states.append(first.cpu())
        for index, block in enumerate(self.anatomy.blocks):
            with self.loaded(block.name) as module, one_expert_at_a_time(self.model):
                for i, ids in enumerate(batches):
                    call = calls[tuple(ids.shape)][index]
                    states[i] = call.run(module, states[i].to(self.device), self.device).cpu()
        norm = self.model.get_submodule(self.anatomy.norm)
        for state in states:
            yield norm(state.to(self.device))


# --- what is read -------------------------------------------------------------------------------------------------------


def from_files(directory: Path, stem: str = "model") -> Read:
    """Reads what safetensors files hold. A file is open only while it is read, so that its pages do not stay."""
    where = dense_index(directory, stem)

    def read(name: str, shape: torch.Size | None) -> Tensor:
        with safe_open(where[name], framework="pt") as f:
            return f.get_tensor(name).clone()

    return read


def from_pare(directory: Path) -> Read:
    """Reads an export in Pare's own form, each weight worked out from its formulas."""
    stored, where = from_files(directory, STEM), dense_index(directory, STEM)
    table = json.loads((directory / TABLE).read_text())["tensors"]
    operands: dict[str, list[str]] = {}
    for key in where:
        operands.setdefault(key.partition(":")[0], []).append(key)
    views: dict[str, list[str]] = {}
    for name in table:
        views.setdefault(parse(name).parameter, []).append(name)

    def worked_out(name: str) -> Tensor:
        own = {key: stored(key, None) for key in operands.get(name, ())}
        return Formula.from_tensors(table[name], within_name(name, own)).materialise()

    def read(name: str, shape: torch.Size | None) -> Tensor:
        if name not in views:
            return stored(name, shape)
        if views[name] == [name] or shape is None:
            return worked_out(name)
        whole = torch.empty(shape)
        for part in views[name]:
            view(whole, part).copy_(worked_out(part))
        return whole

    return read


def stream_export(directory: Path, dtype: torch.dtype, device: torch.device) -> Streamed:
    """An export read block by block.

    Raises:
        TaskError: it has a form that is only opened as a whole.
    """
    said = json.loads((directory / "export.json").read_text())
    if said["format"] not in ("dense", "compressed-tensors", "pare"):
        raise TaskError(
            f"the export does not fit into memory, and one of format {said['format']} is only opened as a whole; give it more: "
            "evaluation.memory_gb",
            "infeasible",
        )
    read = from_pare(directory) if said["format"] == "pare" else from_files(directory)
    return Streamed(directory, read, dtype, device, said["open"])


# --- which way ----------------------------------------------------------------------------------------------------------


def way(needed: int, limit: int | None, device: torch.device, can_shard: bool = True) -> str:
    """`whole`, `sharded` or `streamed`. needed: bytes of the model in memory; limit: what it may take of one device, None:
    what is free there; can_shard: whether transformers opens it by itself."""
    if limit is None:
        limit = int(HEADROOM * free_on(device))
    needed += 3 * LOGIT_BYTES if limit > 16 * LOGIT_BYTES else 0
    if needed <= limit:
        return "whole"
    devices = torch.cuda.device_count() if device.type == "cuda" else 1
    return "sharded" if can_shard and devices > 1 and needed <= devices * limit else "streamed"


def bytes_of(directory: Path, dtype: torch.dtype) -> int:
    """Memory of the dense model that a directory holds, in `dtype`."""
    return sum(torch.Size(shape).numel() for shape in directory_shapes(directory).values()) * dtype.itemsize


def shard_export(directory: Path, dtype: torch.dtype, limit: int | None) -> nn.Module:
    """An export that transformers opens, its blocks spread over all visible GPUs, at most `limit` bytes on each.

    Raises:
        TaskError: it has a form that is opened otherwise.
    """
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    said = json.loads((directory / "export.json").read_text())
    room = dict.fromkeys(range(torch.cuda.device_count()), limit) if limit else None
    arguments: dict[str, Any] = {"device_map": "auto", "max_memory": room}
    if said["open"] == "dequantize":
        arguments["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, local_files_only=True, trust_remote_code=False, **arguments
    )
    return model.eval()
