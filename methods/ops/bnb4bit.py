"""4-bit weights as bitsandbytes keeps them in memory and in checkpoints, to and from `Codes`.

bitsandbytes flattens a weight, takes blocks of 64 and packs two codes to a byte, the first one in the high bits: just what
`Codes` with a `Flat` index holds, except that its "fp4" codes are bit patterns, where `Table` wants them in ascending order.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from pare.methods.parts.codebooks import Table, dynamic8, fp4, nf4
from pare.methods.parts.codes import Codes, Flat

BLOCK, SCALE_BLOCK = 64, 256
QUANT_TYPES = ("nf4", "fp4")

FP4 = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], dtype=torch.float32) / 12
"""Bit pattern -> value: a sign, two bits of exponent and one of mantissa, in an order of bitsandbytes' own."""


def library() -> Any:
    """The module `bitsandbytes`, which not every machine has."""
    try:
        import bitsandbytes
    except ImportError as e:
        raise ImportError(f"4-bit weights need bitsandbytes ({e}). Try: pip install 'pare-lm[qlora]'") from e
    return bitsandbytes


def quantise_linear(linear: nn.Linear, quant_type: str, double_quant: bool, device: torch.device) -> nn.Module:
    """A dense linear -> a frozen `bitsandbytes.nn.Linear4bit` on `device` that computes in the linear's dtype."""
    bnb = library()
    dtype, out_in = linear.weight.dtype, (linear.in_features, linear.out_features)
    new = bnb.nn.Linear4bit(*out_in, bias=linear.bias is not None, compute_dtype=dtype, device="meta")
    new.weight = bnb.nn.Params4bit(
        linear.weight.detach().to(device, torch.float32),
        requires_grad=False,
        blocksize=BLOCK,
        compress_statistics=double_quant,
        quant_type=quant_type,
        module=new,
    ).to(device)  # this quantises
    new.weight.quant_state.dtype = dtype  # what the backward pass decodes to; the forward pass takes its input's dtype
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
    settle(new, dtype)
    return new


def settle(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes a model with 4-bit linears compute in `dtype` and keep their weights as they were stored.

    On processors with AVX512_BF16, bitsandbytes repacks a weight in place at its first forward pass in evaluation mode: the
    scales are rounded to bfloat16, the double quantisation is dropped, and a backward pass then reads the new layout as if
    it were the old one. There is no error, only wrong gradients. And transformers 5.23 leaves the other weights of a 4-bit
    checkpoint in the dtype in which they are stored, whatever dtype was asked for.
    """
    for module in model.modules():
        if isinstance(module, library().nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = dtype, True
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def quantised_weights(model: nn.Module) -> dict[str, Codes]:
    """Parameter name -> codes, for every `Linear4bit` of a model, whether peft has wrapped it or not."""
    bnb = library()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    return {f"{name.removesuffix('.base_layer')}.weight": codes_of(layer.weight) for name, layer in layers.items()}


def codes_of(weight: Any) -> Codes:
    """A quantised `bitsandbytes.nn.Params4bit` (out, in) -> the same numbers as `Codes`."""
    state, packed = weight.quant_state, weight.detach().view(torch.uint8).flatten()
    scale: Tensor | Codes = state.absmax
    if state.nested:
        # The operands are copied where bitsandbytes may share them between weights: safetensors stores no shared memory.
        scale = Codes(
            (1, len(state.absmax)),
            state.absmax,
            dynamic8(),
            Flat(SCALE_BLOCK),
            state.state2.absmax,
            offset=state.offset.clone(),
        )
    shape = (state.shape[0], state.shape[1])
    if state.quant_type == "nf4":
        return Codes(shape, packed, nf4(), Flat(state.blocksize), scale)
    return Codes(shape, swap_nibbles(packed, fp4_ranks()), fp4(), Flat(state.blocksize), scale)


def fp4_ranks() -> Tensor:
    """Bit pattern -> its place among the ascending values, uint8 (16,); the two zeros keep apart."""
    return FP4.argsort(stable=True).argsort().to(torch.uint8)


def swap_nibbles(packed: Tensor, new: Tensor) -> Tensor:
    """Two codes a byte -> the same with every code c replaced by new[c]; new uint8 (16,)."""
    new = new.to(packed.device)
    return (new[(packed >> 4).int()] << 4) | new[(packed & 15).int()]


def quant_type_of(codes: Codes) -> str | None:
    """ "nf4" or "fp4" where bitsandbytes can hold these codes as they are, else None."""
    if not isinstance(codes.index, Flat) or codes.zero is not None or codes.offset is not None:
        return None
    if isinstance(codes.scale, Codes) and codes.scale.index != Flat(SCALE_BLOCK):
        return None
    if not isinstance(codes.codebook, Table):
        return None
    return codes.codebook.name if codes.codebook.name in QUANT_TYPES else None


def checkpoint_tensors(name: str, codes: Codes) -> dict[str, Tensor]:
    """The tensors under which transformers stores a 4-bit weight of bitsandbytes: `name`, `name`.absmax, ..."""
    quant_type = quant_type_of(codes)
    if quant_type is None:
        raise ValueError(f"{name}: bitsandbytes has no 4-bit form of {codes.spec()}")
    packed, values = codes.codes, codes.codebook.lookup(torch.arange(16, dtype=torch.uint8))
    if quant_type == "fp4":
        packed, values = swap_nibbles(packed, fp4_ranks().argsort().to(torch.uint8)), FP4.clone()
    # The decoded dtype is float32, so that the weights are those of the codes in whichever dtype the model is opened.
    about: dict[str, Any] = {
        "quant_type": quant_type,
        "blocksize": codes.index.spec()["block"],
        "dtype": "float32",
        "shape": list(codes.shape),
    }
    tensors = {name: packed.unsqueeze(1), f"{name}.quant_map": values}
    if isinstance(codes.scale, Codes):
        inner = codes.scale
        offset = 0.0 if inner.offset is None else inner.offset.item()
        about |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        tensors |= {
            f"{name}.absmax": inner.codes,
            f"{name}.nested_absmax": inner.scale,
            f"{name}.nested_quant_map": inner.codebook.lookup(torch.arange(256, dtype=torch.uint8)),
        }
    else:
        tensors[f"{name}.absmax"] = codes.scale
    about_bytes = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
    return tensors | {f"{name}.quant_state.bitsandbytes__{quant_type}": about_bytes}


def checkpoint_config(codes: Codes, skip: list[str]) -> dict[str, Any]:
    """`quantization_config` of a checkpoint whose linears, all but those in `skip`, are stored like `codes`."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant_type_of(codes),
        "bnb_4bit_use_double_quant": isinstance(codes.scale, Codes),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": skip,
    }
