"""Export of an adapter together with the base it was trained on, in one directory that needs nothing else.

    adapter_config.json, adapter_model.safetensors     as PEFT writes them
    tokenizer, chat template, generation config        the base's
    base/                                              the base as it ships: dense, or 4-bit codes of bitsandbytes

The 4-bit base is written from the artifact's codes, which only get other names; no weight is quantised a second time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pare.methods.ops.adapters import BASE_PATH, peft_targets, write_adapter_config
from pare.methods.ops.bnb4bit import checkpoint_config, checkpoint_tensors, settle
from pare.methods.parts.codes import Codes
from pare.methods.parts.formula import LowRank
from pare.workers.export.compressed_tensors import linear_names
from pare.workers.export.dense import export_dense
from pare.workers.export.files import copy_companions, write_weights
from pare.workers.models import ModelArtifact

HOW_TO_OPEN = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained(DIRECTORY + "/{BASE_PATH}")
model = PeftModel.from_pretrained(base, DIRECTORY)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)"""


def export_adapter(artifact: ModelArtifact, out: Path) -> tuple[str, str]:
    """Writes the export to `out`; returns (the libraries that open it, the lines of Python that do)."""
    if artifact.base is None:
        raise ValueError(f"{artifact.directory} is a dense model, not an adapter")
    base, libraries = out / BASE_PATH, "transformers + peft"
    base.mkdir()
    if any(formula["op"] == "replace" for formula in artifact.table.values()):
        write_4bit_base(artifact, base)
        libraries += " + bitsandbytes"
    elif artifact.base.compressed_names():
        export_dense(artifact.base, base)  # peft cannot wrap a linear of compressed-tensors before it has run once
    else:
        for pattern in ("config.json", "*.safetensors", "*.safetensors.index.json"):
            for file in artifact.base.directory.glob(pattern):
                link_or_copy(file, base / file.name)
        copy_companions(artifact.base.directory, base)
    for file in (artifact.directory / "adapter").iterdir():
        link_or_copy(file, out / file.name)
    copy_companions(artifact.dense.directory, out)
    return libraries, HOW_TO_OPEN


def write_adapter(updates: Mapping[str, LowRank], model: nn.Module, directory: Path) -> None:
    """Writes low-rank updates as a PEFT adapter. Each keeps its own rank and scale, which peft makes of alpha / rank.

    updates: parameter name in `model` -> its update. model: the base, of which only the names of the modules are read.
    """
    from peft import LoraConfig

    modules = {name.removesuffix(".weight"): update for name, update in updates.items()}
    ranks = {name: update.a.shape[0] for name, update in modules.items()}
    alphas = {name: whole(update.scale * ranks[name]) for name, update in modules.items()}
    rank, alpha = Counter(zip(ranks.values(), alphas.values(), strict=True)).most_common(1)[0][0]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=peft_targets(model, list(modules)),
        rank_pattern={re.escape(name): own for name, own in ranks.items() if own != rank},
        alpha_pattern={re.escape(name): own for name, own in alphas.items() if own != alpha},
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    directory.mkdir()
    config.save_pretrained(directory)
    write_adapter_config(directory, BASE_PATH)
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": tensor.contiguous()
        for name, update in modules.items()
        for side, tensor in (("A", update.a), ("B", update.b))
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def whole(number: float) -> int | float:
    """The number as an integer where it is one, which is how peft writes the alpha of a plain adapter."""
    return int(number) if number == int(number) else number


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows one, so that a base costs its bytes once in the store."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_4bit_base(artifact: ModelArtifact, out: Path) -> None:
    """The base beneath the adapter as a checkpoint of bitsandbytes that `from_pretrained` opens plainly."""
    source = artifact.dense.directory
    skip = [name for name in linear_names(source) if f"{name}.weight" not in artifact.table]
    config = json.loads((source / "config.json").read_text())
    first = base_codes(artifact, next(iter(artifact.table)))
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": checkpoint_config(first, skip)}, indent=2))
    copy_companions(source, out)
    write_weights(base_tensors(artifact), out)


def base_tensors(artifact: ModelArtifact) -> Iterator[tuple[str, Tensor]]:
    for name in artifact.parameter_names():
        if name in artifact.table:
            yield from checkpoint_tensors(name, base_codes(artifact, name)).items()
        else:
            yield name, artifact.stored(name)


def base_codes(artifact: ModelArtifact, name: str) -> Codes:
    """What the adapter of this weight is added to. The adapter itself is the formula's other part."""
    formula = artifact.formula(name)
    match formula.parts if formula and formula.op == "replace" else []:
        case [Codes() as codes] | [Codes() as codes, LowRank()]:
            return codes
    said = artifact.table[name]
    raise ValueError(f"{name}: an export with an adapter takes codes, with or without a low-rank update, got {said}")


def relocate(directory: Path) -> None:
    """Makes the adapter name its base by the absolute path it has now, so that PEFT and transformers find it by themselves.

    In the store the base is named relative to the adapter, which no library resolves: nothing there may depend on a place.
    """
    write_adapter_config(directory, str((directory / BASE_PATH).resolve()))


def open_adapter(directory: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """The exported model, computing in `dtype` on `device`, in evaluation mode. Reads nothing outside `directory`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base_path = directory / BASE_PATH
    base = AutoModelForCausalLM.from_pretrained(
        base_path, dtype=dtype, device_map={"": torch.device(device)}, local_files_only=True, trust_remote_code=False
    )
    if getattr(base, "is_loaded_in_4bit", False):
        settle(base, dtype)
    model: nn.Module = PeftModel.from_pretrained(base, directory, local_files_only=True)
    return model.eval()
