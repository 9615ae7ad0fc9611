"""Layer methods one after another: what a stage adds is counted with what is beneath, and an export holds all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pare.methods.ops.statistics import MeanSquare
from pare.methods.parts.masked import Masked
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
    assert said["format"] == "pare"
    assert torch.equal(logits(open_export(out, torch.float32).model, stack.workshop), stack.logits())
    rest = sum(artifact.stored(name).nbytes for name in artifact.parameter_names() if name not in names)
    assert sum(size.bytes for size in tensor_sizes(out).values()) == rest + stack.result["size/linear_bytes"]


def test_three_stages_keep_the_zeros_of_the_first_where_nothing_is_added_to_them(stack: Stack) -> None:
    pruned = stack.then("wanda", pattern="2:4").open()
    name = pruned.compressed_names()[0]
    (masked,) = pruned.effective(name).parts
    assert isinstance(masked, Masked)

    again = stack.then("wanda", pattern="2:4").open()

    assert torch.equal(again.materialise(name), pruned.materialise(name)), "what is pruned already stays as it is"
    repaired = stack.then("eora", rank=4).open().effective(name)
    assert [part.kind for part in repaired.parts] == ["masked", "low_rank"]


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
