"""Weights that are no (out, in) parameter of their own: experts in a stack, GPT-2's turned ones, norms, shared ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

import pare
from pare.methods.parts.formula import Dense, Formula
from pare.methods.parts.references import Reference
from pare.workers.models import load_in_memory, write_formulas
from pare.workers.tasks import export
from pare.workers.tiny import tiny_tokenizer

COMMON = {"vocab_size": 258, "pad_token_id": 257, "bos_token_id": 256, "eos_token_id": 256}
MIXTRAL = MixtralConfig(**COMMON, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                        num_key_value_heads=1, num_local_experts=3)  # fmt: skip
GPT2 = GPT2Config(**COMMON, n_embd=32, n_layer=1, n_head=2, n_positions=64)
EXPERTS, TURNED = "model.layers.0.mlp.experts.down_proj", "transformer.h.0.mlp.c_fc.weight^T"


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(40)[None]).logits  # type: ignore[no-any-return]


@pytest.fixture
def made(workshop: Any) -> Callable[..., Any]:
    """An artifact on a random model of a family, with formulas made of (name, weight)."""

    def make(config: Any, code: Callable[[str, Tensor], Formula], names: list[str]) -> Any:
        workshop.base = workshop.root / "base"
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(workshop.base, save_original_format=False)
        tiny_tokenizer().save_pretrained(workshop.base)
        directory = workshop.root / "made"
        directory.mkdir()
        base = workshop.open(workshop.base)
        write_formulas(directory, "fingerprint-of-the-base", {name: code(name, base.stored(name)) for name in names})
        return directory

    return make


@pytest.mark.parametrize(
    ("config", "names"), [(MIXTRAL, [f"{EXPERTS}[1]"]), (MIXTRAL, [f"{EXPERTS}[{i}]" for i in range(3)]), (GPT2, [TURNED])]
)
@pytest.mark.parametrize("form", ["auto", "dense"])
def test_views_of_parameters_are_exported(
    workshop: Any, made: Callable[..., Any], codes: Callable[..., Any], config: Any, names: list[str], form: str
) -> None:
    artifact = made(config, lambda name, weight: Formula([codes(weight, 3, 32)]), names)

    out, result = workshop.run(export, "export", {"card": {}, "format": form}, model=artifact)

    expected = load_in_memory(workshop.open(artifact), torch.bfloat16)
    opened = pare.load(out) if form == "auto" else AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert torch.equal(logits(opened), logits(expected))
    assert not torch.equal(logits(opened), logits(load_in_memory(workshop.open(workshop.base), torch.bfloat16)))
    if form == "auto":
        assert result["format"] == "pare"
        assert "is not the weight of a linear layer" in result["reason"]
        # What is coded takes 3.5 bits; the experts beside it, 16.
        share = len(names) / (3 if config is MIXTRAL else 1)
        assert result["size/linear_bits_per_weight"] == pytest.approx(3.5 * share + 16 * (1 - share))


def test_a_folded_norm_is_exported_in_every_form(workshop: Any, codes: Callable[..., Any]) -> None:
    norm = "model.layers.0.input_layernorm.weight"
    directory = workshop.artifact("plain", lambda name, weight: codes(weight, 4, 32))
    made = {name: workshop.open(directory).effective(name) for name in workshop.open(directory).compressed_names()}
    folded = workshop.root / "folded"
    folded.mkdir()
    vector = torch.linspace(0.5, 2, 64).to(torch.bfloat16)
    write_formulas(folded, "fingerprint-of-the-base", {**made, norm: Formula([Dense(vector[None])])})
    from pare.workers.export.reader import open_export

    expected = logits(load_in_memory(workshop.open(folded), torch.float32))
    found = {}
    for form in ("auto", "dense", "gguf", "pare"):
        out, result = workshop.run(export, form, {"card": {}, "format": form}, model=folded)
        opened = open_export(out, torch.float32).model
        assert torch.equal(opened.get_parameter(norm), vector.float())
        # Plain weights are rounded to the bf16 of the base.
        assert torch.allclose(logits(opened), expected, atol=0.05 if form == "dense" else 1e-6)
        found[form] = result["format"]
    assert found["auto"] == "compressed-tensors"


def test_a_shared_weight_is_stored_once_and_read_twice(workshop: Any, codes: Callable[..., Any]) -> None:
    one, two = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    weight = workshop.open(workshop.base).stored(one)
    formula = Formula([codes(weight, 4, 32)])
    directory = workshop.root / "shared"
    directory.mkdir()
    write_formulas(directory, "fingerprint-of-the-base", {one: formula, two: Formula([Reference(one, formula.shape)])})

    out, _ = workshop.run(export, "export", {"card": {}, "format": "pare"}, model=directory)

    model = pare.load(out, torch.float32)
    assert torch.equal(model.get_parameter(one), formula.materialise())
    assert torch.equal(model.get_parameter(two), formula.materialise())
