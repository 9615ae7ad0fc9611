"""Opens an export from its directory alone, the way anybody else would."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pare.workers.export.adapter import open_adapter
from pare.workers.export.pare_form import open_pare
from pare.workers.models import load_tokenizer

NO_DEPLOYMENT_FIGURE = "decompressed by transformers, no deployment figure"
"""Said of speed and memory where a model is made dense before it computes."""


@dataclass
class OpenedExport:
    model: nn.Module
    tokenizer: Any
    runtime: str
    """What computes, and where: `transformers-cpu`, `peft-cuda`, `peft-bitsandbytes-cpu`, ..."""
    notes: list[str]
    """What must be said with a figure of speed or memory."""


def open_export(directory: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> OpenedExport:
    """The export in `directory`, computing in `dtype` on `device`, in evaluation mode."""
    said = json.loads((directory / "export.json").read_text())
    device = torch.device(device)
    if said["format"] == "adapter":
        model = open_adapter(directory, dtype, device)
        library = "peft-bitsandbytes" if getattr(model, "is_loaded_in_4bit", False) else "peft"
    elif said["format"] == "pare":
        model, library = open_pare(directory, dtype, device), "transformers"
    else:
        model = open_stock(directory, said["dequantize"], dtype, device)
        library = "transformers"
    notes = [NO_DEPLOYMENT_FIGURE] if said["format"] in ("compressed-tensors", "pare") else []
    return OpenedExport(model.eval(), load_tokenizer(directory), f"{library}-{device.type}", notes)


def import_libraries(directory: Path) -> None:
    """Imports what `open_export` would, so that the memory of code can be told from that of the model."""
    import transformers

    said = json.loads((directory / "export.json").read_text())
    config = json.loads(next(file for file in directory.rglob("config.json")).read_text())
    for architecture in config.get("architectures") or ():
        getattr(transformers, architecture)  # an attribute of that module is an import
    method = config.get("quantization_config", {}).get("quant_method")
    libraries = {"compressed-tensors": "compressed_tensors", "bitsandbytes": "bitsandbytes", "adapter": "peft"}
    for needed in {method, said["format"]} & libraries.keys():
        importlib.import_module(libraries[needed])


def open_stock(directory: Path, dequantize: bool, dtype: torch.dtype, device: torch.device) -> nn.Module:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    # The dtype is always said: left out, transformers takes the checkpoint's, and the figures would depend on it.
    arguments = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, local_files_only=True, trust_remote_code=False, **arguments
    )
    return model.to(device)
