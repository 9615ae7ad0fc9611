from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pare.methods.anatomy.views import weight_of
from pare.methods.contract import Context
from pare.methods.finetune.full import Full
from pare.methods.ops.sparsity import Pattern, part_of
from pare.methods.parts.codebooks import Integer
from pare.methods.parts.codes import Codes, Rows
from pare.methods.parts.formula import Dense, Formula, LowRank
from pare.methods.parts.masked import Kept, Masked, NofM
from pare.methods.settings import SettingsError

NORMS = [f"model.layers.{i}.{place}_layernorm" for i in (0, 1) for place in ("input", "post_attention")]
CPU = torch.device("cpu")
IDS = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(4))


def llama(dtype: torch.dtype = torch.float32, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def dense(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, Formula]:
    """What the worker says of a model that nothing has been done to."""
    return {name: Formula([Dense(torch.atleast_2d(p.detach()).to(dtype))]) for name, p in model.named_parameters()}


def pruned(model: nn.Module, pattern: Pattern | None = None) -> dict[str, Formula]:
    """The same of one whose linears have been pruned to half."""
    formulas = dense(model)
    for name, formula in formulas.items():
        if "_proj.weight" in name:
            weight = formula.materialise()
            keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
            if pattern:
                keep = torch.tensor([True, False, False, True]).repeat(weight.shape[1] // 4).expand_as(weight)
            formulas[name] = Formula([part_of(keep, weight[keep].to(torch.bfloat16), pattern)])
            weight_of(model, name).data.copy_(formulas[name].materialise())
    return formulas


def take_steps(method: Full, model: nn.Module, steps: int = 3) -> list[float]:
    """As the loop does, weight decay included."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        total, tokens = method.loss(model.train(), {"input_ids": IDS})
        (total / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((total / tokens).item())
    return losses


def trained(model: nn.Module, formulas: dict[str, Formula], **settings: Any) -> tuple[Full, dict[str, Formula]]:
    method = Full(**settings)
    prepared = method.prepare(model, Context(CPU, formulas=formulas))
    losses = take_steps(method, prepared)
    assert losses[-1] < losses[0]
    return method, method.finish(prepared, Path("/nowhere"))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits.float()  # type: ignore[no-any-return]


def put_in(model: nn.Module, formulas: dict[str, Formula]) -> nn.Module:
    with torch.no_grad():
        for name, formula in formulas.items():
            value = weight_of(model, name)
            value.copy_(formula.materialise().view(value.shape))
    return model


def test_all_weights_learn_and_the_formulas_are_the_trained_model() -> None:
    model = llama()

    _, formulas = trained(model, dense(model, torch.float32))

    assert formulas.keys() == dict(llama().named_parameters()).keys(), "a tied head is the embedding"
    assert torch.allclose(logits(put_in(llama(), formulas)), logits(model), atol=1e-6)
    for name, parameter in llama().named_parameters():
        assert not torch.equal(formulas[name].materialise().view(parameter.shape), parameter), name


def test_a_tied_head_stays_tied_whichever_name_means_it() -> None:
    model = llama()

    _, formulas = trained(model, dense(model), parameters=r"lm_head\.weight")

    assert list(formulas) == ["model.embed_tokens.weight"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("settings", "meant"),
    [
        (
            {"parameters": "norm"},
            {"model.norm", *(f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention"))},
        ),
        ({"parameters": "embedding"}, {"model.embed_tokens"}),
        ({"parameters": r".*o_proj\.weight"}, {f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)}),
        ({"parameters": "bias", "last_blocks": 1}, {f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"}),
    ],
)
def test_only_what_is_meant_is_trained(settings: dict[str, Any], meant: set[str]) -> None:
    model = llama(tied=False)

    _, formulas = trained(model, dense(model, torch.float32), **settings)

    assert {name.rpartition(".")[0] for name in formulas} == meant
    for name, parameter in llama(tied=False).named_parameters():
        assert torch.equal(model.get_parameter(name), parameter) == (name not in formulas), name


def test_linears_are_those_of_the_blocks() -> None:
    model = llama(tied=False)

    _, formulas = trained(model, dense(model), parameters="linear", last_blocks=1)

    assert len(formulas) == 7
    assert all(name.startswith("model.layers.1.") and name.endswith("_proj.weight") for name in formulas)


def test_the_result_is_stored_as_it_was_found_unless_another_dtype_is_asked_for() -> None:
    found = {}
    for store in ("as_found", "float32", "float16"):
        model = llama()
        _, formulas = trained(model, dense(model, torch.bfloat16), parameters="norm", store=store)
        found[store] = {t.dtype for formula in formulas.values() for t in formula.tensors().values()}

    assert found == {"as_found": {torch.bfloat16}, "float32": {torch.float32}, "float16": {torch.float16}}


def test_in_bfloat16_what_is_trained_is_float32_and_starts_from_the_stored_values() -> None:
    """Steps of 1e-5 would be lost in bfloat16, and so would the digits that the base has and the model does not."""
    exact = llama()
    model = llama(torch.bfloat16)
    method = Full(parameters="linear")

    method.prepare(model, Context(CPU, formulas=dense(exact, torch.float32)))

    for name, parameter in model.named_parameters():
        if "_proj.weight" in name:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, exact.get_parameter(name))
        else:
            assert parameter.dtype == torch.bfloat16
            assert not parameter.requires_grad


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
def test_zeros_of_a_pruned_model_stay_zero_and_the_result_takes_no_more_bytes(pattern: Pattern | None) -> None:
    model = llama()
    before = pruned(model, pattern)

    _, formulas = trained(model, before)

    assert sum(f.nbytes for f in formulas.values()) == sum(f.nbytes for f in before.values())
    for name, formula in before.items():
        part = formulas[name].parts[0]
        if isinstance(formula.parts[0], Kept):
            assert type(part) is (Masked if pattern is None else NofM)
            gone = formula.materialise() == 0
            assert (model.get_parameter(name)[gone] == 0).all()
            assert (formulas[name].materialise()[gone] == 0).all()
            assert not torch.equal(formulas[name].materialise(), formula.materialise()), name
    # What is measured is what is stored: rounded to bfloat16, as it was found.
    assert torch.allclose(logits(put_in(llama(), formulas)), logits(model), atol=0.1)


def test_gradients_of_what_is_pruned_are_zero_before_they_are_clipped() -> None:
    model = llama()
    before = pruned(model)
    method = Full()
    prepared = method.prepare(model, Context(CPU, formulas=before))

    method.loss(prepared, {"input_ids": IDS})[0].backward()

    for name, formula in before.items():
        if isinstance(formula.parts[0], Kept):
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            assert not gradient[formula.materialise() == 0].any()
            assert gradient.any()


def test_an_optimizer_that_moves_zeros_is_refused_by_name(tmp_path: Path) -> None:
    model = llama()
    method = Full(optimizer="galore_adamw")
    method.prepare(model, Context(CPU, formulas=pruned(model)))
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").add_(1e-9)

    with pytest.raises(SettingsError, match=r"full\.optimizer must be one that moves .*up_proj\.weight, got 'galore_adamw'"):
        method.finish(model, tmp_path)


def test_a_weight_that_is_stored_the_other_way_round_keeps_its_mask() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=16)).eval()
    name = "transformer.h.0.mlp.c_fc.weight"
    weight = model.get_parameter(name).detach().T
    keep = torch.rand(weight.shape) < 0.5
    formulas = dense(model, torch.float32)
    del formulas[name]
    formulas[f"{name}^T"] = Formula([Masked.of(keep, weight[keep])])

    _, found = trained(model, formulas)

    assert name not in found
    assert isinstance(found[f"{name}^T"].parts[0], Masked)
    assert (model.get_parameter(name).T[~keep] == 0).all()
    assert torch.equal(found[f"{name}^T"].materialise(), model.get_parameter(name).T)


def codes(weight: Tensor) -> Codes:
    scale = weight.abs().amax(1, keepdim=True) / 7
    return Codes.of((weight / scale).round().clamp(-8, 7) + 8, Integer(4, signed=True), Rows(-1), scale)


def test_codes_are_refused_with_what_to_do_and_trained_dense_where_that_is_asked_for() -> None:
    model, name = llama(), "model.layers.0.mlp.up_proj.weight"
    formulas = dense(model, torch.float32)
    formulas[name] = Formula([codes(model.get_parameter(name).detach())])

    with pytest.raises(SettingsError, match=r"full\.decode must be true .*up_proj\.weight: it is made of codes.*got False"):
        Full().prepare(llama(), Context(CPU, formulas=formulas))
    _, without = trained(llama(), formulas, parameters=r".*down_proj\.weight")
    _, found = trained(model, formulas, decode=True, store="bfloat16")

    assert len(without) == 2
    assert isinstance(found[name].parts[0], Dense)
    assert found[name].nbytes == 2 * 64 * 96


def test_an_update_on_dense_weights_is_taken_in_and_one_on_sparse_weights_is_refused() -> None:
    model, name = llama(), "model.layers.0.mlp.up_proj.weight"
    formulas = dense(model, torch.float32)
    update = LowRank(torch.randn(2, 64), torch.randn(96, 2), 0.1)
    formulas[name] = formulas[name].plus(Formula([update], op="add"))
    sparse = pruned(llama())
    sparse[name] = sparse[name].plus(Formula([update], op="add"))

    _, found = trained(model, formulas)

    assert [part.kind for part in found[name].parts] == ["dense"]
    with pytest.raises(SettingsError, match=r"made of masked \+ low_rank"):
        Full().prepare(llama(), Context(CPU, formulas=sparse))


def test_settings_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"full\.parameters must be all, linear, .*got 'norms'"):
        Full(parameters="norms")
    with pytest.raises(SettingsError, match=r"full\.parameters must be .*regular expression"):
        Full(parameters="(unclosed")
    with pytest.raises(SettingsError, match=r"full\.store must be one of float32, .* with decode=true, got 'as_found'"):
        Full(decode=True)
    with pytest.raises(SettingsError, match=r"full\.parameters must be what means some parameter.*up_proj\.weight"):
        Full(parameters=".*nothing").prepare(llama(), Context(CPU))
    with pytest.raises(SettingsError, match=r"full\.last_blocks must be in \[0, inf\), got -1"):
        Full(last_blocks=-1)
