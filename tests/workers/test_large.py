"""Models that are read block by block: the same numbers as the whole model, and never much of it in memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pare.methods.ops.float_grids import FloatGrid
from pare.methods.parts.activations import ActivationQuantiser
from pare.methods.parts.formula import Formula
from pare.workers import evaluation, harness, large
from pare.workers.export.reader import open_export
from pare.workers.models import ModelArtifact, load_dense, load_tokenizer
from pare.workers.task import TaskError
from pare.workers.tasks import export, score
from tests.workers.memory_of_blocks import growth

CPU = torch.device("cpu")
PAIRS = [{"good": "a long sentence that is good", "bad": "a bad one", "group": ""}, {"good": "b", "bad": "b", "group": ""},
         {"good": "cats sleep", "bad": "cats sleeps", "group": ""}]  # fmt: skip


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(250, (5, 24), generator=torch.Generator().manual_seed(7))


def same(streamed: large.Streamed, whole: nn.Module, ids: Tensor, tokenizer: Any, base: nn.Module | None = None) -> None:
    """Everything that evaluation measures, of both, to 1e-5."""
    _, hidden = evaluation.predict(base or whole, ids, keep_hidden=True)
    assert hidden is not None
    teacher = evaluation.Teacher(hidden, evaluation.head_of(base or whole))
    expected, states = evaluation.predict(whole, ids, teacher, keep_hidden=True)

    found, own = evaluation.predict(streamed, ids, teacher, keep_hidden=True)

    torch.testing.assert_close(own, states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.nll, expected.nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.kl, expected.kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.agree, expected.agree)
    a, b = evaluation.summary(found), evaluation.summary(expected)
    assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    sentences = [pair[side] for pair in PAIRS for side in ("good", "bad")]
    likelihoods = evaluation.sentence_likelihoods(streamed, tokenizer, sentences)
    assert likelihoods == pytest.approx(evaluation.sentence_likelihoods(whole, tokenizer, sentences), rel=1e-5)
    assert evaluation.prefers_good(streamed, tokenizer, PAIRS) == evaluation.prefers_good(whole, tokenizer, PAIRS)
    blocks = [p for name, p in streamed.model.named_parameters() if ".layers." in name or ".h." in name]
    assert blocks
    assert all(p.is_meta for p in blocks), "no block stays in memory"


def test_an_artifact_read_block_by_block_measures_as_the_whole(random_llama: Path, ids: Tensor) -> None:
    artifact = ModelArtifact(random_llama, Path)
    streamed = large.stream_artifact(artifact, torch.float32, CPU)

    same(streamed, load_dense(random_llama, torch.float32), ids, load_tokenizer(random_llama))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt", "mamba", "untied"])
def test_other_families_read_block_by_block_measure_as_the_whole(
    family: str, random_llama: Path, ids: Tensor, tmp_path: Path
) -> None:
    import transformers as t

    small: dict[str, Any] = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
    configs = {
        "gpt2": lambda: t.GPT2Config(vocab_size=258, n_embd=32, n_layer=3, n_head=4, n_positions=64),
        "gemma2": lambda: t.Gemma2Config(**small, **heads, sliding_window=8, query_pre_attn_scalar=8),
        "opt": lambda: t.OPTConfig(
            **small, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64
        ),
        "mamba": lambda: t.MambaConfig(**small, state_size=4),
        "untied": lambda: t.LlamaConfig(**small, **heads, tie_word_embeddings=False),
    }
    torch.manual_seed(0)
    t.AutoModelForCausalLM.from_config(configs[family]()).save_pretrained(tmp_path)

    streamed = large.Streamed(tmp_path, large.from_files(tmp_path), torch.float32, CPU)

    same(streamed, load_dense(tmp_path, torch.float32), ids, load_tokenizer(random_llama))


@pytest.mark.parametrize(("bits", "symmetric", "wanted"), [(4, True, "compressed-tensors"), (4, False, "compressed-tensors"),
                                                          (3, True, "dense"), (3, True, "pare")])  # fmt: skip
def test_an_export_read_block_by_block_measures_as_the_whole(
    bits: int, symmetric: bool, wanted: str, workshop: Any, codes: Callable[..., Any], ids: Tensor
) -> None:
    artifact = workshop.artifact("made", lambda name, weight: Formula([codes(weight, bits, 32, symmetric)]))
    directory, said = workshop.run(export, "export", {"card": {}, "format": wanted}, model=artifact)
    assert said["format"] == wanted
    whole = open_export(directory, torch.float32).model

    streamed = large.stream_export(directory, torch.float32, CPU)

    same(streamed, whole, ids, load_tokenizer(directory), base=load_dense(workshop.base, torch.float32))


@pytest.mark.parametrize("form", ["artifact", "compressed-tensors", "pare"])
@pytest.mark.parametrize("inputs", ["int8", "fp8_e4m3"])
def test_inputs_that_are_rounded_are_rounded_when_blocks_are_read_one_at_a_time(
    form: str, inputs: str, workshop: Any, codes: Callable[..., Any], ids: Tensor
) -> None:
    grid = FloatGrid(format="fp8_e4m3")
    made = workshop.artifact(
        "made",
        lambda name, weight: Formula(
            [codes(weight, 8, -1) if inputs == "int8" else grid.round_to_nearest(weight.float())],
            activation=ActivationQuantiser.of(inputs),
        ),
    )
    directory, _ = workshop.run(export, "export", {"card": {}, "format": form if form != "artifact" else "pare"}, model=made)
    whole = open_export(directory, torch.float32).model
    artifact = workshop.open(made)

    if form == "artifact":
        streamed = large.stream_artifact(artifact, torch.float32, CPU)
    else:
        streamed = large.stream_export(directory, torch.float32, CPU)

    same(streamed, whole, ids, load_tokenizer(directory), base=load_dense(workshop.base, torch.float32))


def test_what_is_only_opened_as_a_whole_says_so(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text(json.dumps({"format": "adapter"}))

    with pytest.raises(TaskError, match=r"one of format adapter is only opened as a whole.*evaluation.memory_gb"):
        large.stream_export(tmp_path, torch.float32, CPU)


def test_a_model_whose_weights_have_other_names_says_so(random_llama: Path) -> None:
    def nothing(name: str, shape: Any) -> Tensor:
        raise KeyError(name)

    with pytest.raises(TaskError, match=r"model.embed_tokens.weight is not stored under that name"):
        large.Streamed(random_llama, nothing, torch.float32, CPU)


def test_a_model_that_fits_is_read_whole_and_a_larger_one_by_blocks() -> None:
    assert large.way(10**9, 10**9 - 1, CPU) == "streamed"
    assert large.way(10**6, 10**6, CPU) == "whole"
    assert large.way(10**6, None, CPU) == "whole"
    assert large.way(10**18, None, CPU) == "streamed"


def test_several_devices_share_what_one_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    cuda = torch.device("cuda")

    assert large.way(30 * 10**9, 10**10, cuda) == "sharded"
    assert large.way(50 * 10**9, 10**10, cuda) == "streamed"
    assert large.way(9 * 10**9, 10**10, cuda) == "whole"


def test_questions_are_answered_alike_and_nothing_is_written(random_llama: Path) -> None:
    tokenizer = load_tokenizer(random_llama)
    streamed = large.Streamed(random_llama, large.from_files(random_llama), torch.float32, CPU)
    questions = [{"context": f"line {i}: one", "choices": ["two", "three four", "x"], "label": i % 3} for i in range(5)]
    questions.append({**questions[0], "context": "x" * 2040 + "one"})

    found = harness.multiple_choice(streamed, tokenizer, questions, "made_up")

    assert found == harness.multiple_choice(load_dense(random_llama, torch.float32), tokenizer, questions, "made_up")
    with pytest.raises(TaskError, match="lets the model write text"):
        harness.scorer(streamed, tokenizer).generate_until([])


def test_a_score_with_too_little_memory_is_the_score(workshop: Any, codes: Callable[..., Any]) -> None:
    tokens, spec = workshop.tokens(), {"dtype": "float32", "keep_hidden": True}
    artifact = workshop.artifact("rtn", lambda name, weight: codes(weight, 3, 32))
    small = {"dtype": "float32", "keep_hidden": False, "where": {"memory_bytes": 1}}
    teacher, base = workshop.run(score, "teacher", spec, model=workshop.base, tokens=tokens)
    again, same_base = workshop.run(
        score, "teacher2", {**spec, "where": {"memory_bytes": 1}}, model=workshop.base, tokens=tokens
    )

    _, whole = workshop.run(score, "whole", {**spec, "keep_hidden": False}, model=artifact, tokens=tokens, teacher=teacher)
    _, streamed = workshop.run(score, "streamed", small, model=artifact, tokens=tokens, teacher=again)

    assert same_base == pytest.approx(base, rel=1e-5)
    assert streamed == pytest.approx(whole, rel=1e-5, abs=1e-6)
    assert (again / "teacher.json").read_text() == (teacher / "teacher.json").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the Linux kernel's mark of the highest resident size")
def test_a_model_above_its_limit_takes_the_memory_of_a_block_and_not_its_own(tmp_path: Path, ids: Tensor) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(hidden_size=512, intermediate_size=1536, num_hidden_layers=16, vocab_size=258, **heads)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    size, block = large.bytes_of(tmp_path, torch.float32), 4 * (4 * 512**2 + 3 * 512 * 1536)
    assert large.way(size, size // 2, CPU) == "streamed"
    found: dict[str, Any] = {}

    def whole() -> None:
        found["whole"] = evaluation.predict(load_dense(tmp_path, torch.float32), ids)[0].nll

    def streamed() -> None:
        model = large.Streamed(tmp_path, large.from_files(tmp_path), torch.float32, CPU)
        found["streamed"] = evaluation.predict(model, ids)[0].nll

    streamed()  # imports, and memory that stays with the process
    small, large_ = growth(streamed), growth(whole)

    torch.testing.assert_close(found["streamed"], found["whole"], rtol=1e-5, atol=1e-5)
    assert large_ > size
    assert small < 3 * block + 32e6 < size / 2, f"{small:,} of {size:,}, a block is {block:,}"
