"""A model larger than the memory it may take: read block by block from its files, or spread over several devices.

Block by block: embedding, norm and head stay on the device; each block's weights come from disk once, all batches pass through
it, and they go again. Final hidden states are those of the whole model, for the same modules run in the same order with the
arguments that the model itself calls them with (`methods/anatomy/calls.py`). Activations wait on the CPU.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch import Tensor, nn

from pare.methods.anatomy.calls import Call, block_inputs
from pare.methods.anatomy.describe import Anatomy, UnknownModel, describe
from pare.methods.anatomy.reads import one_expert_at_a_time
from pare.methods.anatomy.views import parse, view
from pare.methods.parts.formula import Formula
from pare.workers.evaluation import LOGIT_BYTES, head_of
from pare.workers.export.pare_form import STEM, TABLE
from pare.workers.models import ModelArtifact, dense_index, load_skeleton, within_name
from pare.workers.sources import directory_shapes
from pare.workers.task import TaskError

Read = Callable[[str, torch.Size | None], Tensor]
"""(name of a tensor of the model, its shape there) -> its value, in memory of its own, in any dtype. KeyError where it is not
stored under that name."""

HEADROOM = 0.9
"""Part of the free memory that a model may take."""


class Streamed:
    """A model of which one block at a time is in memory; see `evaluation.Reader`."""

    def __init__(self, directory: Path, read: Read, dtype: torch.dtype, device: torch.device, how: str = "plain") -> None:
        """directory: with `config.json`; its weights are reached through `read` alone. how: see `export.stock.OPENED`."""
        self.read, self.dtype, self.device, self.how = read, dtype, device, how
        self.model, self.is_compressed = bare_model(directory, dtype)
        try:
            self.anatomy: Anatomy = describe(load_skeleton(directory))
        except UnknownModel as e:
            raise TaskError(f"the model does not fit into memory, and cannot be read block by block: {e}", "infeasible") from e
        inside = tuple(f"{block.name}." for block in self.anatomy.blocks)
        self.fill(self.model, "", [name for name, p in tensors_of(self.model) if not name.startswith(inside)])
        self.model.tie_weights()
        self.head = head_of(self.model)
        self.model.eval()

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

    def loaded(self, name: str) -> Loaded:
        return Loaded(self, name)

    def fill(self, module: nn.Module, prefix: str, names: Iterable[str]) -> None:
        """Reads tensors of a module from disk; `prefix` is what stands before their names in the model."""
        for name in names:
            parent, _, leaf = name.rpartition(".")
            owner = module.get_submodule(parent)
            old = getattr(owner, leaf)
            if not old.is_meta:
                continue
            try:
                stored = self.read(prefix + name, old.shape).to(self.device)
            except KeyError:
                if self.is_tied(prefix + name):
                    continue
                raise TaskError(
                    f"the model does not fit into memory, and cannot be read block by block: {prefix}{name} is not stored "
                    "under that name. Give it more memory: evaluation.memory_gb",
                    "infeasible",
                ) from None
            # Codes of compressed-tensors are taken as they are: of packed zero points it prepares neither type nor shape. Nor
            # are scales cast where transformers works the weights out before it casts them.
            early = self.how == "dequantize" and hasattr(owner, "quantization_scheme")
            value = stored.to(old.dtype).view(old.shape) if stored.is_floating_point() and not early else stored
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value)

    def is_tied(self, name: str) -> bool:
        return bool(self.model.config.tie_word_embeddings) and name == f"{self.anatomy.head}.weight"


class Loaded:
    """A block with its weights, for as long as the `with` lasts."""

    def __init__(self, owner: Streamed, name: str) -> None:
        self.owner, self.name = owner, name

    def __enter__(self) -> nn.Module:
        self.bare = self.owner.model.get_submodule(self.name)
        module = copy.deepcopy(self.bare)  # on the meta device, so that nothing is copied but the modules
        self.owner.fill(module, f"{self.name}.", [name for name, _ in tensors_of(module)])
        if self.owner.is_compressed:
            from compressed_tensors.compressors import decompress_module

            for part in module.modules():
                decompress_module(part, leave_decompressed=self.owner.how != "dequantize")
            if self.owner.how != "plain":
                module.to(self.owner.dtype)
        self.owner.model.set_submodule(self.name, module.eval())
        return module

    def __exit__(self, *raised: object) -> None:
        self.owner.model.set_submodule(self.name, self.bare)


def tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def bare_model(directory: Path, dtype: torch.dtype) -> tuple[Any, bool]:
    """(the model without weights, but with the buffers that it computes itself; whether it is of compressed-tensors)."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    said = getattr(config, "quantization_config", None)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if not said:
        return model, False
    from compressed_tensors.compressors import ModelCompressor, compress_module
    from compressed_tensors.quantization import apply_quantization_config
    from transformers import CompressedTensorsConfig

    found = ModelCompressor.from_compression_config(CompressedTensorsConfig(**said))
    with torch.device("meta"):
        apply_quantization_config(model, found.quantization_config, run_compressed=False)
        for module in model.modules():
            compress_module(module)  # without the hook by which a whole model decompresses itself
    return model, True


# --- what is read -------------------------------------------------------------------------------------------------------


def from_artifact(artifact: ModelArtifact) -> Read:
    """Reads the model that an artifact stands for, worked out from its parts."""
    known = set(artifact.parameter_names())

    def read(name: str, shape: torch.Size | None) -> Tensor:
        if name not in known:
            raise KeyError(name)
        return artifact.materialise(name)

    return read


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
        free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
        limit = int(HEADROOM * free)
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
