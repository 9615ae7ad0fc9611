"""Reads a GGUF file of the Llama architecture: header in a tenth of a second, weights, tokenizer.

The format is that of the GGUF specification, versions 2 and 3, little endian: magic, version, number of tensors, number
of metadata entries, the entries, the tensors' names, shapes, types and offsets, then the aligned data.
`gguf.GGUFReader` makes an array per token and takes two seconds for the same header; its dequantisers are used here.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# Value types of the specification -> struct format. 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
CONTROL_TOKEN = 3

LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies and how."""

    shape: tuple[int, ...]
    """(out, in) of a matrix: the reverse of the order in the file."""

    type: int
    """Number of the quantisation type, as in `gguf.GGMLQuantizationType`."""

    offset: int
    """Bytes from the start of the file."""


class Gguf:
    """Metadata and tensor table of a GGUF file; weights are read one by one."""

    def __init__(self, path: Path, only: str | None = "llama") -> None:
        """only: the one architecture that is taken; None: any, of which the metadata and the table are read.

        Raises:
            ValueError: no whole GGUF header, or another architecture.
        """
        self.path = path
        try:
            self._read_header()
        except (struct.error, KeyError, UnicodeDecodeError) as e:
            raise ValueError(f"{path} is cut short in its header or damaged ({type(e).__name__})") from e
        if only and self.metadata["general.architecture"] != only:
            raise ValueError(f"{path} holds architecture {self.metadata['general.architecture']!r}; only {only!r} is read")

    def _read_header(self) -> None:
        path = self.path
        with open(path, "rb") as f:
            self._bytes = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        magic, version, n_tensors, n_entries = struct.unpack_from("<4sIQQ", self._bytes)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{path} is not a GGUF file of version 2 or 3")
        self._at = 24
        self.metadata: dict[str, Any] = {}
        for _ in range(n_entries):
            key = self._string()
            self.metadata[key] = self._value(self._number("I"))
        table = {self._string(): self._table_entry() for _ in range(n_tensors)}
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        self.tensors = {name: Stored(shape, kind, start + offset) for name, (shape, kind, offset) in table.items()}

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._bytes, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._number("Q")
        self._at += length
        return self._bytes[self._at - length : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            of, length = self._number("I"), self._number("Q")
            if of in (STRING, ARRAY):
                return [self._value(of) for _ in range(length)]
            values = struct.unpack_from(f"<{length}{SCALARS[of]}", self._bytes, self._at)
            self._at += struct.calcsize(f"<{length}{SCALARS[of]}")
            return list(values)
        return self._number(SCALARS[kind])

    def _table_entry(self) -> tuple[tuple[int, ...], int, int]:
        n_dims = self._number("I")
        shape = tuple(self._number("Q") for _ in range(n_dims))[::-1]
        return shape, self._number("I"), self._number("Q")

    @property
    def bytes(self) -> int:
        """Bytes that the file has, at least, if it is whole."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        end = self._at
        for tensor in self.tensors.values():
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type)]
            end = max(end, tensor.offset + prod(tensor.shape) // block * block_bytes)
        return end

    def llama(self, key: str) -> Any:
        return self.metadata[f"llama.{key}"]

    @property
    def names(self) -> dict[str, str]:
        """Name of the parameter in transformers' Llama -> name of the tensor in the file."""
        return {llama_name(name): name for name in self.tensors}

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return "output.weight" not in self.tensors

    def config(self) -> dict[str, Any]:
        """The settings of `transformers.LlamaConfig`."""
        heads = self.llama("attention.head_count")
        return {
            "vocab_size": self.tensors["token_embd.weight"].shape[0],
            "hidden_size": self.llama("embedding_length"),
            "intermediate_size": self.llama("feed_forward_length"),
            "num_hidden_layers": self.llama("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.metadata.get("llama.attention.head_count_kv", heads),
            "head_dim": self.llama("rope.dimension_count"),
            "max_position_embeddings": self.llama("context_length"),
            # The file holds float32; the number that was meant has few decimal digits.
            "rms_norm_eps": float(f"{self.llama('attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_parameters": {"rope_type": "default", "rope_theta": self.llama("rope.freq_base")},
            "tie_word_embeddings": self.tied,
            "bos_token_id": self.metadata["tokenizer.ggml.bos_token_id"],
            "eos_token_id": self.metadata["tokenizer.ggml.eos_token_id"],
            "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
        }

    def read(self, name: str) -> np.ndarray:
        """The parameter `name` of transformers' Llama, float32.

        GGUF keeps the rows of Q and K of each head in pairs that are rotated together, (dim / 2, 2); transformers keeps
        the first members of all pairs before the second ones, (2, dim / 2).
        """
        import numpy as np
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        stored = self.tensors[self.names[name]]
        kind = GGMLQuantizationType(stored.type)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        row_bytes = stored.shape[-1] // block * block_bytes
        n_rows = int(np.prod(stored.shape[:-1], dtype=np.int64))
        raw = np.frombuffer(self._bytes, np.uint8, n_rows * row_bytes, stored.offset).reshape(*stored.shape[:-1], row_bytes)
        weight = np.asarray(dequantize(raw, kind), dtype=np.float32).reshape(stored.shape)
        heads = {"q_proj": self.llama("attention.head_count"), "k_proj": self.config()["num_key_value_heads"]}.get(
            name.split(".")[-2]
        )
        if heads:
            weight = weight.reshape(heads, -1, 2, *stored.shape[1:]).swapaxes(1, 2).reshape(stored.shape)
        return weight

    def tokenizer(self) -> Any:
        """The byte-level BPE tokenizer as a `transformers` fast tokenizer, with its chat template.

        `tokenizer.ggml.pre` says how text is cut before merging; "smollm" cuts out every digit before the words of GPT-2.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        meta = {key.removeprefix("tokenizer.ggml."): value for key, value in self.metadata.items()}
        if (meta["model"], meta["pre"]) != ("gpt2", "smollm"):
            raise ValueError(f"{self.path}: tokenizer {meta['model']}/{meta['pre']} is not known here; only gpt2/smollm is")
        tokens = meta["tokens"]
        merges = [tuple(merge.split(" ")) for merge in meta["merges"]]
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        control = [token for token, kind in zip(tokens, meta["token_type"], strict=True) if kind == CONTROL_TOKEN]
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
        roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            model_max_length=self.llama("context_length"),
            clean_up_tokenization_spaces=False,
            chat_template=self.metadata.get("tokenizer.chat_template"),
            **{role: tokens[meta[f"{key}_token_id"]] for role, key in roles.items() if f"{key}_token_id" in meta},
        )


def llama_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    *front, kind, suffix = name.split(".")
    if kind not in LLAMA_NAMES:
        raise ValueError(f"tensor {name!r} is not one of a plain Llama")
    return ".".join((["model.layers", front[1]] if front else []) + [LLAMA_NAMES[kind], suffix])
