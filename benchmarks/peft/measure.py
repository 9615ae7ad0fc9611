"""One tuner on a small random Llama: what it costs, whether it reloads and merges, in float32 and on a base of NF4 codes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pare.methods.contract import METHODS, Context, load_all
from pare.methods.ops.adapters import block_linears
from pare.methods.ops.bnb4bit import quantise_linear
from pare.methods.ops.prompts import FILE, attach, read_prompt
from pare.methods.ops.tuner_kinds import PROMPTS

STEPS, RATE = 4, 1e-2
CPU = torch.device("cpu")
IDS = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(1))
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
RANK = 8
"""Of every tuner that has one, whatever its default: a small model has no room for ranks of hundreds."""
KEYS = {"adamss": {"num_subspaces": 2}, "fourierft": {"n_frequency": 100}, "waveft": {"n_frequency": 100}}
"""Config for the small model where the usual one does not fit it."""


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, tie_word_embeddings=True, **SHAPE)).eval()


def quantised() -> nn.Module:
    """The same in NF4 codes with double quantisation."""
    model = llama()
    for name, linear in block_linears(model).items():
        model.set_submodule(name, quantise_linear(linear, "nf4", True, CPU))
    model.is_loaded_in_4bit = True
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model.eval()(input_ids=IDS).logits.float()
    return out[:, -IDS.shape[1] :]  # peft gives logits for virtual tokens, too


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def tuner(name: str) -> Any:
    cls: Any = load_all()[name]
    rank = {"rank": RANK} if "rank" in cls.__dataclass_fields__ else {}
    config = {"config": KEYS[name]} if name in KEYS else {}
    return cls(steps=STEPS, learning_rate=RATE, batch_size=4, **rank, **config)


def trained(name: str, base: Callable[[], nn.Module]) -> tuple[Any, nn.Module, Tensor]:
    """(method, its model after some steps, what the model put out before them)."""
    method = tuner(name)
    model = method.prepare(base(), Context(CPU, data={"input_ids": IDS}))
    start = logits(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0)
    model.train()
    for step in range(1, STEPS + 1):
        total, tokens = method.loss(model, {"input_ids": IDS})
        (total / tokens).backward()
        method.after_backward(step)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step)
    return method, model, start


def measured(name: str) -> dict[str, Any]:
    """All that the table says of a tuner. Errors are the greatest of a logit; `effect` is what training changed in one."""
    torch.manual_seed(3)
    base = logits(llama())
    method, model, start = trained(name, llama)
    tuned = logits(model)
    row: dict[str, Any] = {
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "start": distance(start, base),
        "effect": distance(tuned, base),
    }
    with tempfile.TemporaryDirectory() as place:
        formulas = method.finish(model, Path(place))
        row["file_bytes"] = (Path(place) / "adapter" / "adapter_model.safetensors").stat().st_size
        row["kept_bytes"] = sum(formula.nbytes for formula in formulas.values())
        row["kept_as"] = "/".join(sorted({part.kind for formula in formulas.values() for part in formula.parts}))
        prompt = read_prompt(Path(place))
        if prompt is not None:
            row |= {"kept_bytes": (Path(place) / FILE).stat().st_size, "kept_as": "prompt"}
        row["reload"] = distance(reloaded(Path(place) / "adapter"), tuned)
    merged = llama()
    with torch.no_grad():
        for weight, formula in formulas.items():
            parameter = merged.get_parameter(weight)
            parameter += formula.materialise().view(parameter.shape)
    if prompt is not None:  # there is nothing to merge: it is what Pare puts before the input
        attach(merged, lambda: prompt)
    return row | {"merge": distance(logits(merged), tuned), "nf4": on_codes(name)}


def reloaded(directory: Path) -> Tensor:
    from peft import PeftModel

    torch.manual_seed(99)
    return logits(PeftModel.from_pretrained(llama(), directory))


def on_codes(name: str) -> dict[str, Any]:
    """Whether it trains on a base of NF4 codes, and what peft's merge into the codes makes of it, where there is one."""
    base = logits(quantised())
    try:
        method, model, start = trained(name, quantised)
        tuned = logits(model)
    except Exception as e:  # whatever a library that was not made for codes raises is the answer
        return {"trains": False, "why": said(e)}
    found: dict[str, Any] = {"trains": True, "start": distance(start, base), "effect": distance(tuned, base)}
    if method.learns_prompt:  # there is nothing to merge
        return found
    try:
        return found | {"merges": True, "error": distance(logits(model.merge_and_unload()), tuned)}
    except Exception as e:
        return found | {"merges": False, "why": said(e)}


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''}"


def names() -> list[str]:
    """`lora`, and every tuner there is; prompts last."""
    load_all()
    found = [name for name, cls in METHODS.items() if hasattr(cls, "of")]
    return ["lora", *sorted(found, key=PROMPTS.__contains__)]
