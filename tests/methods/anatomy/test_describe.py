from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from pare.methods.anatomy.describe import FAMILIES, Anatomy, Block, Group, UnknownModel, describe, verify

FAMILY_CLASSES = {c.__name__: c for c in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)}


def tiny(family: str, tied: bool = False) -> nn.Module:
    config = FAMILY_CLASSES[family].config_class(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, tie_word_embeddings=tied, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    return FAMILY_CLASSES[family](config).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny("LlamaForCausalLM")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_about_a_family_holds_when_a_model_of_it_runs(family: str, tied: bool) -> None:
    model = tiny(family, tied)
    anatomy = describe(model)
    assert anatomy.tied == tied
    assert [block.name for block in anatomy.blocks] == ["model.layers.0", "model.layers.1"]
    verify(model, anatomy)


def test_groups_and_widths_are_named_and_need_no_weights() -> None:
    with torch.device("meta"):
        anatomy = describe(tiny("LlamaForCausalLM"))
    first = anatomy.blocks[0].groups
    assert [group.name for group in first] == [
        f"model.layers.0.{n}" for n in ("self_attn.qkv", "self_attn.o", "mlp.gate_up", "mlp.down")
    ]
    assert first[2].weights == ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
    assert len(anatomy.widths) == 14
    assert anatomy.widths["model.layers.1.self_attn.k_proj.weight"] == (8, 16)
    assert anatomy.widths["model.layers.1.mlp.down_proj.weight"] == (16, 24)


def test_an_unknown_decoder_is_refused_with_its_class_and_what_to_write() -> None:
    class FooForCausalLM(nn.Module):
        pass

    with pytest.raises(
        UnknownModel, match=r"anatomy of FooForCausalLM is not known \(known: Llama.*Write a function.*FAMILIES"
    ):
        describe(FooForCausalLM())


def changed(anatomy: Anatomy, *groups: Group) -> Anatomy:
    """The anatomy with other groups in its first block."""
    return replace(anatomy, blocks=(Block(anatomy.blocks[0].name, groups), *anatomy.blocks[1:]))


def test_a_wrong_anatomy_is_found_out(model: nn.Module) -> None:
    right = describe(model)
    qkv, o, gate_up, down = right.blocks[0].groups
    q, k, v = qkv.linears
    wrong = {
        r"not those of the input groups: model\.layers\.0\.mlp\.down_proj$": changed(right, qkv, o, gate_up),
        r"a linear in two groups": changed(right, qkv, o, gate_up, down, Group("again", down.linears)),
        r"o_proj does not read the tensor that .*q_proj reads": changed(
            right, Group("qkvo", (*qkv.linears, *o.linears)), gate_up, down
        ),
        r"q and kv read one tensor": changed(right, Group("q", (q,)), Group("kv", (k, v)), o, gate_up, down),
        r"module 3 to run should be .*o_proj, but is .*q_proj": changed(right, o, qkv, gate_up, down),
        r"tied=True, but head and embedding are two": replace(right, tied=True),
        r"norm does not read the tensor that model\.layers\.0 returns": replace(right, blocks=right.blocks[:1]),
    }
    for message, anatomy in wrong.items():
        with pytest.raises(ValueError, match=message):
            verify(model, anatomy)
    verify(model, right)
    assert not any(module._forward_pre_hooks for module in model.modules())
