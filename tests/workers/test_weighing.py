"""Statistics in which tokens count differently, in a stream of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pare.methods.anatomy import attends
from pare.methods.anatomy.describe import describe
from pare.methods.ops.statistics import Gram
from pare.methods.ops.token_weights import ActivationNorm, AttentionReceived, FirstTokens, Uniform, WeighedGram, spread
from pare.workers.calibration import stream
from pare.workers.task import TaskError
from tests.methods.anatomy.tiny_models import TOKENS, tiny

CPU = torch.device("cpu")


class AllTheSame(WeighedGram):
    name = "all_the_same"
    token_weights = Uniform()


class ByNorm(WeighedGram):
    name = "by_norm"
    token_weights = ActivationNorm(0.01)


class ByAttention(WeighedGram):
    name = "by_attention"
    token_weights = AttentionReceived(0.05)


class OfTheFirst(WeighedGram):
    name = "of_the_first"
    token_weights = FirstTokens(6)


def streamed(model: nn.Module, *needs: Any, tokens: Tensor = TOKENS, batch_size: int = 2, **options: Any) -> Any:
    passing = stream(model, describe(model), tokens, needs, CPU, batch_size=batch_size, **options)
    return {group: values for p in passing for group, values in p.statistics.items()}


@torch.no_grad()
def states_and_reads(model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What every block reads, and what every group does, (sequences, length, features), when the whole model runs."""
    anatomy, states, reads = describe(model), [], {}
    hooks = []
    for block in anatomy.blocks:
        look = lambda module, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"])
        hooks.append(model.get_submodule(block.name).register_forward_pre_hook(look, with_kwargs=True))
        for group in block.groups:
            note = lambda module, args, name=group.name: reads.update({name: args[0].reshape(*TOKENS.shape, -1)})
            module = model.get_submodule(group.weights[0].removesuffix("^T").removesuffix(".weight"))
            hooks.append(module.register_forward_pre_hook(note))
    model(input_ids=TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states, reads


@pytest.mark.parametrize("inputs", ["dense", "compressed"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM"])
def test_tokens_count_by_what_their_block_reads(architecture: str, inputs: str) -> None:
    model = tiny(architecture)
    got = streamed(model, ByNorm, Gram, inputs=inputs)
    states, reads = states_and_reads(model)
    for state, block in zip(states, describe(model).blocks, strict=True):
        weights = ByNorm.token_weights.of(state, torch.Tensor).double()
        assert weights.std() > 0.1
        for group in block.groups:
            x = reads[group.name].double()
            expected = 2 * torch.einsum("st,sti,stj->ij", weights, x, x) / weights.sum()
            torch.testing.assert_close(
                got[group.name]["by_norm"].double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
            )
            assert not torch.allclose(got[group.name]["gram"].double(), expected, rtol=1e-2)


@torch.no_grad()
def attention_of(model: Any) -> list[Tensor]:
    """Of every block the attention that each token receives (sequences, length), by the maps that transformers returns."""
    model.set_attn_implementation("eager")
    maps = model(input_ids=TOKENS, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    for of_block in maps:
        torch.testing.assert_close(of_block.sum((1, 2, 3)), torch.full((len(TOKENS),), 4.0 * TOKENS.shape[1]))
    return [of_block.sum((1, 2)) for of_block in maps]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel"]
)
def test_tokens_count_by_the_attention_that_they_receive(
    architecture: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attends, "QUERIES", 7)
    model = tiny(architecture)
    received, (_, reads) = attention_of(model), states_and_reads(model)
    model.set_attn_implementation(implementation)
    got = streamed(model, Gram, ByAttention)
    model.set_attn_implementation("sdpa")
    for of_block, block in zip(received, describe(model).blocks, strict=True):
        weights = spread(of_block, 0.05).double()
        weights *= weights.shape[1] / weights.sum(1, keepdim=True)
        for group in block.groups:
            x = reads[group.name].double()
            expected = 2 * torch.einsum("st,sti,stj->ij", weights, x, x) / weights.sum()
            slack = 1e-5 * float(expected.abs().max())
            torch.testing.assert_close(got[group.name]["by_attention"].double(), expected, rtol=1e-3, atol=slack)
            plain = 2 * torch.einsum("sti,stj->ij", x, x) / TOKENS.numel()
            torch.testing.assert_close(got[group.name]["gram"].double(), plain, rtol=1e-3, atol=slack)


def test_a_block_without_attention_is_refused_where_it_counts() -> None:
    with pytest.raises(TaskError, match=r"weighs tokens by attention, and none is seen in a MambaBlock"):
        streamed(tiny("MambaForCausalLM"), ByAttention)


def test_equal_weights_give_the_gram_matrix_to_the_bit_and_the_model_is_left_as_it_was() -> None:
    model = tiny("LlamaForCausalLM")
    for values in streamed(model, AllTheSame, Gram).values():
        assert torch.equal(values["all_the_same"], values["gram"])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_first_tokens_are_those_of_shorter_sequences() -> None:
    model = tiny("LlamaForCausalLM")
    shorter = streamed(model, Gram, tokens=TOKENS[:, :6])
    for group, values in streamed(model, OfTheFirst).items():
        torch.testing.assert_close(values["of_the_first"], shorter[group]["gram"], rtol=1e-4, atol=1e-5)


def test_batches_do_not_matter() -> None:
    model = tiny("LlamaForCausalLM")
    one, all_at_once = (streamed(model, ByNorm, batch_size=size) for size in (1, 5))
    for group, values in one.items():
        torch.testing.assert_close(values["by_norm"], all_at_once[group]["by_norm"], rtol=1e-4, atol=1e-5)


def test_experts_are_refused_for_which_tokens_they_read_is_not_known() -> None:
    with pytest.raises(TaskError, match=r"a statistic weighs tokens, and which of them .*experts.* reads is not known"):
        streamed(tiny("MixtralForCausalLM"), ByNorm)
