from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from pare.methods.contract import Context
from pare.methods.finetune.lora import Lora
from pare.methods.finetune.qlora import Qlora
from pare.methods.ops.bnb4bit import codes_of, quantise_linear
from pare.methods.parts.codes import Codes
from pare.methods.parts.formula import LowRank
from pare.methods.settings import SettingsError

bnb = pytest.importorskip("bitsandbytes")

IDS = torch.arange(24).view(2, 12)
CPU = torch.device("cpu")
CONTEXT = Context(CPU)
SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]

# Dettmers et al. (2023), appendix E.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits.float()  # type: ignore[no-any-return]


def trained(method: Qlora, model: nn.Module | None = None) -> nn.Module:
    """A prepared model whose adapters have been given values as training would."""
    adapted = method.prepare(model or llama(), CONTEXT).eval()
    torch.manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


def quantised(weight: Tensor, quant_type: str, double: bool) -> Any:
    """weight (out, in) -> `Params4bit`, made in the way of the method."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    return quantise_linear(linear, quant_type, double, CPU).weight


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def test_a_weight_decodes_to_the_nearest_entry_times_the_largest_of_its_block() -> None:
    weight = gaussian(48, 128)  # 96 blocks of 64

    decoded = codes_of(quantised(weight, "nf4", double=False)).materialise()

    blocks = weight.view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / largest).unsqueeze(-1).sub(NF4).abs().argmin(-1)
    assert torch.equal(decoded, (NF4[nearest] * largest).view_as(weight))
    # Half of the widest gap, between -1 and the next entry.
    assert ((blocks - decoded.view(-1, 64)).abs() <= largest * (1 - 0.6961928) / 2 + 1e-6).all()


@pytest.mark.parametrize(("quant_type", "error"), [("nf4", 0.0085), ("fp4", 0.0149)])
def test_the_mean_squared_error_on_a_normal_weight_is_the_known_one(quant_type: str, error: float) -> None:
    weight = gaussian(512, 512)

    decoded = codes_of(quantised(weight, quant_type, double=False)).materialise()

    assert (weight - decoded).square().mean().item() == pytest.approx(error, abs=1e-4)


@pytest.mark.parametrize(("quant_type", "double"), KINDS)
@pytest.mark.parametrize("shape", [(64, 64), (160, 128), (3, 192)], ids=str)  # 64, 320 and 9 blocks
def test_codes_decode_to_the_bits_of_bitsandbytes(quant_type: str, double: bool, shape: tuple[int, int]) -> None:
    parameter = quantised(0.02 * gaussian(*shape), quant_type, double)

    theirs = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)

    assert torch.equal(codes_of(parameter).materialise(), theirs)


@pytest.mark.parametrize(("double", "bits"), [(True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4.5)])
def test_a_weight_costs_the_bits_of_the_paper(double: bool, bits: float) -> None:
    codes = codes_of(quantised(gaussian(512, 512), "nf4", double))

    offset = 32 if double else 0  # one number for the whole weight
    assert codes.nbytes * 8 - offset == bits * 512 * 512


def test_weights_are_quantised_from_the_dense_value_in_whichever_dtype_it_came() -> None:
    weight = gaussian(64, 64).to(torch.bfloat16)

    from_float32, from_bfloat16 = (codes_of(quantised(w, "nf4", double=True)) for w in (weight.float(), weight))

    for name, tensor in from_float32.tensors().items():
        assert torch.equal(tensor, from_bfloat16.tensors()[name])


def test_before_training_the_adapted_model_is_the_quantised_base() -> None:
    model = Qlora().prepare(llama(), CONTEXT).eval()
    adapted = logits(model)

    with model.disable_adapter():
        assert torch.equal(logits(model), adapted)
    assert not torch.allclose(adapted, logits(llama()), atol=1e-3)


def test_only_the_adapters_get_gradients_and_none_is_missing() -> None:
    model = trained(Qlora()).train()

    Qlora().loss(model, {"input_ids": IDS})[0].backward()

    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        if "lora_" in name:
            assert parameter.grad.any(), name


def test_every_linear_of_a_block_is_quantised_and_nothing_else_is() -> None:
    model = Qlora(targets="q_v").prepare(llama(), CONTEXT).get_base_model()

    four_bit = {n.removesuffix(".base_layer") for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}

    assert four_bit == {n for n, m in llama().named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.float32


def lora_gradients(model: nn.Module) -> list[Tensor]:
    model.train()
    model.zero_grad()
    Qlora().loss(model, {"input_ids": IDS})[0].backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("double", [True, False])
def test_gradients_and_weights_are_the_same_before_and_after_an_evaluation(double: bool) -> None:
    model = trained(Qlora(double_quant=double), llama(torch.bfloat16))
    stored = {n: m.weight.data.clone() for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}

    before = lora_gradients(model)
    logits(model.eval())
    after = lora_gradients(model)

    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    for name, data in stored.items():
        assert torch.equal(model.get_submodule(name).weight.data, data)


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit")
@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="the repacking happens on processors with AVX512_BF16")
def test_bitsandbytes_still_repacks_weights_that_are_not_kept_from_it() -> None:
    model = trained(Qlora(), llama(torch.bfloat16))
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True

    before = lora_gradients(model)
    logits(model.eval())
    after = lora_gradients(model)

    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True)), (
        "bitsandbytes repacks no more: `settle` in methods/ops/bnb4bit.py need not stop it"
    )


@pytest.mark.parametrize(("quant_type", "double"), KINDS)
def test_the_formulas_are_the_trained_model(tmp_path: Path, quant_type: str, double: bool) -> None:
    method = Qlora(quant_type=quant_type, double_quant=double)
    model = trained(method)

    formulas = method.finish(model, tmp_path)

    ours = llama()
    with torch.no_grad():
        for name, formula in formulas.items():
            assert formula.op == "replace"
            ours.get_parameter(name).copy_(formula.materialise())
    assert len(formulas) == 14
    assert torch.allclose(logits(ours), logits(model), atol=1e-5)


def test_a_quantised_weight_without_an_adapter_has_its_codes_alone(tmp_path: Path) -> None:
    method = Qlora(targets="q_v")

    formulas = method.finish(trained(method), tmp_path)

    for name, formula in formulas.items():
        kinds = [Codes, LowRank] if name.endswith(("q_proj.weight", "v_proj.weight")) else [Codes]
        assert [type(part) for part in formula.parts] == kinds, name


def test_the_saved_adapter_opens_on_an_equally_quantised_base(tmp_path: Path) -> None:
    model = trained(Qlora())
    Qlora().finish(model, tmp_path)

    base = Qlora().prepare(llama(), CONTEXT).unload()
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()

    assert torch.allclose(logits(opened), logits(model), atol=1e-6)


def test_biases_stay_what_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    biases = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}

    adapted = Qlora().prepare(model, CONTEXT)

    assert len(biases) == 6
    for name, bias in biases.items():
        kept = adapted.get_base_model().get_submodule(name.removesuffix(".bias")).base_layer.bias
        assert torch.equal(kept, bias)
        assert not kept.requires_grad


def test_an_unknown_code_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"qlora\.quant_type must be one of nf4, fp4, got 'int4'"):
        Qlora(quant_type="int4")
    with pytest.raises(SettingsError, match=r"qlora\.targets must be .* got 'qv'"):
        Qlora(targets="qv")


def test_a_weight_whose_blocks_run_over_the_end_of_a_row_is_refused_before_there_are_weights() -> None:
    Qlora().check_shapes({"a.weight": (30, 128)})

    with pytest.raises(SettingsError, match=r"multiple of 64 features \(model\.layers\.0\.mlp\.down_proj\.weight reads 96\)"):
        Qlora().check_shapes({"model.layers.0.mlp.down_proj.weight": (64, 96)})


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the fault is in the AVX-512 code")
def test_bitsandbytes_still_decodes_such_weights_wrongly() -> None:
    parameter = quantised(gaussian(64, 96), "nf4", double=False)

    theirs = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)

    assert not torch.equal(codes_of(parameter).materialise(), theirs), (
        "mended: Qlora.check_shapes may let these weights through"
    )


def test_a_missing_library_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)

    with pytest.raises(ImportError, match=r"pip install 'pare-lm\[qlora\]'"):
        Qlora().prepare(llama(), CONTEXT)


def errors(method: Qlora) -> Tensor:
    """Of each weight: how far what stands at the start is from it."""
    dense = dict(llama().named_parameters())
    found = {name: formula.materialise() for name, formula in finished(method).items()}
    return torch.stack([(found[name] - dense[name].detach()).norm() for name in found])


def finished(method: Qlora) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        return method.finish(method.prepare(llama(), CONTEXT), Path(directory))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_loftq_starts_nearer_to_the_weights_with_every_step(quant_type: str) -> None:
    plain = errors(Qlora(quant_type=quant_type))
    once, often = (errors(Qlora(quant_type=quant_type, init="loftq", loftq_steps=n)) for n in (1, 5))

    assert (once < 0.9 * plain).all()
    assert (often < once).sum() >= 12
    assert often.sum() < 0.97 * once.sum()


def test_the_first_step_of_loftq_leaves_the_codes_and_answers_with_the_best_of_its_rank() -> None:
    plain, once = finished(Qlora(rank=4)), finished(Qlora(rank=4, init="loftq"))
    dense = dict(llama().named_parameters())

    for name, formula in once.items():
        codes, update = formula.parts
        assert torch.equal(codes.materialise(), plain[name].parts[0].materialise()), name
        left = dense[name].detach() - codes.materialise()
        rest = torch.linalg.svdvals(left)[4:].norm()
        assert (left - update.materialise()).norm() == pytest.approx(rest.item(), rel=1e-4), name
        assert torch.linalg.matrix_rank(update.materialise(), rtol=1e-4) == 4


def test_the_start_of_loftq_does_not_depend_on_the_scale() -> None:
    one, other = (
        finished(Qlora(rank=4, init="loftq", alpha=alpha, rslora=scaled)) for alpha, scaled in ((4, False), (32, True))
    )

    for name, formula in one.items():
        assert torch.allclose(formula.materialise(), other[name].materialise(), atol=1e-6), name


def test_loftq_is_for_the_targets_alone_and_for_codes_alone() -> None:
    method = Qlora(init="loftq", targets="q_v")
    started = [n for n, p in method.prepare(llama(), CONTEXT).named_parameters() if "lora_B" in n and p.any()]

    assert len(started) == 4
    with pytest.raises(SettingsError, match=r"lora\.init must be one of default, gaussian, got 'loftq'"):
        Lora(init="loftq")
    with pytest.raises(SettingsError, match=r"qlora\.loftq_steps must be in \[1"):
        Qlora(loftq_steps=0)
