"""The task `gradients`, and methods that need what it makes. `workshop` and `attempt_checkpoint`: see conftest.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pare.methods.anatomy.describe import FAMILIES, describe
from pare.methods.anatomy.reads import one_expert_at_a_time
from pare.methods.anatomy.views import parse, view, weight_of
from pare.methods.contract import METHODS
from pare.methods.ops.gradients import Fisher, GradientMagnitude, GradientStatistic
from pare.orchestrator import config
from pare.orchestrator.plan import Plan, build_plan
from pare.workers import hidden_states
from pare.workers.blocks import open_blocks
from pare.workers.checkpoint import Checkpoint
from pare.workers.gradients import backward
from pare.workers.models import ModelArtifact, load_in_memory
from pare.workers.task import TaskError
from pare.workers.tasks import calibrate, compress, gradients
from tests.methods.anatomy.tiny_models import TOKENS, tiny

CPU = torch.device("cpu")
ASKED = [{"module": "pare.methods.ops.gradients", "class": name} for name in ("Fisher", "GradientMagnitude")]
SPEC = {"statistics": ASKED, "dtype": "float32"}


class Every(GradientStatistic):
    """The gradients as they come."""

    name = "every"

    def start(self, shape: tuple[int, int], device: torch.device) -> None:
        self.seen: list[Tensor] = []

    def add(self, gradient: Tensor) -> None:
        self.seen.append(gradient)

    def finish(self) -> Tensor:
        return torch.stack(self.seen)


def by_autograd(model: nn.Module, tokens: Tensor = TOKENS) -> dict[str, Tensor]:
    """Weight -> (sequences, out, in): gradient of what transformers says is the loss of each sequence."""
    model.requires_grad_(True)
    names = list(describe(model).widths)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for sequence in tokens:
        model.zero_grad()
        with one_expert_at_a_time(model):
            model(input_ids=sequence[None], labels=sequence[None], use_cache=False).loss.backward()
        for name in names:
            gradient = model.get_parameter(parse(name).parameter).grad
            found[name].append(torch.zeros_like(weight_of(model, name)) if gradient is None else view(gradient, name).clone())
    return {name: torch.stack(of_name) for name, of_name in found.items()}


def passed(directory: Path, *needs: type[GradientStatistic], tokens: Tensor = TOKENS, dtype: str = "float32") -> Any:
    """Weight -> statistic -> value, of the model in a directory."""
    model = open_blocks(ModelArtifact(directory, Path), getattr(torch, dtype))
    blocks = list(backward(model, tokens, needs, CPU))
    assert [block.index for block in blocks] == [2, 1, 0]
    return {weight: values for block in blocks for weight, values in block.statistics.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_gradients_are_those_of_the_whole_model_for_every_sequence(architecture: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(architecture, tied)
    model.save_pretrained(tmp_path, save_original_format=False)
    got, expected = passed(tmp_path, Every, Fisher, GradientMagnitude), by_autograd(model)
    assert set(got) == set(expected)
    for name, wanted in expected.items():
        slack = 1e-4 * float(wanted.abs().max())
        assert slack > 0 or "experts" in name
        torch.testing.assert_close(got[name]["every"], wanted, rtol=1e-3, atol=slack)
        torch.testing.assert_close(got[name]["fisher"], got[name]["every"].square().mean(0), rtol=1e-5, atol=0)
        torch.testing.assert_close(got[name]["gradient_magnitude"], got[name]["every"].abs().mean(0), rtol=1e-5, atol=0)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny("LlamaForCausalLM").save_pretrained(tmp_path)
    return tmp_path


def test_the_fisher_of_all_sequences_is_the_mean_of_each_ones_in_any_order(llama: Path) -> None:
    together, turned = passed(llama, Fisher), passed(llama, Fisher, tokens=TOKENS.flip(0))
    alone = [passed(llama, Fisher, tokens=sequence[None]) for sequence in TOKENS]
    for name, values in together.items():
        mean = torch.stack([one[name]["fisher"] for one in alone]).mean(0)
        torch.testing.assert_close(values["fisher"], mean, rtol=1e-5, atol=0)
        torch.testing.assert_close(values["fisher"], turned[name]["fisher"], rtol=1e-5, atol=0)


def test_the_gradient_says_how_the_loss_changes(llama: Path) -> None:
    name, step = "model.layers.1.mlp.down_proj.weight", 1e-2
    gradient = passed(llama, Every)[name]["every"].mean(0)
    losses = []
    for sign in (1, -1):
        model = load_in_memory(ModelArtifact(llama, Path), torch.float64)
        with torch.no_grad():
            weight_of(model, name).add_(sign * step * gradient / gradient.norm())
            losses.append(model(input_ids=TOKENS, labels=TOKENS).loss.item())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(gradient.norm().item(), rel=1e-3)


def test_statistics_are_float32_when_the_passes_are_bfloat16(llama: Path) -> None:
    got, exact = passed(llama, Fisher, dtype="bfloat16"), passed(llama, Fisher)
    for name, values in got.items():
        assert values["fisher"].dtype == torch.float32
        both = torch.stack([values["fisher"].flatten(), exact[name]["fisher"].flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.98
        assert values["fisher"].sum().item() == pytest.approx(exact[name]["fisher"].sum().item(), rel=0.1)


def test_one_block_is_in_memory_at_a_time(llama: Path) -> None:
    model = open_blocks(ModelArtifact(llama, Path), torch.float32)
    seen = []

    class Looks(Fisher):
        def add(self, gradient: Tensor) -> None:
            seen.append({name.split(".")[2] for name, p in model.model.named_parameters() if not p.is_meta})
            super().add(gradient)

    for _ in backward(model, TOKENS, [Looks], CPU):
        assert all(p.is_meta for p in model.model.parameters())
    assert [*dict.fromkeys(map(tuple, seen))] == [("2",), ("1",), ("0",)]


def test_what_blocks_read_may_lie_in_files(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = passed(llama, Fisher)
    monkeypatch.setattr(hidden_states, "free_memory", lambda: 0)
    folder, files = tmp_path / "folder", []
    folder.mkdir()
    for block in backward(open_blocks(ModelArtifact(llama, Path), torch.float32), TOKENS, [Fisher], CPU, folder):
        files.append(len([path for path in folder.rglob("*") if path.is_file()]))
        for name, values in block.statistics.items():
            assert torch.equal(values["fisher"], expected[name]["fisher"])
    assert files == [4 * len(TOKENS)] * 3, "what three blocks read, and what the last of them puts out"
    assert not list(folder.iterdir())


# --- the task -----------------------------------------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_task_writes_one_file_for_each_block_with_the_statistics_of_its_weights(workshop: Any) -> None:
    steps: list[tuple[int, int, str]] = []
    ctx = workshop.context("gradients", SPEC, model=workshop.base, tokens=workshop.tokens(3, 16))
    ctx.progress = lambda *step: steps.append(step)

    assert gradients.run(ctx) == {"blocks": 2, "tokens": 48}

    assert steps == [(1, 2, "blocks"), (2, 2, "blocks")]
    assert sorted(contents(ctx.out)) == ["block_000.safetensors", "block_001.safetensors"]
    model = load_in_memory(workshop.open(workshop.base), torch.float32)
    expected = by_autograd(model, load_file(workshop.tokens() / "tokens.safetensors")["input_ids"])
    for index, block in enumerate(describe(model).blocks):
        stored = load_file(ctx.out / f"block_{index:03d}.safetensors")
        names = [name for group in block.groups for name in group.weights]
        assert set(stored) == {f"{kind}:{name}" for kind in ("fisher", "gradient_magnitude") for name in names}
        for name in names:
            wanted = expected[name].square().mean(0)
            torch.testing.assert_close(stored[f"fisher:{name}"], wanted, rtol=1e-3, atol=1e-4 * float(wanted.max()))


def test_gradients_that_are_not_finite_are_refused(workshop: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in workshop.base.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][3] = torch.inf
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TaskError, match=r"fisher:model\.layers\.1\.\S+ is not finite: in float32 .* Try dtype=float32"):
        workshop.run(gradients, "gradients", SPEC, model=broken, tokens=workshop.tokens())


class Killed(Exception):
    pass


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_task_that_was_killed_between_blocks_goes_on_to_the_same_bytes(
    workshop: Any, attempt_checkpoint: Callable[[], Checkpoint], tmp_path: Path, dtype: str
) -> None:
    base = tmp_path / "three-blocks"
    tiny("MixtralForCausalLM").save_pretrained(base, save_original_format=False)
    spec, inputs = {**SPEC, "dtype": dtype}, {"model": base, "tokens": workshop.root / "some"}
    inputs["tokens"].mkdir()
    save_file({"input_ids": TOKENS}, inputs["tokens"] / "tokens.safetensors")
    whole, expected = workshop.run(gradients, "whole", spec, **inputs)

    def killed_after(block: int) -> Callable[[int, int, str], None]:
        def progress(done: int, total: int, unit: str) -> None:
            if done == block:
                raise Killed

        return progress

    for number, block in enumerate((1, 2)):
        ctx = workshop.context(f"killed{number}", spec, **inputs)
        ctx.checkpoint, ctx.progress = attempt_checkpoint(), killed_after(block)
        with pytest.raises(Killed):
            gradients.run(ctx)
    ctx, seen = workshop.context("resumed", spec, **inputs), []
    ctx.checkpoint, ctx.progress = attempt_checkpoint(), lambda done, total, unit: seen.append(done)

    assert gradients.run(ctx) == expected
    assert seen == [2, 3]
    assert contents(ctx.out) == contents(whole)


# --- a method that needs both kinds -------------------------------------------------------------------------------------

KEEPER = '''"""Keeper: of each weight the half stays of which gradients and inputs say that it counts."""

from dataclasses import dataclass

from pare.methods.contract import LayerMethod, method
from pare.methods.ops.gradients import Fisher, MeanOverSequences
from pare.methods.ops.statistics import MeanSquare
from pare.methods.parts.formula import Dense, Formula


class MeanGradient(MeanOverSequences):
    name = "mean_gradient"

    def of(self, gradient):
        return gradient


@method("keeper", source="test", needs=(MeanSquare, Fisher, MeanGradient))
@dataclass
class Keeper(LayerMethod):
    inputs: str = "dense"
    """Which."""

    def compress_weight(self, name, weight, statistics, context):
        harm = (statistics[f"mean_gradient:{name}"] * weight).abs() + statistics[f"fisher:{name}"] * weight**2
        harm = harm * statistics["mean_square"]
        return Formula([Dense(weight.where(harm > harm.median(), 0.0))])
'''


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    plugin = tmp_path_factory.mktemp("plugin") / "keeper_method.py"
    plugin.write_text(KEEPER)
    try:
        chosen = ["recipe=base", "+method@recipe.x=keeper", "recipe.x.inputs=dense,compressed"]
        yield build_plan(config.load([f"plugins=[{plugin}]", "model=tiny", "evaluation.questions.n=4", *chosen]), "cpu", 2)
    finally:
        METHODS.pop("keeper", None)


def of_type(plan: Plan, kind: str) -> list[Any]:
    return [task for task in plan.tasks.values() if task.type == kind]


def test_both_kinds_of_statistics_are_planned_and_the_gradients_are_shared(plan: Plan) -> None:
    (asked,) = of_type(plan, "gradients")
    assert [s["class"] for s in asked.spec["statistics"]] == ["Fisher", "MeanGradient"]
    assert asked.label == "gradients fisher, mean_gradient"
    (calibration,) = of_type(plan, "calibrate")
    assert [s["class"] for s in calibration.spec["statistics"]] == ["MeanSquare"]
    assert asked.inputs == calibration.inputs
    dense, compressed = of_type(plan, "compress")
    assert dense.inputs == {
        "model": asked.inputs["model"],
        "statistics": calibration.fingerprint,
        "gradients": asked.fingerprint,
    }
    assert compressed.inputs == {**asked.inputs, "gradients": asked.fingerprint}


def test_a_method_is_given_both_kinds_of_statistics(plan: Plan, workshop: Any) -> None:
    (asked,), (calibration,), found = (of_type(plan, kind) for kind in ("gradients", "calibrate", "compress"))
    given = {"model": workshop.base, "tokens": workshop.tokens()}
    measured, _ = workshop.run(gradients, "g", asked.spec, **given)
    statistics, _ = workshop.run(calibrate, "s", calibration.spec, **given)
    dense, compressed = (
        workshop.open(workshop.run(compress, f"c{i}", task.spec, **inputs, gradients=measured)[0])
        for i, (task, inputs) in enumerate([(found[0], {"model": workshop.base, "statistics": statistics}), (found[1], given)])
    )
    base = load_in_memory(workshop.open(workshop.base), torch.float32)
    differ = 0
    for index, block in enumerate(describe(base).blocks):
        of_inputs, of_weights = (load_file(d / f"block_{index:03d}.safetensors") for d in (statistics, measured))
        for group in block.groups:
            for name in group.weights:
                weight = weight_of(base, name).detach()
                harm = (of_weights[f"mean_gradient:{name}"] * weight).abs() + of_weights[f"fisher:{name}"] * weight**2
                harm = harm * of_inputs[f"{group.name}:mean_square"]
                expected = weight.where(harm > harm.median(), 0.0)
                assert torch.equal(dense.materialise(name), expected)
                differ += not torch.equal(compressed.materialise(name), expected)
                assert index or group is not block.groups[0] or torch.equal(compressed.materialise(name), expected)
    assert differ, "behind the first block inputs are those of compressed blocks"


def test_a_method_that_folds_cannot_ask_for_gradients() -> None:
    from pare.methods.contract import LayerMethod, method

    class Folding(LayerMethod):
        folds = True

    with pytest.raises(ValueError, match=r"method 'folding' folds and asks for gradients \(fisher\)"):
        method("folding", source="test", needs=(Fisher,))(Folding)
    assert "folding" not in METHODS
