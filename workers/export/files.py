"""What the export formats share: weight files in shards, the files that go with them, and how many bytes they take."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import Tensor

from pare.workers.files import digest_file
from pare.workers.shards import ShardWriter

SHARD_BYTES = 4 << 30
"""A weight file is closed before it would grow beyond this."""

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "LICENSE*",
    "NOTICE*",
)
"""Files of the base that every export carries, besides config.json."""


def copy_companions(source: Path, out: Path) -> None:
    """Tokenizer, chat template, generation config and licence of the base."""
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, out / file.name)


def write_weights(
    tensors: Iterable[tuple[str, Tensor]], out: Path, shard_bytes: int = SHARD_BYTES, stem: str = "model"
) -> None:
    """Writes tensors, as they come, to model.safetensors, or to shards with an index as transformers reads them."""
    writer = ShardWriter(out, stem, shard_bytes)
    for name, tensor in tensors:
        writer.add(name, tensor)
    writer.close()


@dataclass(frozen=True)
class TensorSize:
    bytes: int
    numbers: int
    """Elements."""


def tensor_sizes(directory: Path) -> dict[str, TensorSize]:
    """Size of every tensor in the safetensors files beneath a directory, read from their headers."""
    sizes: dict[str, TensorSize] = {}
    for file in sorted(directory.rglob("*.safetensors")):
        with file.open("rb") as f:
            header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            sizes[name] = TensorSize(end - start, prod(entry["shape"]))
    return sizes


def weight_files(directory: Path) -> list[Path]:
    """All weight files of an export, an adapter's base and adapter alike."""
    return sorted(file for pattern in ("*.safetensors", "*.gguf") for file in directory.rglob(pattern))


def digests(directory: Path) -> dict[str, str]:
    """Weight file -> digest of its content."""
    return {str(file.relative_to(directory)): digest_file(file) for file in weight_files(directory)}
