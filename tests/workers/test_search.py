"""The search for an allocation: the evaluator, and the tasks `levels`, `allocate` and `assemble`. `workshop`: conftest.py."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pare.methods.contract import load_all
from pare.methods.ops.level_errors import DENSE, one_lowered
from pare.methods.parts.formula import Formula
from pare.workers import evaluation
from pare.workers.blobs import LocalBlobs
from pare.workers.checkpoint import Checkpoint
from pare.workers.models import load_in_memory
from pare.workers.search import Evaluator, block_forwards, linears_of, open_levels
from pare.workers.task import TaskContext, TaskError
from pare.workers.tasks import allocate, assemble, calibrate, compress, levels, score, tokens

GRAM = {"statistics": [{"module": "pare.methods.ops.statistics", "class": "Gram"}], "dtype": "float32"}
VALUES = [2, 3, 4]
SMALL = {"target": 3, "score_tokens": 16, "tokens": [32, 96], "generations": 4, "offspring": 4, "token_budget": 100_000}
NUMBERS = itertools.count()


@dataclasses.dataclass
class Ground:
    """What a search stands on: a model, its levels, text and a teacher."""

    workshop: Any
    inputs: dict[str, Path]

    def context(self, out: str, method: str, seed: int = 0, **settings: Any) -> TaskContext:
        spec = {"method": method, "settings": settings, "seed": seed, "dtype": "float32", "values": VALUES}
        context: TaskContext = self.workshop.context(out, spec, **self.inputs)
        return context

    def allocate(self, out: str, method: str, seed: int = 0, **settings: Any) -> tuple[Path, dict[str, Any]]:
        ctx = self.context(out, method, seed, **settings)
        return ctx.out, drive(ctx)

    def evaluator(self) -> Evaluator:
        allocate.release()
        return allocate.open_evaluator(self.context(f"evaluator {next(NUMBERS)}", "ilp"))


def drive(
    ctx: TaskContext, probe: Callable[..., list[float]] = allocate.probe, stop_after: int | None = None
) -> dict[str, Any]:
    """Runs a search with its probes in this process; `stop_after` so many rounds it is let go of."""
    search = allocate.coordinate(ctx)
    rounds = 0
    try:
        probes = next(search)
        while rounds != stop_after:
            assert probes
            assert json.loads(json.dumps(probes)) == probes
            probes = search.send(probe(ctx, probes))
            rounds += 1
    except StopIteration as end:
        return dict(end.value)
    finally:
        search.close()
        allocate.release()
    return {}


def ground_of(workshop: Any, text: Path, builder: str, **settings: Any) -> Ground:
    base = workshop.base
    statistics, _ = workshop.run(calibrate, "statistics", GRAM, model=base, tokens=text)
    made = {}
    for bits in VALUES:
        spec = {"method": builder, "settings": {"bits": bits, "group_size": 32, **settings}, "dtype": "float32"}
        made[f"level.{bits}"], _ = workshop.run(compress, f"level.{bits}", spec, model=base, statistics=statistics)
    spec = {"vary": "bits", "values": VALUES}
    table, _ = workshop.run(levels, "levels", spec, model=base, statistics=statistics, **made)
    teacher, _ = workshop.run(score, "teacher", {"dtype": "float32", "keep_hidden": True}, model=base, tokens=text)
    return Ground(workshop, {"model": base, "levels": table, "tokens": text, "teacher": teacher, **made})


@pytest.fixture
def ground(workshop: Any) -> Ground:
    """A random model at three levels of rounding."""
    return ground_of(workshop, workshop.tokens(4, 32), "rtn")


def table_of(ground: Ground) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((ground.inputs["levels"] / "table.json").read_text())
    return table


# --- the evaluator ----------------------------------------------------------------------------------------------------


def test_the_dense_model_does_not_differ_from_itself_and_coarser_levels_differ_more(ground: Ground) -> None:
    n = len(table_of(ground)["linears"])

    dense, four, three, two = ground.evaluator().divergences([[DENSE] * n, [2] * n, [1] * n, [0] * n], 1, 32)

    assert abs(dense) < 1e-6
    assert 0 < four < three < two


def test_a_candidates_divergence_is_that_of_the_assembled_model(ground: Ground) -> None:
    out, _ = ground.allocate("search", "ilp", scores="local", target=2.6)
    assembled, result = ground.workshop.run(
        assemble, "assembled", {"values": VALUES}, allocation=out, **{r: p for r, p in ground.inputs.items() if r != "tokens"}
    )
    spec = {"dtype": "float32", "keep_hidden": False}
    _, scored = ground.workshop.run(
        score, "scored", spec, model=assembled, tokens=ground.inputs["tokens"], teacher=ground.inputs["teacher"]
    )
    table, allocation = table_of(ground), json.loads((out / "allocation.json").read_text())
    choice = [table["levels"].index(allocation[name]) for name in table["linears"]]

    kl = [ground.evaluator().divergences([choice], window, 32)[0] for window in range(4)]

    assert set(allocation.values()) > {2}
    assert sum(kl) / 4 == pytest.approx(scored["quality/kl"], rel=1e-4)
    assert result["size/linear_bytes"] == sum(cost[k] for cost, k in zip(table["cost"], choice, strict=True))
    artifact = ground.workshop.open(assembled)
    for name, value in allocation.items():
        level = ground.workshop.open(ground.inputs[f"level.{value}"])
        assert torch.equal(artifact.materialise(name), level.materialise(name)), name


def test_a_model_at_one_level_is_the_plain_artifact_of_that_level(ground: Ground) -> None:
    out, _ = ground.allocate("search", "evopress", **{**SMALL, "start_from": "uniform", "generations": 0})
    roles = {role: path for role, path in ground.inputs.items() if role == "model" or role.startswith("level.")}
    assembled, _ = ground.workshop.run(assemble, "assembled", {"values": VALUES}, allocation=out, **roles)

    assert (assembled / "tensors.json").read_text() == (ground.inputs["level.3"] / "tensors.json").read_text()
    ours, plain = (load_file(d / "weights.safetensors") for d in (assembled, ground.inputs["level.3"]))
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[key], plain[key]) for key in ours)


def test_an_answer_depends_neither_on_what_else_is_asked_nor_on_what_was_asked_before(ground: Ground) -> None:
    n = len(table_of(ground)["linears"])
    choices = [*one_lowered(n), [1] * n, [2] * n, [1] * (n - 1) + [0], [1] * n]
    together = ground.evaluator().divergences(choices, 2, 32)
    alone = ground.evaluator()

    for choice, kl in reversed(list(zip(choices, together, strict=True))):
        assert alone.divergences([choice], 2, 32) == [kl]
    assert alone.divergences(choices, 2, 20) != together


def test_only_blocks_after_the_first_difference_are_run_and_every_one_is_counted(ground: Ground) -> None:
    table = table_of(ground)
    n, ran = len(table["linears"]), []
    evaluator = ground.evaluator()

    def note(module: torch.nn.Module, _args: object, _out: object) -> None:
        if "forward" not in vars(module):  # while the inputs of the first block are recorded, a stand-in is called
            ran.append(module)

    for block in evaluator.anatomy.blocks:
        evaluator.model.get_submodule(block.name).register_forward_hook(note)
    late, early = [1] * n, [1] * n
    late[-1], early[0] = 0, 0
    choices = [late, early, [1] * n, early]

    evaluator.divergences(choices, 0, 32)

    assert len(ran) == evaluator.block_forwards == block_forwards(choices, table["blocks"]) == 2 + 1 + 2


def test_a_candidate_whose_output_is_no_number_is_infinitely_far(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = ground.evaluator()
    monkeypatch.setattr(Formula, "materialise", lambda self: torch.full(self.shape, torch.nan))
    n = len(evaluator.linears)

    assert evaluator.divergences([[DENSE] * n, [0] * n], 0, 32)[1] == float("inf")


def test_the_packed_levels_are_what_is_held_not_their_dense_weights(ground: Ground) -> None:
    evaluator = ground.evaluator()
    n = len(evaluator.linears)
    evaluator.divergences([[1] * n, [0] * n], 0, 32)  # in dictionary order: level 2 first
    reference = load_in_memory(ground.workshop.open(ground.inputs["level.3"]), torch.float32)

    held = sum(parameter.numel() for parameter in evaluator.model.parameters())

    assert held == sum(parameter.numel() for parameter in reference.parameters())
    assert all(torch.equal(evaluator.model.get_parameter(name), reference.get_parameter(name)) for name in evaluator.linears)


# --- the level table --------------------------------------------------------------------------------------------------


def test_the_table_holds_the_bytes_as_stored_and_the_output_errors(ground: Ground) -> None:
    table = table_of(ground)
    assert table["levels"] == VALUES
    statistics = load_file(ground.workshop.root / "statistics" / "block_001.safetensors")
    i = table["linears"].index("model.layers.1.mlp.down_proj.weight")
    dense = ground.workshop.open(ground.inputs["model"]).materialise(table["linears"][i])
    gram = statistics["model.layers.1.mlp.down:gram"]
    for k, bits in enumerate(VALUES):
        stored = load_file(ground.inputs[f"level.{bits}"] / "weights.safetensors")
        for j, name in enumerate(table["linears"]):
            assert table["cost"][j][k] == sum(t.nbytes for key, t in stored.items() if key.startswith(f"{name}:"))
        away = dense - ground.workshop.open(ground.inputs[f"level.{bits}"]).materialise(table["linears"][i])
        assert table["error"][i][k] == pytest.approx(torch.trace(away @ gram @ away.T).item(), rel=1e-4)
    assert table["energy"][i] == pytest.approx(torch.trace(dense @ gram @ dense.T).item(), rel=1e-4)
    assert table["sizes"][i] == dense.numel()
    assert table["blocks"] == sorted(table["blocks"])


def test_levels_are_listed_by_their_bytes_in_whatever_order_they_are_named(ground: Ground) -> None:
    roles = {role: path for role, path in ground.inputs.items() if role == "model" or role.startswith("level.")}
    statistics = ground.workshop.root / "statistics"
    spec = {"vary": "bits", "values": [4, 2, 3]}

    again, _ = ground.workshop.run(levels, "again", spec, statistics=statistics, **roles)

    assert json.loads((again / "table.json").read_text()) == table_of(ground)


def test_levels_of_another_model_an_incomplete_level_and_no_levels_are_refused(ground: Ground) -> None:
    roles = {role: path for role, path in ground.inputs.items() if role == "model" or role.startswith("level.")}
    ctx = ground.workshop.context("x", {}, **roles)
    ctx.fingerprint_of["model"] = "another"
    with pytest.raises(TaskError, match="level 2 was made of the model fingerprint-of-the-base, not of another"):
        open_levels(ctx, VALUES)
    with pytest.raises(TaskError, match="a list of different levels"):
        open_levels(ctx, [])
    lora = ground.workshop.artifact("part", lambda name, weight: None if "down" in name else Formula([dense_part(weight)]))
    ctx = ground.workshop.context("y", {}, **{**roles, "level.3": lora})
    with pytest.raises(TaskError, match=r"level 3 leaves 2 linears as they are, the first of them model\.layers\.0\.mlp\.down"):
        open_levels(ctx, VALUES)


def dense_part(weight: torch.Tensor) -> Any:
    from pare.methods.parts.formula import Dense

    return Dense(weight)


def test_statistics_without_a_gram_matrix_are_refused(ground: Ground) -> None:
    empty = ground.workshop.root / "empty"
    empty.mkdir()
    for block in range(2):
        save_file({"x": torch.zeros(1)}, empty / f"block_{block:03d}.safetensors")
    roles = {role: path for role, path in ground.inputs.items() if role == "model" or role.startswith("level.")}

    with pytest.raises(TaskError, match="Gram matrix"):
        ground.workshop.run(levels, "again", {"vary": "bits", "values": VALUES}, statistics=empty, **roles)


# --- the search -------------------------------------------------------------------------------------------------------


def test_measured_errors_are_the_divergences_of_one_linear_at_a_time(ground: Ground) -> None:
    asked: list[dict[str, Any]] = []

    def probe(ctx: TaskContext, probes: list[dict[str, Any]]) -> list[float]:
        asked.extend(probes)
        return [1.0 + one["choice"].index(0) for one in probes]

    ctx = ground.context("search", "ilp", target=3, score_tokens=16)
    result = drive(ctx, probe)

    table, allocation = table_of(ground), json.loads((ctx.out / "allocation.json").read_text())
    assert sorted(one["choice"] for one in asked) == sorted(one_lowered(len(table["linears"])))
    assert {(one["window"], one["tokens"]) for one in asked} == {(0, 16)}
    assert result["search/tokens"] == result["search/score_tokens"] == 16 * len(asked)
    predicted = 0.0
    for i, (name, value) in enumerate(allocation.items()):
        errors = table["error"][i]
        predicted += (1.0 + i) * errors[table["levels"].index(value)] / errors[0]
        assert name == table["linears"][i]
    assert result["search/predicted_kl"] == pytest.approx(predicted)
    assert (ctx.out / "trace.jsonl").read_text() == ""


def test_an_exact_solver_with_local_errors_runs_no_model(ground: Ground) -> None:
    def probe(ctx: TaskContext, probes: list[dict[str, Any]]) -> list[float]:
        raise AssertionError("a model was asked for")

    result = drive(ground.context("search", "ilp", scores="local", target=3), probe)

    uniform = sum(cost[1] for cost in table_of(ground)["cost"])
    assert result["search/tokens"] == 0
    assert result["search/linear_bytes"] <= uniform


def test_the_search_is_never_worse_than_its_start_and_counts_every_token_and_block(ground: Ground) -> None:
    seen: list[int] = []

    def probe(ctx: TaskContext, probes: list[dict[str, Any]]) -> list[float]:
        seen.append(sum(one["tokens"] for one in probes))
        answers = allocate.probe(ctx, probes)
        (held,) = allocate.HELD.values()
        ran.append(held.block_forwards)
        return answers

    ran: list[int] = []
    points: list[tuple[int, dict[str, float]]] = []
    steps: list[tuple[int, int, str]] = []
    ctx = ground.context("search", "evopress", **{**SMALL, "start_from": "random"})
    ctx.point = lambda step, values: points.append((step, values))
    ctx.progress = lambda *step: steps.append(step)
    result = drive(ctx, probe)

    trace = [json.loads(line) for line in (ctx.out / "trace.jsonl").read_text().splitlines()]
    assert [entry["generation"] for entry in trace] == [0, 1, 2, 3, 4]
    assert result["search/kl"] == trace[-1]["kl"] < result["search/start_kl"] == trace[0]["kl"]
    assert result["search/accepted"] == sum(entry["accepted"] for entry in trace[1:]) > 0
    assert result["search/generations"] == 4
    assert result["search/tokens"] == sum(seen) == trace[-1]["tokens"]
    assert result["search/score_tokens"] == 0
    assert result["search/block_forwards"] == ran[-1] <= result["search/block_forwards_plain"]
    assert points == [(entry["generation"], {"fitness": entry["kl"]}) for entry in trace]
    assert [step for step in steps if step[2] == "generations"] == [(g, 4, "generations") for g in range(5)]


def test_a_search_that_is_stopped_after_any_round_ends_with_the_same_files(ground: Ground, tmp_path: Path) -> None:
    undisturbed, result = ground.allocate("undisturbed", "evopress", **SMALL)
    blobs = LocalBlobs(tmp_path / "blobs")
    for stop in (1, 2, 4, 5):
        ctx = ground.context(f"stopped {stop}", "evopress", **SMALL)
        ctx.checkpoint = Checkpoint(blobs, f"checkpoints/{stop}")
        assert drive(ctx, stop_after=stop) == {}
        kept = ctx.checkpoint.latest()
        assert kept is not None
        asked: list[int] = []

        def probe(ctx: TaskContext, probes: list[dict[str, Any]], asked: list[int] = asked) -> list[float]:
            asked.append(sum(one["tokens"] for one in probes))
            return allocate.probe(ctx, probes)

        again = ground.context(f"resumed {stop}", "evopress", **SMALL)
        again.checkpoint = Checkpoint(blobs, f"checkpoints/{stop}")

        assert drive(again, probe) == result
        assert sum(asked) == result["search/tokens"] - kept["tokens"]
        for file in ("allocation.json", "trace.jsonl"):
            assert (again.out / file).read_bytes() == (undisturbed / file).read_bytes()


def test_probes_split_over_two_workers_give_the_same_files_as_one(ground: Ground) -> None:
    one, result = ground.allocate("one", "evopress", **SMALL)
    workers = [ground.evaluator() for _ in range(2)]

    def probe(ctx: TaskContext, probes: list[dict[str, Any]]) -> list[float]:
        answers = [0.0] * len(probes)
        for number, worker in enumerate(workers):
            share = list(range(number, len(probes), 2))
            allocate.HELD.clear()
            allocate.HELD[allocate.name_of(ctx)] = worker
            for i, kl in zip(share, allocate.probe(ctx, [probes[i] for i in share]), strict=True):
                answers[i] = kl
        return answers

    ctx = ground.context("two", "evopress", **SMALL)

    assert drive(ctx, probe) == result
    for file in ("allocation.json", "trace.jsonl"):
        assert (ctx.out / file).read_bytes() == (one / file).read_bytes()


def test_another_seed_searches_elsewhere_and_the_same_one_does_not(ground: Ground) -> None:
    traces = []
    for i, seed in enumerate((0, 0, 1)):
        out, _ = ground.allocate(f"search {i}", "evopress", seed=seed, **{**SMALL, "start_from": "uniform"})
        traces.append((out / "trace.jsonl").read_text())

    assert traces[0] == traces[1] != traces[2]


def test_a_target_or_levels_that_do_not_fit_the_table_are_refused(ground: Ground) -> None:
    with pytest.raises(ValueError, match=r"evopress.target must be in \[2, 4\], the range of the levels, got 6"):
        ground.allocate("high", "evopress", **{**SMALL, "target": 6})
    ctx = ground.context("other", "ilp")
    ctx.spec["values"] = [2, 3]
    with pytest.raises(TaskError, match=r"holds the levels \[2, 3, 4\], not \[2, 3\]"):
        drive(ctx)
    with pytest.raises(TaskError, match="of kind allocate; rtn is of kind layer"):
        drive(ground.context("rtn", "rtn"))


def test_a_start_that_no_text_can_be_predicted_with_fails_as_nonfinite(ground: Ground) -> None:
    ctx = ground.context("search", "evopress", **{**SMALL, "start_from": "uniform"})

    with pytest.raises(TaskError, match="no candidate of generation 0 has a finite KL") as caught:
        drive(ctx, lambda ctx, probes: [float("inf")] * len(probes))
    assert caught.value.failure == "nonfinite"


def test_gptq_levels_searched_on_a_trained_model_give_an_artifact_that_scores_as_promised(
    workshop: Any, tiny_model_dir: Path, tiny_corpus_dir: Path
) -> None:
    load_all()
    shop = dataclasses.replace(workshop, base=tiny_model_dir)
    spec = {"role": "validation", "sequences": 8, "length": 64, "seed": 0}
    text, _ = shop.run(tokens, "text", spec, model=tiny_model_dir, corpus=tiny_corpus_dir)
    ground = ground_of(shop, text, "gptq")
    settings = {"target": 3, "score_tokens": 64, "tokens": [128, 512], "generations": 6, "offspring": 4}

    out, result = ground.allocate("search", "evopress", **settings)
    roles = {role: path for role, path in ground.inputs.items() if role == "model" or role.startswith("level.")}
    assembled, sizes = shop.run(assemble, "assembled", {"values": VALUES}, allocation=out, **roles)
    spec = {"dtype": "float32", "keep_hidden": False}
    kl = {}
    for name, model in (("found", assembled), ("uniform", ground.inputs["level.3"])):
        _, scored = shop.run(score, name, spec, model=model, tokens=text, teacher=ground.inputs["teacher"])
        kl[name] = scored["quality/kl"]

    uniform = sum(cost[1] for cost in table_of(ground)["cost"])
    assert sizes["size/linear_bytes"] == result["search/linear_bytes"] <= uniform
    assert result["search/kl"] <= result["search/start_kl"]
    assert kl["found"] == pytest.approx(result["search/kl"], rel=1e-4)
    assert kl["found"] < kl["uniform"]
    assert evaluation.read_windows(text).shape == (8, 64)
    linears, _ = linears_of(ground.evaluator().anatomy)
    assert list(json.loads((out / "allocation.json").read_text())) == linears
