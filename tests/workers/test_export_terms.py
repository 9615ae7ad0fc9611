"""Low-rank terms beside codes, exported as a PEFT adapter on a base of compressed-tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pare.methods.ops.float_grids import FloatGrid
from pare.methods.parts.formula import Formula, LowRank
from pare.methods.parts.masked import Masked
from pare.workers.export.choose import choose_format
from pare.workers.export.reader import NO_DEPLOYMENT_FIGURE, open_export
from pare.workers.export.schemes import Inexpressible
from pare.workers.models import load_in_memory
from pare.workers.tasks import export, train


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(40)[None]).logits.float()  # type: ignore[no-any-return]


def repaired(code: Callable[[Tensor], Any], scale: float = 1.0) -> Callable[[str, Tensor], Formula]:
    """Codes and the best low-rank term for what they have lost; of rank 3, 4 for v_proj, none for o_proj."""

    def formula(name: str, weight: Tensor) -> Formula:
        codes = code(weight)
        if name.endswith("o_proj"):
            return Formula([codes])
        rank = 4 if name.endswith("v_proj") else 3
        u, s, v = torch.linalg.svd(weight.float() - codes.materialise(), full_matrices=False)
        a, b = v[:rank] / scale, u[:, :rank] * s[:rank]
        return Formula([codes, LowRank(a.to(torch.bfloat16), b.to(torch.bfloat16), scale)])

    return formula


def export_of(workshop: Any, code: Callable[[str, Tensor], Any]) -> tuple[Path, dict[str, Any], Any]:
    artifact = workshop.artifact("made", code)
    out, result = workshop.run(export, "export", {"card": {"base": "random llama"}}, model=artifact)
    return out, result, workshop.open(artifact)


def opened_by_stock_libraries(out: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """As the model card says."""
    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=dtype)
    base.hf_quantizer.compressor.decompress_model(base)
    return PeftModel.from_pretrained(base, str(out)).eval()


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_terms_beside_symmetric_codes_are_an_adapter_of_stock_libraries(
    workshop: Any, codes: Callable[..., Any], scale: float
) -> None:
    out, result, artifact = export_of(workshop, repaired(lambda w: codes(w, 3, 32), scale))

    assert (result["format"], result["opens_with"]) == ("adapter", "transformers + peft + compressed-tensors")
    assert "the low-rank terms of 12 weights" in result["reason"]
    expected = logits(load_in_memory(artifact, torch.float32))
    assert torch.allclose(logits(opened_by_stock_libraries(out)), expected, atol=1e-5)
    opened = open_export(out, torch.float32)
    assert torch.allclose(logits(opened.model), expected, atol=1e-5)
    assert (opened.runtime, opened.notes) == ("peft-cpu", [NO_DEPLOYMENT_FIGURE])


def test_the_terms_are_what_makes_the_difference_and_are_stored_as_they_are(workshop: Any, codes: Callable[..., Any]) -> None:
    out, result, artifact = export_of(workshop, repaired(lambda w: codes(w, 2, 32)))

    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    assert (logits(base) - logits(load_in_memory(artifact, torch.float32))).abs().max() > 0.05
    stored = load_file(out / "adapter_model.safetensors")
    term = artifact.effective("model.layers.0.self_attn.v_proj.weight").parts[1]
    assert torch.equal(stored["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"], term.a)
    assert len(stored) == 24
    weights = [out / "adapter_model.safetensors", out / "base" / "model.safetensors"]
    assert result["size/bytes"] == sum(file.stat().st_size for file in weights)
    names = artifact.compressed_names()
    formulas = sum(artifact.effective(name).nbytes for name in names) + 16 * len(names)  # the shapes that the format keeps
    numbers = sum(artifact.stored(name).numel() for name in names)
    assert result["size/linear_bits_per_weight"] == pytest.approx(8 * formulas / numbers)


def test_terms_beside_zero_points_open_with_dequantize(workshop: Any, codes: Callable[..., Any]) -> None:
    out, result, artifact = export_of(workshop, repaired(lambda w: codes(w, 4, 32, symmetric=False)))

    assert result["opens_with"] == "transformers + peft + compressed-tensors, dequantize=True"
    expected = logits(load_in_memory(artifact, torch.float32))
    found = logits(open_export(out, torch.float32).model)
    assert (found - expected).abs().max() < 0.02 * expected.abs().max(), "that way of loading multiplies in bf16"
    card = (out / "README.md").read_text()
    assert "CompressedTensorsConfig(dequantize=True)" in card
    assert "PeftModel.from_pretrained(model, DIRECTORY)" in card


def test_terms_beside_4_bit_floats_open_too(workshop: Any) -> None:
    out, result, artifact = export_of(workshop, repaired(lambda w: FloatGrid(format="mxfp4").round_to_nearest(w.float())))

    assert result["opens_with"] == "transformers + peft + compressed-tensors, dtype=bfloat16"
    expected = logits(load_in_memory(artifact, torch.float32))
    assert torch.allclose(logits(open_export(out, torch.float32).model), expected, atol=1e-5)
    assert torch.allclose(logits(opened_by_stock_libraries(out, torch.bfloat16)), expected, atol=0.1)


def test_what_the_card_says_runs(workshop: Any, codes: Callable[..., Any]) -> None:
    out, _, artifact = export_of(workshop, repaired(lambda w: codes(w, 4, 32)))

    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("DIRECTORY", repr(str(out)))
    found: dict[str, Any] = {}
    exec(code, found)  # what a person is told to type

    # Opened so, it computes in the bf16 of its base.
    assert torch.allclose(logits(found["model"].eval()), logits(load_in_memory(artifact, torch.bfloat16)), atol=0.1)
    assert found["tokenizer"]("ab").input_ids == [97, 98]


def test_terms_beside_what_no_format_has_stay_in_pares_own_form(workshop: Any) -> None:
    def pruned(name: str, weight: Tensor) -> Formula:
        keep = weight.abs() > weight.abs().median()
        a, b = torch.ones(2, weight.shape[1], dtype=torch.bfloat16), torch.ones(weight.shape[0], 2, dtype=torch.bfloat16)
        return Formula([Masked.of(keep, weight[keep]), LowRank(a, b, 0.01)])

    artifact = workshop.open(workshop.artifact("made", pruned))

    name, why = choose_format(artifact)
    assert name == "pare"
    assert "sum of parts (masked, low_rank)" in why
    with pytest.raises(Inexpressible, match="is stored as masked"):
        choose_format(artifact, "adapter")


def test_an_adapter_trained_on_codes_ships_them_as_codes(workshop: Any, codes: Callable[..., Any]) -> None:
    beneath = workshop.artifact("beneath", lambda name, weight: codes(weight, 4, 32))
    settings = {"steps": 2, "rank": 2, "learning_rate": 0.1, "warmup": 0.0}
    spec = {"method": "lora", "settings": settings, "seed": 0, "dtype": "float32"}
    resolve = workshop.resolve
    workshop.resolve = lambda fingerprint: beneath if fingerprint == "model" else resolve(fingerprint)
    artifact, _ = workshop.run(train, "train", spec, model=beneath, tokens=workshop.tokens())

    out, result = workshop.run(export, "export", {"card": {}}, model=artifact)

    assert result["opens_with"] == "transformers + peft + compressed-tensors"
    assert (out / "base" / "model.safetensors").stat().st_size < (workshop.base / "model.safetensors").stat().st_size
    expected = logits(load_in_memory(workshop.open(artifact), torch.float32))
    assert torch.allclose(logits(opened_by_stock_libraries(out)), expected, atol=1e-4)
    assert torch.allclose(logits(open_export(out, torch.float32).model), expected, atol=1e-4)
