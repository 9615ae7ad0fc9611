"""Opening with transformers alone, or with the library of a format behind it. How is what `export.json` says under `open`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

GGUF_FILE = "model.gguf"

OPENED = {
    "plain": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({directory})""",
    "dequantize": """from transformers import AutoModelForCausalLM, CompressedTensorsConfig

config = CompressedTensorsConfig(dequantize=True)  # zero points cannot be opened without it
model = AutoModelForCausalLM.from_pretrained({directory}, quantization_config=config)""",
    "bfloat16": """from transformers import AutoModelForCausalLM

# codes of 4-bit floats are worked out in bfloat16 and run in no other
model = AutoModelForCausalLM.from_pretrained({directory}, dtype="bfloat16")""",
    "gguf": f"""from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({{directory}}, gguf_file="{GGUF_FILE}")""",
}
"""Way of opening -> the lines of Python that do it."""

SUFFIX = {"plain": "", "dequantize": ", dequantize=True", "bfloat16": ", dtype=bfloat16", "gguf": ""}
"""Way of opening -> what `opens_with` adds to the library."""


def open_stock(directory: Path, how: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """The model in `directory`, computing in `dtype` on `device`, opened as `OPENED[how]` says."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    arguments: dict[str, Any] = {"device_map": {"": torch.device(device)}}
    if how == "dequantize":
        arguments["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    if how == "gguf":
        arguments["gguf_file"] = GGUF_FILE
    # The dtype is always said: left out, transformers takes the checkpoint's, and the figures would depend on it.
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, local_files_only=True, trust_remote_code=False, **arguments
    )
    if how == "bfloat16":
        work_out(model)
        model = model.to(dtype)
    return model


def work_out(model: nn.Module) -> None:
    """Makes the linears of compressed-tensors hold plain weights now; by itself it does so when the model is first called."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and hasattr(model, "ct_decompress_hook"):
        quantizer.compressor.decompress_model(model)
