"""Where a training stands between two steps: kept by all ranks together, and taken up by all or by none."""

from __future__ import annotations

import random
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from pare.workers.checkpoint import Checkpoint
from pare.workers.ranks import Ranks
from pare.workers.task import TaskError


def resumed(checkpoint: Checkpoint, ranks: Ranks, layout: dict[str, Any]) -> dict[str, Any]:
    """The state that all ranks go on from, {} at the start; "optimizer" is this rank's part of it.

    Raises:
        TaskError: its parts are of another layout, or the ranks do not see the same one.
    """
    saved = checkpoint.latest() or {}
    if len(set(ranks.all((len(saved.get("steps", [])), *saved.get("parts", []))))) > 1:
        raise TaskError("the ranks have read different checkpoints of the same task", failure="unknown")
    if saved and saved["layout"] != layout:
        raise TaskError(
            "the checkpoint of this task is of ranks={ranks} and ZeRO stage={stage}".format(**saved["layout"])
            + ", whose parts do not fit this attempt: it has ranks={ranks} and stage={stage}. ".format(**layout)
            + "Try: engine.ranks and the engine that it began with"
        )
    if parts := saved.get("parts"):
        own = checkpoint.piece(parts[ranks.rank])
        if not all(ranks.all(own is not None)):  # damaged: nobody can go on
            if ranks.is_first:
                checkpoint.clear()
            return {}
        saved["optimizer"] = own
    return saved


def keep(checkpoint: Checkpoint, ranks: Ranks, device: torch.device, optimizer: dict[str, Any], state: dict[str, Any]) -> None:
    """Saves a state of all ranks, with `layout`.

    What only one of them holds, as the optimizer's state is in a stage of ZeRO, it writes itself, before the first says that
    there is a state.
    """
    state = state | {"random": ranks.all(random_state(device))}
    if not state["layout"]["stage"]:
        if ranks.is_first:
            checkpoint.save(state | {"optimizer": optimizer})
        return
    name = ranks.first(uuid4().hex)  # so that parts of different attempts at one step never meet
    parts = [f"{name}_{rank:03d}" for rank in range(ranks.count)]
    checkpoint.save_piece(parts[ranks.rank], optimizer)
    ranks.all(None)
    if ranks.is_first:
        checkpoint.save(state | {"parts": parts}, dict.fromkeys(parts))


def random_state(device: torch.device) -> dict[str, Any]:
    """Where the random number generators stand that a step may draw from: torch's, Python's and numpy's own."""
    numpy: Any = np.random.get_state()
    kind, keys, *rest = numpy
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
