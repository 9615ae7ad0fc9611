"""Task `merge`: several models that stand on one base -> the one model that a method of kind `merge` makes of them.

inputs: `model`, the base that all members come from; `tokens`, the selection windows; `member.000`, `member.001`, ...: model
artifacts.
spec: `method`, `settings`, `seed` (where the method draws random numbers), `dtype` (of the evaluations), `members`: name and
selection score of each member, in the same order. A selection score is log(`quality/ppl`) of a task `score` on the selection
windows; what is tried here is scored by the same code, so that the two may be compared.

Writes formulas on the nearest artifact that all members stand on, each weight as it is made; `soup.json`: members, weights, on
which split they were chosen, what was tried and what was kept; and where all members are adapters and the result is one, that
adapter. A dense weight is stored in the base's dtype, and scored as it is stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pare.methods.anatomy.views import parse, view, weight_of
from pare.methods.contract import Candidate, Context, Member, MergeMethod, load_all
from pare.methods.ops.adapters import write_adapter
from pare.methods.ops.losses import next_token_loss_
from pare.methods.parts.codes import Codes
from pare.methods.parts.formula import Dense, Formula, LowRank
from pare.methods.settings import SettingsError
from pare.workers import evaluation
from pare.workers.models import (
    FormulaWriter,
    ModelArtifact,
    as_written,
    load_in_memory,
    load_skeleton,
    need_weights_alone,
)
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
    try:
        method.check_members(list(said))
    except SettingsError as e:
        raise TaskError(f"{e}: {', '.join(said)}") from e

    result: dict[str, Any] = {}
    context = Context(ctx.device, ctx.spec.get("seed", 0), result.__setitem__)
    evaluator = Candidates(ctx, base, most=method.questions(len(said)))
    members = [open_member(name, score, levels[name]) for name, score in said.items()]
    merged = method.merge(members, base.materialise, evaluator, context)
    if not math.isfinite(merged.score):
        raise TaskError(f"what {method.name} made gives a token of the selection windows no finite likelihood", "nonfinite")
    evaluator.model = None  # its room is needed for the result

    writer, updates = FormulaWriter(ctx.out), dict[str, LowRank]()
    is_adapter = all((own[0].directory / "adapter").is_dir() for own in levels.values() if own)
    for name, made in merged.formulas:
        formula = as_stored(base, name, made)
        writer.add(*as_written({name: formula}, {}))
        found = update_of(formula) if is_adapter else None
        is_adapter = found is not None
        if found:
            updates[name] = found[0]
    writer.close(fingerprint)
    if is_adapter and updates:
        write_adapter(updates, load_skeleton(base.dense.directory), ctx.out / "adapter")
    n, length = evaluator.windows.shape
    soup = {
        "method": method.name,
        "settings": ctx.spec["settings"],
        "members": [{"name": name, "score": said[name], "weight": weight} for name, weight in merged.weights.items()],
        "best_member": min(said, key=lambda name: (said[name], name)),
        "selection_nll": merged.score,
        "chosen_by": {"split": "selection", "windows": n, "length": length},
        "decisions": merged.decisions,
    }
    (ctx.out / "soup.json").write_text(json.dumps(soup, indent=1, allow_nan=False) + "\n")
    chosen = f"{len(merged.weights)} of {len(members)} members went into {method.name}, judged on the"
    return result | {
        "merge/members": len(members),
        "merge/accepted": len(merged.weights),
        "merge/evaluations": evaluator.asked,
        "merge/selection_nll": merged.score,
        "merge/best_member_nll": min(said.values()),
        "merge/bytes": sum(file.stat().st_size for file in ctx.out.glob("weights*.safetensors")),
        "cost/tokens": evaluator.asked * evaluator.windows.numel(),
        "notes": [f"{chosen} selection split ({n} windows of {length} tokens); the test split chose nothing"],
    }


def as_stored(base: ModelArtifact, name: str, formula: Formula) -> Formula:
    """The formula with a dense weight cast to the dtype in which the base stores it, as every export has it."""
    match formula.op, formula.parts:
        case "replace", [Dense() as part]:
            return Formula([Dense(part.weight.to(base.stored(name).dtype))])
    return formula


def lineage(ctx: TaskContext, role: str, name: str) -> Lineage:
    """A member and all that it stands on.

    Raises:
        TaskError: the task's base is not among it, or it has a prompt.
    """
    member = ModelArtifact(ctx.inputs[role], ctx.resolve)
    need_weights_alone(member, f"a merge, of which {name} is a member,")
    artifact: ModelArtifact | None = member
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


def update_of(formula: Formula) -> list[LowRank] | None:
    """The update that an adapter would hold of the weight, if any; None where an adapter cannot say it."""
    match formula.op, formula.parts:
        case ("add", [LowRank() as update]) | ("replace", [Codes(), LowRank() as update]):
            return [update]
        case ("replace", [Codes()]):
            return []
    return None


class Candidates:
    """Scores candidates on the selection windows, all in one copy of the base whose weights are changed in place.

    Answers are kept in the task's checkpoint. A resumed merge asks the same questions anew and is told what is known.
    """

    def __init__(self, ctx: TaskContext, base: ModelArtifact, most: int) -> None:
        """most: upper bound of the number of questions, for display."""
        self.ctx, self.base, self.most = ctx, base, most
        self.windows = evaluation.read_windows(ctx.inputs["tokens"])
        self.model: nn.Module | None = None
        self.answers: list[tuple[float, dict[str, list[float]]]] = (ctx.checkpoint.latest() or {"answers": []})["answers"]
        self.asked = 0
        self.changed: set[str] = set()

    def __call__(self, candidate: Candidate) -> float:
        return self.answer(lambda: (self.measure(candidate), {}))[0]

    def slopes(self, candidate: Candidate, along: Callable[[str, Tensor], list[float]]) -> tuple[float, dict[str, list[float]]]:
        return self.answer(lambda: self.differentiate(candidate, along))

    def answer(self, find: Callable[[], tuple[float, dict[str, list[float]]]]) -> tuple[float, dict[str, list[float]]]:
        """What is known of the next question, else what `find` finds out."""
        self.asked += 1
        if self.asked > len(self.answers):
            score, slopes = find()
            self.answers.append((score, slopes))
            self.ctx.checkpoint.save({"answers": self.answers})
            if math.isfinite(score):
                self.ctx.point(self.asked, {"merge/candidate_nll": score})
        self.ctx.progress(self.asked, self.most, "evaluations")
        return self.answers[self.asked - 1]

    @torch.no_grad()
    def put_in_place(self, candidate: Candidate) -> tuple[nn.Module, list[str]]:
        """(the model of a candidate, its names)."""
        device = self.ctx.device
        if self.model is None:
            self.model = load_in_memory(self.base, getattr(torch, self.ctx.spec["dtype"]), device)
        left = self.changed
        self.changed = set()
        for name, made in candidate:
            formula = as_stored(self.base, name, made)
            weight = formula.to(device).materialise()
            if formula.op == "add":
                weight = weight + self.base.materialise(name).to(device)
            parameter = weight_of(self.model, name)
            parameter.copy_(weight.view_as(parameter))
            self.changed.add(name)
        for name in sorted(left - self.changed):
            weight_of(self.model, name).copy_(self.base.materialise(name))
        return self.model, sorted(self.changed)

    def measure(self, candidate: Candidate) -> float:
        model, _ = self.put_in_place(candidate)
        try:
            predictions, _ = evaluation.predict(model, self.windows)
            # By way of the perplexity, as the members' scores come, so that equal models have equal scores.
            return math.log(evaluation.summary(predictions)["quality/ppl"])
        except OverflowError:  # a perplexity beyond all floats
            return math.inf
        except TaskError as e:
            if e.failure != "nonfinite":
                raise
            return math.inf

    def differentiate(
        self, candidate: Candidate, along: Callable[[str, Tensor], list[float]]
    ) -> tuple[float, dict[str, list[float]]]:
        """Gradients of all changed weights are summed up over the windows, one window in memory at a time."""
        model, names = self.put_in_place(candidate)
        model.requires_grad_(False)
        parameters = {name: model.get_parameter(parse(name).parameter).requires_grad_() for name in names}
        tokens, loss = self.windows.shape[0] * (self.windows.shape[1] - 1), 0.0
        with torch.enable_grad():
            for window in self.windows.to(self.ctx.device).split(1):
                total, _ = next_token_loss_(model(input_ids=window, use_cache=False).logits, window)
                if total.requires_grad:
                    (total / tokens).backward()
                loss += total.item() / tokens
        slopes = {}
        for name, parameter in parameters.items() if math.isfinite(loss) else ():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            slopes[name] = along(name, torch.atleast_2d(view(gradient, name)).float())
        model.requires_grad_(False).zero_grad(set_to_none=True)
        return (loss, slopes) if math.isfinite(loss) else (math.inf, {})
