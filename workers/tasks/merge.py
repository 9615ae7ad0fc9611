"""Task `merge`: several models that stand on one base -> the one model that a method of kind `merge` makes of them.

inputs: `model`, the base that all members come from; `tokens`, the selection windows; `member.000`, `member.001`, ...: model
artifacts.
spec: `method`, `settings`, `seed` (where the method draws random numbers), `dtype` (of the evaluations), `members`: name and
selection score of each member, in the same order. A selection score is log(`quality/ppl`) of a task `score` on the selection
windows; what is tried here is scored by the same code, so that the two may be compared.

Writes formulas on the nearest artifact that all members stand on; `soup.json`: members, weights, what was tried and what was
kept; and where all members are adapters, the one adapter that they add up to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pare.methods.anatomy.views import weight_of
from pare.methods.contract import Context, Member, MergeMethod, load_all
from pare.methods.parts.codes import Codes
from pare.methods.parts.formula import Formula, LowRank
from pare.workers import evaluation
from pare.workers.export.adapter import write_adapter
from pare.workers.models import ModelArtifact, load_in_memory, load_skeleton, write_formulas
from pare.workers.task import TaskContext, TaskError

Lineage = dict[str, ModelArtifact]
"""Fingerprint -> artifact: a model, what it stands on, and so on down to the dense one."""


def run(ctx: TaskContext) -> dict[str, Any]:
    method = load_all()[ctx.spec["method"]](**ctx.spec["settings"])
    if not isinstance(method, MergeMethod):
        raise TaskError(f"merge takes a method of kind merge; {method.name} is of kind {method.kind}", "unknown")
    said = {member["name"]: member["score"] for member in ctx.spec["members"]}
    lineages = {name: lineage(ctx, f"member.{i:03d}", name) for i, name in enumerate(said)}
    fingerprint = common_base(list(lineages.values()))
    levels = {name: above(lineage, fingerprint) for name, lineage in lineages.items()}
    base = next(iter(lineages.values()))[fingerprint]

    result: dict[str, Any] = {}
    context = Context(ctx.device, ctx.spec.get("seed", 0), result.__setitem__)
    evaluator = Evaluator(ctx, base, most=len(said) - 1)
    members = [open_member(name, score, levels[name]) for name, score in said.items()]
    merged = method.merge(members, base.materialise, evaluator, context)
    if not math.isfinite(merged.score):
        raise TaskError(f"what {method.name} made gives a token of the selection windows no finite likelihood", "nonfinite")
    evaluator.model = None  # its room is needed for the result

    formulas = dict(merged.formulas)
    write_formulas(ctx.out, fingerprint, formulas)
    if all((own[0].directory / "adapter").is_dir() for own in levels.values() if own) and (summed := updates(formulas)):
        write_adapter(summed, load_skeleton(base.dense.directory), ctx.out / "adapter")
    soup = {
        "method": method.name,
        "settings": ctx.spec["settings"],
        "members": [{"name": name, "score": said[name], "weight": weight} for name, weight in merged.weights.items()],
        "selection_nll": merged.score,
        "decisions": merged.decisions,
    }
    (ctx.out / "soup.json").write_text(json.dumps(soup, indent=1, allow_nan=False) + "\n")
    return result | {
        "merge/members": len(members),
        "merge/accepted": len(merged.weights),
        "merge/evaluations": evaluator.asked,
        "merge/selection_nll": merged.score,
        "merge/best_member_nll": min(said.values()),
        "cost/tokens": evaluator.asked * evaluator.windows.numel(),
    }


def lineage(ctx: TaskContext, role: str, name: str) -> Lineage:
    """A member and all that it stands on.

    Raises:
        TaskError: the task's base is not among it.
    """
    artifact: ModelArtifact | None = ModelArtifact(ctx.inputs[role], ctx.resolve)
    fingerprint: str | None = ctx.fingerprint_of[role]
    found: Lineage = {}
    while artifact and fingerprint:
        found[fingerprint] = artifact
        fingerprint, artifact = artifact.base_fingerprint, artifact.base
    base = ctx.fingerprint_of["model"]
    if base not in found:
        raise TaskError(
            f"member {name} stands on {list(found)[-1][:12]}, and the merge on {base[:12]}: only models that were trained from "
            "one base can be merged. Try: members.blocks with blocks of one model"
        )
    return found


def common_base(lineages: Sequence[Lineage]) -> str:
    """The nearest artifact that all members stand on. Members that are one and the same artifact do not stand on it."""
    shared = [fingerprint for fingerprint in lineages[0] if all(fingerprint in other for other in lineages)]
    one = all(next(iter(other)) == shared[0] for other in lineages)
    return shared[1] if one and len(shared) > 1 else shared[0]


def above(lineage: Lineage, base: str) -> list[ModelArtifact]:
    """The artifacts from a member down to its base, without the base."""
    return list(lineage.values())[: list(lineage).index(base)]


def open_member(name: str, score: float, levels: Sequence[ModelArtifact]) -> Member:
    """A member as merge methods see it.

    Raises:
        TaskError: its score is no number, or factors were folded into its weights. Its `formula` raises one, too, for a weight
            that is not finite, or more than a sum of parts.
    """
    if not math.isfinite(score):
        raise TaskError(f"member {name} has the selection score {score}: a model that diverged cannot be merged", "nonfinite")
    scaled = next((weight for level in levels for weight in level.folded_names()), None)
    if scaled:
        raise TaskError(
            f"member {name} has factors of its own folded into {scaled}: other members' weights are on other scales, and their "
            "mean is no model. Merge members that were trained on the folded model, or merge first and fold the soup"
        )

    def formula(weight: str) -> Formula | None:
        found = relative(levels, weight)
        if found and (found.transforms or found.activation):
            raise TaskError(
                f"{weight} of member {name} has transforms or a quantised input, which weights that are merged cannot have. "
                "Merge first and compress the soup"
            )
        if found and not all(t.float().isfinite().all() for t in found.tensors().values() if t.is_floating_point()):
            raise TaskError(f"{weight} of member {name} is not finite: a model that diverged cannot be merged", "nonfinite")
        return found

    return Member(name, score, list(dict.fromkeys(weight for level in levels for weight in level.table)), formula)


def relative(levels: Sequence[ModelArtifact], weight: str) -> Formula | None:
    """What the levels, the uppermost first, make of a weight, as one formula on top of what lies beneath them all."""
    whole: Formula | None = None
    for level in reversed(levels):
        formula = level.formula(weight)
        if formula:
            whole = formula if whole is None or formula.op == "replace" else whole.plus(formula)
    return whole


def updates(formulas: Mapping[str, Formula]) -> dict[str, LowRank]:
    """Parameter name -> the update that an adapter would hold of it; nothing where an adapter cannot say it all."""
    found: dict[str, LowRank] = {}
    for name, formula in formulas.items():
        match formula.op, formula.parts:
            case ("add", [LowRank() as update]) | ("replace", [Codes(), LowRank() as update]):
                found[name] = update
            case ("replace", [Codes()]):
                pass
            case _:
                return {}
    return found


class Evaluator:
    """Scores candidates on the selection windows, all in one copy of the base whose weights are changed in place.

    Scores are kept in the task's checkpoint. A resumed merge asks the same questions anew and is told what is known.
    """

    def __init__(self, ctx: TaskContext, base: ModelArtifact, most: int) -> None:
        """most: upper bound of the number of questions, for display."""
        self.ctx, self.base, self.most = ctx, base, most
        self.windows = evaluation.read_windows(ctx.inputs["tokens"])
        self.model: nn.Module | None = None
        self.scores: list[float] = (ctx.checkpoint.latest() or {"scores": []})["scores"]
        self.asked = 0
        self.changed: set[str] = set()

    def __call__(self, candidate: Iterable[tuple[str, Formula]]) -> float:
        """Names and formulas relative to the base -> mean next-token loss, nats; infinite where it is no number."""
        self.asked += 1
        if self.asked > len(self.scores):
            score = self.measure(candidate)
            self.scores.append(score)
            self.ctx.checkpoint.save({"scores": self.scores})
            if math.isfinite(score):
                self.ctx.point(self.asked, {"merge/candidate_nll": score})
        self.ctx.progress(self.asked, self.most, "evaluations")
        return self.scores[self.asked - 1]

    @torch.no_grad()
    def measure(self, candidate: Iterable[tuple[str, Formula]]) -> float:
        device = self.ctx.device
        if self.model is None:
            self.model = load_in_memory(self.base, getattr(torch, self.ctx.spec["dtype"]), device)
        left = self.changed
        self.changed = set()
        for name, formula in candidate:
            weight = formula.to(device).materialise()
            if formula.op == "add":
                weight = weight + self.base.materialise(name).to(device)
            parameter = weight_of(self.model, name)
            parameter.copy_(weight.view_as(parameter))
            self.changed.add(name)
        for name in sorted(left - self.changed):
            weight_of(self.model, name).copy_(self.base.materialise(name))
        try:
            predictions, _ = evaluation.predict(self.model, self.windows)
            # By way of the perplexity, as the members' scores come, so that equal models have equal scores.
            return math.log(evaluation.summary(predictions)["quality/ppl"])
        except OverflowError:  # a perplexity beyond all floats
            return math.inf
        except TaskError as e:
            if e.failure != "nonfinite":
                raise
            return math.inf
