"""Several processes at one task: who this one is among them, and what they tell each other.

One rank alone needs no process group; what is asked of the others is then its own. Whoever starts several ranks
(`pare.orchestrator.launch`) sets up torch.distributed before the task begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Ranks:
    """This process among those that work on the task. Every method but the properties is called by all of them alike."""

    rank: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """As torch.distributed knows them; one rank alone where it has not been set up."""
        dist = torch.distributed
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and speaks for all."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in float64, so that all of them go on with the very same numbers."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def first(self, value: Any) -> Any:
        """What the first rank gives."""
        box = [value]
        if self.count > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def all(self, value: Any) -> list[Any]:
        """What each rank gives, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found
