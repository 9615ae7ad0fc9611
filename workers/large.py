"""A model larger than the memory it may take: read block by block from its files, or spread over several devices.

Block by block: embedding, norm and head stay on the device; each block's weights come from disk once, all batches pass through
it, and they go again. Final hidden states are those of the whole model, for the same modules run in the same order with the
arguments that the model itself calls them with (`methods/anatomy/calls.py`). Activations wait on the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pare.methods.anatomy.calls import Call, block_inputs
from pare.methods.anatomy.describe import UnknownModel
from pare.methods.anatomy.reads import one_expert_at_a_time
from pare.methods.anatomy.views import parse, view
from pare.methods.ops.heads import head_of
from pare.methods.parts.formula import Formula
from pare.workers.blocks import BlockByBlock, Read, from_artifact
from pare.workers.evaluation import LOGIT_BYTES
from pare.workers.export.pare_form import STEM, TABLE
from pare.workers.memory import free_on
from pare.workers.models import ModelArtifact, dense_index, within_name
from pare.workers.quantised_inputs import quantise_inputs
from pare.workers.sources import directory_shapes
from pare.workers.task import TaskError

HEADROOM = 0.9
"""Part of the free memory that a model may take."""


class Streamed(BlockByBlock):
    """A model of which one block at a time is in memory, with embedding, norm and head; see `evaluation.Reader`."""

    remedy = "Give it more memory: evaluation.memory_gb"

    def __init__(
        self,
        directory: Path,
        read: Read,
        dtype: torch.dtype,
        device: torch.device,
        how: str = "plain",
        rounding: Mapping[str, Callable[[], Formula]] | None = None,
    ) -> None:
        """rounding: name of a weight -> reads its formula, of those whose linear rounds what it reads."""
        self.rounding = rounding or {}
        try:
            super().__init__(directory, read, dtype, device, how)
        except UnknownModel as e:
            raise TaskError(f"the model does not fit into memory, and cannot be read block by block: {e}", "infeasible") from e
        self.fill(self.model, "", self.around)
        self.model.tie_weights()
        self.round_inputs(self.model, "", {name for name in self.rounding if name in self.around})
        self.head = head_of(self.model)

    @contextmanager
    def loaded(self, name: str) -> Iterator[nn.Module]:
        with super().loaded(name) as module:
            prefix = f"{name}."
            self.round_inputs(module, prefix, {weight for weight in self.rounding if weight.startswith(prefix)})
            yield module

    def round_inputs(self, module: nn.Module, prefix: str, names: Iterable[str]) -> None:
        """prefix: what stands before the names of the module's tensors in the model."""
        quantise_inputs(module, ((name.removeprefix(prefix), self.rounding[name]().to(self.device)) for name in names))

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


def stream_artifact(artifact: ModelArtifact, dtype: torch.dtype, device: torch.device) -> Streamed:
    """The model that an artifact stands for, read block by block.

    Raises:
        TaskError: it has a prompt.
    """
    if artifact.prompt is not None:
        raise TaskError(
            "the model does not fit into memory, and one with a prompt cannot be read block by block. Give it more: "
            "evaluation.memory_gb",
            "infeasible",
        )
    rounding = {
        name: partial(artifact.effective, name) for name in artifact.compressed_names() if artifact.has_quantised_input(name)
    }
    return Streamed(artifact.dense.directory, from_artifact(artifact), dtype, device, rounding=rounding)


def from_pare(directory: Path) -> tuple[Read, dict[str, Callable[[], Formula]]]:
    """Reads an export in Pare's own form, each weight worked out from its formulas; and see `Streamed` for `rounding`."""
    stored, where = from_files(directory, STEM), dense_index(directory, STEM)
    table = json.loads((directory / TABLE).read_text())["tensors"]
    operands: dict[str, list[str]] = {}
    for key in where:
        operands.setdefault(key.partition(":")[0], []).append(key)
    views: dict[str, list[str]] = {}
    for name in table:
        views.setdefault(parse(name).parameter, []).append(name)

    def formula(name: str) -> Formula:
        own = {key: stored(key, None) for key in operands.get(name, ())}
        return Formula.from_tensors(table[name], within_name(name, own)).resolve(formula)

    def worked_out(name: str) -> Tensor:
        return formula(name).materialise()

    def read(name: str, shape: torch.Size | None) -> Tensor:
        if name not in views:
            return stored(name, shape)
        if views[name] == [name] or shape is None:
            return worked_out(name)
        whole = torch.empty(shape)
        for part in views[name]:
            view(whole, part).copy_(worked_out(part))
        return whole

    return read, {name: partial(formula, name) for name, spec in table.items() if "activation" in spec}


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
    read, rounding = from_pare(directory) if said["format"] == "pare" else (from_files(directory), None)
    return Streamed(directory, read, dtype, device, said["open"], rounding)


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
