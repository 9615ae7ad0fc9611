"""How far a task has come, kept in the store until the task is done, so that another attempt goes on from there.

    PREFIX/00000007-<digest>.pt       a state; the last two are kept
    PREFIX/pieces/NAME-<digest>.pt    work that states build upon, written once and kept for as long as one does

The digest (BLAKE3) of the content is part of the name: what does not match it is torn or damaged and never opened.
"""

from __future__ import annotations

import errno
import io
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from pare.workers.blobs import Blobs, StoreError
from pare.workers.hidden_states import HiddenStates

EVERY_S = 30.0
KEPT = 2
PAUSE = 9
"""A save puts off the next one by this many times its own duration, so that saving takes at most a tenth of the time."""


class Checkpoint:
    """The checkpoint of one task. Only one attempt writes it at a time; a second one costs work, not correctness."""

    def __init__(self, blobs: Blobs, prefix: str) -> None:
        self._blobs, self._prefix = blobs, prefix
        self._since, self._took = time.monotonic(), 0.0
        self._built_upon: list[set[str]] = []
        """Names of the pieces of the states that this object has saved and that are kept."""

    def due(self, every_s: float = EVERY_S) -> bool:
        """Whether so many seconds have gone by since the last save, or since this object was made."""
        return time.monotonic() - self._since >= max(every_s, PAUSE * self._took)

    def save_piece(self, name: str, content: dict[str, Any]) -> None:
        """Keeps one of several ranks' part of a state that the first of them is about to save."""
        self._write(f"pieces/{name}", content)

    def save(self, state: dict[str, Any], pieces: Mapping[str, Callable[[], dict[str, Any]] | None] | None = None) -> None:
        """Keeps `state`: dicts, lists and tuples of tensors (on any device) and plain JSON values.

        pieces: name -> what makes it, of all that this state builds upon; None where `save_piece` has kept it. Called for
            the names that are not kept yet, one after another, before the state is written. Pieces that no kept state
            builds upon go.

        Raises:
            StoreError: the place is full or cannot be written. What was saved before still holds.
            TypeError: the state holds something else.
        """
        start = time.monotonic()
        kept = {name_of(key) for key in self._keys("pieces/")}
        for name, make in (pieces or {}).items():
            if name not in kept:
                if make is None:
                    raise StoreError(errno.ENOENT, f"{self._prefix}/pieces/{name}, part of a checkpoint, is missing")
                self._write(f"pieces/{name}", make())
        old = self._keys()
        number = int(name_of(old[-1])) + 1 if old else 1
        self._write(f"{number:08d}", state)
        for key in old[: len(old) + 1 - KEPT]:
            self._blobs.delete(key)
        self._built_upon = [*self._built_upon, {*(pieces or {})}][-KEPT:]
        if len(self._built_upon) == KEPT:  # otherwise there is a state of an earlier attempt
            for key in self._keys("pieces/"):
                if not any(name_of(key) in names for names in self._built_upon):
                    self._blobs.delete(key)
        self._since = time.monotonic()
        self._took = self._since - start

    def latest(self) -> dict[str, Any] | None:
        """The newest intact state, its tensors on the CPU."""
        return self._newest(self._keys())

    def piece(self, name: str) -> dict[str, Any] | None:
        """The piece of that name; None where there is no intact one."""
        return self._newest([key for key in self._keys("pieces/") if name_of(key) == name])

    def clear(self) -> None:
        """Removes all that is kept."""
        for key in self._blobs.list(self._prefix):
            self._blobs.delete(key)

    def _keys(self, folder: str = "") -> list[str]:
        """Keys directly beneath PREFIX/folder, oldest first."""
        start = f"{self._prefix}/{folder}"
        keys = self._blobs.list(start.rstrip("/"))
        return sorted(key for key in keys if "/" not in key.removeprefix(start))

    def _write(self, name: str, content: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(plain(content), buffer)
        data = buffer.getvalue()
        self._blobs.write(f"{self._prefix}/{name}-{digest(data)}.pt", data)

    def _newest(self, keys: list[str]) -> dict[str, Any] | None:
        """The content of the last of `keys` that is intact; damaged ones after it are removed."""
        for key in reversed(keys):
            try:
                data = self._blobs.read(key)
            except FileNotFoundError:  # another attempt has replaced it in the meantime
                continue
            if digest(data) == key.rpartition("-")[2].removesuffix(".pt"):
                content: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                return content
            print(f"checkpoint {key} differs from its digest and is not used", file=sys.stderr)
            self._blobs.delete(key)
        return None


class NothingKept(Checkpoint):
    """For a task whose work is not worth keeping, or that runs by itself."""

    def __init__(self) -> None:
        pass

    def due(self, every_s: float = EVERY_S) -> bool:
        return False

    def save_piece(self, name: str, content: dict[str, Any]) -> None:
        pass

    def save(self, state: dict[str, Any], pieces: Mapping[str, Callable[[], dict[str, Any]] | None] | None = None) -> None:
        pass

    def latest(self) -> dict[str, Any] | None:
        return None

    def piece(self, name: str) -> dict[str, Any] | None:
        return None

    def clear(self) -> None:
        pass


NO_CHECKPOINT = NothingKept()


def save_blocks(
    checkpoint: Checkpoint,
    blocks: int,
    hidden: HiddenStates,
    pieces: Mapping[str, Callable[[], dict[str, Any]]],
    **more: Any,
) -> None:
    """Keeps how far a task has come that finishes one block of a model after another: how many, and what the next one reads.

    pieces: `block_piece` of every finished block -> what makes it. One hidden state at a time is in memory for this.
    """
    states = {hidden_piece(blocks, i): partial(lambda i: {"hidden": hidden[i]}, i) for i in range(len(hidden))}
    checkpoint.save({"blocks": blocks, "batches": len(hidden), **more}, {**pieces, **states})


def resume_blocks(
    checkpoint: Checkpoint, restore: Callable[[int, dict[str, Any]], None], hidden: HiddenStates
) -> tuple[int, dict[str, Any]]:
    """Takes up what `save_blocks` has kept: calls restore(index, piece) for every finished block and fills `hidden`.

    Returns how many blocks are finished and the state; (0, {}) where a piece is damaged, so that the task starts over.
    """
    state = checkpoint.latest() or {}
    blocks = state.get("blocks", 0)
    names = [block_piece(i) for i in range(blocks)] + [hidden_piece(blocks, i) for i in range(state.get("batches", 0))]
    for index, name in enumerate(names):
        piece = checkpoint.piece(name)
        if piece is None:
            checkpoint.clear()
            hidden.clear()
            return 0, {}
        if index < blocks:
            restore(index, piece)
        else:
            hidden.append(piece["hidden"])
    return blocks, state


def hidden_piece(blocks: int, batch: int) -> str:
    """Name of the piece that holds what the block after so many finished ones reads of a batch."""
    return f"hidden_{blocks:03d}_{batch:04d}"


def block_piece(index: int) -> str:
    """Name of the piece that holds what was made of one block."""
    return f"block_{index:03d}"


def name_of(key: str) -> str:
    return key.rpartition("/")[2].rpartition("-")[0]


def digest(data: bytes) -> str:
    return str(blake3(data).hexdigest())


def plain(value: Any, where: str = "state") -> Any:
    """The value as it can be read back without trust in it; tensors on the CPU, each with no more memory than it needs."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
    if isinstance(value, dict):
        return {plain(key, where): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if type(value) not in (str, int, float, bool, type(None)):
        raise TypeError(f"a checkpoint keeps tensors and plain JSON values; {where} is a {type(value).__name__}")
    return value
