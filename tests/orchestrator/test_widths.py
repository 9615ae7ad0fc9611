from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import OlmoeConfig

from pare.orchestrator import cli
from pare.orchestrator.widths import STORED_AS_THEY_ARE, with_widths
from pare.workers.sources import describe_model
from pare.workers.tiny import tiny_tokenizer
from tests.methods.anatomy.tiny_models import CONFIGS, tiny

SHAPED = ["MixtralForCausalLM", "GPT2LMHeadModel", "MambaForCausalLM", "Mamba2ForCausalLM", "Qwen2MoeForCausalLM"]


@pytest.mark.parametrize("architecture", SHAPED)
def test_shapes_are_known_before_there_are_weights_as_methods_see_them(architecture: str, tmp_path: Path) -> None:
    from pare.methods.anatomy.describe import describe

    model = tiny(architecture)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    known = with_widths(describe_model({"source": "hf", "path": str(tmp_path)}))
    assert known["linears"] == {name: list(width) for name, width in describe(model).widths.items()}
    assert known["n_parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("architecture", sorted(STORED_AS_THEY_ARE))
def test_what_is_stored_as_it_is_needs_no_skeleton(architecture: str, tmp_path: Path) -> None:
    from pare.methods.anatomy.describe import describe

    assert architecture in CONFIGS
    model = tiny(architecture)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    known = describe_model({"source": "hf", "path": str(tmp_path)})
    assert with_widths(known) is known
    assert known["linears"] == {name: list(width) for name, width in describe(model).widths.items()}


def test_a_model_whose_parts_are_not_found_is_refused_while_planning_with_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from transformers import OlmoeForCausalLM

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARE_HOME", str(tmp_path / "home"))
    config = OlmoeConfig(
        hidden_size=32, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_hidden_layers=2,
        num_experts_per_tok=2, vocab_size=64, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == ["OlmoeForCausalLM"]
    assert (
        cli.main(["plan", "recipe=rtn", "recipe.quantize.group_size=16", "model=hf", f"model.path={tmp_path / 'model'}"]) == 2
    )
    said = capsys.readouterr().err
    assert "rtn works on input groups, and the anatomy of OlmoeForCausalLM is not known" in said
    assert "@family" in said
