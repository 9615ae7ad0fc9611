"""The figures that are made of the readings of this benchmark."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.readings import Figure, Values, ratio

Value = Callable[[Values], float]


def of(name: str, argument: str, key: str) -> Value:
    return lambda values: values.median(name, argument, key)


def beside(method: str, argument: str) -> list[Figure]:
    """One method beside the bare script: how fast, in how much memory, and that both have learnt the same."""
    peer = f"peer_{method}"
    ours, theirs = (
        {key: of(name, argument, key) for key in ("tokens_s", "peak_growth_bytes", "last_loss")} for name in (method, peer)
    )
    return [
        Figure(f"{method}, as fast as the bare script", "times", ">= 0.95", lambda x: x >= 0.95,
               ratio(ours["tokens_s"], theirs["tokens_s"])),
        Figure(f"{method}, growth of its peak memory", "times", "<= 1.05", lambda x: x <= 1.05,
               ratio(ours["peak_growth_bytes"], theirs["peak_growth_bytes"])),
        Figure(f"{method}, last loss apart from the script's", "nats", "<= 0.02", lambda x: x <= 0.02,
               lambda v: abs(ours["last_loss"](v) - theirs["last_loss"](v))),
        Figure(f"{method}", "tokens/s", "", None, ours["tokens_s"]),
        Figure(f"{method}, the bare script", "tokens/s", "", None, theirs["tokens_s"]),
        Figure(f"{method}, growth of peak memory", "GB", "", None, lambda v: ours["peak_growth_bytes"](v) / 1e9),
        Figure(f"{method}, growth of the script's", "GB", "", None, lambda v: theirs["peak_growth_bytes"](v) / 1e9),
    ]  # fmt: skip


def speed(argument: str) -> list[Figure]:
    base = ("four_bit_base", argument)
    return [
        *beside("lora", argument),
        *beside("qlora", argument),
        Figure("4-bit base, memory off the paper's count", "%", "<= 2", lambda x: x <= 2,
               lambda v: 100 * abs(v.median(*base, "base_bytes") / v.median(*base, "paper_bytes") - 1)),
        Figure("4-bit base", "MB", "", None, lambda v: v.median(*base, "base_bytes") / 1e6),
        Figure("the same model in bfloat16", "MB", "", None, lambda v: v.median(*base, "dense_bytes") / 1e6),
    ]  # fmt: skip


def with_interval(name: str, unit: str, leg: tuple[str, str], key: str) -> list[Figure]:
    return [
        Figure(name + rest, unit, "", None, of(*leg, key + end))
        for rest, end in (("", ""), (", from", "_low"), (", to", "_high"))
    ]


def quality(steps: str) -> list[Figure]:
    soup, heal = ("soup", steps), ("heal", steps)
    found = [
        Figure(f"{name}, perplexity", "", "", None, of(*leg, f"{key}_ppl"))
        for leg, names in (
            (soup, {"base": "base", "best": "best member by selection", "greedy": "greedy soup", "uniform": "uniform soup"}),
            (heal, {f"{kind}{bits}": f"{kind} at {bits} bits" for bits in (3, 2) for kind in ("gptq", "healed")}),
        )
        for key, name in names.items()
    ]
    found += with_interval("greedy soup above the best by selection", "%", soup, "greedy_to_best")
    found += with_interval("uniform soup above the best by selection", "%", soup, "uniform_to_best")
    found += with_interval("best by selection above the base", "%", soup, "best_to_base")
    for bits in (3, 2):
        found += with_interval(f"healed {bits} bits above GPTQ alone", "%", heal, f"healed{bits}_to_gptq")
        found.append(
            Figure(f"healed {bits} bits, all of the interval below", "%", "< 0", lambda x: x < 0,
                   of(*heal, f"healed{bits}_to_gptq_high"))
        )  # fmt: skip
    return found
