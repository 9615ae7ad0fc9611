"""Model artifacts: opening one, writing one, and making the in-memory model it stands for.

A model artifact is a directory in one of two forms:
- *dense*: what `save_pretrained` writes (config.json, model.safetensors or shards, tokenizer). The imported base.
- *formulas*: `tensors.json` (name -> formula, and the fingerprint of the base it stands on) beside `weights.safetensors`
  with the operands, or shards of it with an index. A name is that of a parameter, or of a view of one (see
  `methods/anatomy/views.py`); the formula of a vector (n,) has the shape (1, n). A parameter that the table does not name is
  the base's, so a tie, an embedding or a whole frozen model costs its bytes once. A file form of a method's own (`adapter/`)
  may stand beside. Where the stage has folded factors into weights, they stand with the operands as `fold.in:NAME` (in,), by
  which columns were multiplied, and `fold.out:NAME` (out,), by which rows were divided: without them nobody could tell a
  changed weight from a scaled one. Where the stage has learnt a prompt, it stands in `prompt.safetensors`
  (see `methods/ops/prompts.py`), and nothing stands on such an artifact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pare.methods.anatomy.views import parse, view, weight_of
from pare.methods.ops.prompts import attach, read_prompt
from pare.methods.parts.formula import Dense, Formula
from pare.methods.parts.linear import FrozenLinear
from pare.workers.loading import is_loading
from pare.workers.quantised_inputs import quantise_inputs
from pare.workers.shards import ShardWriter
from pare.workers.task import TaskError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FORMAT = 1
TABLE, STEM = "tensors.json", "weights"
SHARD_BYTES = 64 << 20
"""Of the operands of an artifact what is gathered in memory before it is written: a block or so of a large model."""
FOLD_IN, FOLD_OUT = "fold.in:", "fold.out:"
"""What stands before the name of a weight in the key of its factors."""


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
            need_weights_alone(self.base, "what is made of a model")
            self._operands = dense_index(self.directory, STEM)
            self._keys: dict[str, list[str]] = {}
            for key in self._operands:
                self._keys.setdefault(key.partition(":")[0], []).append(key)
            self._views: dict[str, list[str]] = {}
            for name in self.table:
                if not parse(name).is_plain:
                    self._views.setdefault(parse(name).parameter, []).append(name)
        else:
            self._where = dense_index(self.directory)

    @property
    def dense(self) -> ModelArtifact:
        """The dense artifact at the bottom: its directory holds config and tokenizer."""
        return self.base.dense if self.base else self

    @property
    def prompt(self) -> Tensor | None:
        """What stands before every input (see `methods/ops/prompts.py`), where it is more than weights."""
        return read_prompt(self.directory)

    def parameter_names(self) -> list[str]:
        """Names of all parameters as the dense base stores them (a tied head is not stored)."""
        return list(self.dense._where)

    def formula(self, name: str) -> Formula | None:
        """This artifact's own entry for a name; None where the base's value stands."""
        if name not in self.table:
            return None
        return Formula.from_tensors(self.table[name], within_name(name, self._read(self._keys.get(name, ()))))

    def compressed_names(self) -> list[str]:
        """Names that have a formula here or in an artifact beneath, in order: of parameters and of views."""
        return sorted({*self.table, *(self.base.compressed_names() if self.base else ())})

    def effective(self, name: str) -> Formula:
        """What a name stands for as one formula in place of the dense value, with what artifacts beneath say worked in."""
        formula = self.formula(name)
        if formula is not None and formula.op == "replace":
            return formula
        said = parse(name)
        if formula is None and not said.is_plain and said.parameter in self.table:
            whole = self.effective(said.parameter)
            dense = whole.parts[0] if len(whole.parts) == 1 else None
            return Formula([Dense(view(dense.weight if isinstance(dense, Dense) else whole.materialise(), name))])
        beneath = self.base.effective(name) if self.base else Formula([Dense(torch.atleast_2d(self.stored(name)))])
        return beneath.plus(formula) if formula else beneath

    def has_quantised_input(self, name: str) -> bool:
        """Whether the linear of that weight rounds what it reads."""
        own = self.table.get(name)
        if own is not None and own["op"] == "replace":
            return "activation" in own
        return self.base is not None and self.base.has_quantised_input(name)

    def folded_names(self) -> list[str]:
        """Names of the weights that this artifact, not one beneath it, has folded factors into."""
        if self.base is None:
            return []
        said = (
            key.removeprefix(FOLD_IN).removeprefix(FOLD_OUT) for key in self._operands if key.startswith((FOLD_IN, FOLD_OUT))
        )
        return sorted(set(said))

    def stored(self, name: str) -> Tensor:
        """What a name stands for as the dense base stores it, in its own dtype."""
        if self.base:
            return self.base.stored(name)
        said = parse(name)
        with safe_open(self._where[said.parameter], framework="pt") as f:
            if said.index is None:
                return view(f.get_tensor(said.parameter), name)
            matrix: Tensor = f.get_slice(said.parameter)[said.index]
            return matrix.T if said.turned else matrix

    def original(self, name: str) -> Tensor:
        """The base's weight (out, in), float32, with the factors of all stages so far: what a weight would be, had they done
        nothing but fold."""
        if self.base is None:
            return self.stored(name).float()
        factors = [key for key in (FOLD_IN + name, FOLD_OUT + name) if key in self._operands]
        return folded(self.base.original(name), name, self._read(factors))

    def materialise(self, name: str) -> Tensor:
        """The dense value of what a name stands for, float32, all formulas down to the base worked out. A parameter whose
        views have formulas is put together from them."""
        formula = self.formula(name)
        if formula is not None:
            value = formula.materialise()
            if len(value) == 1 and parse(name).is_plain:
                value = value.view(self.stored(name).shape)
            return value if formula.op == "replace" or self.base is None else self.base.materialise(name) + value
        if self.base is None:
            return self.stored(name).float()
        parameter = parse(name).parameter
        if parameter in self.table:
            return view(self.materialise(parameter), name)
        value = self.base.materialise(name)
        if parse(name).is_plain and parameter in self._views:
            value = value.clone()
            for part in self._views[parameter]:
                view(value, part).copy_(self.materialise(part))
        return value

    def _read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Operands. A file is open only while it is read, so that its pages do not stay."""
        tensors: dict[str, Tensor] = {}
        for file in {self._operands[key] for key in keys}:
            with safe_open(file, framework="pt") as f:
                tensors |= {key: f.get_tensor(key) for key in keys if self._operands[key] == file}
        return tensors


def need_weights_alone(artifact: ModelArtifact, what: str) -> None:
    """Raises `TaskError` where the artifact has a prompt; `what` it is that cannot see it."""
    if artifact.prompt is not None:
        raise TaskError(
            f"{what} sees weights alone, and {artifact.directory} has a prompt beside them: a prompt is learnt against the "
            "model as it is, so make it the last stage of the recipe"
        )


def folded(weight: Tensor, name: str, factors: Mapping[str, Tensor]) -> Tensor:
    """The weight (out, in) of that name with the factors that there are for it."""
    weight = weight * factors[FOLD_IN + name] if FOLD_IN + name in factors else weight
    return weight / factors[FOLD_OUT + name][:, None] if FOLD_OUT + name in factors else weight


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


Entry = dict[str, Any]
"""What the table says of a formula."""


def as_written(formulas: Mapping[str, Formula], factors: Mapping[str, Tensor]) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    """(what goes into the table, operands) of an artifact. factors: see `write_formulas`."""
    table = {name: formula.spec() for name, formula in formulas.items()}
    operands = {f"{name}:{key}": operand for name, formula in formulas.items() for key, operand in formula.tensors().items()}
    return table, {**operands, **factors}


class FormulaWriter:
    """Writes a *formulas* artifact as its formulas come; no more operands are in memory than a shard holds."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.table: dict[str, Entry] = {}
        self.operands = ShardWriter(directory, STEM, SHARD_BYTES)
        self._seen: set[int] = set()

    @is_loading
    def add(self, table: Mapping[str, Entry], operands: Mapping[str, Tensor]) -> None:
        """Both as `as_written` makes them."""
        self.table |= table
        for key, operand in operands.items():
            t = operand.detach().cpu().contiguous()
            storage = t.untyped_storage()
            # safetensors refuses tensors that share memory, such as one column order for several linears; a part of a
            # larger tensor would keep all of it.
            is_alone = storage.data_ptr() not in self._seen and storage.nbytes() == t.nbytes
            self.operands.add(key, t if is_alone else t.clone())
            self._seen.add(storage.data_ptr())

    def discard(self) -> None:
        """Takes away all that was added."""
        self.table = {}
        self.operands.discard()

    @is_loading
    def close(self, base_fingerprint: str) -> None:
        """Raises:
        ValueError: a parameter has a formula, and so has a view of it.
        """
        twice = [name for name in self.table if not parse(name).is_plain and parse(name).parameter in self.table]
        if twice:
            raise ValueError(
                f"{twice[0]} has a formula, and so has the parameter that it is a view of: only one of them counts"
            )
        self.operands.close()
        table = {"format": FORMAT, "base": base_fingerprint, "tensors": self.table}
        (self.directory / TABLE).write_text(json.dumps(table, indent=1))


def write_formulas(
    directory: Path, base_fingerprint: str, formulas: Mapping[str, Formula], factors: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a *formulas* artifact: the table and the operands.

    factors: `fold.in:NAME` and `fold.out:NAME` -> what was folded into that weight, float32.

    Raises:
        ValueError: a parameter has a formula, and so has a view of it.
    """
    writer = FormulaWriter(directory)
    writer.add(*as_written(formulas, factors or {}))
    writer.close(base_fingerprint)


def load_dense(directory: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """The Hugging Face model of a dense directory, in evaluation mode, read offline and without remote code."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True, trust_remote_code=False)
    return model.to(device).eval()


def load_skeleton(directory: Path) -> nn.Module:
    """The Hugging Face model of a dense directory on the meta device: its modules and shapes, no weights."""
    from transformers import AutoConfig

    return skeleton_of(AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False))


def skeleton_of(config: PretrainedConfig) -> nn.Module:
    """The causal language model of a config on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return skeleton.eval()


@is_loading
def load_in_memory(
    artifact: ModelArtifact, dtype: torch.dtype, device: torch.device | str = "cpu", frozen: bool = False
) -> nn.Module:
    """The model that an artifact stands for, every weight worked out from its parts. Never reads an export.

    frozen: linears whose weight has a formula are `FrozenLinear`, which keep it as it is; they cannot be trained.
    """
    model = load_dense(artifact.dense.directory, dtype, device)
    with torch.no_grad():
        for name in artifact.compressed_names():
            module = name.removesuffix(".weight")
            if frozen and module != name and isinstance(linear := model.get_submodule(module), nn.Linear):
                model.set_submodule(module, FrozenLinear(artifact.effective(name).to(device), linear.bias, dtype).eval())
                continue
            weight = weight_of(model, name)
            weight.copy_(artifact.materialise(name))
    if not frozen:
        rounding = [name for name in artifact.compressed_names() if artifact.has_quantised_input(name)]
        quantise_inputs(model, ((name, artifact.effective(name)) for name in rounding))
    prompt = artifact.prompt
    if prompt is not None:
        placed = prompt.to(device)
        attach(model, lambda: placed)
    return model


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer that lies in a model directory."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
