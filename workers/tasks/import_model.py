"""Brings the base model into the store: a dense transformers directory, weights in the dtype of `model.dtype`.

spec: `model` (the config; `dtype` is read), `identity` (from `sources.resolve_model`), `where` (from
`sources.locate_model`). Result: `name`, `license`, `parameters`, `bytes` (of the weight files), `dtype`, and for the
tiny model `train/loss` (nats per byte).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from pare.workers.corpus import SourceError
from pare.workers.files import digest_file
from pare.workers.gguf_file import Gguf
from pare.workers.hub import fetch_model
from pare.workers.model_files import check_model_directory, digest_directory, directory_shapes, model_files
from pare.workers.models import dense_index
from pare.workers.sources import check_unchanged, declared_license, license_of, smollm2_file
from pare.workers.task import TaskContext, TaskError
from pare.workers.tiny import TinySettings, tiny_tokenizer, train_tiny

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def run(ctx: TaskContext) -> dict[str, Any]:
    identity, where = ctx.spec["identity"], ctx.spec.get("where") or {}
    dtype = getattr(torch, ctx.spec["model"]["dtype"])
    try:
        if identity["source"] == "smollm2":
            facts = import_smollm2(identity, dtype, ctx)
        elif identity["source"] == "tiny":
            facts = import_tiny(identity, dtype, ctx)
        else:
            facts = import_hf(identity, where, dtype, ctx)
    except SourceError as e:
        raise TaskError(str(e)) from e
    shapes = directory_shapes(ctx.out)
    return {
        **facts,
        "dtype": ctx.spec["model"]["dtype"],
        "parameters": sum(torch.Size(shape).numel() for shape in shapes.values()),
        "bytes": sum(file.stat().st_size for file in set(dense_index(ctx.out).values())),
    }


def import_smollm2(identity: dict[str, Any], dtype: torch.dtype, ctx: TaskContext) -> dict[str, Any]:
    """The GGUF file of the package, its 4-bit codes worked out."""
    from transformers import LlamaConfig

    path = smollm2_file()
    check_unchanged(digest_file(path), identity, str(path))
    gguf = Gguf(path)
    weights = {}
    for i, name in enumerate(gguf.names):
        weights[name] = torch.from_numpy(gguf.read(name).copy()).to(dtype)
        ctx.progress(i + 1, len(gguf.names), "tensors")
    write_llama(ctx.out, LlamaConfig(**gguf.config()), weights, dtype)
    gguf.tokenizer().save_pretrained(ctx.out)
    return {"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": license_of({"source": "smollm2"})}


def import_tiny(identity: dict[str, Any], dtype: torch.dtype, ctx: TaskContext) -> dict[str, Any]:
    """The tiny model, trained here and now."""
    model, loss = train_tiny(TinySettings(**identity["settings"]), ctx.progress)
    stored = {name: weight.to(dtype) for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    write_llama(ctx.out, model.config, stored, dtype)
    tiny_tokenizer().save_pretrained(ctx.out)
    return {"name": "pare-tiny", "license": license_of({"source": "tiny"}), **({} if loss is None else {"train/loss": loss})}


def write_llama(directory: Path, config: PretrainedConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Config, generation config and weights of a Llama, as `save_pretrained` lays them down."""
    from transformers import GenerationConfig

    config.architectures, config.dtype = ["LlamaForCausalLM"], dtype
    config.save_pretrained(directory)
    tokens = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**tokens).save_pretrained(directory)
    save_file({name: w.contiguous() for name, w in weights.items()}, directory / "model.safetensors", metadata={"format": "pt"})


def import_hf(identity: dict[str, Any], where: dict[str, Any], dtype: torch.dtype, ctx: TaskContext) -> dict[str, Any]:
    """A local directory or a commit of the hub, opened and written again in `dtype`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    if "commit" in identity:
        source = fetch_model(where["name"], identity["commit"])
        check_model_directory(source)
    else:
        source = Path(where["path"])
        check_model_directory(source)
        check_unchanged(digest_directory(source, model_files(source)), identity, str(source))
    model, info = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True
    )
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise TaskError(
            f"{source}: the weights do not fill {type(model).__name__}: {absent[0]} and {len(absent) - 1} more are missing or "
            "of another shape. Pare takes causal language models; is this one?"
        )
    broken = next((name for name, weight in model.state_dict().items() if not torch.isfinite(weight).all()), None)
    if broken:
        raise TaskError(
            f"{source}: {broken} holds numbers that are infinite or none at all (NaN) in {dtype}. Copy or download the model "
            "again, or import it in a wider dtype: model.dtype=float32",
            "nonfinite",
        )
    if hasattr(model.config, "auto_map"):
        del model.config.auto_map  # it names files of foreign code, which was not run and is not copied
    ctx.progress(1, 2, "steps")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # whatever the two libraries make of a foreign file
        raise TaskError(
            f"{source}: its tokenizer cannot be opened ({type(e).__name__}: {e}). Put tokenizer.json and tokenizer_config.json "
            "there"
        ) from e
    model.save_pretrained(ctx.out, save_original_format=False)  # under the names of the parameters: experts stay stacked
    tokenizer.save_pretrained(ctx.out)
    if not (source / "generation_config.json").exists():
        GenerationConfig.from_model_config(model.config).save_pretrained(ctx.out)
    ctx.progress(2, 2, "steps")
    return {"name": where.get("name") or source.name, "license": declared_license(source)}
