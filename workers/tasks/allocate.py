"""The search for an allocation: a level for every linear, within the bytes that the target allows.

inputs: `model`, `levels` (a level table), `level.<value>` for each of `values`, `tokens` (the search windows), `teacher`
(the score of the dense base on these, with its hidden states).
spec: `method`, `settings`, `seed` (where the method draws random numbers), `dtype` (of the forward passes), `values`.
Files: `allocation.json` (parameter name -> value), `trace.jsonl` (an entry for every generation).
Result: `search/tokens` (forward tokens in all, with `search/score_tokens` that went into the errors of the table),
`search/block_forwards` (blocks run over a piece of text, by one evaluator; further ones repeat a little of it) and
`search/block_forwards_plain` (had nothing been reused); of a method that asks: `search/generations`, `search/accepted`
(generations whose winner was a child), `search/start_kl` and `search/kl` (mean KL to the dense base in nats, of the first
parent and the last, each on the text on which it was chosen); and `search/predicted_kl` (the sum of measured errors).

A coordinated task: `coordinate` decides, without a model, and `probe` evaluates candidates wherever there is room.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator, Sequence
from typing import Any

import torch
from safetensors import safe_open

from pare.methods.contract import AllocateMethod, LevelTable, Problem, Question, State, load_all
from pare.methods.ops.level_errors import measured_errors, one_lowered, relative_errors
from pare.workers.evaluation import open_teacher, read_windows
from pare.workers.search import Evaluator, block_forwards, dictionary_order, open_levels
from pare.workers.task import TaskContext, TaskError

Probes = Generator[list[dict[str, Any]], list[float], tuple[list[float], int]]
"""Yields candidates, is sent their KL; returns the mean KL of each question, and the tokens that were run."""

ALL = 2**31


def coordinate(ctx: TaskContext) -> Generator[list[dict[str, Any]], list[float], dict[str, Any]]:
    method = load_all()[ctx.spec["method"]](**ctx.spec["settings"])
    if not isinstance(method, AllocateMethod):
        raise TaskError(f"allocate takes a method of kind allocate; {method.name} is of kind {method.kind}")
    database = json.loads((ctx.inputs["levels"] / "table.json").read_text())
    if sorted(database["levels"]) != sorted(ctx.spec["values"]):
        raise TaskError(f"the level table holds the levels {database['levels']}, not {ctx.spec['values']}")
    method.check_levels(database["levels"])
    with safe_open(ctx.inputs["tokens"] / "tokens.safetensors", framework="pt") as file:
        windows, length = file.get_slice("input_ids").get_shape()

    state: State = ctx.checkpoint.latest() or {"known": {}, "tokens": 0, "forwards": 0, "plain": 0}
    measured = method.reads_errors and method.scores == "measured"
    if "error" not in state:
        state["error"] = relative_errors(database["error"], database["energy"])
        if measured:
            piece = (0, min(method.score_tokens, length))
            lowered = [Question(choice, [piece]) for choice in one_lowered(len(database["linears"]))]
            kl, _ = yield from evaluate(state, database["blocks"], lowered)
            state["error"] = measured_errors(kl, database["error"])
        state["known"], state["score_tokens"] = {}, state["tokens"]
        ctx.checkpoint.save(state)
    columns = {key: database[key] for key in ("linears", "blocks", "sizes", "levels", "cost")}
    table = LevelTable(**columns, error=state["error"])
    problem = Problem(table, windows, length, ctx.spec.get("seed", 0), state["score_tokens"])

    if "search" not in state:
        state["search"] = method.start(problem)
    while questions := method.ask(problem, state["search"], ALL):
        kl, tokens = yield from evaluate(state, table.blocks, questions)
        ended = len(state["search"]["trace"])
        state["search"] = method.tell(problem, state["search"], kl, tokens)
        for entry in state["search"]["trace"][ended:]:
            if not math.isfinite(entry["kl"]):
                raise TaskError(f"{method.name}: no candidate of generation {entry['generation']} has a finite KL", "nonfinite")
            ctx.point(entry["generation"], {"fitness": entry["kl"]})
            ctx.progress(entry["generation"], max(method.generations_at_most, entry["generation"]), "generations")
        ctx.checkpoint.save(state)

    choice, trace = method.answer(problem, state["search"]), state["search"]["trace"]
    (ctx.out / "allocation.json").write_text(json.dumps(table.allocation(choice), indent=1))
    (ctx.out / "trace.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in trace))
    result = {
        "search/tokens": state["tokens"],
        "search/score_tokens": state["score_tokens"],
        "search/block_forwards": state["forwards"],
        "search/block_forwards_plain": state["plain"],
        "search/linear_bytes": table.bytes(choice),
    }
    if trace:
        result["search/generations"] = trace[-1]["generation"]
        result["search/accepted"] = sum(entry["accepted"] for entry in trace[1:])
        result["search/start_kl"], result["search/kl"] = trace[0]["kl"], trace[-1]["kl"]
    if measured:
        result["search/predicted_kl"] = sum(errors[k] for errors, k in zip(table.error, choice, strict=True))
    return result


def evaluate(state: State, blocks: list[int], questions: Sequence[Question]) -> Probes:
    """Asks for what is not known yet, and keeps it in `state["known"]`: choice and piece of text -> KL."""
    wanted: dict[tuple[int, int], dict[str, list[int]]] = {}
    for question in questions:
        for piece in question.pieces:
            if key(question.choice, piece) not in state["known"]:
                wanted.setdefault(piece, {})[key(question.choice, piece)] = question.choice
    probes, keys, tokens = [], [], 0
    for (window, n), choices in wanted.items():
        names, of_piece = list(choices), list(choices.values())
        for i in dictionary_order(of_piece, blocks):
            probes.append({"window": window, "tokens": n, "choice": of_piece[i]})
            keys.append(names[i])
        tokens += n * len(choices)
        state["forwards"] += block_forwards(of_piece, blocks)
        state["plain"] += (blocks[-1] + 1) * len(choices)
    if probes:
        state["known"] |= zip(keys, (yield probes), strict=True)
        state["tokens"] += tokens
    return [mean(state["known"], question) for question in questions], tokens


def key(choice: Sequence[int], piece: tuple[int, int]) -> str:
    return hashlib.sha256(json.dumps([*choice, *piece]).encode()).hexdigest()


def mean(known: dict[str, float], question: Question) -> float:
    """KL over all pieces of a question; of n tokens n - 1 are followed by a prediction that counts."""
    predictions = sum(n - 1 for _, n in question.pieces)
    total: float = sum(known[key(question.choice, (window, n))] * (n - 1) for window, n in question.pieces)
    return total / predictions


HELD: dict[str, Evaluator] = {}
"""The evaluator of the search that this process works for, by its inputs."""


def probe(ctx: TaskContext, probes: list[dict[str, Any]]) -> list[float]:
    """KL of each candidate {"window", "tokens", "choice"}."""
    name = name_of(ctx)
    if name not in HELD:
        release()
        HELD[name] = open_evaluator(ctx)
    done, answers = 0, [0.0] * len(probes)
    by_piece: dict[tuple[int, int], list[int]] = {}
    for i, one in enumerate(probes):
        by_piece.setdefault((one["window"], one["tokens"]), []).append(i)

    def tick() -> None:
        nonlocal done
        done += 1
        ctx.progress(done, len(probes), "candidates")

    for (window, tokens), members in by_piece.items():
        kl = HELD[name].divergences([probes[i]["choice"] for i in members], window, tokens, tick)
        for i, value in zip(members, kl, strict=True):
            answers[i] = value
    return answers


def name_of(ctx: TaskContext) -> str:
    """Equal for tasks that one evaluator can serve."""
    return json.dumps([sorted(map(str, ctx.inputs.values())), ctx.spec["dtype"], str(ctx.device)])


def open_evaluator(ctx: TaskContext) -> Evaluator:
    model, levels = open_levels(ctx, ctx.spec["values"])
    dtype = getattr(torch, ctx.spec["dtype"])
    teacher = open_teacher(ctx.inputs["teacher"], ctx.resolve, dtype, ctx.device)
    order = json.loads((ctx.inputs["levels"] / "table.json").read_text())["levels"]
    windows = read_windows(ctx.inputs["tokens"])
    return Evaluator(model, [levels[value] for value in order], teacher, windows, dtype, ctx.device)


def release() -> None:
    """Lets the model go."""
    HELD.clear()
