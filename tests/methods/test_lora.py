from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pare.methods.contract import Context
from pare.methods.finetune.lora import Lora
from pare.methods.settings import SettingsError

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.arange(24).view(2, 12)
CONTEXT = Context(torch.device("cpu"))


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits.float()  # type: ignore[no-any-return]


def trained(method: Lora, model: nn.Module | None = None) -> nn.Module:
    """A prepared model whose adapters have been given values as training would."""
    adapted = method.prepare(model or llama(), CONTEXT).eval()
    torch.manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


def test_before_training_the_adapted_model_is_the_base() -> None:
    base = logits(llama())

    for method in (Lora(), Lora(init="gaussian", rslora=True)):
        assert torch.equal(logits(method.prepare(llama(), CONTEXT).eval()), base)


def test_disabling_the_adapters_restores_the_base_exactly() -> None:
    model = trained(Lora())
    assert not torch.allclose(logits(model), logits(llama()), atol=1e-2)

    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("settings", [{}, {"rank": 4, "alpha": 3, "rslora": True}, {"targets": "q_v"}])
def test_base_plus_formula_is_the_weight_that_peft_merges(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = trained(Lora(**settings))
    before = logits(model)
    formulas = Lora(**settings).finish(model, tmp_path)

    ours = llama()
    with torch.no_grad():
        for name, formula in formulas.items():
            assert formula.op == "add"
            ours.get_parameter(name).add_(formula.materialise())
    merged = model.merge_and_unload()

    for name, parameter in merged.named_parameters():
        assert torch.allclose(ours.get_parameter(name), parameter, atol=1e-5), name
    assert torch.allclose(logits(ours), before, atol=1e-5)


def test_the_saved_adapter_opens_with_peft_and_is_what_was_trained(tmp_path: Path) -> None:
    model = trained(Lora())
    Lora().finish(model, tmp_path)

    opened = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()

    assert torch.allclose(logits(opened), logits(model), atol=1e-6)


def test_the_saved_files_name_no_place_and_have_one_order(tmp_path: Path) -> None:
    model = trained(Lora(rank=4))
    model.get_base_model().config._name_or_path = model.get_base_model().name_or_path = "/some/machine/path"

    Lora(rank=4).finish(model, tmp_path)

    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    config = json.loads(text)
    assert "/some/machine" not in text
    assert config["base_model_name_or_path"] == "base"
    assert config["target_modules"] == sorted(LEAVES)


def test_formulas_hold_the_very_tensors_that_are_saved(tmp_path: Path) -> None:
    formulas = Lora().finish(trained(Lora()), tmp_path)

    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")

    assert len(saved) == 2 * len(formulas) == 2 * 2 * len(LEAVES)
    for name, formula in formulas.items():
        prefix = "base_model.model." + name.removesuffix(".weight")
        assert torch.equal(saved[f"{prefix}.lora_A.weight"], formula.parts[0].a)
        assert torch.equal(saved[f"{prefix}.lora_B.weight"], formula.parts[0].b)


def test_rank_times_in_plus_out_numbers_are_trained_and_stored(tmp_path: Path) -> None:
    model = Lora(rank=3).prepare(llama(), CONTEXT)
    Lora(rank=3).finish(model, tmp_path)

    # q, o: 64 + 64; k, v: 64 + 32; gate, up, down: 64 + 96. Two blocks.
    expected = 2 * 3 * (2 * 128 + 2 * 96 + 3 * 160)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert sum(t.nbytes for t in stored.values()) == 4 * expected


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16 / 4), (True, 16 / math.sqrt(4))])
def test_the_scale_is_alpha_over_rank_or_over_its_root(tmp_path: Path, rslora: bool, scale: float) -> None:
    method = Lora(rank=4, alpha=16, rslora=rslora)

    formulas = method.finish(method.prepare(llama(), CONTEXT), tmp_path)

    assert {formula.parts[0].scale for formula in formulas.values()} == {scale}


@pytest.mark.parametrize(
    ("targets", "leaves", "blocks"),
    [
        ("all-linear", LEAVES, (0, 1)),
        ("attention", LEAVES[:4], (0, 1)),
        ("q_v", ("q_proj", "v_proj"), (0, 1)),
        (".*mlp.*", LEAVES[4:], (0, 1)),
        (r"model\.layers\.1\..*(o|up)_proj", ("o_proj", "up_proj"), (1,)),
    ],
)
def test_targets_mean_these_linears_and_survive_a_reload(
    tmp_path: Path, targets: str, leaves: tuple[str, ...], blocks: tuple[int, ...]
) -> None:
    method = Lora(targets=targets)
    model = trained(method)

    formulas = method.finish(model, tmp_path)
    opened = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()

    found = {(int(name.split(".")[2]), name.split(".")[4]) for name in formulas}
    assert found == {(block, leaf) for block in blocks for leaf in leaves}
    assert torch.allclose(logits(opened), logits(model), atol=1e-6)


def test_an_expression_that_fits_no_linear_says_which_linears_there_are() -> None:
    with pytest.raises(ValueError, match=r"targets='\.\*c_attn'.*down_proj, gate_proj, .*v_proj.*Try: targets=all-linear"):
        Lora(targets=".*c_attn").prepare(llama(), CONTEXT)


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("rank", 0, r"\[1, inf\)"),
        ("alpha", 0, r"\[1, inf\)"),
        ("dropout", 1.0, r"\[0, 1\)"),
        ("init", "pissa", "default, gaussian"),
        ("targets", "all_linear", "all-linear, attention, q_v or a regular expression"),
        ("targets", ".*(q_proj", "regular expression"),
        ("targets", "", "regular expression"),
        ("steps", 0, r"\[1, inf\)"),
        ("micro_batch_size", 2, "divisor of batch_size=1"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(setting: str, value: Any, allowed: str) -> None:
    with pytest.raises(SettingsError, match=rf"lora\.{setting} must be .*{allowed}"):
        Lora(**{setting: value})


def test_the_initial_values_depend_on_init_seed_alone() -> None:
    def first(init_seed: int, trial_seed: int) -> Tensor:
        torch.manual_seed(trial_seed)
        model = Lora(init_seed=init_seed).prepare(llama(), Context(torch.device("cpu"), trial_seed))
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    assert torch.equal(first(0, 1), first(0, 2))
    assert not torch.equal(first(0, 1), first(3, 1))


def test_preparing_leaves_the_global_random_state_alone() -> None:
    model = llama()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)

    Lora().prepare(model, CONTEXT)

    assert torch.equal(torch.rand(3), expected)


def test_what_is_trained_is_float32_and_everything_else_is_frozen_in_the_compute_dtype() -> None:
    model = Lora().prepare(llama(torch.bfloat16), CONTEXT)

    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name


def test_checkpointing_activations_changes_memory_and_not_gradients() -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = trained(Lora()).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        assert model.is_gradient_checkpointing == checkpointing
        total, _ = Lora().loss(model, {"input_ids": IDS})
        total.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for kept, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.allclose(kept, recomputed, atol=1e-6)
