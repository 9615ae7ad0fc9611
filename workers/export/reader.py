"""Opens an export from its directory alone, the way anybody else would."""

from __future__ import annotations

import importlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pare.workers.export.adapter import open_adapter
from pare.workers.export.choose import FORMATS
from pare.workers.export.files import digests, weight_files
from pare.workers.export.pare_form import open_pare
from pare.workers.export.stock import OPENED, open_stock
from pare.workers.models import load_tokenizer

NO_DEPLOYMENT_FIGURE = "decompressed by transformers, no deployment figure"
"""Said of speed and memory where a model is made dense before it computes."""


FOREIGN = "foreign"
"""Format of a checkpoint made elsewhere that transformers opens plainly, if need be by the library of its quantiser."""


class BadExport(ValueError):
    """A directory is no export, or not the one that was written. The message is one sentence that says why."""


@dataclass
class OpenedExport:
    model: nn.Module
    tokenizer: Any
    runtime: str
    """What computes, and where: `transformers-cpu`, `peft-cuda`, `peft-bitsandbytes-cpu`, ..."""
    notes: list[str]
    """What must be said with a figure of speed or memory."""


def open_export(directory: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> OpenedExport:
    """The export in `directory`, computing in `dtype` on `device`, in evaluation mode.

    Raises:
        BadExport: see `check_export`.
    """
    said = check_export(directory)
    device = torch.device(device)
    if said["format"] == "adapter":
        model = open_adapter(directory, dtype, device, said["open"])
        library = "peft-bitsandbytes" if getattr(model, "is_loaded_in_4bit", False) else "peft"
    elif said["format"] == "pare":
        model, library = open_pare(directory, dtype, device), "transformers"
    else:
        model = open_stock(directory, said["open"], dtype, device)
        library = "transformers"
    is_worked_out = said["format"] in ("compressed-tensors", "gguf", "pare") or "compressed-tensors" in said["opens_with"]
    notes = [NO_DEPLOYMENT_FIGURE] if is_worked_out else []
    return OpenedExport(model.eval(), load_tokenizer(directory), f"{library}-{device.type}", notes)


def check_export(directory: Path) -> dict[str, Any]:
    """What `export.json` says, after a check that the directory is what was written.

    Raises:
        BadExport: it is not, was made by something else, or wants code of its own to be run.
    """
    file = directory / "export.json"
    if not file.is_file():
        raise BadExport(f"{directory} is no export of Pare, for it has no export.json; recipe=imported opens what others made")
    try:
        said: dict[str, Any] = json.loads(file.read_text())
    except ValueError as e:
        raise BadExport(f"{file} is no JSON ({e}); export the trial again: pare export") from e
    if said.get("format") not in (*FORMATS[1:], FOREIGN) or said.get("open") not in OPENED:
        got = f"format {said.get('format')!r}, opened {said.get('open')!r}"
        raise BadExport(f"{file} names {got}, which this version of Pare does not know; export the trial again: pare export")
    for config in (directory / "config.json", directory / "base" / "config.json", directory / "tokenizer_config.json"):
        if config.is_file() and "auto_map" in json.loads(config.read_text()):
            raise BadExport(f"{config} asks for code of its own (auto_map), which Pare never runs")
    check_weights(directory, said["digests"])
    return said


def check_weights(directory: Path, written: dict[str, str]) -> None:
    """Refuses weights that are not those that were written.

    Raises:
        BadExport: a file is missing, too short, another one, or there is one too many.
    """
    names = {str(file.relative_to(directory)) for file in weight_files(directory)}
    again = "export the trial again: pare export"
    for name in sorted(written.keys() - names):
        raise BadExport(f"{directory} lacks the weight file {name}; {again}")
    for name in sorted(names - written.keys()):
        raise BadExport(f"{directory / name} does not belong to this export; take it away")
    for name in sorted(names):
        if name.endswith(".safetensors"):
            check_length(directory / name, again)
    for name, digest in digests(directory).items():
        if digest != written[name]:
            raise BadExport(
                f"{directory / name} is not what was written: its digest is {digest[:12]}, not {written[name][:12]}; {again}"
            )


def check_length(file: Path, again: str) -> None:
    """Refuses a safetensors file whose length is not what its header says."""
    there = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        header = f.read(struct.unpack("<Q", start)[0]) if len(start) == 8 else b""
    try:
        entries = json.loads(header)
        wanted = 8 + len(header) + max(e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__")
    except ValueError as e:
        raise BadExport(f"{file} is no safetensors file or is cut off in its header ({there} bytes); {again}") from e
    if there != wanted:
        raise BadExport(f"{file} holds {there} bytes, its header says {wanted}: it is cut off or was overwritten; {again}")


def import_libraries(directory: Path) -> None:
    """Imports what `open_export` would, so that the memory of code can be told from that of the model."""
    import transformers

    said = json.loads((directory / "export.json").read_text())
    config = json.loads(next(file for file in directory.rglob("config.json")).read_text())
    for architecture in config.get("architectures") or ():
        getattr(transformers, architecture)  # an attribute of that module is an import
    method = config.get("quantization_config", {}).get("quant_method")
    libraries = {"compressed-tensors": "compressed_tensors", "bitsandbytes": "bitsandbytes", "adapter": "peft", "gguf": "gguf"}
    for needed in {method, said["format"]} & libraries.keys():
        importlib.import_module(libraries[needed])
