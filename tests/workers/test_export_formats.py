"""The formats of compressed-tensors, each opened by plain transformers and held against the model in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pare.methods.ops.float_grids import FloatGrid
from pare.methods.parts.activations import E2M1, E4M3, ActivationQuantiser
from pare.methods.parts.codebooks import Integer
from pare.methods.parts.codes import Codes, Rows, Tiles
from pare.methods.parts.formula import Dense, Formula
from pare.workers.export.compressed_tensors import schemes
from pare.workers.export.reader import open_export
from pare.workers.export.schemes import Inexpressible, scheme_of
from pare.workers.models import load_in_memory
from pare.workers.task import TaskError
from pare.workers.tasks import export

CARD = {"base": "random llama"}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None]).logits.float()


def floats(name: str, group: int = 0) -> Callable[[Tensor], Codes]:
    """weight -> codes of a format of `FloatGrid`."""
    return lambda weight: FloatGrid(format=name, group_size=group).round_to_nearest(weight.float())


def one_scale(weight: Tensor) -> Codes:
    """FP8 codes with one scale for the weight."""
    scale = (weight.float().abs().max() / E4M3.largest).to(torch.bfloat16)
    return Codes.of(E4M3.nearest(weight.float() / scale.float()), E4M3, Rows(-1), scale)


def check_plain(
    workshop: Any,
    code: Callable[[str, Tensor], Any],
    fmt: str,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 0.0,
) -> Any:
    """Exports, opens with plain transformers in `dtype`, compares with memory; returns (result, quantization_config).

    tolerance: greatest difference of a logit; 0: not a bit.
    """
    from transformers import AutoModelForCausalLM

    artifact = workshop.artifact("made", code)
    out, result = workshop.run(export, "export", {"card": CARD}, model=artifact)
    opened = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
    expected = logits(load_in_memory(workshop.open(artifact), dtype))
    assert (logits(opened) - expected).abs().max() <= tolerance
    assert result["size/bytes"] == (out / "model.safetensors").stat().st_size
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (result["format"], said["format"]) == ("compressed-tensors", fmt)
    return result, said


@pytest.mark.parametrize("group", [-1, 32])
def test_8_bit_codes_with_zero_points_open_plainly(workshop: Any, codes: Callable[..., Any], group: int) -> None:
    result, said = check_plain(workshop, lambda name, weight: codes(weight, 8, group, symmetric=False), "int-quantized")

    assert result["opens_with"] == "transformers + compressed-tensors"
    assert said["config_groups"]["group_0"]["weights"]["symmetric"] is False


@pytest.mark.parametrize(
    ("code", "strategy"), [(one_scale, "tensor"), (floats("fp8_e4m3"), "channel"), (floats("fp8_e4m3", 32), "group")]
)
def test_fp8_opens_plainly(workshop: Any, code: Callable[[Tensor], Codes], strategy: str) -> None:
    _, said = check_plain(workshop, lambda name, weight: code(weight), "float-quantized")

    assert said["config_groups"]["group_0"]["weights"]["strategy"] == strategy
    stored = load_file(workshop.root / "export" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(("name", "bits"), [("nvfp4", 4.5), ("mxfp4", 4.25)])
def test_fp4_opens_plainly_in_bfloat16_and_by_pare_in_any_dtype(workshop: Any, name: str, bits: float) -> None:
    result, _ = check_plain(workshop, lambda _, weight: floats(name)(weight), f"{name}-pack-quantized", torch.bfloat16)

    assert result["opens_with"] == "transformers + compressed-tensors, dtype=bfloat16"
    assert 'dtype="bfloat16"' in (workshop.root / "export" / "README.md").read_text()
    # 4 bits a code and 8 a scale, for 16 codes or 32, and a global scale for each of the 14 linears.
    assert result["size/linear_bits_per_weight"] == pytest.approx(bits, abs=0.02)
    opened = open_export(workshop.root / "export", torch.float32)
    expected = logits(load_in_memory(workshop.open(workshop.root / "made"), torch.float32))
    assert opened.model.dtype == torch.float32
    assert torch.equal(logits(opened.model), expected), "these products need no more digits than bfloat16 has"


@pytest.mark.xfail(strict=True, raises=RuntimeError, reason="compressed-tensors 0.20 unpacks FP4 to bfloat16")
def test_fp4_opens_plainly_in_float32(workshop: Any) -> None:
    """When this passes, the way of opening `bfloat16` can go: from `schemes.py`, `stock.py` and the export task."""
    check_plain(workshop, lambda _, weight: floats("mxfp4")(weight), "mxfp4-pack-quantized")


def test_formats_mix_where_each_is_opened_plainly(workshop: Any, codes: Callable[..., Any]) -> None:
    def code(name: str, weight: Tensor) -> Codes:
        if "mlp" in name:
            return floats("fp8_e4m3")(weight)
        return codes(weight, 8, 32, symmetric=False) if "o_proj" in name else codes(weight, 3, 64)

    result, said = check_plain(workshop, code, "mixed-precision")

    assert {group["format"] for group in said["config_groups"].values()} == {
        "float-quantized",
        "int-quantized",
        "pack-quantized",
    }
    assert "vLLM" not in result["reason"], "q, k and v are alike, and so are gate and up"
    assert result["notes"] == []


def test_unlike_schemes_in_what_vllm_fuses_are_written_and_said(workshop: Any, codes: Callable[..., Any]) -> None:
    result, _ = check_plain(workshop, lambda name, w: codes(w, 3 if "k_proj" in name else 4, 32), "pack-quantized")

    assert result["opens_with"] == "transformers + compressed-tensors"
    assert "vLLM does not" in result["reason"]
    assert "differ in 2 places, first at model.layers.0.self_attn.q_proj" in result["reason"]
    assert result["notes"] == [f"exported as compressed-tensors: {result['reason']}"]


def test_weights_that_are_stored_dense_stand_beside_codes(workshop: Any, codes: Callable[..., Any]) -> None:
    def code(name: str, weight: Tensor) -> Any:
        return Formula([Dense(2 * weight)]) if name.endswith("down_proj") else codes(weight, 4, 32)

    _, said = check_plain(workshop, code, "pack-quantized")

    assert "model.layers.0.mlp.down_proj" in said["ignore"]


def flat_scale(weight: Tensor) -> Codes:
    """FP4 codes whose 8-bit scales are for groups of another size than a format has."""
    scale = Codes.of(torch.full((weight.shape[0], 2), 56), E4M3, Rows(-1), torch.ones(()))
    return Codes.of(E2M1.nearest(weight), E2M1, Rows(32), scale)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (floats("fp6_e2m3"), "codes E2M3, which no format has"),
        (floats("fp4_e2m1", 16), "scales are no codes"),
        (floats("mxfp8"), "scales that are codes themselves"),
        (flat_scale, "groups of 32 with scales"),
        (lambda w: Codes.of(torch.zeros(w.shape), Integer(8, signed=True), Rows(-1), torch.ones(())), "one scale for all"),
        (lambda w: Codes.of(torch.zeros(w.shape), Integer(4, signed=True), Tiles(4, 4), torch.ones(24, 16)), "not consecutive"),
    ],
)
def test_codes_that_no_format_has_are_refused_with_the_reason(code: Callable[[Tensor], Codes], reason: str) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))

    with pytest.raises(Inexpressible, match=reason):
        scheme_of(Formula([code(weight)]))


def test_a_view_of_a_parameter_is_no_linear(workshop: Any, codes: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = workshop.open(workshop.artifact("made", lambda name, weight: codes(weight, 4, 32)))
    monkeypatch.setattr(artifact, "compressed_names", lambda: ["model.layers.0.mlp.experts.gate_up_proj[3]"])
    monkeypatch.setattr(artifact, "effective", lambda name: Formula([codes(torch.ones(32, 32), 4, 32)]))

    with pytest.raises(Inexpressible, match=r"gate_up_proj\[3\] is not the weight of a linear layer"):
        schemes(artifact)


def quantised_inputs(code: Callable[[Tensor], Codes], quantiser: ActivationQuantiser) -> Callable[[str, Tensor], Formula]:
    return lambda name, weight: Formula([code(weight)], activation=quantiser)


@pytest.mark.parametrize("scale", [None, torch.tensor(0.05)])
@pytest.mark.parametrize(("bits", "fmt"), [(8, "int-quantized"), (4, "pack-quantized")])
def test_8_bit_inputs_before_integers_open_plainly(
    workshop: Any, codes: Callable[..., Any], bits: int, fmt: str, scale: Tensor | None
) -> None:
    inputs = ActivationQuantiser.of("int8", scale)
    _, said = check_plain(workshop, quantised_inputs(lambda w: codes(w, bits, -1), inputs), fmt, tolerance=2e-3)

    strategy = "token" if scale is None else "tensor"
    assert said["config_groups"]["group_0"]["input_activations"]["strategy"] == strategy


@pytest.mark.parametrize("scale", [None, torch.tensor(0.02)])
def test_fp8_inputs_before_fp8_open_plainly(workshop: Any, scale: Tensor | None) -> None:
    inputs = ActivationQuantiser.of("fp8_e4m3", scale)

    check_plain(workshop, quantised_inputs(floats("fp8_e4m3"), inputs), "float-quantized", tolerance=2e-3)


@pytest.mark.parametrize(("name", "scale"), [("nvfp4", torch.tensor(2.0**-8)), ("mxfp4", None)])
def test_fp4_inputs_before_fp4_open(workshop: Any, name: str, scale: Tensor | None) -> None:
    artifact = workshop.artifact("made", quantised_inputs(floats(name), ActivationQuantiser.of(name, scale)))

    out, result = workshop.run(export, "export", {"card": CARD}, model=artifact)

    assert result["format"] == "compressed-tensors"
    expected = logits(load_in_memory(workshop.open(artifact), torch.float32))
    found = logits(open_export(out, torch.float32).model)
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()


def test_a_quantised_input_is_kept_by_pares_own_form_and_refused_by_plain_weights(
    workshop: Any, codes: Callable[..., Any]
) -> None:
    plain = workshop.artifact("plain", lambda name, weight: codes(weight, 3, 32))
    code = quantised_inputs(lambda w: codes(w, 3, 32), ActivationQuantiser.of("mxfp8"))
    artifact = workshop.artifact("made", code)

    out, result = workshop.run(export, "export", {"card": CARD}, model=artifact)

    assert result["format"] == "pare"
    assert "quantises its input in a way that no format has" in result["reason"]
    expected = logits(load_in_memory(workshop.open(artifact), torch.float32))
    assert torch.equal(logits(open_export(out, torch.float32).model), expected)
    assert not torch.allclose(expected, logits(load_in_memory(workshop.open(plain), torch.float32)), atol=1e-4)
    for form in ("dense", "gguf"):
        with pytest.raises(TaskError, match=f"export.format={form} cannot say what this model is: .* quantised"):
            workshop.run(export, form, {"card": CARD, "format": form}, model=artifact)
