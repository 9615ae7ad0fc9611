"""Merges that thin the task vectors out before they add them up, so that members get into each other's way less.

    ties          keep the largest |d_i|; elect a sign for each entry; mean of the entries that have it      (algorithm 1)
    dare          keep each entry with probability p, divided by p                                           (eq. 1 to 3)
    della         the same, with a p that grows with the rank of |d_i| within its row                        (section 3)
    breadcrumbs   drop the largest |d_i| and the smallest                                                    (section 3)

What is left is summed up as it is (`combine=linear`) or by elected signs (`combine=ties`), and

    theta = theta_0 + lambda * merged

The result is dense. What is drawn depends on the seed, the member and the weight, not on the order in which they come.

Sources: Yadav et al. (2023), "TIES-Merging", arXiv:2306.01708; Yu et al. (2023), "Language Models are Super Mario",
arXiv:2311.03099; Deep et al. (2024), "DELLA-Merging", arXiv:2406.11617; Davari, Belilovsky (2023), "Model Breadcrumbs",
arXiv:2312.06795.
Differs from the papers: an elected sign of a sum of zero is +, where the authors of TIES take the most frequent sign; survivors
are divided by p, where mergekit keeps the norm of what was there; epsilon of DELLA is half the paper's, which gives the range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pare.methods.contract import Context, Member, MergeMethod, method, weight_by_weight
from pare.methods.ops.sparsity import all_but_smallest, count
from pare.methods.ops.task_vectors import (
    Base,
    Formulas,
    TaskVectorFields,
    edges,
    elected,
    generator_of,
    task_vectors,
    weighted_sum,
)
from pare.methods.parts.formula import Dense, Formula
from pare.methods.settings import SettingsError, check


@dataclass
class Sparsified(TaskVectorFields, MergeMethod):
    """What they share; `thin` tells them apart."""

    keeps_updates = False

    density: float = 0.5
    """Fraction of the entries of each task vector that is kept, in (0, 1]."""

    combine: str = "linear"
    """How thinned task vectors are merged: "linear", their weighted sum; "ties", where they disagree in sign only those of the
    elected one."""

    elect_weighted: bool = True
    """With combine=ties: signs are elected by the weighted task vectors, or (false) by the task vectors as they are."""

    def __post_init__(self) -> None:
        check(self, "density", above=0, at_most=1)
        check(self, "combine", one_of=("linear", "ties"))

    def check_members(self, names: Sequence[str], most: int | None = None) -> None:
        super().check_members(names, most)
        self.check_names(names)

    def merge_weight(self, name: str, formulas: Formulas, base: Base, known: Any, context: Context) -> Formula | None:
        start, vectors = task_vectors(name, formulas, base)
        shares = self.shares(list(formulas))
        thinned = {member: self.thin(vector, name, member, known, context) for member, vector in vectors.items()}
        if self.combine == "ties":
            merged = elected(thinned, shares, self.elect_weighted, self.normalise)
        else:
            merged = weighted_sum(thinned, shares)
        return Formula([Dense(start.add(merged, alpha=self.scaling))])

    def thin(self, vector: Tensor, name: str, member: str, known: Any, context: Context) -> Tensor:
        """A task vector (out, in) with zeros in place of what is dropped."""
        raise NotImplementedError


def largest(vector: Tensor, kept: int) -> Tensor:
    """Which entries are the `kept` largest in magnitude, bool (out, in)."""
    return all_but_smallest(vector.abs().view(1, -1), vector.numel() - kept).view(vector.shape)


@method("ties", source="Yadav et al. (2023), TIES-Merging, arXiv:2306.01708, algorithm 1")
@dataclass
class Ties(Sparsified):
    density: float = 0.2
    """Fraction of the entries of each task vector that is kept, the largest in magnitude, in (0, 1]."""

    combine: str = "ties"
    """How trimmed task vectors are merged: "ties", where they disagree in sign only those of the elected one; "linear", their
    weighted sum."""

    trim_scope: str = "tensor"
    """Among which entries the largest are looked for: those of one "tensor", exactly floor(density * n) of which stay, or
    "global", those of the member's whole task vector, as in the paper; all that equal the smallest which stays do so, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "trim_scope", one_of=("tensor", "global"))

    def survey(self, members: Sequence[Member], base: Base, context: Context) -> dict[str, float] | None:
        """Member -> the smallest magnitude of it that stays."""

        def vectors() -> Iterator[dict[str, Tensor]]:
            return (task_vectors(name, found, base)[1] for name, found in weight_by_weight(members, context.device))

        return edges(vectors, self.density) if self.trim_scope == "global" else None

    def thin(self, vector: Tensor, name: str, member: str, known: Any, context: Context) -> Tensor:
        if known is None:
            return vector * largest(vector, count(vector.numel(), self.density))
        return vector * (vector.abs() >= known[member])


@method("dare", source="Yu et al. (2023), DARE, arXiv:2311.03099, eq. 1 to 3")
@dataclass
class Dare(Sparsified):
    draws_random_numbers = True

    density: float = 0.5
    """Probability of an entry to be kept, 1 - p of the paper, in (0, 1]. 0.1 and less is for small task vectors alone."""

    def thin(self, vector: Tensor, name: str, member: str, known: Any, context: Context) -> Tensor:
        return drawn(vector, torch.tensor(self.density), context.seed, member, name)


@method("della", source="Deep et al. (2024), DELLA-Merging, arXiv:2406.11617, section 3")
@dataclass
class Della(Sparsified):
    draws_random_numbers = True

    density: float = 0.5
    """Mean probability of an entry to be kept, in (0, 1]."""

    combine: str = "ties"
    """How thinned task vectors are merged: "ties", where they disagree in sign only those of the elected one; "linear", their
    weighted sum."""

    epsilon: float = 0.15
    """The smallest entry of a row is kept with probability density - epsilon, the largest with density + epsilon; these must
    lie in (0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.epsilon < self.density or self.density + self.epsilon > 1 + 1e-9:
            most = f"{min(self.density, 1 - self.density):g} (density={self.density:g})"
            raise SettingsError(self.name, "epsilon", self.epsilon, f">= 0, below density and at most {most}")

    def thin(self, vector: Tensor, name: str, member: str, known: Any, context: Context) -> Tensor:
        columns = vector.shape[1]
        rank = vector.abs().argsort(dim=1, stable=True).argsort(dim=1)
        probability = self.density - self.epsilon + 2 * self.epsilon * rank / max(columns - 1, 1)
        return drawn(vector, probability if columns > 1 else torch.tensor(self.density), context.seed, member, name)


@method("breadcrumbs", source="Davari, Belilovsky (2023), Model Breadcrumbs, arXiv:2312.06795, section 3")
@dataclass
class Breadcrumbs(Sparsified):
    density: float = 0.9
    """Fraction of the entries of each tensor that is kept, in (0, 1]."""

    gamma: float = 0.01
    """Fraction of the entries of each tensor, the largest, that is dropped as outliers, in [0, 1 - density]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma <= 1 - self.density + 1e-9:
            raise SettingsError(self.name, "gamma", self.gamma, f"in [0, {1 - self.density:g}] with density={self.density:g}")

    def thin(self, vector: Tensor, name: str, member: str, known: Any, context: Context) -> Tensor:
        n = vector.numel()
        outliers = count(n, self.gamma)
        kept = min(count(n, self.density), n - outliers)
        return vector * (largest(vector, kept + outliers) & ~largest(vector, outliers))


def drawn(vector: Tensor, probability: Tensor, seed: int, member: str, weight: str) -> Tensor:
    """Each entry with its probability (one for all, or one each) and divided by it, else zero. Drawn on the CPU."""
    numbers = torch.rand(vector.shape, generator=generator_of(seed, member, weight)).to(vector.device)
    probability = probability.to(vector.device)
    return torch.where(numbers < probability, vector / probability, 0.0)
