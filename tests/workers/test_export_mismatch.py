"""Each form, measured from its directory: the figures of the parts in memory, or a failure that states both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pare.methods.ops.float_grids import FloatGrid
from pare.methods.parts.activations import ActivationQuantiser
from pare.methods.parts.formula import Formula, LowRank
from pare.workers.probe import ExportUnderTest
from pare.workers.task import TaskError
from pare.workers.tasks import evaluate, export, score

MEMORY = {"dtype": "float32", "keep_hidden": False}


def forms(codes: Callable[..., Any]) -> dict[str, tuple[str, str, Callable[[Tensor], Formula]]]:
    """Name -> (export.format, the form that comes of it, weight -> formula)."""

    def repaired(weight: Tensor) -> Formula:
        a, b = torch.full((2, weight.shape[1]), 0.02), torch.full((weight.shape[0], 2), 0.02)
        return Formula([codes(weight, 3, 32), LowRank(a, b)])

    def rounded(weight: Tensor) -> Formula:
        grid = FloatGrid(format="fp8_e4m3")
        return Formula([grid.round_to_nearest(weight.float())], activation=ActivationQuantiser.of("fp8_e4m3"))

    return {
        "gguf": ("gguf", "gguf", lambda w: Formula([codes(w, 4, 32, symmetric=False)])),
        "terms": ("auto", "adapter", repaired),
        "8-bit zero points": ("auto", "compressed-tensors", lambda w: Formula([codes(w, 8, 32, symmetric=False)])),
        "fp8 inputs": ("auto", "compressed-tensors", rounded),
        "nvfp4": ("auto", "compressed-tensors", lambda w: Formula([FloatGrid(format="nvfp4").round_to_nearest(w.float())])),
    }


@pytest.mark.parametrize("name", ["gguf", "terms", "8-bit zero points", "fp8 inputs", "nvfp4"])
def test_what_is_measured_is_what_was_made_and_another_model_is_a_mismatch(
    workshop: Any, codes: Callable[..., Any], name: str
) -> None:
    wanted, form, code = forms(codes)[name]
    tokens = workshop.tokens()
    teacher, _ = workshop.run(score, "teacher", {"dtype": "float32", "keep_hidden": True}, model=workshop.base, tokens=tokens)
    made = {
        "right": workshop.artifact("right", lambda _, weight: code(weight)),
        "wrong": workshop.artifact("wrong", lambda module, w: code(20 * w if module.endswith("0.mlp.down_proj") else w)),
    }
    memory, in_memory = workshop.run(score, "memory", MEMORY, model=made["right"], tokens=tokens, teacher=teacher)
    found = {}
    for which, artifact in made.items():
        out, result = workshop.run(export, f"export-{which}", {"card": {}, "format": wanted}, model=artifact)
        assert result["format"] == form
        probe = ExportUnderTest(str(out), "float32", "cpu")
        found[which] = probe.predict(str(tokens), str(teacher), {"fingerprint-of-the-base": str(workshop.base)})["metrics"]

    assert found["right"]["quality/ppl"] == pytest.approx(in_memory["quality/ppl"], rel=1e-4)
    assert evaluate.compare(found["right"], memory, 0.005)["quality/ppl_in_memory"] == in_memory["quality/ppl"]
    with pytest.raises(TaskError) as error:
        evaluate.compare(found["wrong"], memory, 0.005)
    assert error.value.failure == "export_mismatch"
    for figure in (in_memory["quality/ppl"], found["wrong"]["quality/ppl"]):
        assert f"{figure:.6g}" in str(error.value)
