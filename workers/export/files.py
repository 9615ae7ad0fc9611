"""What the export formats share: weight files in shards, the files that go with them, and how many bytes they take."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from pare.workers.files import digest_file

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
    shards: list[dict[str, Tensor]] = []
    where: dict[str, int] = {}
    total = filled = 0

    def close(shard: dict[str, Tensor]) -> None:
        file = out / f"{len(shards)}.part"
        save_file({name: t.contiguous() for name, t in shard.items()}, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors writes 0600
        shard.clear()

    for name, tensor in tensors:
        if not shards or filled + tensor.nbytes > shard_bytes:
            if shards:
                close(shards[-1])
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        where[name] = len(shards)
        filled += tensor.nbytes
        total += tensor.nbytes
    close(shards[-1])
    if len(shards) == 1:
        (out / "1.part").rename(out / f"{stem}.safetensors")
        return
    names = {i: f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)}
    for i, name in names.items():
        (out / f"{i}.part").rename(out / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in sorted(where.items())}}
    (out / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))


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
