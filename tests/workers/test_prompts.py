"""What a prompt does to a model: it is read first, and what the model takes and gives stays that of the input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softmax
from transformers import DynamicCache

from pare.methods.contract import Context
from pare.methods.ops.prompts import attach, flattened, keys_and_values, unflattened
from pare.workers import evaluation, harness
from pare.workers.models import load_tokenizer
from tests.methods.anatomy.tiny_models import CONFIGS, TOKENS, tiny
from tests.methods.anatomy.tiny_models import logits as tiny_logits
from tests.workers.prompting import CPU, IDS, P, llama, logits, made


def prompts() -> dict[str, Tensor]:
    """One of each form."""
    generator = torch.Generator().manual_seed(2)
    return {
        "embeddings": 0.3 * torch.randn(P, 64, generator=generator),
        "keys and values": torch.randn(2, 2, 2, P, 16, generator=generator),
    }


each_form = pytest.mark.parametrize("form", list(prompts()))


def prompted(form: str, dtype: torch.dtype = torch.float32) -> Any:
    model, prompt = llama(dtype), prompts()[form]
    attach(model, lambda: prompt)
    return model


def by_hand(model: Any, ids: Tensor, prompt: Tensor) -> Tensor:
    """Final hidden states (length, width) of one row `ids` (length,), each attention written out."""

    def rotated(x: Tensor, start: int) -> Tensor:
        cos, sin = model.model.rotary_emb(x, torch.arange(start, start + x.shape[1])[None])
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    x = model.model.embed_tokens(ids)
    x, start = (torch.cat([prompt, x]), 0) if prompt.dim() == 2 else (x, P)
    for i, layer in enumerate(model.model.layers):
        read, own = layer.input_layernorm(x), layer.self_attn
        heads = [linear(read).view(len(x), -1, 16).transpose(0, 1) for linear in (own.q_proj, own.k_proj, own.v_proj)]
        q, k, v = rotated(heads[0], start), rotated(heads[1], start), heads[2]
        if prompt.dim() == 5:
            k, v = torch.cat([prompt[i, 0], k], 1), torch.cat([prompt[i, 1], v], 1)
        scores = q @ k.repeat_interleave(2, 0).transpose(1, 2) / 4
        future = torch.ones(scores.shape[1:]).triu(1 + scores.shape[2] - scores.shape[1]).bool()
        read = softmax(scores.masked_fill(future, -torch.inf), -1) @ v.repeat_interleave(2, 0)
        x = x + own.o_proj(read.transpose(0, 1).flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    hidden: Tensor = model.model.norm(x)
    return hidden[-len(ids) :]


@each_form
@torch.no_grad()
def test_a_prompted_model_is_what_comes_out_when_attention_is_written_out(form: str) -> None:
    plain, model = llama(), prompted(form)
    expected = torch.stack([by_hand(plain, row, prompts()[form]) for row in IDS])

    torch.testing.assert_close(model.base_model(input_ids=IDS).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model), plain.lm_head(expected), atol=1e-5, rtol=1e-5)
    assert (logits(model) - logits(plain)).abs().max() > 0.1


@each_form
@torch.no_grad()
def test_what_a_model_takes_and_gives_stays_that_of_the_input(form: str) -> None:
    model, embedded = prompted(form), llama().model.embed_tokens(IDS)
    expected = logits(model)

    out = model(input_ids=IDS, output_hidden_states=True, use_cache=False)
    assert out.past_key_values is None
    assert {tuple(state.shape) for state in out.hidden_states} == {(2, 10, 64)}
    for given in (
        {"attention_mask": torch.ones_like(IDS)},
        {"position_ids": torch.arange(10)[None]},
        {"use_cache": True},
        {"past_key_values": DynamicCache()},
    ):
        assert torch.allclose(logits(model, **given), expected, atol=1e-5)
    assert torch.allclose(model(inputs_embeds=embedded).logits, expected, atol=1e-5)
    assert torch.allclose(logits(model, logits_to_keep=1), expected[:, -1:], atol=1e-5)
    targets = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert torch.allclose(model(input_ids=IDS, labels=IDS).loss, targets)


@each_form
@torch.no_grad()
def test_a_cache_holds_the_prompt_from_the_first_call_on(form: str) -> None:
    model = prompted(form)
    expected = logits(model)

    first = model(input_ids=IDS[:, :6], use_cache=True)
    rest = model(input_ids=IDS[:, 6:], past_key_values=first.past_key_values, attention_mask=torch.ones_like(IDS))

    assert rest.past_key_values.get_seq_length() == 10 + P
    assert torch.allclose(torch.cat([first.logits, rest.logits], 1), expected, atol=1e-5)


@each_form
@torch.no_grad()
def test_text_is_written_the_same_with_and_without_a_cache_and_behind_padding(form: str) -> None:
    model, ids = prompted(form), IDS[:1, :6]
    arguments = {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **arguments)

    cached = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    padding = torch.zeros(1, 3, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(ids)], 1)
    behind = model.generate(torch.cat([padding, ids], 1), attention_mask=mask, **arguments)

    assert torch.equal(cached, plain)
    assert torch.equal(behind[:, 3:], plain)
    assert not torch.equal(llama().generate(ids, attention_mask=torch.ones_like(ids), **arguments), plain)


@each_form
def test_what_reads_models_reads_the_prompted_one(form: str, random_llama: Path) -> None:
    model = prompted(form)
    read = evaluation.Whole(model)
    hidden = next(iter(read.hidden([IDS])))
    torch.testing.assert_close(read.head(hidden.flatten(0, 1)).view(2, 10, 96), logits(model), atol=1e-4, rtol=0)

    context, choices = IDS[0, :5].tolist(), [IDS[0, 5:8].tolist(), IDS[1, 5:7].tolist()]
    shared = harness.continuations(model, context, choices)
    alone = evaluation.row_likelihoods(model, [[*context, *choice] for choice in choices])
    for (total, _), (each, _), choice in zip(shared, alone, choices, strict=True):
        assert total == pytest.approx(each[-len(choice) :].sum().item(), abs=1e-4)
    assert harness.scorer(model, load_tokenizer(random_llama)).model is model


@each_form
def test_documents_that_share_a_row_are_refused_and_so_are_masks_of_pairs(form: str) -> None:
    model = prompted(form)
    with pytest.raises(ValueError, match="only its first document would see the prompt"):
        logits(model, position_ids=torch.arange(5).repeat(1, 2))
    with pytest.raises(ValueError, match=r"attention mask of \(sequences, length\)"):
        logits(model, attention_mask=torch.ones(2, 1, 10, 10).bool())


@pytest.mark.parametrize("family", [name for name in CONFIGS if "Mamba" not in name])
@each_form
def test_in_every_family_a_prompt_made_of_tokens_is_these_tokens(form: str, family: str) -> None:
    model, (start, rows) = tiny(family), (TOKENS[0, :P], TOKENS[:, P : P + 9])
    expected = tiny_logits(model, torch.cat([start.expand(len(rows), -1), rows], 1))[:, P:]
    prompt = model.get_input_embeddings()(start).detach() if form == "embeddings" else keys_and_values(model, start)

    attach(model, lambda: prompt)

    torch.testing.assert_close(tiny_logits(model, rows), expected, atol=1e-5, rtol=0)


def test_a_model_with_a_state_in_place_of_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="MambaForCausalLM cannot read a prompt: its body does not take"):
        made("prompt_tuning").prepare(tiny("MambaForCausalLM"), Context(CPU))
    with pytest.raises(ValueError, match="Mamba2ForCausalLM has layers without keys and values"):
        made("prefix_tuning").prepare(tiny("Mamba2ForCausalLM"), Context(CPU))


def test_keys_and_values_are_turned_into_the_order_of_peft_and_back() -> None:
    prompt = prompts()["keys and values"]
    flat = flattened(prompt)
    assert flat.shape == (P, 2 * 2 * 2 * 16)
    assert torch.equal(flat[1, 16:32], prompt[0, 0, 1, 1])
    assert torch.equal(unflattened(flat, 2, 2), prompt)
