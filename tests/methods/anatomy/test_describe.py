from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pare.methods.anatomy.describe import Anatomy, Block, Fold, Group, UnknownModel, describe, family_of, verify
from tests.methods.anatomy.tiny_models import tiny


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("LlamaForCausalLM")


@pytest.fixture(scope="module")
def routed() -> Any:
    return tiny("Qwen2MoeForCausalLM")


def test_groups_and_widths_are_named() -> None:
    with torch.device("meta"):
        anatomy = describe(tiny("LlamaForCausalLM"))
    first = anatomy.blocks[0].groups
    assert [group.name for group in first] == [
        f"model.layers.0.{n}" for n in ("self_attn.qkv", "self_attn.o", "mlp.gate_up", "mlp.down")
    ]
    assert first[2].weights == ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
    assert len(anatomy.widths) == 21
    assert anatomy.widths["model.layers.1.self_attn.k_proj.weight"] == (16, 40)
    assert anatomy.widths["model.layers.1.mlp.down_proj.weight"] == (40, 56)


def test_experts_are_groups_of_their_own_and_routers_are_left_out(routed: Any) -> None:
    plain, with_experts, _ = describe(routed).blocks
    assert not plain.left_out
    assert set(with_experts.left_out) == {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.shared_expert_gate.weight"}
    groups = {group.name.removeprefix("model.layers.1.mlp."): group for group in with_experts.groups}
    third = groups["experts.down[2]"]
    assert third.weights == ("model.layers.1.mlp.experts.down_proj[2]",)
    assert third.routed
    assert not groups["shared_expert.down"].routed
    assert third.fold == Fold("linear", ("model.layers.1.mlp.experts.gate_up_proj[2]",), start=24)
    assert groups["experts.gate_up[0]"].fold is None  # the norm before it feeds the router and the other experts too


def test_what_is_fused_or_turned_round_is_one_weight_of_which_a_fold_takes_the_rows_it_needs() -> None:
    qkv, o, gate_up, down = describe(tiny("Phi3ForCausalLM")).blocks[0].groups
    assert qkv.weights == ("model.layers.0.self_attn.qkv_proj.weight",)
    assert o.fold == Fold("linear", qkv.weights, repeat=2, head=10, start=60)
    assert down.fold == Fold("linear", gate_up.weights, start=56)
    qkv, o, up, down = describe(tiny("GPT2LMHeadModel")).blocks[0].groups
    assert qkv.weights == ("transformer.h.0.attn.c_attn.weight^T",)
    assert o.fold == Fold("linear", (*qkv.weights, "transformer.h.0.attn.c_attn.bias"), head=10, start=80)
    assert up.fold == Fold("norm", ("transformer.h.0.ln_2.weight", "transformer.h.0.ln_2.bias"))
    assert down.fold is None  # GELU of a smaller number is not a smaller GELU in proportion


def test_an_opt_of_another_build_is_refused_with_the_reason() -> None:
    with pytest.raises(UnknownModel, match="as opt-350m does"):
        describe(tiny("OPTForCausalLM", word_embed_proj_dim=24))


def test_a_class_that_nobody_knows_is_refused_before_there_is_a_model_and_one_of_transformers_is_tried() -> None:
    with pytest.raises(UnknownModel, match=r"anatomy of FooForCausalLM is not known \(known: Llama.*@family\('FooFor"):
        family_of("FooForCausalLM")
    assert family_of("StableLmForCausalLM").__name__ == "find"


def changed(anatomy: Anatomy, *groups: Group, at: int = 0) -> Anatomy:
    """The anatomy with other groups in one of its blocks."""
    blocks = list(anatomy.blocks)
    blocks[at] = Block(blocks[at].name, groups, blocks[at].left_out)
    return replace(anatomy, blocks=tuple(blocks))


def test_a_wrong_anatomy_is_found_out(model: Any) -> None:
    right = describe(model)
    qkv, o, gate_up, down = right.blocks[0].groups
    q, k, v = qkv.weights
    wrong = {
        r"model\.layers\.0 are not those of its input groups and those left out: model\.layers\.0\.mlp\.down_proj\.weight$": (
            changed(right, qkv, o, gate_up)
        ),
        r"a weight in two groups": changed(right, qkv, o, gate_up, down, Group("again", down.weights)),
        r"o_proj.weight does not read the tensor that .*q_proj.weight reads": changed(
            right, Group("qkvo", (*qkv.weights, *o.weights)), gate_up, down
        ),
        r"q and kv read one tensor": changed(right, Group("q", (q,)), Group("kv", (k, v)), o, gate_up, down),
        r"number 3 to run should be .*o_proj.weight, but is .*q_proj.weight": changed(right, o, qkv, gate_up, down),
        r"tied=True, but head and embedding are two": replace(right, tied=True),
        r"norm does not read the tensor that model\.layers\.1 returns": replace(
            right, blocks=right.blocks[:2], widths={n: w for n, w in right.widths.items() if "layers.2" not in n}
        ),
        r"the widths are not those of the weights: .*q_proj": replace(right, widths=right.widths | {q: (1, 2)}),
    }
    for message, anatomy in wrong.items():
        with pytest.raises(ValueError, match=message):
            verify(model, anatomy)
    verify(model, right)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_wrong_anatomy_of_experts_is_found_out(routed: Any) -> None:
    right = describe(routed)
    groups = right.blocks[1].groups
    without_last = {n: w for n, w in right.widths.items() if n != "model.layers.1.mlp.experts.down_proj[3]"}
    with pytest.raises(ValueError, match=r"stand in no input group: model\.layers\.1\.mlp\.experts\.down_proj\[3\]"):
        verify(routed, replace(changed(right, *groups[:-1], at=1), widths=without_last))
    joined = Group("both", (*groups[-4].weights, *groups[-2].weights), routed=True)
    assert "gate_up" in groups[-4].name
    with pytest.raises(ValueError, match=r"number \d+ to run should be|does not read the tensor"):
        verify(routed, changed(right, *groups[:-4], joined, groups[-3], groups[-1], at=1))
