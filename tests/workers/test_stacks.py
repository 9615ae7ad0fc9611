"""Layer methods one after another: what a stage adds is counted with what is beneath, and an export holds all of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pare.methods.ops.statistics import MeanSquare
from pare.methods.parts.masked import NofM
from pare.workers.export.files import tensor_sizes
from pare.workers.export.reader import open_export
from pare.workers.models import ModelArtifact, load_in_memory
from pare.workers.task import TaskContext
from pare.workers.tasks import calibrate, compress, export


class Stack:
    """Stages on the small Llama, each on the one before it."""

    def __init__(self, workshop: Any, root: Path) -> None:
        self.workshop, self.root = workshop, root
        self.places: dict[str, Path] = {}
        self.top, self.fingerprint = workshop.base, "fingerprint-of-the-base"
        self.result: dict[str, Any] = {}

    def resolve(self, fingerprint: str) -> Path:
        return self.places.get(fingerprint) or Path(self.workshop.resolve(fingerprint))

    def then(self, name: str, **settings: Any) -> Stack:
        out = self.root / f"{len(self.places)}-{name}"
        out.mkdir()
        spec = {"method": name, "settings": settings, "dtype": "float32"}
        inputs = {"model": self.top, "tokens": self.workshop.tokens()}
        fingerprints = {"model": self.fingerprint}
        self.result = compress.run(TaskContext(spec, inputs, out, resolve=self.resolve, fingerprint_of=fingerprints))
        self.top, self.fingerprint = out, out.name
        self.places[out.name] = out
        return self

    def open(self) -> ModelArtifact:
        return ModelArtifact(self.top, self.resolve)

    def logits(self) -> Tensor:
        return logits(load_in_memory(self.open(), torch.float32), self.workshop)

    def export(self) -> tuple[Path, dict[str, Any]]:
        out = self.root / "export"
        out.mkdir()
        ctx = TaskContext({"card": {}}, {"model": self.top}, out, resolve=self.resolve)
        return out, export.run(ctx)


def logits(model: Any, workshop: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=load_file(workshop.tokens() / "tokens.safetensors")["input_ids"]).logits
    return found


@pytest.fixture
def stack(workshop: Any, tmp_path: Path) -> Stack:
    return Stack(workshop, tmp_path)


def distance(stack: Stack) -> float:
    """Of the logits to those of the base."""
    base = logits(load_in_memory(stack.workshop.open(stack.workshop.base), torch.float32), stack.workshop)
    return float((stack.logits() - base).norm())


@pytest.mark.parametrize(
    ("first", "settings"),
    [("sparsegpt", {"pattern": "2:4"}), ("wanda", {}), ("gptq", {"bits": 2, "group_size": 32, "inputs": "compressed"})],
)
def test_a_low_rank_term_repairs_whatever_is_beneath_it_and_its_export_is_all_of_that(
    stack: Stack, first: str, settings: dict[str, Any]
) -> None:
    stack.then(first, **settings)
    before, beneath = distance(stack), stack.result["size/linear_bytes"]

    stack.then("eora", rank=8)

    assert distance(stack) < 0.9 * before
    artifact = stack.open()
    names = artifact.compressed_names()
    spans = sum(sum(artifact.stored(name).shape) for name in names)
    assert stack.result["size/linear_bytes"] == beneath + 8 * 2 * spans
    out, said = stack.export()
    is_adapter = first == "gptq"  # beside codes that compressed-tensors has words for; it keeps their shapes as well
    assert said["format"] == ("adapter" if is_adapter else "pare")
    torch.testing.assert_close(logits(open_export(out, torch.float32).model, stack.workshop), stack.logits())
    rest = sum(artifact.stored(name).nbytes for name in artifact.parameter_names() if name not in names)
    shapes = 16 * len(names) if is_adapter else 0
    assert sum(size.bytes for size in tensor_sizes(out).values()) == rest + shapes + stack.result["size/linear_bytes"]


def test_three_stages_keep_the_zeros_of_the_first_where_nothing_is_added_to_them(stack: Stack) -> None:
    pruned = stack.then("wanda", pattern="2:4").open()
    name = pruned.compressed_names()[0]
    (masked,) = pruned.effective(name).parts
    assert isinstance(masked, NofM)

    again = stack.then("wanda", pattern="2:4").open()

    assert torch.equal(again.materialise(name), pruned.materialise(name)), "what is pruned already stays as it is"
    repaired = stack.then("eora", rank=4).open().effective(name)
    assert [part.kind for part in repaired.parts] == ["n_of_m", "low_rank"]


def test_wanda_weighs_by_what_its_pruned_predecessors_put_out(workshop: Any, tmp_path: Path) -> None:
    wanted = {"statistics": [{"module": MeanSquare.__module__, "class": "MeanSquare"}], "dtype": "float32"}
    statistics, _ = workshop.run(calibrate, "statistics", wanted, model=workshop.base, tokens=workshop.tokens())
    spec = {"method": "wanda", "settings": {"sparsity": 0.7, "inputs": "dense"}, "dtype": "float32"}
    directory, _ = workshop.run(compress, "dense", spec, model=workshop.base, statistics=statistics)
    dense = workshop.open(directory)
    own = Stack(workshop, tmp_path).then("wanda", sparsity=0.7).open()

    first = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(own.materialise(first), dense.materialise(first)), "nothing comes before it"
    second = [name for name in own.compressed_names() if "layers.1." in name]
    assert any(not torch.equal(own.materialise(name), dense.materialise(name)) for name in second)


def test_pruned_weights_become_codes_and_get_a_low_rank_term(stack: Stack) -> None:
    stack.then("sparsegpt", pattern="2:4").then("gptq", bits=4, group_size=32, inputs="compressed")
    quantized, before = stack.open(), distance(stack)
    names = quantized.compressed_names()
    kinds = {part.kind for name in names for part in quantized.effective(name).parts}
    assert kinds == {"n_of_m"}, "the zeros of the first stage are those of the second"
    stack.then("eora", rank=8)

    assert distance(stack) < 0.9 * before
    artifact = stack.open()
    shapes = [artifact.stored(name).shape for name in names]
    weights, sides = sum(rows * columns for rows, columns in shapes), sum(map(sum, shapes))
    # Three bits for four weights and half of a code for each, a bf16 scale for 32 of them, and two bf16 factors of rank 8.
    expected = 3 / 4 + 4 / 2 + 16 / 32 + 16 * 8 * sides / weights
    assert stack.result["size/linear_bits_per_weight"] == pytest.approx(expected, rel=1e-12)
    out, said = stack.export()
    assert said["format"] == "pare"
    assert torch.equal(logits(open_export(out, torch.float32).model, stack.workshop), stack.logits())
    rest = sum(artifact.stored(name).nbytes for name in artifact.parameter_names() if name not in names)
    assert sum(size.bytes for size in tensor_sizes(out).values()) == rest + stack.result["size/linear_bytes"]


def test_factors_that_are_folded_leave_the_model_what_it_was(stack: Stack) -> None:
    base = stack.workshop.open(stack.workshop.base)
    before = logits(load_in_memory(base, torch.float32), stack.workshop)
    scaled = stack.then("awq", scale_only=True, bits=3, group_size=32).open()

    torch.testing.assert_close(stack.logits(), before, rtol=1e-5, atol=1e-5)
    norm, weight = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(scaled.materialise(norm).flatten(), base.materialise(norm))
    assert not torch.equal(scaled.materialise(weight), base.materialise(weight))
    assert scaled.formula(norm).parts[0].weight.dtype == torch.bfloat16  # type: ignore[union-attr, attr-defined]
    everything = sum(base.stored(name).numel() for name in scaled.compressed_names() if "_proj" in name)
    assert stack.result["size/linear_bits_per_weight"] == 32
    assert stack.result["size/linear_bytes"] == 4 * everything, "norms are no linears"


def test_factors_make_rounding_and_gptq_less_harmful(stack: Stack) -> None:
    make_loud(stack)
    grid = {"bits": 3, "group_size": 32, "symmetric": False}
    lost = {}
    for name, stages in {
        "rtn": [("rtn", grid)],
        "awq": [("awq", grid)],
        "gptq": [("gptq", grid)],
        "awq_gptq": [("awq", grid | {"scale_only": True}), ("gptq", grid)],
    }.items():
        (stack.root / name).mkdir()
        one = Stack(stack.workshop, stack.root / name)
        for stage, settings in stages:
            one.then(stage, **settings)
        lost[name] = distance(one)
    assert lost["awq"] < 0.9 * lost["rtn"]
    assert lost["awq_gptq"] < 0.95 * lost["gptq"]


def make_loud(stack: Stack) -> None:
    """Gives the small model a few features of large activations and small weights; what it computes stays the same."""
    base = stack.workshop.base
    stack.workshop.base = Path(shutil.copytree(base, stack.root / "loud"))
    weights = load_file(base / "model.safetensors")
    for i in range(2):
        for norm, readers in {
            "input": ["self_attn.q", "self_attn.k", "self_attn.v"],
            "post_attention": ["mlp.gate", "mlp.up"],
        }.items():
            weights[f"model.layers.{i}.{norm}_layernorm.weight"][:4] *= 16
            for reader in readers:
                weights[f"model.layers.{i}.{reader}_proj.weight"][:, :4] /= 16
    save_file(weights, stack.workshop.base / "model.safetensors", metadata={"format": "pt"})


def test_an_export_of_scaled_weights_holds_the_norms_they_were_folded_into(stack: Stack) -> None:
    stack.then("awq", bits=4, group_size=32, symmetric=True)
    out, said = stack.export()
    assert said["format"] == "compressed-tensors"
    torch.testing.assert_close(logits(open_export(out, torch.float32).model, stack.workshop), stack.logits())


def test_the_original_of_a_scaled_weight_is_the_scaled_weight(stack: Stack) -> None:
    base = stack.workshop.open(stack.workshop.base)
    scaled = stack.then("awq", scale_only=True, bits=3, group_size=32).open()
    linears = [name for name in scaled.compressed_names() if "_proj" in name]
    assert all(torch.equal(scaled.original(name), scaled.materialise(name)) for name in linears)
    assert not torch.equal(scaled.original(linears[0]), base.materialise(linears[0]))
    keys = load_file(stack.top / "weights.safetensors").keys()
    assert {"fold.in:model.layers.0.mlp.down_proj.weight", "fold.out:model.layers.0.mlp.up_proj.weight"} <= {*keys}
    assert "fold.out:model.layers.0.mlp.down_proj.weight" not in keys, "nothing behind it is folded into it"

    twice = stack.then("awq", scale_only=True, bits=3, group_size=32, duo=True).open()
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(twice.materialise(name), scaled.materialise(name))
    assert torch.equal(twice.original(name), twice.materialise(name)), "factors of both stages"

    coded = stack.then("rtn", bits=3, group_size=32).open()
    assert torch.equal(coded.original(name), twice.materialise(name)), "what rounds leaves no factors"


@pytest.mark.parametrize("stages", [["awq", "gptq"], ["awq"]])
def test_a_low_rank_term_repairs_weights_that_factors_were_folded_into(stack: Stack, stages: list[str]) -> None:
    make_loud(stack)
    stack = Stack(stack.workshop, stack.root)
    grid = {"bits": 2, "group_size": 32, "symmetric": False}
    for name in stages:
        stack.then(name, **grid, **({"scale_only": True} if name == "awq" and len(stages) > 1 else {}))
    before, beneath = distance(stack), stack.result["size/linear_bytes"]
    artifact = stack.open()
    name = "model.layers.0.self_attn.q_proj.weight"
    far = float((artifact.stored(name).float() - artifact.materialise(name)).norm())
    near = float((artifact.original(name) - artifact.materialise(name)).norm())
    assert near < far, "the factors are part of what is lost no more"

    stack.then("eora", rank=8)

    assert distance(stack) < 0.9 * before
    artifact = stack.open()
    linears = [name for name in artifact.compressed_names() if "_proj" in name]
    assert stack.result["size/linear_bytes"] == beneath + 8 * 2 * sum(sum(artifact.stored(name).shape) for name in linears)
    out, said = stack.export()
    torch.testing.assert_close(logits(open_export(out, torch.float32).model, stack.workshop), stack.logits())
    assert not [name for name in tensor_sizes(out) if "fold" in name], said["format"]
