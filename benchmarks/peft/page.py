"""docs/peft.md, from what was measured."""

from __future__ import annotations

from typing import Any

from pare.methods.ops.tuner_kinds import NOT_OFFERED

HEAD = """# Tuners of peft

<!-- Written by `python -m benchmarks.peft`; change benchmarks/peft/page.py instead. -->

    pare run recipe=peft method@recipe.tune=lora,dora,ia3,vera data=pydoc
    pare run recipe=peft method@recipe.tune=oft +recipe.tune.config.oft_block_size=16,32

Each name below is a method (`pare methods` lists their settings). All share `targets`, `init_seed` and the settings of
every training method; those with a rank have `rank`. What is a tuner's own goes to `config`, with the names that peft gives
it; a key or value that peft would refuse is refused while planning.

**What comes out.** For every weight that changed a formula, added to the base's weight: score, export, merging and later
stages need know nothing of the tuner. Beside it stands the adapter, which ships with its base. Where the update is a plain
product B A, the adapter is a plain LoRA that any peft opens, with each linear's own rank (AdaLoRA, EVA). A start that takes its
own product from the weights (PiSSA, OLoRA, CorDA, LoRA-GA) is published against the base as it was, at twice the rank: peft's
own file of such an adapter repeats the start when it is loaded, and with a random one
(`config.init_lora_weights=pissa_niter_4`) draws another.
In bfloat16 what is left of the base is rounded after the start, by as much as any bfloat16 weight; the figures reported are
those of what is published.

**Prompts.** `prompt_tuning`, `p_tuning` and `prefix_tuning` train what stands before every input: embeddings of
`virtual_tokens`, or keys and values in every layer. No weight changes. Only the prompt is kept, worked out where a network made
it while it was trained, and ships with its base as an adapter that peft opens. It is learnt against the model as it is, so it
has to be the last stage of a recipe: no later stage, merge or search sees it, rows of several documents are refused
(`data.train.packing=padded`), and so is a model too large to be in memory as a whole. `init=text` starts it from a text.

**Size.** `size/bytes` counts files. A tuner that trains few numbers may write large files: VeRA, PVeRA and RandLoRA store the
projections they share unless `config.save_projection=false`, SHiRA and Super-Tuning store where their numbers stand, and a
rotation is kept in the store (not in the export) as the dense update that it makes.

**4-bit bases.** On codes of NF4, what a merge makes is rounded to codes again. So Pare never merges into codes: it ships the
adapter beside them. `qlora` is the method that trains on codes, with `init=loftq` from the start that fits them; the last
columns say what peft does with the other tuners there.
"""

LEGEND = """
`start`: by how much the untrained adapter changes the model; `effect`: by how much training did. `merge`: formulas in float32
against the adapter, of a prompt what Pare puts before the input; `reload`: the adapter's file, opened by peft, against what was
trained. All are the greatest difference of a logit. `kept as`: the form of the update in the store.
"""

TAIL = """
## Not offered, and why

| tuner | why |
|---|---|"""


def page(result: dict[str, Any]) -> str:
    rows = result["rows"]
    shape = ", ".join(f"{key} {value}" for key, value in result["model"].items())
    about = result["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    heads = ["tuner", "numbers trained", "file, bytes", "kept as", "start", "effect", "reload", "merge"]
    heads += ["trains on NF4", "peft's merge into NF4"]
    table = [
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
        *(line(name, row) for name, row in rows.items()),
    ]
    reasons = [f"- {name}: {row['nf4']['why']}" for name, row in rows.items() if "why" in row["nf4"]]
    left_out = [f"| {name} | {why} |" for name, why in NOT_OFFERED.items()]
    how = f"A random Llama ({shape}), rank {result['rank']}, {result['steps']} steps; {versions}; {about['at'][:10]}."
    measured = f"\n## Measured\n\n{how}\n"
    said = "What the libraries say where something fails on NF4:\n"
    return "\n".join([HEAD, measured, *table, LEGEND, said, *reasons, TAIL, *left_out, ""])


def line(name: str, row: dict[str, Any]) -> str:
    small = [number(row[key]) for key in ("start", "effect", "reload", "merge")]
    cells = [f"`{name}`", f"{row['trained']:,}", f"{row['file_bytes']:,}", row["kept_as"].replace("_", "-"), *small]
    return "| " + " | ".join([*cells, *on_codes(row["nf4"])]) + " |"


def on_codes(found: dict[str, Any]) -> list[str]:
    """Two cells."""
    if not found["trains"]:
        return ["no", "-"]
    if found["effect"] == 0:
        return ["runs, learns nothing", "-"]
    trains = "yes" if found["start"] < 1e-5 else f"yes, start {number(found['start'])}"
    if "merges" not in found:
        return [trains, "-"]
    if not found["merges"]:
        return [trains, "fails"]
    if found["error"] < 1e-5:
        return [trains, "exact"]
    return [trains, f"error {number(found['error'])} of effect {number(found['effect'])}"]


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if value < 0.01 else f"{value:.2g}"
