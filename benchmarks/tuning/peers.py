"""The peer: Hugging Face's Trainer and peft, as their guides put them together; settings, rows and their order are ours."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

import torch

from benchmarks.core.inputs import place, progress_to_stderr, timed
from benchmarks.tuning.inputs import ALPHA, BATCH, LEARNING_RATE, MICRO_BATCH, RANK, Asked, Clock, rows
from benchmarks.tuning.legs import warm

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained(method: str, asked: Asked, root: str) -> dict[str, float]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

    dtype = getattr(torch, asked.dtype)
    four_bit: dict[str, Any] = {}
    if method == "qlora":
        four_bit["device_map"] = {"": "cpu"}
        four_bit["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    arguments = TrainingArguments(
        output_dir=root,
        max_steps=asked.steps,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=BATCH // MICRO_BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=asked.warmup_steps,
        optim="adamw_torch",
        bf16=asked.dtype == "bfloat16",
        use_cpu=True,
        seed=0,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    clock, losses = Clock(), list[float]()

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(place() / "model", dtype=dtype, **four_bit)
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, task_type="CAUSAL_LM"))
        data = [{"input_ids": row, "labels": row} for row in rows(asked.steps)]
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Watch()]).train()
        model.save_pretrained(f"{root}/adapter")

    values = timed(work)
    return values | {"tokens_s": clock.tokens_s, "first_loss": losses[0], "last_loss": losses[-1]}


def main(name: str, argument: str) -> dict[str, float]:
    warm()
    with tempfile.TemporaryDirectory() as root:
        return trained(name.removeprefix("peer_"), Asked.of(argument), root)


if __name__ == "__main__":
    answer = os.dup(1)
    progress_to_stderr()
    os.write(answer, f"{json.dumps(main(sys.argv[1], sys.argv[2]))}\n".encode())
