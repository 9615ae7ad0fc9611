"""Model soups: average the weights of models that were trained from one base with different settings or seeds.

    uniform   W = (1/n) (W_1 + ... + W_n)
    greedy    members from best to worst; W_i joins the soup if the average of the soup with it scores better than without

What makes it work is that the members lie in one basin of the loss; models of different initial values do not, and their
average is no model at all. Scores are taken on windows that neither training nor the final test has seen.

How a weight is averaged follows from what it is in the members:
- low-rank updates of one and the same weight (LoRA on the base, or on equal codes as QLoRA leaves them) are set side by side,
  A = [A_1; ...; A_n] and B = [s_1 B_1, ..., s_n B_n] / n, so that B A is exactly the mean of the updates s_i B_i A_i, whatever
  their ranks and targets. The mean of the A times the mean of the B is something else. Equal updates are set down once.
- dense weights become their running mean in float32, cast once at the end.
- codes that differ are refused: the mean of two numbers of a grid need not lie on it.

Cost: greedy takes n - 1 passes over the selection windows, uniform one. One weight of every member is held at a time.
Source: Wortsman et al. (2022), "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time", arXiv:2203.05482, recipe 1 and table 2.
Differs from the paper: the score is the mean next-token loss, where the paper has accuracy, which moves in steps; a member
must make the score strictly better, as in the paper's code, where its text also takes in a member that changes nothing; and
`margin` may ask for more. The learned soup is left out: it needs all members in memory at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from pare.methods.contract import Context, Member, Merged, MergeMethod, method
from pare.methods.parts.formula import Dense, Formula, LowRank, Part
from pare.methods.settings import check


@method("model_soups", source="Wortsman et al. (2022), Model soups, arXiv:2203.05482, recipe 1")
@dataclass
class ModelSoups(MergeMethod):
    mode: str = "greedy"
    """"greedy": take in a member only if the soup scores better with it; never worse than the best member on the selection
    windows. "uniform": take in every member."""

    margin: float = 0.0
    """What a member must at least gain to be taken in by "greedy", in nats per token, >= 0; at 0 any gain is enough. With few
    selection windows small gains are noise, and a margin of the noise's size keeps them out."""

    def __post_init__(self) -> None:
        check(self, "mode", one_of=("greedy", "uniform"))
        check(self, "margin", at_least=0)

    def merge(
        self,
        members: Sequence[Member],
        base: Callable[[str], Tensor],
        evaluate: Callable[[Iterable[tuple[str, Formula]]], float],
        context: Context,
    ) -> Merged:
        best, *others = sorted(members, key=lambda member: (member.score, member.name))
        chosen, score, decisions = [best], best.score, [decision(best, best.score, True, "the best member")]
        if self.mode == "uniform" and others:
            chosen += others
            score = evaluate(soup(chosen, base))
            decisions += [decision(member, None, True, "uniform takes in every member") for member in others]
        elif self.mode == "greedy":
            for member in others:
                with_it = evaluate(soup([*chosen, member], base))
                gain = score - with_it
                taken = gain > self.margin
                reason = f"the soup with it gains {gain:.3g} nats; more than {self.margin:g} is asked for"
                decisions.append(decision(member, with_it, taken, reason))
                if taken:
                    chosen, score = [*chosen, member], with_it
        return Merged({member.name: 1 / len(chosen) for member in chosen}, soup(chosen, base), score, decisions)


def decision(member: Member, soup_score: float | None, taken: bool, reason: str) -> dict[str, Any]:
    """One line of the log; `soup_score` is that of the soup with the member, None where it was not taken."""
    known = soup_score is not None and math.isfinite(soup_score)
    return {
        "member": member.name,
        "score": member.score,
        "soup_score": soup_score if known else None,
        "accepted": taken,
        "reason": reason,
    }


def soup(members: Sequence[Member], base: Callable[[str], Tensor]) -> Iterator[tuple[str, Formula]]:
    """The average of the members, one weight after another."""
    for name in dict.fromkeys(name for member in members for name in member.names):
        formulas = {member.name: member.formula(name) for member in members}
        if any(formulas.values()):
            yield name, average(name, formulas, base)


def average(name: str, formulas: Mapping[str, Formula | None], base: Callable[[str], Tensor]) -> Formula:
    """Member -> its formula of one weight, at least one of them not None -> their average.

    Raises:
        ValueError: the formulas differ in parts that have no average.
    """
    # A member that leaves the weight alone adds no update to it.
    ops = [formula.op if formula else "add" for formula in formulas.values()]
    parts = [formula.parts if formula else [] for formula in formulas.values()]
    updates = [[part for part in own if isinstance(part, LowRank)] for own in parts]
    rest = [[part for part in own if not isinstance(part, LowRank)] for own in parts]
    if all(op == ops[0] and same(own, rest[0]) for op, own in zip(ops, rest, strict=True)):
        return Formula([*rest[0], *side_by_side(updates)], ops[0])
    odd = {part.kind for own in rest for part in own if not isinstance(part, Dense)}
    if odd:
        raise ValueError(
            f"model_soups: {name} is made of {' and '.join(sorted(odd))} that differ between {', '.join(formulas)}, and the "
            "average of quantised values is not on their grid. Try: merge first and quantise the soup, or members that are "
            "adapters on one and the same quantised model"
        )
    dtypes = [part.weight.dtype for own in rest for part in own if isinstance(part, Dense)]
    mean = running_mean(effective(name, formula, base) for formula in formulas.values())
    return Formula([Dense(mean.to(reduce(torch.promote_types, dtypes, dtypes[0] if dtypes else mean.dtype)))])


def effective(name: str, formula: Formula | None, base: Callable[[str], Tensor]) -> Tensor:
    """The dense weight (out, in), float32, that a formula stands for."""
    if formula is None:
        return base(name)
    return formula.materialise() if formula.op == "replace" else base(name) + formula.materialise()


def running_mean(weights: Iterable[Tensor]) -> Tensor:
    """Mean of float32 tensors of one shape, of which it holds one at a time. Of equal ones it is that one to the last bit."""
    waiting = iter(weights)
    mean = next(waiting).clone()
    for count, weight in enumerate(waiting, start=2):
        mean += (weight - mean) / count
    return mean


def side_by_side(updates: Sequence[Sequence[LowRank]]) -> list[LowRank]:
    """The updates of one weight by each member -> their mean as one update, or none where no member has any."""
    terms: list[tuple[LowRank, int]] = []
    for part in itertools.chain.from_iterable(updates):
        at = next((i for i, (known, _) in enumerate(terms) if same([known], [part])), None)
        if at is None:
            terms.append((part, 1))
        else:
            terms[at] = (terms[at][0], terms[at][1] + 1)
    if not terms or (len(terms) == 1 and terms[0][1] == len(updates)):
        return [part for part, _ in terms]
    a = torch.cat([part.a.float() for part, _ in terms])
    b = torch.cat([part.b.float() * (part.scale * count / len(updates)) for part, count in terms], dim=1)
    return [LowRank(a, b)]


def same(parts: Sequence[Part], others: Sequence[Part]) -> bool:
    """Whether the parts are equal to the last bit."""
    if [part.spec() for part in parts] != [part.spec() for part in others]:
        return False
    pairs = [(part.tensors(), other.tensors()) for part, other in zip(parts, others, strict=True)]
    return all(one.keys() == two.keys() and all(torch.equal(t, two[key]) for key, t in one.items()) for one, two in pairs)
