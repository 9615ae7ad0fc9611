from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pare.workers.gguf_file import Gguf, llama_name

HEADS, KV_HEADS, WIDTH, FFN, BLOCKS = 4, 2, 64, 96, 2


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama written by the gguf package, its matrices in Q4_1, Q8_0 and float32."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<|end|>", "a", "b", "c", "1", "2", "Ġ", "ab", "abc", "12"] + [f"t{i}" for i in range(22)]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 31)
    writer.add_token_merges(["a b", "ab c", "1 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    random = np.random.default_rng(0)
    shapes = {
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (WIDTH * KV_HEADS // HEADS, WIDTH),
        "attn_v": (WIDTH * KV_HEADS // HEADS, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (FFN, WIDTH),
        "ffn_up": (FFN, WIDTH),
        "ffn_down": (WIDTH, FFN),
    }
    kinds = [gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32]

    def add(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> None:
        weight = random.standard_normal(shape, dtype=np.float32)
        data = weight if kind == gguf.GGMLQuantizationType.F32 else gguf.quantize(weight, kind)
        writer.add_tensor(name, data, raw_dtype=kind)

    add("token_embd.weight", (len(tokens), WIDTH), gguf.GGMLQuantizationType.Q8_0)
    add("output_norm.weight", (WIDTH,), gguf.GGMLQuantizationType.F32)
    for i in range(BLOCKS):
        add(f"blk.{i}.attn_norm.weight", (WIDTH,), gguf.GGMLQuantizationType.F32)
        add(f"blk.{i}.ffn_norm.weight", (WIDTH,), gguf.GGMLQuantizationType.F32)
        for n, (name, shape) in enumerate(shapes.items()):
            add(f"blk.{i}.{name}.weight", shape, kinds[(n + i) % 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_weight_is_bit_for_bit_what_transformers_reads(file: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    expected = {name: p.detach() for name, p in reference.named_parameters()}

    ours = Gguf(file)

    assert set(ours.names) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(torch.from_numpy(ours.read(name).copy()), weight), name


def test_the_config_is_what_was_written(file: Path) -> None:
    config = Gguf(file).config()

    assert config["rms_norm_eps"] == 1e-5  # and not the nearest float32
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (WIDTH, FFN, BLOCKS)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (HEADS, KV_HEADS, 16)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config["tie_word_embeddings"], config["vocab_size"], config["max_position_embeddings"]) == (True, 32, 128)


def test_the_tokenizer_merges_letters_and_keeps_digits_apart(file: Path) -> None:
    tokenizer = Gguf(file).tokenizer()

    assert tokenizer.tokenize("abc 12<|end|>ab") == ["abc", "Ġ", "1", "2", "<|end|>", "ab"]
    assert tokenizer.decode(tokenizer("abc 12").input_ids) == "abc 12"
    assert (tokenizer.eos_token, tokenizer.bos_token_id) == ("<|end|>", 0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blk.12.attn_q.weight", "model.layers.12.self_attn.q_proj.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
    ],
)
def test_names_are_those_of_transformers(name: str, expected: str) -> None:
    assert llama_name(name) == expected


def test_what_is_not_a_plain_llama_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'blk.0.ssm_a.weight' is not one of a plain Llama"):
        llama_name("blk.0.ssm_a.weight")
    (tmp_path / "not.gguf").write_bytes(b"something else, and long enough for a header")
    with pytest.raises(ValueError, match=r"not.gguf is not a GGUF file"):
        Gguf(tmp_path / "not.gguf")
