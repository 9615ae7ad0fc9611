"""Distillation: a compressed model learns to predict what the model that it was made of predicts.

    loss of a token = sum_k w_k D(p_k, q) + w_ce (-log q(next token)) + w_hidden sum_k w_k |h - h_k|^2 / |h_k|^2

p_k is the distribution of teacher k, of weight w_k (they sum to 1), q that of the student, both softmax(logits /
temperature); D is the forward KL, the reverse KL or a JSD (see methods/ops/divergences.py); h and h_k are final hidden states.
The loss is the mean over the predicted tokens of a step's whole batch. Teachers do not run here: their final hidden states on
the training data were stored once, and their logits are made of these by their own heads, `chunk` tokens at a time.

`distill` trains the student's own weights; what has been pruned stays zero. `distill_lora` trains low-rank adapters beside
them, so that codes stay codes.
Cost: that of the tuning, and a matrix product with each teacher's head. Of logits there are about 5 * chunk * vocabulary
float32 numbers at a time, where the plain way holds four copies or more of those of the whole batch.
Source: Muralidharan et al. (2024), "Compact Language Models via Pruning and Knowledge Distillation" (Minitron),
arXiv:2407.14679, section 3; reverse KL and JSD: Agarwal et al. (2023), GKD, arXiv:2306.13649, eq. 1.
Differs from them: weights of the terms are fixed, where Minitron balances the last by the ratio of the losses of a batch, which
would make the result depend on how the batch is cut up; no temperature squared before the loss; the student's own texts (on
policy) are not learnt from; of hidden states the last alone are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from pare.methods.contract import Context, Teacher, TrainMethod, method
from pare.methods.ops.adapters import LoraFields, attach, save_adapter, updates
from pare.methods.ops.divergences import DIVERGENCES, cross_entropy, divergence_, log_softmax_, sum_over_logits
from pare.methods.ops.heads import layer_head_of
from pare.methods.ops.whole_weights import WholeFields, open_weights
from pare.methods.parts.formula import Formula
from pare.methods.settings import SettingsError, check

SOURCE = (
    "Muralidharan et al. (2024), Minitron, arXiv:2407.14679, section 3; Agarwal et al. (2023), GKD, arXiv:2306.13649, eq. 1"
)


@dataclass
class Distillation(TrainMethod):
    """What both ways of tuning share."""

    has_teachers: ClassVar[bool] = True

    divergence: str = "forward_kl"
    """How a student's distribution is compared with a teacher's: "forward_kl" (covers all that the teacher thinks possible),
    "reverse_kl" (seeks what it thinks likely) or "jsd" (between the two, by `beta`)."""

    beta: float = 0.5
    """Share of the teacher in the mixture of a "jsd", in (0, 1); 0.5 treats both alike. Its loss shrinks with beta and with
    1 - beta: the ends are no KL."""

    temperature: float = 1.0
    """Logits are divided by it before they are compared, > 0."""

    w_ce: float = 0.0
    """Weight of the loss on the tokens of the text themselves, >= 0."""

    w_hidden: float = 0.0
    """Weight of the relative squared error of the final hidden states, >= 0. Takes teachers of the student's width."""

    chunk: int = 512
    """Tokens of which logits exist at a time, >= 1. Changes memory, not the result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "divergence", one_of=DIVERGENCES)
        check(self, "beta", above=0, below=1)
        check(self, "temperature", above=0)
        check(self, "w_ce", at_least=0)
        check(self, "w_hidden", at_least=0)
        check(self, "chunk", at_least=1)

    def take_teachers(self, model: nn.Module, context: Context) -> None:
        """model: the student, on the device, before anything is put around it."""
        if not context.teachers:
            raise ValueError(f"{self.name} learns from teachers, and was given none")
        self.teachers, self.head = context.teachers, layer_head_of(model)
        for teacher in self.teachers:
            if teacher.head.vocabulary != self.head.vocabulary:
                raise ValueError(
                    f"{self.name}: {teacher.column} predicts {teacher.head.vocabulary} tokens and the student "
                    f"{self.head.vocabulary}; a teacher must have the student's vocabulary"
                )
        probe = torch.arange(8, device=next(model.parameters()).device)[None] % self.head.vocabulary
        with torch.no_grad():
            whole = model(input_ids=probe, use_cache=False).logits[0].float()
            parts = self.head(final_hidden(model, {"input_ids": probe})[0])
        if not torch.allclose(whole, parts, rtol=1e-2, atol=1e-2 * whole.abs().max().item()):
            raise ValueError(
                f"{self.name}: {type(model).__name__} does more between its hidden states and its logits than a head, a cap "
                "and a factor; extend `Head` in pare/methods/ops/heads.py"
            )

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See the head of this file. batch: as ever, and each teacher's column (sequences, length, width)."""
        labels = batch.get("labels", batch["input_ids"])[:, 1:]
        predicted = labels >= 0
        targets, student = labels[predicted], final_hidden(model, batch)[:, :-1][predicted]
        taught = [(teacher, batch[teacher.column][:, :-1][predicted]) for teacher in self.teachers]

        def terms(logits: Tensor, rows: slice) -> Iterator[tuple[float, Tensor, Tensor]]:
            """Weight, value for each row and slope with respect to the logits of each term; the logits are overwritten."""
            if self.w_ce:
                yield self.w_ce, *cross_entropy(logits.log_softmax(-1), targets[rows])
            log_q = log_softmax_(logits, self.temperature)
            for teacher, states in taught:
                log_p = log_softmax_(teacher.head(states[rows]), self.temperature)
                value, slope = divergence_(self.divergence, log_p, log_q, self.beta)
                yield teacher.weight, value, slope.div_(self.temperature)

        def of_logits(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            total, gradient = torch.zeros((), device=logits.device), None
            for weight, value, slope in terms(logits, rows):
                total += weight * value.sum()
                slope.mul_(weight)
                gradient = slope if gradient is None else gradient.add_(slope)
            assert gradient is not None  # there is a teacher
            return total, gradient

        parameters = list(self.head.project.parameters()) if isinstance(self.head.project, nn.Module) else []
        total = sum_over_logits(self.head, student, parameters, of_logits, self.chunk)
        if self.w_hidden:
            total = total + self.w_hidden * sum(t.weight * self.hidden_error(student, states, t) for t, states in taught)
        return total, predicted.sum()

    def hidden_error(self, student: Tensor, taught: Tensor, teacher: Teacher) -> Tensor:
        """Sum over rows of the squared difference, relative to the teacher's square; both (rows, width)."""
        if student.shape != taught.shape:
            allowed = f"0 for {teacher.column} of width {taught.shape[-1]}: the student's is {student.shape[-1]}"
            raise SettingsError(self.name, "w_hidden", self.w_hidden, allowed)
        taught = taught.float()
        return ((student.float() - taught).square().sum(-1) / taught.square().sum(-1)).sum()


def final_hidden(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Final hidden states (sequences, length, width), by the model's own forward pass: what spreads it over ranks sees it."""
    apart = {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
    out = model(input_ids=batch["input_ids"], use_cache=False, output_hidden_states=True, logits_to_keep=1, **apart)
    found: Tensor = out.hidden_states[-1]
    return found


@method("distill", source=SOURCE)
@dataclass
class Distill(Distillation, WholeFields):
    learning_rate: float = 5e-5
    """Peak learning rate, > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole()

    def prepare(self, model: nn.Module, context: Context) -> nn.Module:
        model = model.to(context.device)
        self.take_teachers(model, context)
        self.opened = open_weights(model, self, context.formulas)
        return model

    def finish(self, model: nn.Module, directory: Path) -> dict[str, Formula]:
        return self.opened.results(model)


@method("distill_lora", source=f"{SOURCE}; Hu et al. (2021), LoRA, arXiv:2106.09685, eq. 3")
@dataclass
class DistillLora(Distillation, LoraFields):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_adapter()

    def prepare(self, model: nn.Module, context: Context) -> nn.Module:
        model = model.to(context.device)
        self.take_teachers(model, context)
        return attach(model, self)

    def finish(self, model: nn.Module, directory: Path) -> dict[str, Formula]:
        save_adapter(model, directory / "adapter")
        return {name: Formula([update], op="add") for name, update in updates(model).items()}
