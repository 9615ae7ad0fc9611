"""GGUF files against the model in memory: transformers reads from them what was made, and codes are not quantised again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3Config

from pare.methods.ops.float_grids import FloatGrid
from pare.methods.parts.codebooks import Integer, Ternary
from pare.methods.parts.codes import Codes, Rows
from pare.methods.parts.formula import Formula, LowRank
from pare.workers.export.gguf_blocks import blocks_of
from pare.workers.export.gguf_tokenizer import rule_of
from pare.workers.export.reader import NO_DEPLOYMENT_FIGURE, open_export
from pare.workers.export.schemes import Inexpressible
from pare.workers.models import load_in_memory
from pare.workers.task import TaskError
from pare.workers.tasks import export
from pare.workers.tiny import TinySettings, tiny_config, tiny_tokenizer

SPEC = {"card": {"base": "random"}, "format": "gguf"}


def random_codes(bits: int, group: int, symmetric: bool = True, columns: int = 64, scale: float = 0.01) -> Codes:
    """Codes that use their whole range, scales of 8 significant bits."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (8, columns), generator=generator)
    groups = 1 if group == -1 else columns // group
    scales = (scale * (0.5 + torch.rand(8, groups, generator=generator))).to(torch.bfloat16)
    zero = None if symmetric else torch.randint(2**bits, (8, groups), generator=generator)
    return Codes.of(codes, Integer(bits, signed=symmetric), Rows(group), scales, zero)


def power_scales(codes: Codes) -> Codes:
    """The same with scales of one significant bit, so that a float16 has every scale times every zero point."""
    scale = torch.full_like(codes.scales(), 2.0**-7).to(torch.bfloat16)
    return Codes.of(codes.unpacked(), codes.codebook, codes.index, scale, codes.unpacked_zero())


TERNARY = Codes.of(torch.arange(512).view(2, 256) % 3, Ternary(), Rows(-1), torch.full((2, 1), 0.02, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("codes", "name"),
    [
        (random_codes(2, 32), "Q4_0"),
        (random_codes(4, 32), "Q4_0"),
        (random_codes(4, -1), "Q4_0"),
        (random_codes(5, 64), "Q5_0"),
        (random_codes(8, 32), "Q8_0"),
        (random_codes(3, 32, symmetric=False), "Q4_0"),
        (random_codes(4, 32, symmetric=False, columns=512), "Q5_0"),
        (power_scales(random_codes(4, 32, symmetric=False)), "Q4_1"),
        (power_scales(random_codes(5, 64, symmetric=False)), "Q5_1"),
        (random_codes(5, 64, symmetric=False), "Q8_0"),
        (TERNARY, "TQ2_0"),
        (FloatGrid(format="mxfp4").round_to_nearest(torch.randn(8, 64)), "MXFP4"),
    ],
)
def test_blocks_are_read_by_the_gguf_package_as_the_very_weights(codes: Codes, name: str) -> None:
    kind, blocks = blocks_of(codes)

    assert kind == name
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert blocks.shape == (codes.shape[0], codes.shape[1] // block * size)
    read = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(torch.from_numpy(read), codes.materialise())


@pytest.mark.parametrize(
    ("codes", "reason"),
    [
        (random_codes(4, 16), "64 columns in groups of 16"),
        (random_codes(4, 32, scale=1e-7), "no float16"),
        (random_codes(8, 32, symmetric=False), "about their zero points; Q8_0 has -128 to 127"),
        (FloatGrid(format="nvfp4").round_to_nearest(torch.randn(8, 64)), "groups of 16"),
        (FloatGrid(format="fp4_e2m1", group_size=32).round_to_nearest(torch.randn(8, 64)), "no powers of two"),
        (FloatGrid(format="fp8_e4m3").round_to_nearest(torch.randn(8, 64)), "which are no integers"),
        (FloatGrid(format="nf4", group_size=64).round_to_nearest(torch.randn(8, 64)), "not consecutive columns"),
    ],
)
def test_codes_of_no_type_are_refused_and_not_quantised_again(codes: Codes, reason: str) -> None:
    with pytest.raises(Inexpressible, match=reason):
        blocks_of(codes)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(40)[None]).logits  # type: ignore[no-any-return]


def family(name: str) -> Any:
    common = tiny_config(TinySettings(layers=2, width=64, ffn=96))
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    if name == "llama":
        return LlamaConfig(**common | rope | {"tie_word_embeddings": False})
    if name == "qwen2":
        return Qwen2Config(**{key: value for key, value in common.items() if key != "head_dim"} | rope)
    return Qwen3Config(**common | rope | {"head_dim": 128})


@pytest.fixture
def base_of(tmp_path: Path) -> Callable[..., Path]:
    def made(config: Any) -> Path:
        directory = tmp_path / "base"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                nn.init.normal_(parameter, mean=1)
        model.to(torch.bfloat16).save_pretrained(directory)
        tiny_tokenizer().save_pretrained(directory)
        return directory

    return made


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_model_in_memory_from_the_file(
    workshop: Any, base_of: Callable[..., Path], codes: Callable[..., Any], name: str
) -> None:
    workshop.base = base_of(family(name))
    bits = {"q_proj": 4, "k_proj": 8, "v_proj": 5}
    artifact = workshop.artifact(
        "made",
        lambda name, w: None if "down" in name or w.dim() == 1 else codes(w, bits.get(name.rpartition(".")[2], 3), 32),
    )

    out, result = workshop.run(export, "export", SPEC, model=artifact)

    expected = logits(load_in_memory(workshop.open(artifact), torch.float32))
    plain = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    assert torch.allclose(logits(plain), expected, rtol=0, atol=1e-6)
    opened = open_export(out, torch.float32)
    assert torch.equal(logits(opened.model), logits(plain))
    assert opened.notes == [NO_DEPLOYMENT_FIGURE]
    assert opened.tokenizer("ab").input_ids == [97, 98]
    assert (result["format"], result["opens_with"]) == ("gguf", "transformers + gguf")
    for said in ("2 Q8_0", "2 Q5_0", "Q4_0", "BF16", "F32"):
        assert said in result["reason"]
    assert 'gguf_file="model.gguf"' in (out / "README.md").read_text()


def test_bytes_are_those_of_the_file(workshop: Any, codes: Callable[..., Any]) -> None:
    artifact = workshop.artifact("made", lambda name, weight: codes(weight, 4, 32))

    out, result = workshop.run(export, "export", SPEC, model=artifact)

    assert result["size/bytes"] == (out / "model.gguf").stat().st_size
    assert result["size/linear_bits_per_weight"] == 4.5
    reader = gguf.GGUFReader(out / "model.gguf")
    assert {t.name for t in reader.tensors if t.tensor_type.name == "Q4_0"} >= {"blk.0.attn_q.weight", "blk.1.ffn_down.weight"}
    assert not list(out.glob("*.safetensors"))
    assert {"config.json", "tokenizer.json", "generation_config.json", "export.json"} <= {file.name for file in out.iterdir()}


def test_the_base_itself_is_written_in_its_own_dtype(workshop: Any) -> None:
    out, result = workshop.run(export, "export", SPEC, model=workshop.base)

    assert torch.equal(
        logits(open_export(out, torch.float32).model), logits(load_in_memory(workshop.open(workshop.base), torch.float32))
    )
    assert "BF16" in result["reason"]


def test_the_file_holds_the_tokenizer(workshop: Any) -> None:
    out, _ = workshop.run(export, "export", SPEC, model=workshop.base)

    fields = gguf.GGUFReader(out / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    ours = AutoTokenizer.from_pretrained(workshop.base)
    assert [ours.convert_ids_to_tokens(i) for i in range(len(ours))] == tokens[: len(ours)]
    assert fields["tokenizer.ggml.token_type"].contents()[255:258] == [1, 3, 3]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == ours.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_a_cut_of_text_that_is_not_known_is_refused() -> None:
    def said(*steps: dict[str, Any], kind: str = "BPE") -> dict[str, Any]:
        return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}, "model": {"type": kind, "merges": ["a b"]}}

    split = {"type": "Split", "pattern": {"Regex": r"\w+"}}
    byte_level = {"type": "ByteLevel", "use_regex": True}

    assert rule_of(said(byte_level)) == "gpt-2"
    assert rule_of(said({"type": "Digits", "individual_digits": True}, byte_level)) == "smollm"
    with pytest.raises(Inexpressible, match="is not known here; known: gpt-2, smollm, qwen2, llama-bpe"):
        rule_of(said(split, byte_level))
    with pytest.raises(Inexpressible, match="no byte-level BPE"):
        rule_of(said(byte_level, kind="Unigram"))


def test_what_gguf_cannot_say_fails_with_the_reason_and_what_to_type(workshop: Any, codes: Callable[..., Any]) -> None:
    def corrected(name: str, weight: Tensor) -> Formula:
        a, b = torch.ones(2, weight.shape[1]), torch.ones(weight.shape[0], 2)
        return Formula([codes(weight, 4, 32), LowRank(a, b, 0.01)])

    with pytest.raises(TaskError, match=r"format=gguf cannot say .* made of codes, low_rank\. Try: export\.format=auto"):
        workshop.run(export, "export", SPEC, model=workshop.artifact("made", corrected))


def test_a_setting_that_transformers_does_not_read_back_is_refused(workshop: Any, base_of: Callable[..., Path]) -> None:
    config = LlamaConfig(**tiny_config(TinySettings(layers=2, width=64, ffn=96)) | {"attention_bias": True})
    workshop.base = base_of(config)

    with pytest.raises(TaskError, match="attention_bias=False from a GGUF file of this model, not True"):
        workshop.run(export, "export", SPEC, model=workshop.base)


def test_another_family_is_refused(workshop: Any) -> None:
    said = json.loads((workshop.base / "config.json").read_text())
    copy = workshop.root / "mistral"
    LlamaForCausalLM.from_pretrained(workshop.base).save_pretrained(copy)
    (copy / "config.json").write_text(json.dumps(said | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}))
    workshop.base = copy

    with pytest.raises(TaskError, match="GGUF is written for llama, qwen2, qwen3, not for mistral"):
        workshop.run(export, "export", SPEC, model=copy)
