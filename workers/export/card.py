"""The model card of an export. Its text depends on nothing but what was made: no paths, hosts or dates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pare.tracking.units import protocol

PARE = """import pare

model = pare.load({directory})"""
"""How an export in Pare's own form is opened."""


def how_to_open(lines: str) -> str:
    """The lines that open a model, `{directory}` standing for where it lies, and the tokenizer's."""
    tokenizer = "from transformers import AutoTokenizer\n\ntokenizer = AutoTokenizer.from_pretrained(DIRECTORY)"
    return lines.format(directory="DIRECTORY") + "\n\n" + tokenizer


METRICS_LATER = "They are measured on this export after it is written: see the report of Pare (`pare report`)."


def with_metrics(text: str, metrics: Mapping[str, float]) -> str:
    """A model card with the figures that were measured on its export, intervals in brackets.

    Speed and memory stay out: they belong to a machine and a runtime, not to the model.
    """
    rows = []
    for name, value in sorted(metrics.items()):
        if name.startswith(("quality/", "size/")) and not name.endswith(("_low", "_high")):
            low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
            interval = f" ({low:.4g} to {high:.4g})" if low is not None and high is not None else ""
            rows.append(f"| `{name}` | {value:,.6g}{interval} |")
    windows, length = (metrics.get(f"eval/{name}") for name in ("windows", "window_length"))
    how = ["", f"Perplexity, KL and agreement: {protocol(int(windows), int(length))}."] if windows and length else []
    return text.replace(METRICS_LATER, "\n".join(["| metric | value |", "|---|---|", *rows, *how]))


def model_card(card: Mapping[str, Any], facts: Mapping[str, Any], opening: str) -> str:
    """card: what the trial says of itself; facts: `format`, `opens_with`, `reason` and sizes of the export; opening: see
    `how_to_open`."""
    base = card.get("base", "not stated")
    lines = [
        "---",
        "library_name: transformers",
        "tags: [pare, compressed]",
        "---",
        f"# {base}, recipe `{card.get('recipe', 'not stated')}`",
        "",
        "Made by Pare, which pares language models down along their Pareto front.",
        "",
        "| | |",
        "|---|---|",
        f"| base | {base} |",
        f"| licence | {card.get('licence', 'that of the base')} |",
        f"| format | {facts['format']}: {facts['reason']} |",
        f"| opens with | {facts['opens_with']} |",
        f"| weights | {facts['size/bytes']:,} bytes, {facts['size/bits_per_weight']:.3f} bits per weight of the whole model |",
        f"| data | {card.get('data', 'none')}: {describe(card.get('calibration', {}))} |",
        f"| seed | {'none drawn' if card.get('seed') is None else card['seed']} |",
        "",
        "## Settings",
        "",
        *(settings_lines(card.get("settings", {})) or ["None: this is the base model."]),
        "",
        "## How to load",
        "",
        "```python",
        how_to_open(opening),
        "```",
        "",
        "## Metrics",
        "",
        METRICS_LATER,
        "",
        "## Make it again",
        "",
        "```",
        card.get("command", "not stated"),
        "```",
    ]
    return "\n".join(lines) + "\n"


def settings_lines(settings: Mapping[str, Any]) -> list[str]:
    return [f"- `{stage}`: {describe(values)}" for stage, values in settings.items()]


def describe(values: Mapping[str, Any]) -> str:
    """`{"bits": 3, "group": 64}` -> `bits 3, group 64`."""
    return ", ".join(f"{key} {value}" for key, value in values.items()) or "none"
