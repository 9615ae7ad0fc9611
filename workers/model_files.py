"""A directory with a model made elsewhere: its config, its weights' headers, and what is wrong with it in one sentence.

Read while planning, so nothing here imports torch or transformers, no weight is read, no pickle opened and no code that
comes with a model run. `key` is the setting that named the directory, for the message.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from pare.workers.corpus import SourceError
from pare.workers.files import digest_file
from pare.workers.hub import MODEL_FILES

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json", "*.tiktoken")
"""Files of which a tokenizer has at least one."""
MODELS = ("ForCausalLM", "LMHeadModel")
"""Endings of the class names of causal language models."""
CONVERT = "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"


def check_model_directory(directory: Path, key: str = "model.path") -> None:
    """Raises `SourceError` unless the directory is a plain transformers model with safetensors weights and a tokenizer."""
    config = read_config(directory, key)
    check_dense(config, f"{key}={directory}", key)
    weight_files(directory, key)
    if not any(found for pattern in TOKENIZERS for found in directory.glob(pattern)):
        raise SourceError(
            f"{key}={directory}: no tokenizer there ({', '.join(TOKENIZERS[:3])}, ...). Copy the tokenizer's files of the "
            "model beside its weights",
            key,
        )


def read_config(directory: Path, key: str = "model.path") -> dict[str, Any]:
    """config.json of a model directory, checked: a causal language model that transformers knows without foreign code."""
    where = f"{key}={directory}"
    if directory.is_file():
        raise SourceError(f"{where}: is a file. Give the directory that holds config.json and the weights", key)
    if not directory.is_dir():
        raise SourceError(f"{where}: no such directory. Give the directory that holds config.json", key)
    if not (directory / "config.json").is_file():
        raise SourceError(f"{where}: no config.json there, so this is no transformers model directory{instead(directory)}", key)
    config = read_json(directory / "config.json", where, key)
    check_config(config, where, key)
    tokenizer = directory / "tokenizer_config.json"
    if tokenizer.is_file() and "auto_map" in read_json(tokenizer, where, key):
        raise SourceError(f"{where}: tokenizer_config.json asks for its own code (auto_map), which is never run", key)
    return config


def instead(directory: Path) -> str:
    """What a directory without config.json is."""
    ggufs = sorted(p.name for p in directory.glob("*.gguf"))
    if ggufs:
        return f"; it holds {ggufs[0]}. To measure a GGUF file beside others: recipe=imported recipe.import.path=FILE.gguf"
    if (directory / "adapter_config.json").exists():
        return "; it is a PEFT adapter. To measure it on the base: recipe=imported recipe.import.path=DIRECTORY"
    if (directory / "model_index.json").exists():
        return "; it is a pipeline of the package diffusers, and Pare takes causal language models"
    if (directory / "params.json").exists():
        return "; params.json is of a model in its authors' own form. Take the release in transformers' form"
    return ""


def read_json(file: Path, where: str, key: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as e:
        raise SourceError(f"{where}: {file.name} is not JSON ({e}). Copy or download it again", key) from None
    if not isinstance(content, dict):
        raise SourceError(f"{where}: {file.name} holds a {type(content).__name__}, not an object", key)
    return content


def check_config(config: Mapping[str, Any], where: str, key: str) -> None:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise SourceError(f"{where}: config.json names no `architectures`, e.g. LlamaForCausalLM", key)
    if not names[0].endswith(MODELS):
        raise SourceError(f"{where}: {names[0]} is no causal language model (...ForCausalLM)", key)
    if "auto_map" in config and not is_native(config):
        raise SourceError(
            f"{where}: config.json asks for its own code (auto_map), which is never run, and the installed transformers has no "
            f"class {names[0]} of its own",
            key,
        )


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether the installed transformers defines the class that a config names. Looked up in its source: importing it costs
    seconds."""
    package = importlib.util.find_spec("transformers")
    folder = str(config.get("model_type", "")).replace("-", "_")
    if package is None or not package.submodule_search_locations or not folder.isidentifier():
        return False
    files = Path(package.submodule_search_locations[0], "models", folder).glob("modeling_*.py")
    defined = re.compile(rf"^class {re.escape(config['architectures'][0])}\b", re.MULTILINE)
    return any(defined.search(file.read_text(encoding="utf-8")) for file in files)


def check_dense(config: Mapping[str, Any], where: str, key: str) -> None:
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise SourceError(
            f"{where}: is quantised already ({method}); a base model has to be dense. To measure it beside others of the same "
            "base: recipe=imported recipe.import.path=DIRECTORY",
            key,
        )


# --- weights ----------------------------------------------------------------------------------------------------------


def weight_files(directory: Path, key: str = "model.path", stem: str = "model") -> list[Path]:
    """The safetensors files of a model directory, all there."""
    where, single = f"{key}={directory}", directory / f"{stem}.safetensors"
    index = directory / f"{stem}.safetensors.index.json"
    if index.exists():
        names = read_json(index, where, key).get("weight_map")
        if not isinstance(names, dict) or not names or any(Path(str(name)).name != name for name in names.values()):
            raise SourceError(f"{where}: {index.name} has no `weight_map` from weights to files beside it", key)
        files = [directory / name for name in sorted(set(names.values()))]
        missing = next((file.name for file in files if not file.exists()), None)
        if missing:
            raise SourceError(f"{where}: {index.name} names {missing}, which is not there", key)
        return files
    if single.exists():
        return [single]
    pickles = sorted(p.name for pattern in PICKLES for p in directory.glob(pattern))
    if pickles:
        raise SourceError(
            f"{where}: the weights are only in {pickles[0]}, a pickle, which can run code when opened; Pare reads "
            f"safetensors. Where you trust it, convert it: {CONVERT}",
            key,
        )
    raise SourceError(f"{where}: holds neither {single.name} nor {index.name}, the weights", key)


def directory_shapes(directory: Path, key: str = "model.path", stem: str = "model") -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape, from the headers of the safetensors files, each of which is whole."""
    shapes = {}
    for file in weight_files(directory, key, stem):
        header = safetensors_header(file, f"{key}={directory}", key)
        shapes.update({name: tuple(entry["shape"]) for name, entry in header.items()})
    return shapes


def safetensors_header(file: Path, where: str, key: str) -> dict[str, Any]:
    """Name -> shape, dtype and place of each tensor. Raises `SourceError` where the file is not whole."""

    def refuse(what: str) -> SourceError:
        return SourceError(f"{where}: {file.name} {what}. Copy or download it again", key)

    size = file.stat().st_size
    with open(file, "rb") as f:
        start = f.read(8)
        if start.startswith(b"version "):
            raise refuse("is a pointer of git-lfs, not the weights (git lfs pull)")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise refuse(f"is cut short or no safetensors file: its header would take {length} bytes, the file has {size}")
        try:
            header: dict[str, Any] = json.loads(f.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if not all(isinstance(n, int) for entry in header.values() for n in entry["shape"]):
                raise TypeError("a shape is not made of whole numbers")
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as e:
            raise refuse(f"is no safetensors file: its header cannot be read ({type(e).__name__})") from None
    if size != 8 + length + end:
        raise refuse(
            f"is {'cut short' if size < 8 + length + end else 'damaged'}: {8 + length + end} bytes expected, got {size}"
        )
    return header


# --- identity ---------------------------------------------------------------------------------------------------------


def model_files(directory: Path) -> list[str]:
    """Names of the files that decide what a model directory is."""
    names = {p.name for pattern in MODEL_FILES for p in directory.glob(pattern) if p.is_file()}
    return sorted(n for n in names if n != "README.md" and not n.startswith("LICENSE"))


def digest_directory(directory: Path, names: Iterable[str]) -> str:
    """Digest over the names and contents of files below a directory."""
    lines = [f"{name} {digest_file(directory / name)}" for name in names]
    return blake3("\n".join(lines).encode()).hexdigest()
