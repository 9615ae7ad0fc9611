"""Export as a GGUF file, for llama.cpp and for what opens its files; transformers opens it with `gguf_file=`.

    model.gguf                          config, tokenizer and weights
    config.json, tokenizer and others   the base's, for whoever opens the directory

Only for families whose every setting survives the way back through transformers: after writing, the config that transformers
reads from the file is compared with the base's. Weights that are codes are written as they are (`gguf_blocks`), vectors as
float32, other weights in the dtype of the base.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pare.methods.parts.codes import Codes
from pare.workers.export.files import TensorSize, copy_companions
from pare.workers.export.gguf_blocks import blocks_of
from pare.workers.export.gguf_tokenizer import add_tokenizer
from pare.workers.export.schemes import Inexpressible, is_dense
from pare.workers.export.stock import GGUF_FILE
from pare.workers.models import ModelArtifact

FAMILIES = ("llama", "qwen2", "qwen3")
"""`model_type` of transformers, which is also the name of the architecture in the file."""

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

SAID_ELSEWHERE = {"architectures", "dtype", "transformers_version", "_name_or_path", "_model_name_or_path", "vocab_size"}
SAID_ELSEWHERE |= {"bos_token_id", "eos_token_id", "pad_token_id"}
SAID_ELSEWHERE |= {"use_cache", "initializer_range", "attention_dropout", "pretraining_tp"}
"""Keys of a config that change no logit, or that stand in the tokenizer or the shapes."""


@dataclass(frozen=True)
class Place:
    """How one parameter is written."""

    name: str
    """In the file."""
    type: str
    """Name in `gguf.GGMLQuantizationType`."""


def layout(artifact: ModelArtifact) -> dict[str, Place]:
    """Parameter name -> how it is written.

    Raises:
        Inexpressible: the format has no words for the model or for a weight.
    """
    import gguf

    config = read_config(artifact.dense.directory)
    if config["model_type"] not in FAMILIES:
        raise Inexpressible(f"GGUF is written for {', '.join(FAMILIES)}, not for {config['model_type']}")
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config["model_type"])
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    changed = artifact.compressed_names()
    unknown = sorted(set(changed) - set(artifact.parameter_names()))
    if unknown:
        raise Inexpressible(f"{unknown[0]} is only a part of a parameter")
    places = {}
    for name in artifact.parameter_names():
        stem, _, kind = name.rpartition(".")
        there = names.get_name(stem)
        if there is None:
            raise Inexpressible(f"GGUF has no name for {name}")
        places[name] = Place(f"{there}.{kind}", type_of(artifact, name, name in changed))
    return places


def type_of(artifact: ModelArtifact, name: str, is_changed: bool) -> str:
    formula = artifact.effective(name) if is_changed else None
    if formula is None or is_dense(formula):
        stored = artifact.stored(name)
        return DTYPES[torch.float32 if stored.dim() == 1 else stored.dtype]
    codes = formula.parts[0]
    if formula.transforms or formula.activation:
        raise Inexpressible(f"GGUF cannot say {name}, which has transforms or a quantised input")
    if len(formula.parts) > 1 or not isinstance(codes, Codes):
        kinds = ", ".join(part.kind for part in formula.parts)
        raise Inexpressible(f"GGUF cannot say {name}, which is made of {kinds}")
    try:
        return blocks_of(codes)[0]
    except Inexpressible as e:
        raise Inexpressible(f"GGUF cannot say {name}, which {e}") from None


def describe_types(places: Mapping[str, Place]) -> str:
    counts = Counter(place.type for place in places.values())
    return "tensors by type: " + ", ".join(f"{counts[name]} {name}" for name in sorted(counts))


def read_config(directory: Path, **arguments: str) -> dict[str, Any]:
    """A config with what it leaves unsaid."""
    from transformers import AutoConfig

    config: dict[str, Any] = AutoConfig.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False, **arguments
    ).to_dict()
    return config


def export_gguf(artifact: ModelArtifact, out: Path, name: str) -> tuple[dict[str, TensorSize], str]:
    """Writes the file and what goes with it; returns (parameter name -> size of its data in the file, what types there are).

    name: what the file calls the model.
    """
    import gguf

    places, source = layout(artifact), artifact.dense.directory
    config = read_config(source)
    shutil.copyfile(source / "config.json", out / "config.json")
    copy_companions(source, out)
    writer = gguf.GGUFWriter(out / GGUF_FILE, config["model_type"])
    writer.add_name(name)
    add_config(writer, config)
    add_tokenizer(writer, source, artifact.stored("model.embed_tokens.weight").shape[0])
    sizes: dict[str, TensorSize] = {}
    for parameter, place in places.items():
        kind, shape = gguf.GGMLQuantizationType[place.type], artifact.stored(parameter).shape
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        sizes[parameter] = TensorSize(shape.numel() // block * block_bytes, shape.numel())
        byte_shape = (*shape[:-1], shape[-1] // block * block_bytes)
        writer.add_tensor_info(place.name, byte_shape, data_type(), sizes[parameter].bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for parameter, place in places.items():
        rows = stored_rows(artifact, parameter, place)
        writer.write_tensor_data(rows[row_order(parameter, rows.shape[0], config)].numpy())
    writer.close()
    check_config(config, out)
    return sizes, describe_types(places)


def data_type() -> Any:
    import numpy as np

    return np.dtype(np.uint8)


def stored_rows(artifact: ModelArtifact, name: str, place: Place) -> Tensor:
    """The data of a tensor, uint8 (rows, bytes of a row); a vector is a column."""
    if place.type not in DTYPES.values():
        codes = artifact.effective(name).parts[0]
        assert isinstance(codes, Codes)  # `type_of` has seen it
        return blocks_of(codes)[1]
    dtype = next(key for key, value in DTYPES.items() if value == place.type)
    weight = artifact.materialise(name) if name in artifact.compressed_names() else artifact.stored(name)
    shape = artifact.stored(name).shape
    return weight.view(shape[0], -1).to(dtype).contiguous().view(torch.uint8)


def row_order(name: str, rows: int, config: Mapping[str, Any]) -> Tensor:
    """Which row stands where. The Llama of GGUF rotates neighbours, that of transformers the halves of a head (see
    `gguf_file.Gguf.read`)."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    order = torch.arange(rows)
    if config["model_type"] != "llama" or heads is None:
        return order
    return order.view(config[heads], 2, -1).transpose(1, 2).flatten()


def add_config(writer: Any, config: Mapping[str, Any]) -> None:
    """Shapes and constants of the model."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_quantization_version(2)


def check_config(wanted: Mapping[str, Any], out: Path) -> None:
    """Refuses a file from which transformers would make another model.

    Raises:
        Inexpressible: a setting of the base is not what transformers reads from the file.
    """
    found = read_config(out, gguf_file=GGUF_FILE)
    for key in sorted(wanted.keys() - SAID_ELSEWHERE):
        if not alike(wanted[key], found.get(key)):
            raise Inexpressible(
                f"transformers reads {key}={found.get(key)!r} from a GGUF file of this model, not {wanted[key]!r}"
            )


def alike(one: Any, other: Any) -> bool:
    """Equal, numbers as float32, which is what the file holds."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, int | float):
        return bool(torch.tensor(one).float() == torch.tensor(other).float())
    return bool(one == other)
