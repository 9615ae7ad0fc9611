"""Prompts that are learnt: they start, train, resume and are published as every method promises."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from pare.methods.contract import METHODS, Context, TrainMethod
from pare.methods.ops.prompts import attach
from pare.methods.ops.tuner_kinds import PROMPTS
from pare.methods.settings import SettingsError
from pare.workers.checkpoint import NO_CHECKPOINT, Checkpoint
from pare.workers.models import load_dense, load_tokenizer
from pare.workers.training import Engine, train
from tests.workers.prompting import CPU, DATA, WAYS, P, every, llama, logits, made


def trained(way: str, out: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[TrainMethod, Any, list[Any]]:
    method = made(way, **settings)
    model = method.prepare(llama(dtype), Context(CPU, 0, data=DATA))
    return method, model, train(method, model, DATA, out, 0, Engine(CPU, dtype))


@every
def test_training_lowers_the_loss_and_peft_opens_what_was_trained(way: str, tmp_path: Path) -> None:
    method, model, steps = trained(way, tmp_path, steps=12, batch_size=6, micro_batch_size=3, learning_rate=3e-2)
    expected = logits(model)

    assert steps[-1].loss < steps[0].loss - 0.05
    assert method.finish(model, tmp_path) == {}

    reloaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    torch.testing.assert_close(logits(reloaded)[:, -10:], expected, atol=1e-5, rtol=0)
    base = llama()
    prompt = load_file(tmp_path / "prompt.safetensors")["prompt"]
    attach(base, lambda: prompt)
    torch.testing.assert_close(logits(base), expected, atol=1e-5, rtol=0)
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in llama().named_parameters())


@every
def test_it_starts_from_its_own_seed_and_no_other_and_writes_the_same_bytes(way: str, tmp_path: Path) -> None:
    def written(where: str, outside: int, **settings: Any) -> bytes:
        method = made(way, **settings)
        torch.manual_seed(outside)
        model = method.prepare(llama(), Context(CPU, outside))
        (tmp_path / where).mkdir()
        method.finish(model, tmp_path / where)
        files = sorted(file for file in (tmp_path / where).rglob("*") if file.is_file())
        assert [f.name for f in files] == ["adapter_config.json", "adapter_model.safetensors", "prompt.safetensors"]
        return b"".join(f.read_bytes() for f in files)

    assert written("one", 1) == written("two", 2)
    assert written("other", 1, init_seed=5) != written("again", 1)


@every
def test_a_training_that_was_killed_goes_on_to_the_same_bits(
    way: str, tmp_path: Path, attempt_checkpoint: Callable[[], Checkpoint]
) -> None:
    def attempt(checkpoint: Checkpoint, death: int | None = None) -> Any:
        method = made(way, weight_decay=0.1)
        model = method.prepare(llama(), Context(CPU, data=DATA))

        def progress(done: int, total: int, unit: str) -> None:
            if done == death:
                raise KeyboardInterrupt

        train(method, model, DATA, tmp_path, 3, Engine(CPU, torch.float32), progress, checkpoint=checkpoint)
        return model.prompt_encoder.state_dict()

    whole = attempt(NO_CHECKPOINT)
    with pytest.raises(KeyboardInterrupt):
        attempt(attempt_checkpoint(), death=3)
    resumed = attempt(attempt_checkpoint())

    assert whole.keys() == resumed.keys()
    assert all(torch.equal(t, resumed[name]) for name, t in whole.items())


@pytest.mark.parametrize("way", ["prompt_tuning", "p_tuning", "prefix_tuning", "prefix_tuning_projected"])
def test_recomputing_activations_changes_memory_and_not_what_is_learnt(way: str, tmp_path: Path) -> None:
    """Of keys and values peft says that it cannot: blocks that recompute drop the cache that they stand in."""
    settings: dict[str, Any] = {"steps": 3, "batch_size": 4, "micro_batch_size": 2}
    one, other = (trained(way, tmp_path, gradient_checkpointing=again, **settings)[1:] for again in (False, True))

    assert [step.loss for step in other[1]] == pytest.approx([step.loss for step in one[1]], abs=1e-5)
    values = dict(other[0].named_parameters())
    assert all(torch.allclose(p, values[n], atol=1e-4) for n, p in one[0].named_parameters() if p.requires_grad)


@every
def test_in_bfloat16_the_prompt_stays_float32_and_the_published_one_computes_what_was_trained(way: str, tmp_path: Path) -> None:
    method, model, _ = trained(way, tmp_path, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    method.finish(model, tmp_path)

    opened = PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path / "adapter")

    assert load_file(tmp_path / "prompt.safetensors")["prompt"].dtype == torch.float32
    torch.testing.assert_close(logits(opened)[:, -10:], logits(model), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["prompt_tuning", "prefix_tuning"])
def test_a_prompt_that_starts_from_a_text_is_the_model_that_reads_the_text(name: str, random_llama: Path) -> None:
    cls: Any = METHODS[name]
    method = cls(virtual_tokens=7, init="text", init_text="abc")
    tokens = load_tokenizer(random_llama)("abc" * 3, add_special_tokens=False).input_ids[:7]
    ids = torch.arange(40, 50)[None]
    expected = logits(load_dense(random_llama, torch.float32), torch.cat([torch.tensor([tokens]), ids], 1))[:, 7:]

    model = method.prepare(load_dense(random_llama, torch.float32), Context(CPU))

    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("projection", "numbers"), [(False, 2 * 2 * 2 * P * 16), (True, P * 32 + 32 * 16 + 16 + 17 * 128)])
def test_a_prefix_of_zeros_has_no_values_and_a_projected_one_begins_where_the_other(projection: bool, numbers: int) -> None:
    def start(**settings: Any) -> tuple[Tensor, int]:
        model = made("prefix_tuning", projection=projection, hidden=16, **settings).prepare(llama(), Context(CPU))
        return model.prompt_encoder().detach(), sum(p.numel() for p in model.parameters() if p.requires_grad)

    zero, count = start(init="zero")
    assert count == numbers
    assert not zero.any()
    plain = made("prefix_tuning").prepare(llama(), Context(CPU)).prompt_encoder().detach()
    assert torch.equal(start()[0], plain)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("prompt_tuning", {"virtual_tokens": 0}, r"virtual_tokens must be in \[1, inf\), got 0"),
        ("prompt_tuning", {"init": "zero"}, "init must be one of vocabulary, text, random, got 'zero'"),
        ("prompt_tuning", {"init": "text"}, "init_text must be a text where init is text, got ''"),
        ("prefix_tuning", {"init_text": "Be brief."}, "init_text must be empty unless init is text"),
        ("p_tuning", {"network": "gru"}, "network must be one of mlp, lstm"),
        ("p_tuning", {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    cls: Any = METHODS[name]
    with pytest.raises(SettingsError, match=message):
        cls(**settings)


def test_the_contract_says_which_methods_learn_prompts_and_their_settings_travel() -> None:
    found = {name for name, cls in METHODS.items() if getattr(cls, "learns_prompt", False)}
    assert found == PROMPTS.keys()
    for way in WAYS:
        assert pickle.loads(pickle.dumps(made(way))) == made(way)
