"""What is left of a model when units are taken out computes what the whole model does with them set to zero."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import pare
from pare.methods.anatomy.architecture import KEY, filled, reshape
from pare.methods.anatomy.cut import Cut, ties
from pare.methods.anatomy.describe import FAMILIES, Anatomy, Tie, describe
from pare.methods.anatomy.shrink import Shrunk, shrink
from pare.methods.anatomy.views import parse, view
from pare.workers.export.pare_form import export_shrunk
from tests.methods.anatomy.tiny_models import CONFIGS, HIDDEN, TOKENS, logits, stirred, tiny

every = pytest.mark.parametrize("architecture", FAMILIES)
KEPT_HIDDEN = tuple(c for c in range(HIDDEN) if c % 5 != 3)
UNITS = {"ffn": 0.5, "kv": 0.5, "channel": 0.7}
"""Kind of a tie -> share of its units that is kept."""
LAYER_NORM = {"GPT2LMHeadModel", "OPTForCausalLM"}
NEEDS_A_TABLE = {
    "kv": {"GPT2LMHeadModel", "OPTForCausalLM"},  # a head is as wide as hidden_size / heads
    "hidden": {
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Gemma3ForCausalLM",
        "Mamba2ForCausalLM",
    },  # other norms with that eps
}
"""Axis -> classes whose config cannot say what is left, even where all blocks are alike."""


def share(tie: Tie, kept: float, start: int = 1) -> tuple[int, ...]:
    """So many of the units of a tie, and not the first ones."""
    count = max(1, int(tie.units * kept))
    return tuple(sorted((start + u) % tie.units for u in range(count)))


def masked(model: Any, anatomy: Anatomy, cut: Cut) -> Any:
    """A copy of the whole model in which the units that are not kept are zero wherever they stand, and blocks do nothing."""
    changed = copy.deepcopy(model)
    cuts = [(anatomy.blocks[b].ties[t], kept) for (b, t), kept in cut.units.items()]
    if cut.hidden is not None:
        assert anatomy.hidden is not None
        cuts.append((anatomy.hidden, cut.hidden))
    with torch.no_grad():
        for tie, kept in cuts:
            for unit in set(range(tie.units)) - set(kept):
                for side in tie.sides:
                    value = view(changed.get_parameter(parse(side.parameter).parameter), side.parameter)
                    side.of(value, unit).zero_()
    for b, block in enumerate(anatomy.blocks):
        if cut.blocks is not None and b not in cut.blocks:
            nothing = (lambda x, *_, **__: (x,)) if anatomy.returns else (lambda x, *_, **__: x)
            changed.get_submodule(block.name).forward = nothing
    return changed


def check(model: Any, cut: Cut) -> Shrunk:
    """The cut, after a look at whether what is left computes what it should."""
    anatomy = describe(model)
    shrunk = shrink(model, anatomy, cut)
    left = shrunk.model(model.get_parameter, torch.float32)
    torch.testing.assert_close(logits(left), logits(masked(model, anatomy, cut)), rtol=1e-5, atol=1e-5)
    return shrunk


def fewer(anatomy: Anatomy, kind: str) -> Cut:
    return Cut(units={key: share(tie, UNITS[kind]) for key, tie in ties(anatomy, kind).items()})


@every
@pytest.mark.parametrize("kind", ["ffn", "kv", "channel"])
def test_units_of_every_block_are_taken_out_exactly(architecture: str, kind: str, model_of: Callable[[str], Any]) -> None:
    model = model_of(architecture)
    cut = fewer(describe(model), kind)
    if not cut.units:
        pytest.skip("it has none of these")
    shrunk = check(model, cut)
    assert shrunk.is_plain == (architecture not in NEEDS_A_TABLE.get(kind, set()))


@every
def test_units_are_taken_out_exactly_of_one_block_more_than_of_another(
    architecture: str, model_of: Callable[[str], Any]
) -> None:
    model = model_of(architecture)
    anatomy = describe(model)
    units = {key: share(tie, 0.5, start=2) for kind in UNITS for key, tie in ties(anatomy, kind).items() if key[0] == 1}
    if not units:
        pytest.skip("nothing can be taken out of its blocks")
    assert not check(model, Cut(units=units)).is_plain


@every
@pytest.mark.parametrize("kept", [(0, 2), (1, 2), (1,)])
def test_blocks_are_taken_out_exactly(architecture: str, kept: tuple[int, ...], model_of: Callable[[str], Any]) -> None:
    shrunk = check(model_of(architecture), Cut(blocks=kept))
    assert shrunk.is_plain
    assert shrunk.config.num_hidden_layers == len(kept)


@every
@pytest.mark.parametrize("tied", [True, False])
def test_hidden_channels_are_taken_out_exactly_or_not_at_all(architecture: str, tied: bool) -> None:
    model = tiny(architecture, tied)
    if architecture in LAYER_NORM:
        with pytest.raises(ValueError, match=r"layer norms.*the mean that they subtract runs over all channels"):
            shrink(model, describe(model), Cut(hidden=KEPT_HIDDEN))
        return
    shrunk = check(model, Cut(hidden=KEPT_HIDDEN))
    assert shrunk.is_plain == (architecture not in NEEDS_A_TABLE["hidden"])


@every
def test_the_epsilon_of_a_norm_counts_as_much_as_before(architecture: str) -> None:
    if architecture in LAYER_NORM:
        pytest.skip("refused")
    word = "rms_norm_eps" if "rms_norm_eps" in tiny(architecture).config.to_dict() else "layer_norm_epsilon"
    large: dict[str, Any] = {word: 0.05}
    check(tiny(architecture, **large), Cut(hidden=KEPT_HIDDEN))


@every
@pytest.mark.parametrize("is_even", [True, False])
def test_everything_at_once_is_saved_and_opened_with_the_same_logits(
    architecture: str, is_even: bool, model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    model = model_of(architecture)
    anatomy = describe(model)
    units = {}
    for kind in UNITS:
        for key, tie in ties(anatomy, kind).items():
            units[key] = share(tie, UNITS[kind] if is_even or key[0] else 0.9)
    cut = Cut((0, 2), units, None if architecture in LAYER_NORM else KEPT_HIDDEN)
    shrunk = check(model, cut)
    export_shrunk(shrunk, model.get_parameter, tmp_path)

    if shrunk.is_plain:
        opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        stem = "model"
    else:
        opened = pare.load(tmp_path, torch.float32)
        stem = "pare"
        with pytest.raises(OSError, match=r"model\.safetensors"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(opened), logits(shrunk.model(model.get_parameter, torch.float32)))

    whole, left = (sum(p.numel() for p in m.parameters()) for m in (model, opened))
    stored = load_file(tmp_path / f"{stem}.safetensors")
    assert sum(t.numel() for t in stored.values()) == left < 0.8 * whole
    assert {name: tuple(t.shape) for name, t in stored.items()} == {n: p.shape for n, p in shrunk.pieces.items()}


@every
def test_what_is_left_generates_with_a_cache_what_it_does_without(architecture: str, model_of: Callable[[str], Any]) -> None:
    model = model_of(architecture)
    anatomy = describe(model)
    units = {key: share(tie, 0.5) for kind in UNITS for key, tie in ties(anatomy, kind).items() if key[0] == 1}
    left = shrink(model, anatomy, Cut((1, 2), units)).model(model.get_parameter, torch.float32)
    asked: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached, anew = (left.generate(TOKENS[:2, :5], use_cache=use_cache, **asked) for use_cache in (True, False))
    assert cached.shape == (2, 11)
    assert torch.equal(cached, anew)


@every
def test_nothing_but_shapes_is_needed_to_plan_it(architecture: str, model_of: Callable[[str], Any]) -> None:
    model = model_of(architecture)
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    cut = Cut((1, 2), fewer(describe(model), "ffn").units)
    planned, made = shrink(skeleton, describe(skeleton), cut), shrink(model, describe(model), cut)
    assert {n: (p.origin, p.shape) for n, p in planned.pieces.items()} == {
        n: (p.origin, p.shape) for n, p in made.pieces.items()
    }
    assert planned.config.to_dict() == made.config.to_dict()


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel", "MambaForCausalLM"])
def test_what_was_shrunk_can_be_shrunk_again(architecture: str, model_of: Callable[[str], Any]) -> None:
    model = model_of(architecture)
    anatomy = describe(model)
    once = {key: share(tie, 0.75) for kind in UNITS for key, tie in ties(anatomy, kind).items() if key[0] == 1}
    left = shrink(model, anatomy, Cut(units=once)).model(model.get_parameter, torch.float32)
    again = {key: share(tie, 0.7) for kind in UNITS for key, tie in ties(describe(left), kind).items() if tie.units > 1}
    check(left, Cut((1, 2), {key: kept for key, kept in again.items() if key[0] > 0}))


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"])
@pytest.mark.parametrize("tied", [True, False])
def test_hidden_channels_can_be_taken_out_twice(architecture: str, tied: bool) -> None:
    model = tiny(architecture, tied)
    left = shrink(model, describe(model), Cut(hidden=KEPT_HIDDEN)).model(model.get_parameter, torch.float32)
    check(left, Cut(hidden=tuple(range(3, 27))))


def test_a_model_that_scales_attention_by_the_number_of_the_block_keeps_the_scale_of_each() -> None:
    shrunk = check(tiny("GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True), Cut(blocks=(1, 2)))
    assert not shrunk.is_plain


def test_the_dtype_of_a_weight_is_kept_and_so_is_every_bit_that_has_no_factor(model_of: Callable[[str], Any]) -> None:
    model = copy.deepcopy(model_of("LlamaForCausalLM")).bfloat16()
    shrunk = shrink(model, describe(model), Cut(hidden=KEPT_HIDDEN))
    made = dict(shrunk.tensors(model.get_parameter))
    assert {t.dtype for t in made.values()} == {torch.bfloat16}
    up = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(made[up], model.get_parameter(up)[:, list(KEPT_HIDDEN)])


def test_what_a_config_does_not_allow_is_said_in_the_table(model_of: Callable[[str], Any]) -> None:
    assert not check(model_of("LlamaForCausalLM"), Cut(hidden=tuple(range(33)))).is_plain  # 33 is no multiple of 4 heads


def test_blocks_are_taken_out_of_a_model_that_was_found_by_its_structure() -> None:
    config = transformers.StableLmConfig(**CONFIGS["Phi3ForCausalLM"])
    torch.manual_seed(0)
    model = stirred(transformers.StableLmForCausalLM(config).eval())
    assert check(model, Cut(blocks=(0, 2))).is_plain
    with pytest.raises(ValueError, match=r"Anatomy\.hidden"):
        shrink(model, describe(model), Cut(hidden=(0,)))


def test_a_weight_that_is_missing_is_not_made_up(model_of: Callable[[str], Any]) -> None:
    model = model_of("LlamaForCausalLM")
    weights = {name: p for name, p in model.named_parameters() if name != "model.norm.weight"}
    with pytest.raises(ValueError, match=r"no weight for model\.norm\.weight of the LlamaForCausalLM"):
        filled(type(model), model.config, weights, torch.float32)


def test_experts_may_lose_different_features_but_equally_many(model_of: Callable[[str], Any]) -> None:
    model = model_of("Qwen3MoeForCausalLM")
    found = ties(describe(model), "ffn")
    assert check(model, Cut(units={key: share(tie, 0.5, start=sum(key)) for key, tie in found.items()})).is_plain
    one = next(iter(found))
    with pytest.raises(ValueError, match="keep as many units of each expert"):
        shrink(model, describe(model), Cut(units={one: share(found[one], 0.5)}))


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (Cut(blocks=()), r"blocks: kept \[\]; allowed: at least one of 0 to 2"),
        (Cut(blocks=(1, 0)), "ascending"),
        (Cut(blocks=(0, 3)), "0 to 2"),
        (Cut(units={(0, 0): (0, 2)}), r"model.layers.0, tie 0 \(kv\): kept \[0, 2\]; allowed: at least one of 0 to 1"),
        (Cut(units={(0, 7): (0,)}), "no tie 7 in block 0; number of ties in each block"),
        (Cut(hidden=(0, 0)), "each once"),
    ],
)
def test_a_cut_that_does_not_fit_is_refused(cut: Cut, message: str, model_of: Callable[[str], Any]) -> None:
    model = model_of("LlamaForCausalLM")
    with pytest.raises(ValueError, match=message):
        shrink(model, describe(model), cut)


def test_no_hidden_channel_is_taken_out_of_a_model_whose_residual_stream_is_not_known(model_of: Callable[[str], Any]) -> None:
    from dataclasses import replace

    model = model_of("LlamaForCausalLM")
    with pytest.raises(ValueError, match=r"Anatomy\.hidden"):
        shrink(model, replace(describe(model), hidden=None), Cut(hidden=KEPT_HIDDEN))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"shapes": {"model.layers.0.nothing": [1]}, "attributes": {}}, "no such parameter"),
        ({"shapes": {"model.norm.weight": [1, 2]}, "attributes": {}}, "a parameter of shape"),
        ({"shapes": {}, "attributes": {"model": {"forward": 1}}}, "sets forward of model to 1; allowed"),
        ({"shapes": {}, "attributes": {"model.norm": {"variance_epsilon": "x"}}}, "allowed: a number"),
    ],
)
def test_a_table_that_does_not_fit_or_sets_what_it_should_not_is_refused(
    table: dict[str, Any], message: str, model_of: Callable[[str], Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        reshape(copy.deepcopy(model_of("LlamaForCausalLM")), table)


def test_the_table_says_nothing_that_the_config_says(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    model = model_of("LlamaForCausalLM")
    (key, tie), *_ = ties(describe(model), "ffn").items()
    export_shrunk(shrink(model, describe(model), Cut(units={key: share(tie, 0.5)})), model.get_parameter, tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())[KEY]
    mlp = "model.layers.0.mlp"
    assert set(table["shapes"]) == {f"{mlp}.{n}" for n in ("gate_proj.weight", "up_proj.weight", "down_proj.weight",
                                                           "gate_proj.bias", "up_proj.bias")}  # fmt: skip
    assert not table["attributes"]
    left: nn.Module = pare.load(tmp_path)
    assert left.get_submodule(f"{mlp}.up_proj").out_features == CONFIGS["LlamaForCausalLM"]["intermediate_size"] // 2
