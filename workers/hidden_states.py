"""What the next block of a model reads, batch by batch: in memory, and in files where that would take too much of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import torch
from torch import Tensor

from pare.workers.memory import free_memory

PART = 0.25
"""Of the free memory, what hidden states may take of it unless somebody says otherwise."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> Tensor:
        """A copy in memory of its own: where a tensor lies must not decide in which order a product of it adds up."""
        x = torch.empty(self.shape, dtype=self.dtype)
        with self.file.open("rb", buffering=0) as file:
            room = memoryview(x.view(-1).view(torch.uint8).numpy())
            while room and (taken := file.readinto(room)):
                room = room[taken:]
        if room:
            raise OSError(f"{self.file} is {len(room)} bytes shorter than what was written to it; run the task again")
        return x


class HiddenStates:
    """The hidden state of every batch. One in a file is read when it is asked for and written when another takes its place.

    Used as a context: its files go at the end.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        """folder: where a folder for files may be made; None: all stay in memory.
        limit: bytes in memory at most; None: `PART` of what is free when the first one comes."""
        self.folder, self.limit = folder, limit
        self.kept: list[Tensor | Stored] = []
        self.held = 0
        """Bytes in memory."""
        self.files: TemporaryDirectory[str] | None = None

    def append(self, x: Tensor) -> None:
        """x: on the CPU."""
        if self.limit is None:
            self.limit = int(PART * free_memory())
        if self.folder is None or self.held + x.nbytes <= self.limit:
            self.kept.append(x)
            self.held += x.nbytes
        else:
            self.kept.append(self._written(len(self), x))

    def extend(self, states: Iterable[Tensor]) -> HiddenStates:
        for x in states:
            self.append(x)
        return self

    def clear(self) -> None:
        self.kept, self.held = [], 0
        if self.files:
            self.files.cleanup()
            self.files = None

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> Tensor:
        kept = self.kept[i]
        return kept if isinstance(kept, Tensor) else kept.read()

    def __setitem__(self, i: int, x: Tensor) -> None:
        """x, as large as what it replaces, goes where that was."""
        self.kept[i] = x if isinstance(self.kept[i], Tensor) else self._written(i, x)

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(len(self)):
            yield self[i]

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.clear()

    def _written(self, i: int, x: Tensor) -> Stored:
        if self.files is None:
            self.files = TemporaryDirectory(dir=self.folder, prefix="hidden-states-")
        file = Path(self.files.name) / str(i)
        x = x.detach().contiguous()
        file.write_bytes(x.view(-1).view(torch.uint8).numpy().data)
        return Stored(file, x.shape, x.dtype)
