"""Calibration and compression with one block in memory at a time: the numbers of the whole model, in the memory of a block."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pare.methods.anatomy.describe import FAMILIES, describe
from pare.methods.ops.statistics import Gram, MeanSquare
from pare.methods.parts.activations import ActivationQuantiser
from pare.methods.parts.formula import Formula
from pare.workers.blocks import open_blocks
from pare.workers.calibration import stream
from pare.workers.models import ModelArtifact, load_in_memory
from pare.workers.task import TaskError
from pare.workers.tasks import calibrate
from tests.methods.anatomy.tiny_models import TOKENS, tiny
from tests.workers import memory_of_blocks

CPU = torch.device("cpu")


def parameters_in_memory(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if not p.is_meta]


@pytest.mark.parametrize("inputs", ["dense", "compressed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", [*FAMILIES])
def test_streamed_statistics_are_to_the_bit_those_of_the_model_in_memory(
    architecture: str, dtype: torch.dtype, inputs: str, tmp_path: Path
) -> None:
    tiny(architecture).save_pretrained(tmp_path, save_original_format=False)
    artifact = ModelArtifact(tmp_path, Path)
    whole = load_in_memory(artifact, dtype)
    anatomy = describe(whole)
    expected = {}
    for passing in stream(whole, anatomy, TOKENS, [Gram, MeanSquare], CPU, inputs, batch_size=2):
        expected |= passing.statistics

    opened = open_blocks(artifact, dtype)
    got, seen = {}, []
    for passing in stream(opened, opened.anatomy, TOKENS, [Gram, MeanSquare], CPU, inputs, batch_size=2):
        got |= passing.statistics
        seen.append(passing)
        present = parameters_in_memory(opened.model)
        assert present
        assert all(name.startswith(f"{passing.block.name}.") for name in present), "this block and nothing else"

    assert opened.anatomy == anatomy
    assert list(got) == list(expected)
    for group, values in expected.items():
        for name, value in values.items():
            # Where the model in memory is mapped from its file, products may add up in another order for where weights lie.
            slack = 0.0 if architecture == "LlamaForCausalLM" else 1e-6
            torch.testing.assert_close(got[group][name], value, rtol=slack, atol=slack * float(value.abs().max()))
    assert not parameters_in_memory(opened.model)
    assert all(p.is_meta for passing in seen for p in passing.module.parameters()), "whoever holds a block holds no weights"


def test_streamed_statistics_of_a_compressed_model_are_those_of_the_model_in_memory(
    workshop: Any, codes: Callable[..., Any]
) -> None:
    artifact = workshop.open(workshop.artifact("coded", lambda name, weight: codes(weight, 3, 32)))
    whole, opened = load_in_memory(artifact, torch.bfloat16), open_blocks(artifact, torch.bfloat16)
    expected, got = (
        {name: values["gram"] for p in stream(m, opened.anatomy, TOKENS, [Gram], CPU) for name, values in p.statistics.items()}
        for m in (whole, opened)
    )
    assert expected
    assert all(torch.equal(got[group], gram) for group, gram in expected.items())


def test_buffers_that_are_stored_are_read(workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some families keep what they have learnt in a buffer that a new module fills with zeros."""
    from transformers.models.llama import modeling_llama

    made = modeling_llama.LlamaMLP.__init__

    def with_a_buffer(self: Any, config: Any) -> None:
        made(self, config)
        self.register_buffer("learnt", torch.zeros(3))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", with_a_buffer)
    for file in workshop.base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.learnt"] = torch.tensor([1.0, 2.0, 3.0])
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened = open_blocks(ModelArtifact(tmp_path, Path), torch.float32)
    with opened.loaded("model.layers.0") as first, opened.loaded("model.layers.1") as second:
        assert first.mlp.learnt.tolist() == [0, 0, 0]
        assert second.mlp.learnt.tolist() == [1, 2, 3]


def test_statistics_on_top_of_rounded_inputs_are_refused(workshop: Any, codes: Callable[..., Any]) -> None:
    def rounding(name: str, weight: Tensor) -> Formula:
        return Formula([codes(weight, 8, -1)], activation=ActivationQuantiser.of("int8"))

    model = workshop.artifact("rounding", rounding)
    spec = {"statistics": [{"module": Gram.__module__, "class": "Gram"}], "dtype": "float32"}
    with pytest.raises(TaskError, match=r"_proj.weight round its input.*let the stage that rounds inputs come last"):
        workshop.run(calibrate, "gram", spec, model=model, tokens=workshop.tokens())


@pytest.mark.skipif(sys.platform != "linux", reason="reads the Linux kernel's mark of the highest resident size")
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_model_larger_than_the_limit_is_calibrated_and_compressed_in_the_memory_of_two_blocks(tmp_path: Path) -> None:
    # A process of its own, in which tensors of this size go back to the system when they are freed, as those of real size do.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.workers.memory_of_blocks", str(tmp_path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    grown = json.loads(ran.stdout.splitlines()[-1])

    # Hidden states of which a quarter may be in memory, and operands of which few may be.
    assert grown["whole"] > memory_of_blocks.BLOCKS * memory_of_blocks.BLOCK > 2 * memory_of_blocks.LIMIT
    assert grown["calibrate"] < grown["unlimited"] - 0.6 * (memory_of_blocks.HIDDEN - memory_of_blocks.HELD)
    assert {name: grown[name] for name in ("calibrate", "dense", "compressed") if grown[name] > memory_of_blocks.LIMIT} == {}
