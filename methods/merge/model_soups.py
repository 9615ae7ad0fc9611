"""Model soups: average the weights of models that were trained from one base with different settings or seeds.

    uniform   W = (1/n) (W_1 + ... + W_n)
    greedy    members from best to worst; W_i joins the soup if the average of the soup with it scores better than without
    learned   W_l = sum of softmax(a_l)_i W_i,l, with the a of all members (of each block l) that gradient descent on the
              selection loss finds, from equal ones on

What makes it work is that the members lie in one basin of the loss; models of different initial values do not, and their
average is no model at all. Scores are taken on windows that neither training nor the final test has seen. What the average of a
weight is, low-rank, dense or refused, is said in `ops/task_vectors.py`.

Cost: greedy takes n - 1 passes over the selection windows, uniform one, learned one forward and backward for each step, and one
more. One weight of every member is held at a time; learned holds the gradients of one model beside that.
Source: Wortsman et al. (2022), "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time", arXiv:2203.05482, recipe 1, table 2 and appendix I.
Differs from the paper: the score is the mean next-token loss, where the paper has accuracy, which moves in steps; a member
must make the score strictly better, as in the paper's code, where its text also takes in a member that changes nothing; and
`margin` may ask for more. The learned soup needs no two members in memory, since d loss / d a_i is made of <gradient, W_i>, a
weight at a time; each step takes all selection windows, not some; the best of all steps is the answer, not the last; and there
is no temperature of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pare.methods.contract import (
    Context,
    Evaluator,
    Member,
    Merged,
    MergeMethod,
    best_first,
    method,
    on_device,
    weight_by_weight,
)
from pare.methods.ops.task_vectors import combine, layer_of, task_vectors
from pare.methods.parts.formula import Formula
from pare.methods.settings import check

Base = Callable[[str], Tensor]
Shares = Mapping[str, float]
"""Member -> its share in the soup."""


@method("model_soups", source="Wortsman et al. (2022), Model soups, arXiv:2203.05482, recipe 1")
@dataclass
class ModelSoups(MergeMethod):
    mode: str = "greedy"
    """"greedy": take in a member only if the soup scores better with it; never worse than the best member on the selection
    windows. "uniform": take in every member. "learned": find shares by gradient descent."""

    margin: float = 0.0
    """What a member must at least gain to be taken in by "greedy", in nats per token, >= 0; at 0 any gain is enough. With few
    selection windows small gains are noise, and a margin of the noise's size keeps them out."""

    per: str = "layer"
    """Of "learned": a share of each member for every "layer" (and one for what is outside of layers), or for the "model"."""

    steps: int = 20
    """Of "learned": steps of gradient descent, >= 1, each a pass forward and backward over all selection windows."""

    learning_rate: float = 0.2
    """Of "learned": of AdamW on a, > 0; about how far a share's logit moves in a step."""

    def __post_init__(self) -> None:
        check(self, "mode", one_of=("greedy", "uniform", "learned"))
        check(self, "margin", at_least=0)
        check(self, "per", one_of=("layer", "model"))
        check(self, "steps", at_least=1)
        check(self, "learning_rate", above=0)

    def questions(self, members: int) -> int:
        if self.mode == "learned":
            return self.steps + 1
        return 1 if self.mode == "uniform" else members - 1

    def merge(self, members: Sequence[Member], base: Base, evaluate: Evaluator, context: Context) -> Merged:
        base = on_device(base, context.device)
        best, *others = best_first(members)
        if self.mode == "learned" and others:
            return self.learn([best, *others], base, evaluate, context)
        chosen, score, decisions = [best], best.score, [decision(best, best.score, True, "the best member")]
        if self.mode == "uniform" and others:
            chosen += others
            score = evaluate(soup(chosen, equal(chosen), base, context))
            decisions += [decision(member, None, True, "uniform takes in every member") for member in others]
        elif self.mode == "greedy":
            for member in others:
                with_it = evaluate(soup([*chosen, member], equal([*chosen, member]), base, context))
                gain = score - with_it
                taken = gain > self.margin
                reason = f"the soup with it gains {gain:.3g} nats; more than {self.margin:g} is asked for"
                decisions.append(decision(member, with_it, taken, reason))
                if taken:
                    chosen, score = [*chosen, member], with_it
        return Merged(equal(chosen), soup(chosen, equal(chosen), base, context), score, decisions)

    def learn(self, members: list[Member], base: Base, evaluate: Evaluator, context: Context) -> Merged:
        """d loss / d a_i = s_i (<g, W_i> - sum of s_j <g, W_j>) with the shares s and the gradient g of the soup's weights."""
        names = [member.name for member in members]
        group_of = layer_of if self.per == "layer" else lambda name: ""
        groups = sorted({group_of(name) for member in members for name in member.names}) or [""]
        logits = torch.zeros(len(groups), len(members), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([logits], self.learning_rate, weight_decay=0.0)

        def made(table: Tensor) -> Iterator[tuple[str, Formula]]:
            shares = {group: dict(zip(names, row, strict=True)) for group, row in zip(groups, table.tolist(), strict=True)}
            return soup(members, lambda name: shares[group_of(name)], base, context)

        def along(name: str, gradient: Tensor) -> list[float]:
            (_, formulas), *_ = weight_by_weight([only(member, name) for member in members], context.device)
            vectors = task_vectors(name, formulas, base)[1].values()
            return [(gradient.to(context.device).double() * vector).sum().item() for vector in vectors]

        best, chosen, decisions = math.inf, logits.detach().softmax(1), []
        for step in range(self.steps):
            table = logits.detach().softmax(1)
            loss, slopes = evaluate.slopes(made(table), along)
            decisions.append({"step": step, "loss": loss if math.isfinite(loss) else None})
            if not math.isfinite(loss):
                break
            if loss < best:
                best, chosen = loss, table
            of_shares = torch.zeros_like(table)
            for name, own in slopes.items():
                of_shares[groups.index(group_of(name))] += torch.tensor(own, dtype=torch.float64)
            logits.grad = table * (of_shares - (table * of_shares).sum(1, keepdim=True))
            optimizer.step()
        found = {group: dict(zip(names, row, strict=True)) for group, row in zip(groups, chosen.tolist(), strict=True)}
        means = dict(zip(names, chosen.mean(0).tolist(), strict=True))
        return Merged(means, made(chosen), evaluate(made(chosen)), [*decisions, {"shares": found}])


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


def equal(members: Sequence[Member]) -> dict[str, float]:
    return {member.name: 1 / len(members) for member in members}


def soup(
    members: Sequence[Member], shares: Shares | Callable[[str], Shares], base: Base, context: Context
) -> Iterator[tuple[str, Formula]]:
    """The average of the members by their shares, or by those that a weight's name has, one weight after another."""
    for name, formulas in weight_by_weight(members, context.device):
        formula = combine(name, formulas, shares(name) if callable(shares) else shares, base)
        if formula is not None:
            yield name, formula


def only(member: Member, name: str) -> Member:
    """The member as if there were no other weight."""
    return Member(member.name, member.score, [name], member.formula)
