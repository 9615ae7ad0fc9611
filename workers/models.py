"""Model artifacts: opening one, writing one, and making the in-memory model it stands for.

A model artifact is a directory in one of two forms:
- *dense*: what `save_pretrained` writes (config.json, model.safetensors or shards, tokenizer). The imported base.
- *formulas*: `tensors.json` (parameter name -> formula, and the fingerprint of the base it stands on) beside
  `weights.safetensors` with the operands. A parameter that the table does not name is the base's, so a tie, an
  embedding or a whole frozen model costs its bytes once. A file form of a method's own (`adapter/`) may stand beside.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pare.methods.parts.formula import Dense, Formula
from pare.workers.loading import is_loading

FORMAT = 1
TABLE, OPERANDS = "tensors.json", "weights.safetensors"


class ModelArtifact:
    """Read access to a model artifact, one tensor at a time (memory-mapped)."""

    def __init__(self, directory: Path, resolve: Callable[[str], Path]) -> None:
        self.directory = Path(directory)
        self.base: ModelArtifact | None = None
        self.table: dict[str, dict[str, Any]] = {}
        self.base_fingerprint: str | None = None
        table = self.directory / TABLE
        if table.exists():
            content = json.loads(table.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"{table}: format {content['format']} is not format {FORMAT} of this version of Pare")
            self.table = content["tensors"]
            self.base_fingerprint = content["base"]
            self.base = ModelArtifact(resolve(content["base"]), resolve)
            self._operands = safe_open(self.directory / OPERANDS, framework="pt")
        else:
            self._where = dense_index(self.directory)

    @property
    def dense(self) -> ModelArtifact:
        """The dense artifact at the bottom: its directory holds config and tokenizer."""
        return self.base.dense if self.base else self

    def parameter_names(self) -> list[str]:
        """Names of all parameters as the dense base stores them (a tied head is not stored)."""
        return list(self.dense._where)

    def formula(self, name: str) -> Formula | None:
        """This artifact's own entry for a parameter; None where the base's value stands."""
        if name not in self.table:
            return None
        spec = self.table[name]
        keys = [k for k in self._operands.keys() if k.startswith(name + ":")]  # noqa: SIM118 - safe_open is no mapping
        tensors = {k: self._operands.get_tensor(k) for k in keys}
        return Formula.from_tensors(spec, within_name(name, tensors))

    def compressed_names(self) -> list[str]:
        """Names of the parameters that have a formula here or in an artifact beneath, in order."""
        return sorted({*self.table, *(self.base.compressed_names() if self.base else ())})

    def effective(self, name: str) -> Formula:
        """The parameter as one formula in place of the dense value, with what artifacts beneath say worked in."""
        formula = self.formula(name)
        if formula is not None and formula.op == "replace":
            return formula
        beneath = self.base.effective(name) if self.base else Formula([Dense(self.stored(name))])
        return Formula([*beneath.parts, *formula.parts]) if formula else beneath

    def stored(self, name: str) -> Tensor:
        """The parameter as the dense base stores it, in its own dtype. Only for a parameter without a formula."""
        if self.base:
            return self.base.stored(name)
        with safe_open(self._where[name], framework="pt") as f:
            return f.get_tensor(name)

    def materialise(self, name: str) -> Tensor:
        """The parameter's dense value, float32, all formulas down to the base worked out."""
        formula = self.formula(name)
        if formula is None:
            return self.base.materialise(name) if self.base else self.stored(name).float()
        if formula.op == "replace" or self.base is None:
            return formula.materialise()
        return self.base.materialise(name) + formula.materialise()


def dense_index(directory: Path, stem: str = "model") -> dict[str, Path]:
    """Tensor name -> safetensors file, for a directory that `save_pretrained` (or `write_weights`) wrote."""
    index = directory / f"{stem}.safetensors.index.json"
    if index.exists():
        return {name: directory / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = directory / f"{stem}.safetensors"
    if not single.exists():
        raise FileNotFoundError(f"{directory} holds neither {stem}.safetensors nor {stem}.safetensors.index.json")
    with safe_open(single, framework="pt") as f:
        return dict.fromkeys(f.keys(), single)


def within_name(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Operands of one parameter: `name:0.codes` -> `0.codes`."""
    return {key[len(name) + 1 :]: t for key, t in tensors.items()}


@is_loading
def write_formulas(directory: Path, base_fingerprint: str, formulas: Mapping[str, Formula]) -> None:
    """Writes a *formulas* artifact: the table and the operands."""
    table = {name: formula.spec() for name, formula in formulas.items()}
    operands: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, formula in formulas.items():
        for key, operand in formula.tensors().items():
            t = operand.detach().cpu().contiguous()
            where = t.untyped_storage().data_ptr()
            # safetensors refuses tensors that share memory, such as one column order for several linears.
            operands[f"{name}:{key}"] = t.clone() if where in written else t
            written.add(where)
    save_file(operands, directory / OPERANDS, metadata={"format": "pt"})
    (directory / TABLE).write_text(json.dumps({"format": FORMAT, "base": base_fingerprint, "tensors": table}, indent=1))


def load_dense(directory: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """The Hugging Face model of a dense directory, in evaluation mode, read offline and without remote code."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True, trust_remote_code=False)
    return model.to(device).eval()


def load_skeleton(directory: Path) -> nn.Module:
    """The Hugging Face model of a dense directory on the meta device: its modules and shapes, no weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        skeleton: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return skeleton


@is_loading
def load_in_memory(artifact: ModelArtifact, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """The model that an artifact stands for, every weight worked out from its parts. Never reads an export."""
    model = load_dense(artifact.dense.directory, dtype, device)
    with torch.no_grad():
        for name in artifact.compressed_names():
            model.get_parameter(name).copy_(artifact.materialise(name))
    return model


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer that lies in a model directory."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
