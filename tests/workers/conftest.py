"""A small random Llama on disk, artifacts made of it, and a context to run tasks in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pare.methods.parts.codebooks import Integer
from pare.methods.parts.codes import Codes, Rows
from pare.methods.parts.formula import Formula
from pare.workers.blobs import LocalBlobs
from pare.workers.checkpoint import Checkpoint
from pare.workers.models import ModelArtifact, write_formulas
from pare.workers.task import TaskContext
from pare.workers.tiny import TinySettings, tiny_config, tiny_tokenizer
from tests.workers.merging import Sweep, trained_sweep

BASE = "fingerprint-of-the-base"


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random bf16 weights: 2 blocks, width 64, FFN 96, tied head, a token for each byte."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("random_llama")
    torch.manual_seed(0)
    config = LlamaConfig(**tiny_config(TinySettings(layers=2, width=64, ffn=96)))
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def integer_codes(weight: Tensor, bits: int, group: int, symmetric: bool = True) -> Codes:
    """Round-to-nearest codes of weight (out, in), scales in bf16."""
    columns = weight.shape[1] if group == -1 else group
    groups = weight.float().unflatten(1, (-1, columns))
    half = 2 ** (bits - 1)
    if symmetric:
        scale = (groups.abs().amax(-1) / (half - 0.5)).to(torch.bfloat16)
        codes = (groups / scale.float()[..., None]).round().clamp(-half, half - 1) + half
        return Codes.of(codes.flatten(1), Integer(bits, signed=True), Rows(group), scale)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / (2 * half - 1)).to(torch.bfloat16)
    zero = (-low / scale.float()).round().clamp(0, 2 * half - 1)
    codes = ((groups / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 2 * half - 1)
    return Codes.of(codes.flatten(1), Integer(bits, signed=False), Rows(group), scale, zero)


@dataclass
class Workshop:
    """Makes artifacts on one base and runs tasks on them."""

    base: Path
    root: Path

    def resolve(self, fingerprint: str) -> Path:
        return {BASE: self.base}[fingerprint]

    def artifact(self, name: str, code: Callable[[str, Tensor], Any]) -> Path:
        """A *formulas* artifact with `code(module, weight)` in place of every linear for which that is not None."""
        directory = self.root / name
        directory.mkdir()
        base = ModelArtifact(self.base, self.resolve)
        weights = {name: base.stored(name) for name in base.parameter_names() if "_proj" in name}
        made = {name: code(name.removesuffix(".weight"), weight) for name, weight in weights.items()}
        formulas = {name: part if isinstance(part, Formula) else Formula([part]) for name, part in made.items() if part}
        write_formulas(directory, BASE, formulas)
        return directory

    def open(self, directory: Path) -> ModelArtifact:
        return ModelArtifact(directory, self.resolve)

    def context(self, out: str, spec: dict[str, Any], **inputs: Path) -> TaskContext:
        """What a task is run with; its directory is made."""
        directory = self.root / out
        directory.mkdir()
        fingerprints = {role: BASE if path == self.base else role for role, path in inputs.items()}
        return TaskContext(spec, inputs, directory, resolve=self.resolve, fingerprint_of=fingerprints)

    def run(self, task: Any, out: str, spec: dict[str, Any], **inputs: Path) -> tuple[Path, dict[str, Any]]:
        """Runs a task module; returns its directory and result."""
        ctx = self.context(out, spec, **inputs)
        return ctx.out, task.run(ctx)

    def tokens(self, sequences: int = 4, length: int = 32) -> Path:
        """Windows of random bytes."""
        directory = self.root / "tokens"
        if not directory.exists():
            directory.mkdir()
            ids = torch.randint(256, (sequences, length), generator=torch.Generator().manual_seed(1))
            save_file({"input_ids": ids}, directory / "tokens.safetensors")
        return directory


@pytest.fixture
def workshop(random_llama: Path, tmp_path: Path) -> Workshop:
    return Workshop(random_llama, tmp_path)


class Eager(Checkpoint):
    """Due at every opportunity."""

    def due(self, every_s: float = 0.0) -> bool:
        return True


@pytest.fixture
def attempt_checkpoint(tmp_path: Path) -> Callable[[], Checkpoint]:
    """Makes the checkpoint that one attempt after another is given for the same task; due at every opportunity."""
    return lambda: Eager(LocalBlobs(tmp_path / "kept"), "checkpoints/a-task")


@pytest.fixture(scope="session")
def codes() -> Callable[..., Codes]:
    return integer_codes


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A trained base, three adapters of unlike ranks and targets, one that was trained much too fast, and another base."""
    return trained_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture
def sweep(trained: Sweep, tmp_path: Path) -> Sweep:
    """The trained members, and a directory of the test's own for what it makes."""
    return Sweep(tmp_path, dict(trained.places))
