"""What is done to an export in a fresh process: it is opened from its directory and measured."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pare.workers import evaluation
from pare.workers.export.reader import OpenedExport, import_libraries, open_export

CONTROL_SIZE = {"cpu": 512, "cuda": 4096}
"""Side of the square matrices of the control reading."""


class ExportUnderTest:
    """An export, opened when it is first needed. Arguments and results are plain JSON."""

    def __init__(self, directory: str, dtype: str, device: str) -> None:
        self.directory, self.dtype, self.device = Path(directory), getattr(torch, dtype), torch.device(device)
        self._opened: OpenedExport | None = None
        import_libraries(self.directory)
        self._memory_of_imports = resident_bytes("VmRSS")

    def ready(self) -> None:
        """Answers once the libraries are imported."""

    def open(self) -> dict[str, Any]:
        """Opens the export; says what runtime computes it, and on how many threads."""
        return {"runtime": self.opened.runtime, "notes": self.opened.notes, "threads": torch.get_num_threads()}

    @property
    def opened(self) -> OpenedExport:
        if self._opened is None:
            self._opened = open_export(self.directory, self.dtype, self.device)
        return self._opened

    def close(self) -> None:
        """Lets go of the model, to make room for another export's."""
        self._opened = None

    def predict(self, tokens: str, teacher: str, models: dict[str, str]) -> dict[str, Any]:
        """Metrics and sums per window on the test windows; `models`: fingerprint -> directory of what the teacher refers to."""
        remembered = evaluation.open_teacher(Path(teacher), lambda fp: Path(models[fp]), self.dtype, self.device)
        predictions, _ = evaluation.predict(self.opened.model, evaluation.read_windows(Path(tokens)), remembered)
        return {"metrics": evaluation.summary(predictions), "windows": evaluation.per_window(predictions)}

    def answer(self, questions: str, task: str) -> dict[str, float]:
        """Accuracy on questions.jsonl."""
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant: a model and a data set in memory
        lines = [json.loads(line) for line in Path(questions).read_text().splitlines()]
        return evaluation.multiple_choice(self.opened.model, self.opened.tokenizer, lines, task)

    @torch.inference_mode()
    def speed(self, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        """Reads a prompt and then writes token after token, greedily, one sequence at a time."""
        model = self.opened.model
        control = self.control()
        drawn = torch.randint(model.config.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
        prompt = drawn.to(self.device)
        started = self.now()
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        read = self.now()
        for _ in range(new_tokens):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        written = self.now()
        return {
            "prefill_tok_s": prompt_tokens / (read - started),
            "decode_tok_s": new_tokens / (written - read),
            "control_gflop_s": control,
        }

    def control(self) -> float:
        """Speed of bare matrix products, GFLOP/s: tells a disturbed reading from a slow model."""
        side, times = CONTROL_SIZE[self.device.type], 8
        a = torch.ones(side, side, dtype=self.dtype, device=self.device)
        torch.mm(a, a)
        started = self.now()
        for _ in range(times):
            torch.mm(a, a)
        return times * 2 * side**3 / (self.now() - started) / 1e9

    def now(self) -> float:
        """Seconds, after the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def peak_bytes(self) -> int:
        """Most memory at any time: on a GPU what was allocated there, else the growth of this process above its imports."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resident_bytes("VmHWM") - self._memory_of_imports


def resident_bytes(field: str) -> int:
    """Resident memory of this process: `VmRSS` now, `VmHWM` at its highest. Off Linux it is the highest both times."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
