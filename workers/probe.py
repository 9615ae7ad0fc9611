"""What is done to an export in a fresh process: it is opened from its directory and measured."""

from __future__ import annotations

import functools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pare.workers import evaluation, harness, large, metric_function
from pare.workers.evaluation import Reader
from pare.workers.export.reader import OpenedExport, import_libraries, open_export
from pare.workers.models import load_tokenizer
from pare.workers.pairs import accuracy
from pare.workers.task import TaskError

CONTROL_SIZE = {"cpu": 512, "cuda": 4096}
"""Side of the square matrices of the control reading."""


class ExportUnderTest:
    """An export, opened when it is first needed. Arguments and results are plain JSON."""

    def __init__(self, directory: str, dtype: str, device: str, memory: int | None = None) -> None:
        """memory: bytes that the model may take of a device while it is evaluated; None: what is free there."""
        self.memory = memory
        self._reader: Reader | None = None
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

    @property
    def reader(self) -> Reader:
        """The export as evaluation reads it, as much of it in memory as there is room for."""
        if self._reader is None:
            self.prepare()
        assert self._reader is not None
        return self._reader

    def prepare(self) -> dict[str, Any]:
        """Opens the export for evaluation; says which way."""
        said = json.loads((self.directory / "export.json").read_text())
        needed = said["parameters"] * self.dtype.itemsize
        can_shard = said["format"] in ("dense", "compressed-tensors") and said["open"] != "bfloat16"
        way = large.way(needed, self.memory, self.device, can_shard)
        if way == "streamed":
            self._reader = large.stream_export(self.directory, self.dtype, self.device)
        elif way == "sharded":
            self._reader = evaluation.Whole(large.shard_export(self.directory, self.dtype, self.memory))
        else:
            self._reader = evaluation.Whole(self.opened.model)
        return {"way": way, "bytes": needed}

    @property
    def model(self) -> Any:
        """What lm-eval is given: the model itself where there is one, for it reads contexts only once then."""
        return self.reader.model if isinstance(self.reader, evaluation.Whole) else self.reader

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.directory)

    def close(self) -> None:
        """Lets go of the model, to make room for another export's."""
        self._opened = self._reader = None

    def predict(self, tokens: str, teacher: str, models: dict[str, str]) -> dict[str, Any]:
        """Metrics and sums per window on the test windows; `models`: fingerprint -> directory of what the teacher refers to."""
        remembered = evaluation.open_teacher(Path(teacher), lambda fp: Path(models[fp]), self.dtype, self.device)
        predictions, _ = evaluation.predict(self.reader, evaluation.read_windows(Path(tokens)), remembered)
        return {"metrics": evaluation.summary(predictions), "windows": evaluation.per_window(predictions)}

    def answer(self, questions: str, task: str) -> dict[str, Any]:
        """Accuracy on questions.jsonl; as `harness.measured` gives it."""
        return harness.multiple_choice(self.model, self.tokenizer, read_lines(questions), task)

    def benchmark(self, directory: str, num_fewshot: int | None, limit: int | None) -> dict[str, Any]:
        """The tasks of a `benchmark` artifact; as `harness.measured` gives it."""
        return harness.benchmark(self.model, self.tokenizer, Path(directory), num_fewshot, limit)

    def pairs(self, directory: str) -> dict[str, Any]:
        """Accuracy on the minimal pairs of a `pairs` artifact; of the same form as that of `harness.measured`."""
        pairs = read_lines(str(Path(directory) / "pairs.jsonl"))
        answers = evaluation.prefers_good(self.reader, self.tokenizer, pairs)
        metrics = accuracy(answers, [pair["group"] for pair in pairs])
        directions = {
            name: "higher" for name in metrics if name.startswith("quality/") and not name.endswith(("_low", "_high"))
        }
        return {"metrics": metrics, "directions": directions, "answers": {"quality/acc/pairs": harness.as_digits(answers)}}

    def metric(self, spec: dict[str, Any], file: str, tokens: str) -> dict[str, float]:
        """What a function of the user measures."""
        if not isinstance(self.reader, evaluation.Whole):
            raise TaskError(
                f"evaluation.metrics: {spec['name']} is given the model, for which it has to be in memory as a whole. Give it "
                "more: evaluation.memory_gb; or leave the metric out",
                "infeasible",
            )
        windows = evaluation.read_windows(Path(tokens))
        return metric_function.call(spec, Path(file), self.reader.model, self.tokenizer, windows)

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


def read_lines(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def resident_bytes(field: str) -> int:
    """Resident memory of this process: `VmRSS` now, `VmHWM` at its highest. Off Linux it is the highest both times."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
