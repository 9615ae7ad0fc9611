"""`pare doctor --model X`: what Pare takes a model to be made of, and whether it is so when the model runs.

The model is built from its config with made-up weights, so that nothing is downloaded and little memory is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pare.orchestrator.config import load_plugin
from pare.orchestrator.doctor import finding
from pare.orchestrator.errors import ConfigError

BLOCKS = 2
"""Blocks of a model that is made of a class alone."""

CHECKS = ("every weight is in one group or left out", "what reads what, and when", "blocks run one at a time")


def examine(what: str, plugins: Sequence[str] = ()) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the anatomy as plain JSON, empty where there is none; findings as `doctor.finding` makes them)."""
    import torch

    from pare.methods.anatomy import verify
    from pare.methods.anatomy.describe import UnknownModel, describe
    from pare.methods.anatomy.structure import hollow

    for plugin in plugins:
        load_plugin(plugin)
    skeleton = skeleton_of(what)
    try:
        anatomy = describe(skeleton)
    except UnknownModel as e:
        reason, _, to_write = str(e).partition("\n\n")
        return {}, [finding("anatomy", "fail", reason, to_write)]
    model = hollow(skeleton)
    findings = [finding("anatomy", "ok", f"{type(skeleton).__name__}, {how(skeleton)}")]
    with torch.no_grad():
        checks = (
            lambda: verify.check_weights(model, anatomy),
            lambda: verify.check_reads(model, anatomy),
            lambda: verify.check_stream(model, anatomy, verify.check_reads(model, anatomy)),
        )
        for name, check in zip(CHECKS, checks, strict=True):
            try:
                check()
                findings.append(finding(name, "ok", "holds"))
            except ValueError as e:
                findings.append(finding(name, "fail", str(e), "correct its anatomy; name its file with --plugin"))
    return {"class": type(skeleton).__name__, **dataclasses.asdict(anatomy)}, findings


def how(skeleton: Any) -> str:
    """Where its anatomy comes from."""
    from pare.methods.anatomy.describe import FAMILIES, written_for

    name = type(skeleton).__name__
    if family := written_for(name):
        return f"written in {family.__module__}"
    parents = [c.__name__ for c in type(skeleton).__mro__[1:] if c.__name__ in FAMILIES]
    return f"tried as {parents[0]}, which it inherits from, or by its structure" if parents else "found by its structure"


def skeleton_of(what: str) -> Any:
    """The model of a directory or of a class of transformers, on the meta device."""
    import torch
    import transformers

    from pare.workers.models import load_skeleton

    if (Path(what) / "config.json").is_file():
        try:
            return load_skeleton(Path(what))
        except (OSError, ValueError) as e:
            raise ConfigError(f"--model {what}: transformers cannot make a causal language model of its config: {e}") from e
    cls = getattr(transformers, what, None) if what.isidentifier() else None
    if cls is None or not hasattr(cls, "config_class") or not hasattr(cls, "get_output_embeddings"):
        raise ConfigError(
            f"--model {what}: neither a directory with a config.json nor a class of transformers. Try: a directory, or "
            "LlamaForCausalLM"
        )
    with torch.device("meta"):
        return cls(cls.config_class(num_hidden_layers=BLOCKS)).eval()


def lines(about: dict[str, Any]) -> Iterable[str]:
    """The anatomy for a person: blocks that are made alike are shown once."""
    tied = "one parameter with the embedding" if about["tied"] else "a parameter of its own"
    yield f"{about['class']}: embedding {about['embedding']}, norm {about['norm']}, head {about['head']} ({tied})"
    kinds: dict[str, list[dict[str, Any]]] = {}
    for block in about["blocks"]:
        kinds.setdefault("\n".join(block_lines(block, about["widths"])), []).append(block)
    for text, blocks in kinds.items():
        others = f" and {len(blocks) - 1} more like it" if len(blocks) > 1 else ""
        yield f"{blocks[0]['name']}{others}, norms: {blocks[0]['norm']}"
        yield text


def block_lines(block: dict[str, Any], widths: dict[str, tuple[int, int]]) -> Iterable[str]:
    def within(name: str) -> str:
        return str(name.removeprefix(block["name"] + "."))

    experts = sum(1 for group in block["groups"] if group["routed"]) // 2
    for group in block["groups"]:
        if group["routed"] and not group["name"].endswith("[0]"):
            continue
        weights = ", ".join(f"{within(name)} {widths[name][0]}x{widths[name][1]}" for name in group["weights"])
        fold = f"; folds into {within(group['fold']['parameters'][0])}" if group["fold"] else ""
        fold += f"; and so {experts} experts" if group["routed"] else ""
        yield f"    {within(group['name'])}: {weights}{fold}"
    ties = [f"{tie['kind']} x {tie['units']}" for tie in block["ties"]]
    yield f"    can be taken out: {', '.join(dict.fromkeys(ties)) or 'nothing is known to be exact'}"
    for name, reason in block["left_out"].items():
        yield f"    left out: {within(name)}: {reason}"
