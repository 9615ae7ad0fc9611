"""How much a process grows while it calibrates and compresses a model that is larger than what it may take.

python -m tests.workers.memory_of_blocks DIRECTORY    prints {"whole": bytes, "calibrate": bytes, ...} as JSON
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pare.methods.ops.statistics import Gram
from pare.workers import hidden_states, models
from pare.workers.models import ModelArtifact, load_in_memory
from pare.workers.probe import resident_bytes
from pare.workers.task import TaskContext
from pare.workers.tasks import calibrate, compress

WIDTH, FFN, BLOCKS = 512, 1024, 12
SEQUENCES, LENGTH = 32, 128
BLOCK = 4 * (4 * WIDTH**2 + 3 * WIDTH * FFN)
"""Bytes of the weights of a block in float32, the dtype of the forward pass here and of what methods work on."""
STATISTICS = 4 * (3 * WIDTH**2 + FFN**2)
"""Bytes of the Gram matrices of a block."""
HIDDEN = 4 * SEQUENCES * LENGTH * WIDTH
"""Bytes of what a block reads of all sequences."""
HELD = HIDDEN // 4
"""How many of these may be in memory."""
ACTIVATIONS = HELD + 4 * 4 * LENGTH * (2 * WIDTH + 4 * FFN)
"""Of a batch of four sequences what a block reads and puts out, and inside it four tensors of the MLP's width."""
SHARD = 1 << 20
"""Bytes of finished operands in memory."""
CONSTANT = 10e6
"""Of the largest linear the copies of its Gram matrix and of its weights that a method works on; files that are read."""
LIMIT = 2 * BLOCK + STATISTICS + ACTIVATIONS + SHARD + CONSTANT


def main(root: Path) -> dict[str, int]:
    from transformers import LlamaConfig, LlamaForCausalLM

    places = {role: root / role for role in ("model", "tokens", "statistics")}
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=BLOCKS, vocab_size=258, max_position_embeddings=256,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(places["model"])
    places["tokens"].mkdir()
    save_file({"input_ids": torch.randint(256, (SEQUENCES, LENGTH))}, places["tokens"] / "tokens.safetensors")

    def run(task: Any, out: str, spec: dict[str, Any], *roles: str) -> Callable[[], None]:
        def work() -> None:
            (root / out).mkdir()
            inputs = {role: places[role] for role in roles}
            known: dict[str, Any] = {"resolve": lambda _: places["model"], "fingerprint_of": {"model": "m"}}
            task.run(TaskContext({"dtype": "float32"} | spec, inputs, root / out, **known))

        return work

    models.SHARD_BYTES = SHARD
    gram = {"statistics": [{"module": Gram.__module__, "class": "Gram"}]}
    gptq: dict[str, Any] = {"method": "gptq", "settings": {"bits": 4, "group_size": 64}}
    sequential = gptq | {"settings": gptq["settings"] | {"inputs": "compressed"}}
    run(calibrate, "before", gram, "model", "tokens")()  # imports, and memory that stays with the process
    unlimited = growth(run(calibrate, "unlimited", gram, "model", "tokens"))
    hidden_states.free_memory = lambda: int(HELD / hidden_states.PART)
    return {
        "whole": growth(lambda: load_in_memory(ModelArtifact(places["model"], Path), torch.float32)),
        "unlimited": unlimited,
        "calibrate": growth(run(calibrate, "statistics", gram, "model", "tokens")),
        "dense": growth(run(compress, "dense", gptq, "model", "statistics")),
        "compressed": growth(run(compress, "compressed", sequential, "model", "tokens")),
    }


def growth(work: Callable[[], Any]) -> int:
    """Bytes by which this process grew at its highest while it worked."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the kernel's mark of the highest resident size back
    before = resident_bytes("VmRSS")
    work()
    return resident_bytes("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
