"""Evaluates the candidates of a search: KL(dense || candidate) on pieces of text.

One dense model is held, and of the levels their packed formulas; only linears whose level changes are made anew. The
teacher is remembered by its final hidden states, from which its own head makes the logits again. A candidate shares with
the one before it the hidden states up to the first block in which they differ, and candidates come in the order that
makes most of this: as words in a dictionary do, where every letter is the levels of one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pare.methods.anatomy.calls import block_inputs
from pare.methods.anatomy.describe import Anatomy, describe, verify
from pare.methods.anatomy.views import weight_of
from pare.methods.contract import Level
from pare.methods.ops.losses import PIECE
from pare.workers.evaluation import Teacher, body_and_head
from pare.workers.models import ModelArtifact, load_in_memory, load_skeleton, need_weights_alone
from pare.workers.task import TaskContext, TaskError

Choice = Sequence[int]
"""Of each linear of the model, in the order of its anatomy, the index of its level; -1: as it is in the dense model."""


class Evaluator:
    """Holds the model. What it answers does not depend on what it was asked before, nor on what else it is asked."""

    def __init__(
        self,
        model: ModelArtifact,
        levels: Sequence[ModelArtifact],
        teacher: Teacher,
        windows: Tensor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """levels: artifacts on `model`, each with a formula for every linear. windows (n, length) int64: teacher's text."""
        self.dense, self.levels, self.teacher, self.windows = model, levels, teacher, windows
        self.model = load_in_memory(model, dtype, device)
        self.anatomy = describe(self.model)
        verify(self.model, self.anatomy)
        _, self.head = body_and_head(self.model)
        self.linears, self.block_of = linears_of(self.anatomy)
        self.present = [-1] * len(self.linears)
        self.block_forwards = 0
        """Forward passes of one block over one piece so far."""

    @torch.inference_mode()
    def divergences(
        self, choices: Sequence[Choice], window: int, tokens: int, tick: Callable[[], None] = lambda: None
    ) -> list[float]:
        """Mean KL of each choice, in nats, over the first `tokens` of a window but the last; infinite where it is no number."""
        final = self.final_states(choices, window, tokens, tick)
        base = self.teacher.hidden[window, : tokens - 1].to(final[0].device)
        totals = [0.0] * len(choices)
        for positions in pieces_of(tokens - 1, self.model.config.vocab_size):
            log_p = self.teacher.head(base[positions]).log_softmax(-1)
            p = log_p.exp()
            for i, hidden in enumerate(final):
                log_q = self.head(hidden[positions]).log_softmax(-1)
                totals[i] += log_q.neg_().add_(log_p).mul_(p).sum().item()
        return [total / (tokens - 1) if math.isfinite(total) else math.inf for total in totals]

    def final_states(self, choices: Sequence[Choice], window: int, tokens: int, tick: Callable[[], None]) -> list[Tensor]:
        """Of each choice: what the head reads (tokens - 1, width)."""
        ids = self.windows[window : window + 1, :tokens].to(self.device)
        inputs, calls = block_inputs(self.model, self.anatomy, [ids])
        norm = self.model.get_submodule(self.anatomy.norm)
        states = inputs  # what each block reads, and at the end what the norm reads, under the choice before
        final: dict[int, Tensor] = {}
        before: list[list[int]] | None = None
        for i in dictionary_order(choices, self.block_of):
            word = word_of(choices[i], self.block_of)
            first = 0 if before is None else shared(before, word)
            del states[first + 1 :]
            for index in range(first, len(word)):
                self.put(index, choices[i])
                block = self.model.get_submodule(self.anatomy.blocks[index].name)
                states.append(calls[1][index].run(block, states[index]))
                self.block_forwards += 1
            final[i], before = norm(states[-1])[0, : tokens - 1], word
            tick()
        return [final[i] for i in range(len(choices))]

    def put(self, block: int, choice: Choice) -> None:
        """Makes the linears of a block what the choice says."""
        for i, name in enumerate(self.linears):
            if self.block_of[i] == block and self.present[i] != choice[i]:
                artifact = self.dense if choice[i] < 0 else self.levels[choice[i]]
                weight_of(self.model, name).copy_(artifact.materialise(name))
                self.present[i] = choice[i]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def linears_of(anatomy: Anatomy) -> tuple[list[str], list[int]]:
    """Parameter names of all linears, in the order in which the model runs them; of each the index of its block."""
    named = [(name, i) for i, block in enumerate(anatomy.blocks) for group in block.groups for name in group.weights]
    return [name for name, _ in named], [i for _, i in named]


def pieces_of(positions: int, vocabulary: int) -> list[slice]:
    """Positions of which logits are made at a time, few enough to be worked on in the cache."""
    step = max(1, PIECE // vocabulary)
    return [slice(i, i + step) for i in range(0, positions, step)]


def word_of(choice: Choice, block_of: Sequence[int]) -> list[list[int]]:
    """The choice cut up into blocks."""
    word: list[list[int]] = [[] for _ in range(block_of[-1] + 1)]
    for level, block in zip(choice, block_of, strict=True):
        word[block].append(level)
    return word


def shared(one: list[list[int]], other: list[list[int]]) -> int:
    """Blocks from the start in which two words agree."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def dictionary_order(choices: Sequence[Choice], block_of: Sequence[int]) -> list[int]:
    """Indices of the choices in the order in which the fewest blocks are run."""
    return sorted(range(len(choices)), key=lambda i: word_of(choices[i], block_of))


def block_forwards(choices: Sequence[Choice], block_of: Sequence[int]) -> int:
    """Blocks that one evaluator runs for these choices on one piece of text."""
    words = sorted(word_of(choice, block_of) for choice in choices)
    skipped = sum(shared(one, other) for one, other in pairwise(words))
    return (block_of[-1] + 1) * len(words) - skipped


def open_levels(ctx: TaskContext, values: Sequence[Level]) -> tuple[ModelArtifact, dict[Level, ModelArtifact]]:
    """The inputs `model` and `level.<value>` of a task: the model, and what it is at each level.

    Raises:
        TaskError: there are none, or one is not of this model.
    """
    if not values or len(set(values)) != len(values):
        raise TaskError(f"a search takes a list of different levels, got {list(values)}")
    model = ModelArtifact(ctx.inputs["model"], ctx.resolve)
    need_weights_alone(model, "a search")
    levels = {value: ModelArtifact(ctx.inputs[f"level.{value}"], ctx.resolve) for value in values}
    linears, _ = linears_of(describe(load_skeleton(model.dense.directory)))
    for value, level in levels.items():
        if level.base_fingerprint != ctx.fingerprint_of["model"]:
            raise TaskError(
                f"level {value} was made of the model {level.base_fingerprint}, not of {ctx.fingerprint_of['model']}"
            )
        if missing := [name for name in linears if name not in level.table]:
            raise TaskError(f"level {value} leaves {len(missing)} linears as they are, the first of them {missing[0]}")
    return model, levels
