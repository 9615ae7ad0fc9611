"""Export of an adapter together with the base that it belongs to, in one directory that needs nothing else.

    adapter_config.json, adapter_model.safetensors     as PEFT writes them
    tokenizer, chat template, generation config        the base's
    base/                                              the base as it ships

The adapter was trained, or it is the low-rank term that a method has put beside codes (EoRA). The base is dense, 4-bit codes of
bitsandbytes where the adapter was trained on them, or codes of compressed-tensors. Codes only get other names: no weight is
quantised a second time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pare.methods.ops.adapters import BASE_PATH, write_adapter, write_adapter_config
from pare.methods.ops.bnb4bit import checkpoint_config, checkpoint_tensors, settle
from pare.methods.ops.prompts import freed
from pare.methods.parts.codes import Codes
from pare.methods.parts.formula import Formula, LowRank
from pare.workers.export.compressed_tensors import describe_schemes, export_compressed_tensors, linear_names, schemes
from pare.workers.export.dense import export_dense
from pare.workers.export.files import copy_companions, write_weights
from pare.workers.export.schemes import Inexpressible
from pare.workers.export.stock import OPENED, SUFFIX, open_stock, work_out
from pare.workers.models import ModelArtifact, load_skeleton

WRAP = """
model.hf_quantizer.compressor.decompress_model(model)  # peft wraps linears that hold plain weights"""
PEFT = """
from peft import PeftModel

model = PeftModel.from_pretrained(model, {directory})"""

CUT = """
# The first {n} logits of a row are those of the prompt: model(input_ids).logits[:, {n}:]"""


@dataclass(frozen=True)
class Written:
    """What stands in the directory, for `export.json` and the model card."""

    libraries: str
    """What opens it."""
    how: str
    """How the base is opened: a key of `stock.OPENED`."""
    is_compressed: bool = False
    """Whether the base is a checkpoint of compressed-tensors."""
    virtual_tokens: int = 0
    """Positions that peft puts before those of the input, and gives logits for."""

    @property
    def opening(self) -> str:
        """The lines of Python that open it; `{directory}` stands for where it lies."""
        wrap = WRAP if self.is_compressed and self.how != "dequantize" else ""
        cut = CUT.format(n=self.virtual_tokens) if self.virtual_tokens else ""
        return OPENED[self.how].format(directory=f'{{directory}} + "/{BASE_PATH}"') + wrap + PEFT + cut


def holds_adapter(artifact: ModelArtifact) -> bool:
    return (artifact.directory / "adapter").is_dir()


def export_adapter(artifact: ModelArtifact, out: Path) -> Written:
    """Writes adapter and base to `out`.

    Raises:
        Inexpressible: the artifact has no adapter, and none can be made of its low-rank terms.
    """
    base = out / BASE_PATH
    base.mkdir()
    copy_companions(artifact.dense.directory, out)
    if not holds_adapter(artifact):
        return export_terms(artifact, out)
    for file in (artifact.directory / "adapter").iterdir():
        link_or_copy(file, out / file.name)
    if any(formula["op"] == "replace" for formula in artifact.table.values()):
        write_4bit_base(artifact, base)
        return Written("transformers + peft + bitsandbytes", "plain")
    if artifact.base is None:
        raise ValueError(f"{artifact.directory} is a dense model, not an adapter")
    prompt = artifact.prompt
    virtual = len(prompt) if prompt is not None and prompt.dim() == 2 else 0
    if artifact.base.compressed_names():
        return replace(export_compressed_base(artifact.base, base), virtual_tokens=virtual)
    for pattern in ("config.json", "*.safetensors", "*.safetensors.index.json"):
        for file in artifact.base.directory.glob(pattern):
            link_or_copy(file, base / file.name)
    copy_companions(artifact.base.directory, base)
    return Written("transformers + peft", "plain", virtual_tokens=virtual)


def export_compressed_base(base: ModelArtifact, out: Path) -> Written:
    """The base of an adapter as codes; written out where compressed-tensors has no words for them."""
    try:
        found = schemes(base)
    except Inexpressible:
        export_dense(base, out)
        return Written("transformers + peft", "plain")
    how = export_compressed_tensors(base, out, found)
    return Written("transformers + peft + compressed-tensors" + SUFFIX[how], how, is_compressed=True)


class WithoutTerms(ModelArtifact):
    """An artifact less its low-rank terms: the base that these are an adapter of."""

    def __init__(self, artifact: ModelArtifact) -> None:
        self.__dict__.update(vars(artifact))

    def effective(self, name: str) -> Formula:
        formula = super().effective(name)
        rest = [part for part in formula.parts if not isinstance(part, LowRank)]
        return replace(formula, parts=rest) if rest else formula

    def materialise(self, name: str) -> Tensor:
        return self.effective(name).materialise()


def terms_of(artifact: ModelArtifact) -> dict[str, LowRank]:
    """Parameter name -> the low-rank term beside what else it is made of.

    Raises:
        Inexpressible: there is none, or one that an adapter cannot be.
    """
    linears = set(linear_names(artifact.dense.directory))
    found: dict[str, LowRank] = {}
    for name in artifact.compressed_names():
        parts = artifact.effective(name).parts
        terms = [part for part in parts if isinstance(part, LowRank)]
        if len(terms) > 1 or len(terms) == len(parts):
            kinds = ", ".join(part.kind for part in parts)
            raise Inexpressible(f"{name} is made of {kinds}; an adapter is one low-rank term beside something else")
        if any(term.reads == "q" for term in terms) and artifact.has_quantised_input(name):
            raise Inexpressible(f"{name} has a low-rank term behind a quantised input; an adapter reads the input itself")
        if terms and name.removesuffix(".weight") not in linears:
            raise Inexpressible(f"{name} is not the weight of a linear layer, which an adapter stands beside")
        if terms:
            found[name] = terms[0]
    if not found:
        raise Inexpressible("no weight has a low-rank term that could be an adapter")
    return found


def describe_terms(artifact: ModelArtifact) -> str:
    """Why the low-rank terms are an adapter.

    Raises:
        Inexpressible: they cannot be, or what they stand beside cannot be said by compressed-tensors.
    """
    terms, found = terms_of(artifact), schemes(WithoutTerms(artifact))
    return f"the low-rank terms of {len(terms)} weights are an adapter, beside a base of which {describe_schemes(found)}"


def export_terms(artifact: ModelArtifact, out: Path) -> Written:
    """Low-rank terms as an adapter, on what they stand beside."""
    terms, base = terms_of(artifact), WithoutTerms(artifact)
    found = schemes(base)
    write_adapter(terms, load_skeleton(artifact.dense.directory), out)
    how = export_compressed_tensors(base, out / BASE_PATH, found)
    return Written("transformers + peft + compressed-tensors" + SUFFIX[how], how, is_compressed=True)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows one, so that a base costs its bytes once in the store."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_4bit_base(artifact: ModelArtifact, out: Path) -> None:
    """The base beneath the adapter as a checkpoint of bitsandbytes that `from_pretrained` opens plainly."""
    source = artifact.dense.directory
    skip = [name for name in linear_names(source) if f"{name}.weight" not in artifact.table]
    config = json.loads((source / "config.json").read_text())
    first = base_codes(artifact, next(iter(artifact.table)))
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": checkpoint_config(first, skip)}, indent=2))
    copy_companions(source, out)
    write_weights(base_tensors(artifact), out)


def base_tensors(artifact: ModelArtifact) -> Iterator[tuple[str, Tensor]]:
    for name in artifact.parameter_names():
        if name in artifact.table:
            yield from checkpoint_tensors(name, base_codes(artifact, name)).items()
        else:
            yield name, artifact.stored(name)


def base_codes(artifact: ModelArtifact, name: str) -> Codes:
    """What the adapter of this weight is added to. The adapter itself is the formula's other part."""
    formula = artifact.formula(name)
    match formula.parts if formula and formula.op == "replace" else []:
        case [Codes() as codes] | [Codes() as codes, LowRank()]:
            return codes
    said = artifact.table[name]
    raise ValueError(f"{name}: an export with an adapter takes codes, with or without a low-rank update, got {said}")


def relocate(directory: Path) -> None:
    """Makes the adapter name its base by the absolute path it has now, so that PEFT and transformers find it by themselves.

    In the store the base is named relative to the adapter, which no library resolves: nothing there may depend on a place.
    """
    write_adapter_config(directory, str((directory / BASE_PATH).resolve()))


def open_adapter(directory: Path, dtype: torch.dtype, device: torch.device | str = "cpu", how: str = "plain") -> nn.Module:
    """The exported model, computing in `dtype` on `device`, in evaluation mode. Reads nothing outside `directory`. A prompt is
    attached to the base, so that what comes out belongs to the input alone.

    how: the way in which the base is opened, a key of `stock.OPENED`.
    """
    from peft import PeftModel

    base = open_stock(directory / BASE_PATH, how, dtype, device)
    work_out(base)
    if getattr(base, "is_loaded_in_4bit", False):
        settle(base, dtype)
    model: nn.Module = PeftModel.from_pretrained(base, directory, local_files_only=True)
    return freed(model) if model.active_peft_config.is_prompt_learning else model.eval()
