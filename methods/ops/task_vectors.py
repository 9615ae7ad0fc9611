"""What members of a merge have in common, and what one makes of their differences from it, a weight at a time.

    d_i = theta_i - theta_0        the task vector of member i, of each weight (out, in), float32

theta_0 is the base that the members stand on. Members that are low-rank updates of equal codes (as QLoRA leaves them) stand on
these codes: their d_i are the updates alone. Codes that differ have no common ground: the mean of two numbers of a grid need
not lie on it, so they are refused.

A linear combination of low-rank updates stays low rank, and exact: with A = [A_1; ...; A_n] and B = [c_1 s_1 B_1, ...,
c_n s_n B_n] side by side, B A is the sum of c_i s_i B_i A_i, whatever ranks and targets. (The mean of the A times the mean of
the B is something else.) Equal updates are set down once.

Source: Ilharco et al. (2022), "Editing Models with Task Arithmetic", arXiv:2212.04089, section 2.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from pare.methods.ops.sparsity import count
from pare.methods.parts.formula import Dense, Formula, LowRank, Part, add_up
from pare.methods.settings import SettingsError

Formulas = Mapping[str, Formula | None]
"""Member -> its formula of one weight relative to the base, None where it leaves the weight alone."""

Base = Callable[[str], Tensor]
"""Name of a weight -> the base's value, float32."""

LAYER = re.compile(r"(.*?\.)(\d+)\.")


@dataclass
class TaskVectorFields:
    """Settings of every method that weighs task vectors."""

    name: ClassVar[str]

    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each member by its name, e.g. `{lora-1: 0.3}`, or `path0` for the first of members.paths; any number. A
    member that is not named weighs 1."""

    scaling: float = 1.0
    """Lambda: by how much the merged task vector is multiplied before it is added to the base."""

    normalise: bool = True
    """Divide by the sum of the weights, so that the result is a mean of the members and not their sum."""

    def check_names(self, members: Sequence[str]) -> None:
        """Raises `SettingsError` for a weight of something else."""
        for name in self.weights:
            if name not in members:
                raise SettingsError(self.name, "weights", name, f"named after members: {', '.join(members)}")

    def shares(self, members: Sequence[str]) -> dict[str, float]:
        """Member -> its weight, divided by their sum where that is wanted."""
        self.check_names(members)
        own = {name: float(self.weights.get(name, 1.0)) for name in members}
        total = math.fsum(own.values()) if self.normalise else 1.0
        if not total:
            raise SettingsError(self.name, "weights", self.weights, "of a sum other than 0, or normalise=false")
        return {name: weight / total for name, weight in own.items()}


# --- what members share -------------------------------------------------------------------------------------------------


def shared(formulas: Formulas) -> list[Part] | None:
    """The parts beside low-rank updates that are equal to the last bit in all members and stand in place of the base's weight;
    empty where the members are low-rank updates and nothing else; None where they have no such thing in common."""
    ops, rests = zip(*((f.op, rest_of(f)) if f else ("add", []) for f in formulas.values()), strict=True)
    is_same = all(op == ops[0] and same(own, rests[0]) for op, own in zip(ops, rests, strict=True))
    stands_on_codes = ops[0] == "replace" and any(not isinstance(part, Dense) for part in rests[0])
    return rests[0] if is_same and (stands_on_codes or (ops[0] == "add" and not rests[0])) else None


def rest_of(formula: Formula) -> list[Part]:
    """The parts that are no low-rank update."""
    return [part for part in formula.parts if not isinstance(part, LowRank)]


def updates_of(formula: Formula | None) -> list[LowRank]:
    return [part for part in (formula.parts if formula else []) if isinstance(part, LowRank)]


def same(parts: Sequence[Part], others: Sequence[Part]) -> bool:
    """Whether the parts are equal to the last bit."""
    if [part.spec() for part in parts] != [part.spec() for part in others]:
        return False
    pairs = [(part.tensors(), other.tensors()) for part, other in zip(parts, others, strict=True)]
    return all(one.keys() == two.keys() and all(torch.equal(t, two[key]) for key, t in one.items()) for one, two in pairs)


def check_representations(name: str, formulas: Formulas) -> None:
    """Raises `ValueError` where members are made of codes, or of what is left by pruning, each of its own."""
    odd = {
        part.kind for f in formulas.values() if f and f.op == "replace" for part in rest_of(f) if not isinstance(part, Dense)
    }
    if odd:
        raise ValueError(
            f"{name} is made of {' and '.join(sorted(odd))} that differ between {', '.join(formulas)}, and the average of "
            "quantised values is not on their grid. Try: merge first and quantise the soup, or members that are adapters on "
            "one and the same quantised model"
        )


def effective(name: str, formula: Formula | None, base: Base) -> Tensor:
    """The dense weight (out, in), float32, that a formula stands for."""
    if formula is None:
        return torch.atleast_2d(base(name))
    return formula.materialise() if formula.op == "replace" else torch.atleast_2d(base(name)) + formula.materialise()


def task_vectors(name: str, formulas: Formulas, base: Base) -> tuple[Tensor, dict[str, Tensor]]:
    """(theta_0, member -> d_i) of one weight, each (out, in), float32.

    Raises:
        ValueError: the members are made of codes that differ.
    """
    codes = shared(formulas)
    if codes is None:
        check_representations(name, formulas)
    start = add_up([part.materialise() for part in codes or []])
    start = torch.atleast_2d(base(name)) if start is None else start

    def vector(formula: Formula | None) -> Tensor:
        if codes is None and formula and formula.op == "replace":
            return formula.materialise() - start
        delta = add_up([part.materialise() for part in (updates_of(formula) if codes else formula.parts if formula else [])])
        return torch.zeros_like(start) if delta is None else delta

    return start, {member: vector(formula) for member, formula in formulas.items()}


# --- linear combinations ------------------------------------------------------------------------------------------------


def combine(name: str, formulas: Formulas, shares: Mapping[str, float], base: Base) -> Formula | None:
    """theta_0 + sum of shares[i] * d_i of one weight, low rank where all members are; None where that is the base's own value.

    Dense weights are added up in float32, as differences from the first of them where the shares sum to 1, so that equal
    members make that member to the last bit; and cast once, to the widest dtype of the members.

    Raises:
        ValueError: the members are made of codes that differ.
    """
    codes, is_mean = shared(formulas), math.isclose(math.fsum(shares.values()), 1, rel_tol=1e-9)
    if codes is not None or (is_mean and all(f and f.op == "replace" and not rest_of(f) for f in formulas.values())):
        parts = [*(codes or []), *side_by_side([(updates_of(f), shares[member]) for member, f in formulas.items()])]
        op = next((f.op for f in formulas.values() if f), "add")
        return Formula(parts, op) if parts else None
    check_representations(name, formulas)
    members = iter(formulas)
    start = effective(name, formulas[next(members)], base) if is_mean else torch.atleast_2d(base(name))
    value = start.clone()
    for member in members if is_mean else formulas:
        value.add_(effective(name, formulas[member], base) - start, alpha=shares[member])
    dtypes = [part.weight.dtype for f in formulas.values() if f for part in f.parts if isinstance(part, Dense)]
    return Formula([Dense(value.to(reduce(torch.promote_types, dtypes) if dtypes else value.dtype))])


def side_by_side(updates: Iterable[tuple[Sequence[LowRank], float]]) -> list[LowRank]:
    """(the updates of one weight by a member, its share) for each member -> their sum as one update, or none."""
    terms: list[tuple[LowRank, float]] = []
    for own, share in updates:
        for part in own:
            at = next((i for i, (known, _) in enumerate(terms) if same([known], [part])), len(terms))
            terms[at:] = [(part, share + (terms[at][1] if at < len(terms) else 0)), *terms[at + 1 :]]
    terms = [(part, share) for part, share in terms if share]
    if not terms or (len(terms) == 1 and math.isclose(terms[0][1], 1, rel_tol=1e-9)):
        return [part for part, _ in terms]
    a = torch.cat([part.a.float() for part, _ in terms])
    b = torch.cat([part.b.float() * (part.scale * share) for part, share in terms], dim=1)
    return [LowRank(a, b)]


def layer_of(name: str, blocks: int = 1) -> str:
    """The group of so many consecutive blocks that a weight belongs to; all that stands outside of blocks is one of its own.

    >>> layer_of("model.layers.7.mlp.up_proj.weight", 4), layer_of("model.norm.weight")
    ('model.layers.1', '')
    """
    found = LAYER.match(name)
    return f"{found[1]}{int(found[2]) // blocks}" if found else ""


# --- sparse task vectors ------------------------------------------------------------------------------------------------


def edges(vectors: Callable[[], Iterable[Mapping[str, Tensor]]], density: float) -> dict[str, float]:
    """Member -> the smallest of its floor(density * n) largest magnitudes over all n entries of all its task vectors; infinite
    where that is none. Exact, whatever n: the bits of a magnitude are in the order of its value, and are counted in two passes,
    the upper half and then, where the edge was found, the lower half.

    vectors: gives member -> task vector, float32, of one weight after another, and the same each time it is called.
    """
    upper, lower = 2**15, 2**16
    coarse: dict[str, Tensor] = {}
    for own in vectors():
        for member, vector in own.items():
            counted = torch.bincount(bits_of(vector) >> 16, minlength=upper)
            coarse[member] = coarse[member] + counted if member in coarse else counted
    wanted = {member: count(int(counts.sum()), density) for member, counts in coarse.items()}
    found = {member: from_the_top(counts, wanted[member]) for member, counts in coarse.items()}
    fine = {member: torch.zeros(lower, dtype=torch.int64, device=counts.device) for member, counts in coarse.items()}
    for own in vectors():
        for member, vector in own.items():
            bits = bits_of(vector)
            fine[member] += torch.bincount(bits[bits >> 16 == found[member][0]] & (lower - 1), minlength=lower)
    answer = {}
    for member, (bucket, above) in found.items():
        low, _ = from_the_top(fine[member], wanted[member] - above)
        edge = torch.tensor(bucket << 16 | low, dtype=torch.int32).view(torch.float32).item()
        answer[member] = edge if wanted[member] else math.inf
    return answer


def bits_of(vector: Tensor) -> Tensor:
    """The magnitudes of float32 numbers as integers in the same order, int64, flat."""
    return vector.abs().flatten().contiguous().view(torch.int32).long()


def from_the_top(counts: Tensor, wanted: int) -> tuple[int, int]:
    """counts of ascending values -> (the value of the `wanted`-th largest, how many are larger than that value)."""
    above = counts.flip(0).cumsum(0)
    place = min(int((above < max(wanted, 1)).sum()), len(counts) - 1)
    return len(counts) - 1 - place, int(above[place - 1]) if place else 0


def generator_of(seed: int, member: str, weight: str) -> torch.Generator:
    """A CPU generator for what is drawn for one weight of one member: the same in whatever order they come."""
    key = hashlib.blake2b(f"{seed} {member} {weight}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "big"))


def elected(vectors: Mapping[str, Tensor], shares: Mapping[str, float], weighted: bool, normalise: bool) -> Tensor:
    """TIES steps 2 and 3: per entry the sign of the sum of the (weighted) vectors, + where it is zero, and the weighted mean
    (or sum) of the entries that have this sign.

    Source: Yadav et al. (2023), "TIES-Merging", arXiv:2306.01708, algorithm 1.
    """
    first = next(iter(vectors.values()))
    total = torch.zeros_like(first)
    for member, vector in vectors.items():
        total.add_(vector, alpha=shares[member] if weighted else 1.0)
    sign = torch.where(total >= 0, 1.0, -1.0)
    value, mass = torch.zeros_like(first), torch.zeros_like(first)
    for member, vector in vectors.items():
        agrees = (vector * sign > 0).float()
        value.addcmul_(vector, agrees, value=shares[member])
        mass.add_(agrees, alpha=shares[member])
    return torch.where(mass != 0, value / mass, 0.0) if normalise else value


def weighted_sum(vectors: Mapping[str, Tensor], shares: Mapping[str, float]) -> Tensor:
    return reduce(torch.add, (vector * shares[member] for member, vector in vectors.items()))
