"""A checkpoint made elsewhere: what it is and whether it can be opened here, found while planning and without opening it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pare.workers.corpus import SourceError
from pare.workers.files import digest_file
from pare.workers.gguf_file import Gguf
from pare.workers.model_files import PICKLES, digest_directory, directory_shapes, model_files, read_config, read_json

KEY = "recipe.import.path"
"""The setting that names it."""

PACKAGES: dict[str, dict[str, str]] = {
    "adapter": {"peft": "peft"},
    "gguf": {"gguf": "gguf"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "bitsandbytes": {"bitsandbytes": "bitsandbytes"},
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},
    "awq": {"gptqmodel": "gptqmodel"},
    "auto-round": {"auto_round": "auto-round"},
    "hqq": {"hqq": "hqq"},
    "torchao": {"torchao": "torchao"},
    "quanto": {"optimum.quanto": "optimum-quanto"},
    "aqlm": {"aqlm": "aqlm"},
    "vptq": {"vptq": "vptq"},
    "eetq": {"eetq": "eetq"},
    "spqr": {"spqr_quant": "spqr_quant"},
    "quark": {"quark": "amd-quark"},
}
"""Format -> module -> the package that brings it, for those with which transformers opens the format."""


def resolve_import(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of the checkpoint: `format`, `open` (how, see `export/stock.py`) and `digest` of what it consists of.

    Raises:
        SourceError: it is not there, cannot be opened here, or asks for pickles or foreign code.
    """
    path = import_path(spec)
    where = f"{KEY}={path}"
    if path.suffix.lower() == ".gguf":
        need_packages("gguf", where)
        check_gguf(path, where)
        return {"format": "gguf", "open": "gguf", "digest": digest_file(path)}
    if path.is_file():
        raise SourceError(f"{where}: is a file. Give the directory of the checkpoint, or a GGUF file", KEY)
    if (path / "adapter_config.json").is_file():
        check_adapter(path, where)
        kind, how = "adapter", "plain"
    else:
        config = read_config(path, KEY)
        quantised = config.get("quantization_config") or {}
        kind = str(quantised.get("quant_method", "dense")).lower() if quantised else "dense"
        how = way_of_opening(quantised) if kind == "compressed-tensors" else "plain"
        need_packages(kind, where)
        directory_shapes(path, KEY)
    return {"format": kind, "open": how, "digest": digest_directory(path, model_files(path))}


def locate_import(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {"path": str(import_path(spec).resolve())}


def import_path(spec: Mapping[str, Any]) -> Path:
    if not spec.get("path"):
        raise SourceError(f"{KEY} has to be given: the checkpoint's directory or GGUF file. Try: {KEY}=DIRECTORY", KEY)
    path = Path(spec["path"]).expanduser()
    if not path.exists():
        raise SourceError(f"{KEY}={path}: there is no such file or directory", KEY)
    ggufs = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").exists() else []
    if len(ggufs) > 1:
        raise SourceError(f"{KEY}={path}: holds {len(ggufs)} GGUF files. Name one of them: {KEY}={ggufs[0]}", KEY)
    return ggufs[0] if ggufs else path


def need_packages(kind: str, where: str) -> None:
    """Raises `SourceError` where a package with which transformers opens the format is not installed."""
    for module, package in PACKAGES.get(kind, {}).items():
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # the package above it
            found = None
        if found is None:
            raise SourceError(
                f"{where}: {kind} checkpoints are opened by the package {package}, which is not installed. Type: pip install "
                f"{package}",
                KEY,
            )


def check_gguf(file: Path, where: str) -> None:
    try:
        wanted, there = Gguf(file, only=None).bytes, file.stat().st_size
    except ValueError as e:  # an empty file as well: it cannot be mapped
        raise SourceError(f"{where}: cannot be read: {e}. Copy or download it again", KEY) from None
    if there < wanted:
        raise SourceError(f"{where}: is cut short: {wanted} bytes expected, got {there}. Copy or download it again", KEY)


def check_adapter(directory: Path, where: str, key: str = KEY) -> None:
    need_packages("adapter", where)
    kind = read_json(directory / "adapter_config.json", where, key).get("peft_type")
    if not isinstance(kind, str):
        raise SourceError(f"{where}: adapter_config.json names no `peft_type`, e.g. LORA", key)
    if not (directory / "adapter_model.safetensors").is_file():
        pickles = sorted(p.name for pattern in PICKLES for p in directory.glob(pattern))
        pickled = f"the adapter is only in {pickles[0]}, a pickle, which can run code when opened" if pickles else ""
        raise SourceError(f"{where}: {pickled or 'holds no adapter'}. Pare reads adapter_model.safetensors", key)
    directory_shapes(directory, key, "adapter_model")


def way_of_opening(quantised: Mapping[str, Any]) -> str:
    """How transformers opens a checkpoint of compressed-tensors, by what its config says."""
    groups = [group for group in (quantised.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    formats = {str(group.get("format") or quantised.get("format")) for group in groups}
    if any("fp4" in name for name in formats):
        return "bfloat16"
    weights = [group.get("weights") or {} for group in groups]
    return "dequantize" if "pack-quantized" in formats and not all(w.get("symmetric", True) for w in weights) else "plain"
