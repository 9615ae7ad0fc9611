"""Tensors to safetensors files as they come, so that no more of them are in memory than go into one file."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class ShardWriter:
    """Writes STEM.safetensors, or where that would grow too large shards with an index, as transformers reads them."""

    def __init__(self, directory: Path, stem: str, shard_bytes: int) -> None:
        """shard_bytes: a file is closed before it would grow beyond this."""
        self.directory, self.stem, self.shard_bytes = directory, stem, shard_bytes
        self.gathered: dict[str, Tensor] = {}
        """What the next shard is to hold."""
        self.where: dict[str, int] = {}
        """Tensor name -> number of its shard, from 1."""
        self.shards = self.filled = self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self.gathered and self.filled + tensor.nbytes > self.shard_bytes:
            self._flush()
        self.gathered[name] = tensor
        self.where[name] = self.shards + 1
        self.filled += tensor.nbytes
        self.total += tensor.nbytes

    def read(self, name: str) -> Tensor:
        """A tensor that was added, before the end."""
        if name in self.gathered:
            return self.gathered[name]
        with safe_open(self._part(self.where[name]), framework="pt") as f:
            tensor: Tensor = f.get_tensor(name)
        return tensor

    def discard(self) -> None:
        """Takes away all that was added."""
        for shard in range(1, self.shards + 1):
            self._part(shard).unlink()
        self.gathered, self.where = {}, {}
        self.shards = self.filled = self.total = 0

    def close(self) -> None:
        """Gives the files their names."""
        if self.gathered or not self.shards:
            self._flush()
        if self.shards == 1:
            self._part(1).rename(self.directory / f"{self.stem}.safetensors")
            return
        names = {i: f"{self.stem}-{i:05}-of-{self.shards:05}.safetensors" for i in range(1, self.shards + 1)}
        for i, name in names.items():
            self._part(i).rename(self.directory / name)
        where = {name: names[i] for name, i in sorted(self.where.items())}
        index = {"metadata": {"total_size": self.total}, "weight_map": where}
        (self.directory / f"{self.stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))

    def _flush(self) -> None:
        self.shards += 1
        file = self._part(self.shards)
        save_file({name: t.contiguous() for name, t in self.gathered.items()}, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors writes 0600
        self.gathered, self.filled = {}, 0

    def _part(self, shard: int) -> Path:
        return self.directory / f"{self.stem}.{shard}.part"
