"""A model of which one block at a time is in memory, read from its files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pare.methods.anatomy.describe import Anatomy, describe, verify
from pare.methods.anatomy.structure import hollow
from pare.methods.anatomy.views import parse
from pare.workers.loading import loading
from pare.workers.models import ModelArtifact, load_skeleton, need_weights_alone
from pare.workers.task import TaskError

Read = Callable[[str, torch.Size | None], Tensor]
"""(name of a tensor of the model, its shape there) -> its value, in memory of its own, in any dtype. KeyError where it is not
stored under that name."""


class BlockByBlock:
    """A model whose weights are in memory for as long as somebody works with them; otherwise on the meta device."""

    remedy = "Import it anew"
    """What to do about a model whose tensors have other names than its modules."""

    def __init__(self, directory: Path, read: Read, dtype: torch.dtype, device: torch.device, how: str = "plain") -> None:
        """directory: with `config.json`; its weights are reached through `read` alone. how: see `export.stock.OPENED`."""
        self.read, self.dtype, self.device, self.how = read, dtype, device, how
        self.model, self.is_compressed = bare_model(directory, dtype)
        self.anatomy: Anatomy = describe(load_skeleton(directory))
        inside = tuple(f"{block.name}." for block in self.anatomy.blocks)
        self.around = [name for name, _ in tensors_of(self.model) if not name.startswith(inside)]
        """Names of what belongs to no block."""
        self.model.eval()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """With what the input of the first block is made of: all that belongs to no block, save an untied head."""
        names = [name for name in self.around if not name.startswith(f"{self.anatomy.head}.")]
        bare = {name: p for name, p in self.model.named_parameters(remove_duplicate=False) if name in self.around}
        self.fill(self.model, "", names)
        self.model.tie_weights()
        try:
            yield
        finally:
            for name, parameter in bare.items():
                parent, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(parent), leaf, parameter)

    @contextmanager
    def loaded(self, name: str) -> Iterator[nn.Module]:
        """The block of that name with its weights. They go whoever still holds the module afterwards."""
        bare = self.model.get_submodule(name)
        module = copy.deepcopy(bare)  # on the meta device, so that nothing is copied but the modules
        self.fill(module, f"{name}.", [tensor for tensor, _ in tensors_of(module)])
        if self.is_compressed:
            from compressed_tensors.compressors import decompress_module

            for part in module.modules():
                decompress_module(part, leave_decompressed=self.how != "dequantize")
            if self.how != "plain":
                module.to(self.dtype)
        self.model.set_submodule(name, module.eval())
        try:
            yield module
        finally:
            self.model.set_submodule(name, bare)
            module.to("meta")

    def fill(self, module: nn.Module, prefix: str, names: Iterable[str]) -> None:
        """Reads tensors of a module; `prefix` is what stands before their names in the model. Buffers that the module works out
        by itself are read where they are stored."""
        kept = module.state_dict(keep_vars=True)
        with loading():
            for name in names:
                parent, _, leaf = name.rpartition(".")
                owner = module.get_submodule(parent)
                old = getattr(owner, leaf)
                if not old.is_meta and (name not in kept or isinstance(old, nn.Parameter)):
                    continue
                try:
                    stored = self.read(prefix + name, old.shape).to(self.device)
                except KeyError:
                    if not old.is_meta or self.is_tied(prefix + name):
                        continue
                    raise TaskError(
                        f"the model cannot be read block by block: {prefix}{name} is not stored under that name. {self.remedy}",
                        "infeasible",
                    ) from None
                # Codes of compressed-tensors are taken as they are: of packed zero points it prepares neither type nor shape.
                # Nor are scales cast where transformers works the weights out before it casts them.
                early = self.how == "dequantize" and hasattr(owner, "quantization_scheme")
                value = stored.to(old.dtype).view(old.shape) if stored.is_floating_point() and not early else stored
                setattr(owner, leaf, nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value)

    def is_tied(self, name: str) -> bool:
        return bool(self.model.config.tie_word_embeddings) and name == f"{self.anatomy.head}.weight"


def open_blocks(artifact: ModelArtifact, dtype: torch.dtype, device: torch.device | None = None) -> BlockByBlock:
    """The model that an artifact stands for, its blocks read to a device (None: the CPU) one at a time.

    Its anatomy is verified with made-up weights that take no memory: what is checked does not depend on them.

    Raises:
        ValueError: the anatomy does not hold for it.
        TaskError: linears of it round what they read or it has a prompt, so that it is not plain weights.
    """
    need_weights_alone(artifact, "a model that is read block by block")
    rounding = next((name for name in artifact.compressed_names() if artifact.has_quantised_input(name)), None)
    if rounding:
        raise TaskError(
            f"an earlier stage makes {rounding} round its input, and what needs statistics works on plain weights: let the "
            "stage that rounds inputs come last"
        )
    directory = artifact.dense.directory
    model = BlockByBlock(directory, from_artifact(artifact), dtype, device or torch.device("cpu"))
    verify(hollow(load_skeleton(directory)), model.anatomy)
    return model


def from_artifact(artifact: ModelArtifact) -> Read:
    """Reads the model that an artifact stands for, worked out from its parts."""
    known = set(artifact.parameter_names())
    changed = {parse(name).parameter for name in artifact.compressed_names()}

    def read(name: str, shape: torch.Size | None) -> Tensor:
        if name not in known:
            raise KeyError(name)
        return artifact.materialise(name) if name in changed else artifact.stored(name).clone()

    return read


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
