"""A byte-level BPE tokenizer as metadata of a GGUF file.

The file names the rule by which text is cut before merging, and whoever reads the file has to know it. Rules are recognised
by what `tokenizer.json` says; of a tokenizer with another one no file is written, for it would cut other tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pare.workers.export.schemes import Inexpressible
from pare.workers.models import load_tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""`gguf.TokenType`."""

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {CONTRACTIONS + r"\p{N}" + REST: "qwen2", CONTRACTIONS + r"\p{N}{1,3}" + REST: "llama-bpe"}
"""Regular expression that cuts text -> name of the rule."""


def rule_of(tokenizer: dict[str, Any]) -> str:
    """The name of the rule by which `tokenizer.json` cuts text.

    Raises:
        Inexpressible: it is no byte-level BPE, or none of the rules known here.
    """
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    if tokenizer["model"].get("type") != "BPE" or kinds[-1] != "ByteLevel":
        raise Inexpressible("its tokenizer is no byte-level BPE, the one kind that is written to GGUF here")
    if kinds == ["ByteLevel"] and (steps[0].get("use_regex", True) or not tokenizer["model"]["merges"]):
        return "gpt-2"  # without merges it does not matter where text is cut
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    pattern = steps[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    if pattern in PATTERNS:
        return PATTERNS[pattern]
    known = ", ".join(["gpt-2", "smollm", *PATTERNS.values()])
    raise Inexpressible(
        f"its tokenizer cuts text by a rule ({', '.join(map(str, kinds))}) that is not known here; known: {known}"
    )


def add_tokenizer(writer: Any, source: Path, rows: int) -> None:
    """Adds the tokenizer that lies in `source` to a `gguf.GGUFWriter`.

    rows: of the embedding; those without a token are marked as unused.
    """
    file = source / "tokenizer.json"
    if not file.is_file():
        raise Inexpressible("it has no tokenizer.json, from which the tokenizer of a GGUF file is written")
    said = json.loads(file.read_text())
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [UNUSED] * rows
    for token, i in said["model"]["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in said["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule_of(said))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = said["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    tokenizer = load_tokenizer(source)
    for role in ("bos", "eos", "unk", "pad"):
        i = getattr(tokenizer, f"{role}_token_id")
        if i is not None:
            getattr(writer, f"add_{role}_token_id")(i)
    writer.add_add_bos_token(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
