"""Training of a Llama-shaped model of 1 to 3 billion random weights on one device: tokens a second and peak memory of LoRA,
QLoRA and full fine-tuning.

    python -m benchmarks.gpu.tuning                  1.2 billion weights on the GPU there is; benchmarks/results/gpu_tuning.json
    python -m benchmarks.gpu.tuning --hidden 3072 --heads 24 --blocks 28 --only lora qlora                     3.2 billion
    python -m benchmarks.gpu.tuning --hidden 64 --ffn 128 --heads 4 --blocks 2 --vocabulary 512 --batch 2 --micro-batch 1 \\
        --length 16 --steps 3 --dtype float32 --result /tmp/x.json                                                     anywhere

The methods and the loop are those of a real run; weights and tokens are random. Needs neither Ray nor MLflow.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.core.inputs import timed
from benchmarks.provenance import ROOT, provenance
from pare.methods.contract import Context, TrainMethod, load_all
from pare.workers.training import Engine, train

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 16, "alpha": 32},
    "qlora": {"rank": 16, "alpha": 32},
    "full": {"store": "bfloat16"},
}
"""Reading, which is the name of a method -> its own settings."""
SHAPE = {"hidden": 2048, "ffn": 8192, "heads": 32, "blocks": 16, "vocabulary": 128256}
LOOP = {"batch": 8, "micro-batch": 2, "length": 2048, "steps": 8}


def model_of(given: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A Llama with one head of keys and values for four of queries and a tied head, on `device` from the start."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=given.hidden,
        intermediate_size=given.ffn,
        num_attention_heads=given.heads,
        num_key_value_heads=max(1, given.heads // 4),
        num_hidden_layers=given.blocks,
        vocab_size=given.vocabulary,
        max_position_embeddings=max(2048, given.length),
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: torch.nn.Module = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return model


def measure(name: str, given: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """One method on a fresh model. The first step is left out of the tokens a second: it warms up kernels and memory."""
    dtype = getattr(torch, given.dtype)
    loop = {"steps": given.steps, "batch_size": given.batch, "micro_batch_size": given.micro_batch, "warmup": 0.0}
    method = load_all()[name](**loop, **METHODS[name], gradient_checkpointing=given.checkpointing)
    assert isinstance(method, TrainMethod)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(given.vocabulary, (given.batch * given.steps, given.length), generator=generator)
    done: list[float] = []

    def tick(*_: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done.append(time.perf_counter())

    found: dict[str, float] = {}

    def work() -> None:
        model = model_of(given, device, dtype)
        found["weights"] = sum(p.numel() for p in model.parameters())
        model = method.prepare(model, Context(device))
        found["trained_weights"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if device.type == "cuda":
            found["held_bytes"] = torch.cuda.memory_allocated(device)
        with tempfile.TemporaryDirectory() as directory:
            train(method, model, {"input_ids": ids}, Path(directory), 0, Engine(device, dtype), tick)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    spent = timed(work)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else spent["peak_growth_bytes"]
    gc.collect()
    torch.cuda.empty_cache()
    rate = (given.steps - 1) * given.batch * given.length / (done[-1] - done[0])
    return {**found, "tokens_s": rate, "peak_bytes": peak, "wall_s": spent["s"]}


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {**SHAPE, **LOOP}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_tuning.json")
    given = parser.parse_args(words)
    if given.steps < 2:
        parser.error("--steps must be >= 2: the first one is left out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = {key: value for key, value in vars(given).items() if key not in ("result", "only")}
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    found = {"schema_version": 1, **provenance("benchmarks.gpu.tuning", *packages), "device": str(device), "asked": asked}
    found["methods"] = {name: measure(name, given, device) for name in given.only}
    given.result.parent.mkdir(parents=True, exist_ok=True)
    given.result.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["methods"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
