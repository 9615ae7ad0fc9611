"""The peer: llm-compressor's `oneshot` with the settings and data of our legs, its sequential pipeline. Nothing is saved."""

from __future__ import annotations

import json
import os
import sys

import torch

from benchmarks.core.inputs import LENGTH, perplexity, place, progress_to_stderr, timed, tokens


def recipe(name: str, argument: str) -> object:
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import GPTQModifier

    if name == "peer_sparsegpt":
        return SparseGPTModifier(sparsity=float(argument), targets=["Linear"], ignore=["re:.*lm_head"])
    if name == "peer_wanda":
        return WandaPruningModifier(sparsity=float(argument), targets=["Linear"], ignore=["re:.*lm_head"])
    weights = {"num_bits": int(argument), "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}
    return GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])


def main(name: str, argument: str) -> dict[str, float]:
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place() / "model", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(place() / "model")
    ids = tokens("tokens")
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    values = timed(
        lambda: oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=data,
            recipe=recipe(name, argument),
            max_seq_length=LENGTH,
            num_calibration_samples=len(ids),
        )
    )
    return values | {"ppl": perplexity(model.float())}


if __name__ == "__main__":
    answer = os.dup(1)
    progress_to_stderr()
    line = json.dumps(main(sys.argv[1], sys.argv[2]))
    os.write(answer, f"{line}\n".encode())
