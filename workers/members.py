"""A member of a merge that lies in a directory: what it is and whether it fits the base, found while planning.

Either a full model of the base's shapes, or a LoRA adapter as peft writes it. Only configs and headers of weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pare.workers.corpus import SourceError
from pare.workers.gguf_file import Gguf
from pare.workers.imported import check_adapter
from pare.workers.model_files import digest_directory, directory_shapes, model_files, read_config, read_json
from pare.workers.sources import config_and_shapes, is_tied, model_directory, smollm2_file

Shapes = Mapping[str, tuple[int, ...]]

CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of peft's `init_lora_weights` with which the base beneath the adapter is another one than it was."""

MORE_THAN_LORA = (
    "use_dora", "modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters", "fan_in_fan_out",
    "lora_bias", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "use_qalora",
)  # fmt: skip
"""Keys of an adapter's config that make it another thing than A and B beside linears."""

HEAD = "lm_head.weight"

ADDED = "base_model.model."
"""What stands before the name of a module in an adapter's file."""


def resolve_member(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a member: `format` (dense or adapter) and `digest` of what it consists of.

    spec: `path`; `key`, the setting that names it; `model`, the config of the base.

    Raises:
        SourceError: it is not there, it is nothing that can be merged, or it was not made of this base.
    """
    path, key = Path(spec["path"]).expanduser(), spec["key"]
    where = f"{key}={path}"
    if not path.is_dir():
        what = "is a file" if path.exists() else "there is no such directory"
        raise SourceError(f"{where}: {what}. Give the directory of a full model or of a LoRA adapter", key)
    base_config, base = config_and_shapes(spec["model"])
    if (path / "adapter_config.json").is_file():
        check_adapter(path, where, key)
        check_is_lora(read_json(path / "adapter_config.json", where, key), where, key)
        check_adapter_shapes(directory_shapes(path, key, "adapter_model"), base, where, key)
        kind = "adapter"
    else:
        config = read_config(path, key)
        if quantised := config.get("quantization_config"):
            how = quantised.get("quant_method", "unknown method")
            raise SourceError(
                f"{where}: is quantised ({how}), and the mean of quantised values is not on their grid. Give the model that it "
                "was quantised from, and quantise what comes out of the merge",
                key,
            )
        own, wanted = config["architectures"][0], base_config["architectures"][0]
        if own != wanted:
            raise SourceError(f"{where}: is a {own}, and the base a {wanted}: only models of one base can be merged", key)
        check_shapes(directory_shapes(path, key), base, is_tied(base_config), where, key)
        check_tokenizer(path, tokens_of_base(spec["model"]), where, key)
        kind = "dense"
    return {"format": kind, "digest": digest_directory(path, model_files(path))}


def locate_member(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {"path": str(Path(spec["path"]).expanduser().resolve())}


def check_shapes(own: Shapes, base: Shapes, tied: bool, where: str, key: str) -> None:
    """tied: whether the base's head is its embedding. Such a head may be stored or not; at the member's looks the task."""
    for name in [*base, *own]:
        if name == HEAD and (name not in base or (tied and name not in own)):
            continue
        mine, theirs = own.get(name), base.get(name)
        if mine != theirs:
            said = [f"{name} {'is not there' if shape is None else f'is of shape {list(shape)}'}" for shape in (mine, theirs)]
            raise SourceError(
                f"{where}: was not made of the base: here {said[0]}, in the base {said[1].removeprefix(name + ' ')}. Name the "
                "model that it was made of: model=hf model.path=BASE; where tokens were added to it, remove them",
                key,
            )


def check_is_lora(config: Mapping[str, Any], where: str, key: str) -> None:
    """Refuses adapters that are more, or something else, than low-rank updates of the base's weights."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
        raise SourceError(
            f"{where}: began with init_lora_weights={start}, which changes the base beneath it, so that it is no update of "
            "this one. Save it again as a plain LoRA: save_pretrained(NEW, path_initial_model_for_weight_conversion=START)",
            key,
        )
    odd = [name for name in MORE_THAN_LORA if config.get(name)]
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    if config.get("peft_type") != "LORA":
        odd = [f"peft_type={config.get('peft_type')}"]
    if odd:
        raise SourceError(
            f"{where}: is more than low-rank updates of weights ({', '.join(odd)}). Merge it into its base and give the full "
            "model: PeftModel.from_pretrained(BASE, DIRECTORY).merge_and_unload().save_pretrained(NEW)",
            key,
        )


def check_adapter_shapes(own: Shapes, base: Shapes, where: str, key: str) -> None:
    for name, shape in own.items():
        module, _, side = name.removesuffix(".weight").rpartition(".lora_")
        wanted = base.get(module.removeprefix(ADDED) + ".weight")
        if not module.startswith(ADDED) or side not in ("A", "B") or wanted is None or len(wanted) != 2:
            raise SourceError(
                f"{where}: {name} has no place in the base. Name the model that the adapter was trained on: model=hf "
                "model.path=BASE",
                key,
            )
        along = 1 if side == "A" else 0  # A is (rank, in) and B (out, rank)
        if len(shape) != 2 or shape[along] != wanted[along]:
            raise SourceError(
                f"{where}: was not trained on the base: {name} of shape {list(shape)} does not fit a weight of shape "
                f"{list(wanted)}. Name the model that it was trained on: model=hf model.path=BASE",
                key,
            )


Tokens = tuple[dict[str, int], list[str]]
"""(token -> number, merges in their order)."""


def tokens_of_base(model: Mapping[str, Any]) -> Tokens | None:
    """Of the base; None where it cannot be known without opening more than a file."""
    if model["source"] == "smollm2":
        meta = Gguf(smollm2_file()).metadata
        return {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}, meta["tokenizer.ggml.merges"]
    directory = model_directory(model) if model["source"] == "hf" and model.get("path") else None
    return tokens_of(directory) if directory else None


def tokens_of(directory: Path) -> Tokens | None:
    """What tokenizer.json says; None where there is none, or one without words."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        return None
    said = json.loads(file.read_bytes())
    vocabulary = said.get("model", {}).get("vocab")
    if not isinstance(vocabulary, dict):
        return None
    vocabulary = vocabulary | {token["content"]: token["id"] for token in said.get("added_tokens") or []}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in said["model"].get("merges") or []]
    return vocabulary, merges


def check_tokenizer(path: Path, base: Tokens | None, where: str, key: str) -> None:
    """Refuses another tokenizer than the base's; a member without one is taken to have the base's."""
    own = tokens_of(path)
    if own is None or base is None or own == base:
        return
    if own[0] != base[0]:
        token = min(own[0].items() ^ base[0].items())[0]
        what = f"they differ in the number of {token!r}, among others"
    else:
        place = next(i for i, (a, b) in enumerate(zip_longest(own[1], base[1])) if a != b)
        what = f"they cut words in other places, from merge {place} on"
    raise SourceError(
        f"{where}: its tokenizer is not that of the base: {what}. Only models that read the same tokens can be merged; name "
        "the model that it was made of: model=hf model.path=BASE",
        key,
    )
