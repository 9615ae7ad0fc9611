"""Takes a checkpoint made elsewhere into the store as an export that is measured like any, after it has been opened once.

spec: `identity` (from `imported.resolve_import`), `where` (from `imported.locate_import`). Input: `model`, the base that it was
made of. Writes the checkpoint's files and `export.json`. Result: `format`, `opens_with`, sizes, `notes`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pare.methods.ops.adapters import BASE_PATH, write_adapter_config
from pare.workers.corpus import SourceError
from pare.workers.export.adapter import link_or_copy, open_adapter
from pare.workers.export.card import METRICS_LATER
from pare.workers.export.files import copy_companions, digests, tensor_sizes, weight_files
from pare.workers.export.reader import FOREIGN
from pare.workers.export.stock import GGUF_FILE, SUFFIX
from pare.workers.files import digest_file
from pare.workers.gguf_file import Gguf
from pare.workers.imported import PACKAGES
from pare.workers.model_files import TOKENIZERS, digest_directory, model_files
from pare.workers.models import load_tokenizer
from pare.workers.sources import check_unchanged
from pare.workers.task import TaskContext, TaskError

OWN_FORMS = ("adapter", "gguf", "compressed-tensors")
"""Formats that the reader of exports tells from others, because Pare writes them as well."""
CARD = f"# A checkpoint made elsewhere\n\nMeasured by Pare, and left as it was.\n\n## Metrics\n\n{METRICS_LATER}\n"
UNCOMPARED = "made elsewhere: there is no score in memory to hold its perplexity against"


def run(ctx: TaskContext) -> dict[str, Any]:
    identity, source = ctx.spec["identity"], Path(ctx.spec["where"]["path"])
    kind, how, base = identity["format"], identity["open"], ctx.inputs["model"]
    try:
        digest = digest_directory(source, model_files(source)) if source.is_dir() else digest_file(source)
        check_unchanged(digest, identity, str(source))
    except SourceError as e:
        raise TaskError(str(e)) from e
    notes = [UNCOMPARED]
    if kind == "adapter":
        take_adapter(source, base, ctx.out)
    elif kind == "gguf":
        take_gguf(source, base, ctx.out)
    else:
        notes += take_model(source, base, ctx.out)
    ctx.progress(1, 2, "steps")
    check_opens(ctx.out, kind, how, source)
    ctx.progress(2, 2, "steps")
    libraries = " + ".join(["transformers", *PACKAGES.get(kind, {}).values()])
    facts = {"format": kind, "opens_with": libraries + SUFFIX[how], "reason": "made elsewhere", **sizes(base, ctx.out)}
    said = {**facts, "format": kind if kind in OWN_FORMS else FOREIGN, "open": how, "digests": digests(ctx.out)}
    (ctx.out / "export.json").write_text(json.dumps(said, indent=1))
    (ctx.out / "README.md").write_text(CARD)
    return {**facts, "notes": notes}


def take_model(source: Path, base: Path, out: Path) -> list[str]:
    """Copies the files that a model consists of; the base's tokenizer where it has none. Returns what there is to say of it."""
    for name in model_files(source):
        shutil.copyfile(source / name, out / name)
    config = json.loads((out / "config.json").read_text())
    if config.pop("auto_map", None):  # of foreign code, which is neither copied nor run
        (out / "config.json").write_text(json.dumps(config, indent=2))
    if not any(found for pattern in TOKENIZERS for found in out.glob(pattern)):
        copy_companions(base, out)
        return ["brings no tokenizer; the base's was taken"]
    check_same_tokens(load_tokenizer(out).get_vocab(), base, source)
    return []


def take_gguf(source: Path, base: Path, out: Path) -> None:
    """The file under the name by which it is opened, the config that is in it, and the base's tokenizer: it is compared with
    the one in the file, which transformers cannot read in all its forms."""
    from transformers import AutoConfig

    shutil.copyfile(source, out / GGUF_FILE)
    tokens = Gguf(source, only=None).metadata.get("tokenizer.ggml.tokens") or []
    known = len(load_tokenizer(base))
    check_same_tokens({token: i for i, token in enumerate(tokens[:known])}, base, source)
    try:
        AutoConfig.from_pretrained(out, gguf_file=GGUF_FILE).save_pretrained(out)
    except Exception as e:  # whatever transformers makes of a foreign file
        raise TaskError(f"{source}: transformers cannot read it ({type(e).__name__}: {e})") from e
    copy_companions(base, out)


def take_adapter(source: Path, base: Path, out: Path) -> None:
    """The adapter beside the base that it is measured on."""
    shutil.copyfile(source / "adapter_config.json", out / "adapter_config.json")
    shutil.copyfile(source / "adapter_model.safetensors", out / "adapter_model.safetensors")
    write_adapter_config(out, BASE_PATH)
    (out / BASE_PATH).mkdir()
    for name in model_files(base):
        link_or_copy(base / name, out / BASE_PATH / name)
    copy_companions(base, out)


def check_same_tokens(own: Mapping[str, int], base: Path, source: Path) -> None:
    """own: token -> number. Raises `TaskError` unless the base numbers tokens so, too: else no two figures can be compared."""
    wanted = load_tokenizer(base).get_vocab()
    if own != wanted:
        token = min(own.items() ^ wanted.items())[0]
        raise TaskError(
            f"{source}: its tokenizer is not that of the base: they differ in the number of {token!r}, among others. Name the "
            "model that it was made of: model=hf model.path=BASE"
        )


def check_opens(out: Path, kind: str, how: str, source: Path) -> None:
    """Opens it once and raises `TaskError` where that fails or leaves weights unfilled, which transformers would make up."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    if kind == "adapter":
        check_adapter_fits(out, source)
        return
    options: dict[str, Any] = {"gguf_file": GGUF_FILE} if how == "gguf" else {}
    if how == "dequantize":
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as e:  # whatever the libraries make of a foreign checkpoint
        raise TaskError(f"{source}: transformers cannot open it ({type(e).__name__}: {e})") from e
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise TaskError(
            f"{source}: its weights do not fill {type(model).__name__}: {absent[0]} and {len(absent) - 1} more are missing or "
            "of another shape"
        )


def check_adapter_fits(out: Path, source: Path) -> None:
    """Raises `TaskError` where peft cannot put the adapter on the base, or would leave a part of it out."""
    try:
        model = open_adapter(out, torch.bfloat16)
    except Exception as e:  # whatever peft makes of a foreign adapter
        raise TaskError(f"{source}: peft cannot put it on this base ({type(e).__name__}: {e})") from e
    placed = {name.replace(".default.", ".").removesuffix(".default") for name, _ in model.named_parameters()}
    left = sorted(name for name in tensor_sizes(out) if name.startswith("base_model.") and name not in placed)
    if left:
        raise TaskError(
            f"{source}: does not fit the base: it has no place for {left[0]} and {len(left) - 1} more. Name the model that the "
            "adapter was trained on: model=hf model.path=BASE"
        )


def sizes(base: Path, out: Path) -> dict[str, float]:
    """`size/...` as for an export: all weight files, an adapter's base included, over the weights of the base."""
    parameters = sum(size.numbers for size in tensor_sizes(base).values())
    total = sum(file.stat().st_size for file in weight_files(out))
    return {"size/bytes": total, "size/bits_per_weight": 8 * total / parameters, "parameters": parameters}
