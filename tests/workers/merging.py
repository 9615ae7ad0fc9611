"""A sweep of models on one base, as the task `merge` finds them: what trained, compressed and merged tasks leave."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pare.methods.contract import Context
from pare.methods.finetune.lora import Lora
from pare.methods.parts.formula import Formula
from pare.workers.checkpoint import NO_CHECKPOINT, Checkpoint
from pare.workers.models import ModelArtifact, load_in_memory, write_formulas
from pare.workers.task import TaskContext
from pare.workers.tasks import export, merge, score
from pare.workers.tiny import TinySettings, tiny_config, tiny_tokenizer

IDS = torch.arange(32).view(2, 16)


def text(sequences: int, seed: int) -> Tensor:
    """Windows that are easy to learn: counting up by a step that differs from window to window."""
    generator = torch.Generator().manual_seed(seed)
    start, step = (torch.randint(high, (sequences, 1), generator=generator) for high in (60, 3))
    return (start + (step + 1) * torch.arange(16)) % 96


def descend(model: nn.Module, rows: Tensor, steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        total, tokens = Lora().loss(model, {"input_ids": rows[4 * step % len(rows) :][:4]})
        (total / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


@dataclass
class Sweep:
    """Artifacts by name, which is their fingerprint too, and tasks that are run on them."""

    root: Path
    places: dict[str, Path] = field(default_factory=dict)

    def run(self, task: Any, name: str, spec: dict[str, Any], checkpoint: Checkpoint = NO_CHECKPOINT, **inputs: str) -> Any:
        """Runs a task; what it writes becomes the artifact `name`. Role `member_000` means `member.000`."""
        out = self.places[name] = self.root / name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        return task.run(self.context(spec, out, checkpoint, **inputs))

    def context(self, spec: dict[str, Any], out: Path, checkpoint: Checkpoint = NO_CHECKPOINT, **inputs: str) -> TaskContext:
        roles = {role.replace("_0", ".0"): name for role, name in inputs.items()}
        places = {role: self.places[name] for role, name in roles.items()}
        return TaskContext(
            spec, places, out, resolve=self.places.__getitem__, fingerprint_of=roles, checkpoint=checkpoint
        )  # fmt: skip

    def train(self, name: str, method: Any = None, on: str = "base", steps: int = 12, rate: float = 0.02) -> None:
        """What the task `train` leaves of such an adapter, without its loop."""
        out = self.places[name] = self.root / name
        out.mkdir()
        method = method or Lora(rank=4)
        start = load_in_memory(self.open(on), torch.float32)
        model = method.prepare(start, Context(torch.device("cpu")))
        descend(model, text(24, seed=0), steps, rate)
        write_formulas(out, on, method.finish(model, out))

    def write(self, name: str, formulas: dict[str, Formula], base: str = "base", **more: Any) -> None:
        self.places[name] = self.root / name
        self.places[name].mkdir()
        write_formulas(self.places[name], base, formulas, **more)

    def open(self, name: str) -> ModelArtifact:
        return ModelArtifact(self.places[name], self.places.__getitem__)

    def score(self, name: str) -> float:
        """The selection score, as the driver reads it off the task `score`."""
        result = self.run(score, f"score-{name}", {"dtype": "float32", "keep_hidden": False}, model=name, tokens="selection")
        return math.log(result["quality/ppl"])

    def merge_spec(
        self, names: tuple[str, ...], scores: dict[str, float] | None = None, method: str = "model_soups", **settings: Any
    ) -> dict[str, Any]:
        members = [{"name": name, "score": (scores or {}).get(name) or self.score(name)} for name in names]
        members.sort(key=lambda member: (member["score"], member["name"]))
        return {"method": method, "settings": settings, "dtype": "float32", "members": members}

    def inputs(self, spec: dict[str, Any], base: str = "base") -> dict[str, str]:
        members = {f"member_{i:03d}": member["name"] for i, member in enumerate(spec["members"])}
        return {"model": base, "tokens": "selection", **members}

    def merge(self, names: tuple[str, ...], out: str = "soup", base: str = "base", **settings: Any) -> dict[str, Any]:
        spec = self.merge_spec(names, **settings)
        result: dict[str, Any] = self.run(merge, out, spec, **self.inputs(spec, base))
        return result

    def soup(self, name: str = "soup") -> Any:
        return json.loads((self.places[name] / "soup.json").read_text())

    def export(self, name: str = "soup") -> tuple[Path, dict[str, Any]]:
        result = self.run(export, f"export-{name}", {}, model=name)
        return self.places[f"export-{name}"], result


def trained_sweep(root: Path) -> Sweep:
    """A trained base, three adapters of unlike ranks and targets, one that was trained much too fast, and another base."""
    sweep = Sweep(root)
    for name in ("base", "stranger", "selection"):
        sweep.places[name] = sweep.root / name
        sweep.places[name].mkdir()
    for seed, name in enumerate(("base", "stranger")):
        torch.manual_seed(seed)
        config = LlamaConfig(**{**tiny_config(TinySettings(layers=2, width=64, ffn=128)), "vocab_size": 300})
        model = LlamaForCausalLM(config)
        if name == "base":
            descend(model, text(64, seed=9), 60, 3e-3)
        model.to(torch.bfloat16).save_pretrained(sweep.places[name])
        tiny_tokenizer().save_pretrained(sweep.places[name])
    save_file({"input_ids": text(8, seed=1)}, sweep.places["selection"] / "tokens.safetensors")
    sweep.train("a")
    sweep.train("b", Lora(rank=2, alpha=3, rslora=True, init_seed=1))
    sweep.train("c", Lora(rank=4, targets="q_v", init_seed=2))
    sweep.train("wild", rate=3.0)
    return sweep


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits.float()  # type: ignore[no-any-return]


def in_memory(sweep: Sweep, name: str = "soup") -> Tensor:
    return logits(load_in_memory(sweep.open(name), torch.float32))
