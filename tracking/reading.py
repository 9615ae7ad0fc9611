"""What the record says in plain words. A difference is called one only where it is beyond noise."""

from __future__ import annotations

from pare.tracking import units
from pare.tracking.paired import compare
from pare.tracking.pareto import SIZE_AND_PERPLEXITY, front
from pare.tracking.record import Record, Trial, base_trial, labels, measured, metric, settings

PPL, BYTES = "quality/ppl", "size/bytes"
MOST_COMPARISONS = 6
"""Comparisons at equal settings that are spelt out; the rest is counted."""


def distinct(a: Trial, b: Trial) -> bool | None:
    """Whether two perplexities differ beyond noise: by a paired bootstrap over the windows that both were measured on, else
    by whether their intervals keep apart; None where neither was measured."""
    difference = compare(a, b)
    if difference is not None:
        return difference.beyond_noise
    bounds = [metric(t, f"{PPL}_{end}") for t in (a, b) for end in ("low", "high")]
    if any(bound is None for bound in bounds):
        return None
    a_low, a_high, b_low, b_high = (bound for bound in bounds if bound is not None)
    return a_low > b_high or b_low > a_high


def verdict(is_distinct: bool | None) -> str:
    if is_distinct is None:
        return "no interval was measured, so it may be noise"
    return "beyond noise" if is_distinct else "not distinguishable"


def sentences(record: Record) -> list[str]:
    """How far the sweep is, what the front spans, what stands against the base, which recipe won at equal settings."""
    return [*progress(record), *against_base(record), *against_members(record), *at_equal_settings(record)]


def progress(record: Record) -> list[str]:
    trials = record["trials"]
    count = {
        status: sum(t["status"] == status for t in trials) for status in ("done", "failed", "running", "pending", "skipped")
    }
    rest = ", ".join(f"{n} {status}" for status, n in count.items() if n and status != "done")
    if not count["done"]:
        return [f"No trial has finished, so there is no front ({rest or 'no trials'})."]
    return [f"{count['done']} of {len(trials)} trials are done, {rest}."] if rest else []


def against_base(record: Record) -> list[str]:
    name = labels(record)
    members = front(record, SIZE_AND_PERPLEXITY)
    base = base_trial(record)
    others = [t for t in measured(record, PPL) if t is not base]
    said = []
    if len(members) > 1:
        small, large = members[0], members[-1]
        said.append(
            f"The front has {len(members)} trials, from {name[small['trial']]} ({describe(small)}) "
            f"to {name[large['trial']]} ({describe(large)})."
        )
    if base is None or not others:
        return said
    base_ppl, base_bytes = base["metrics"][PPL], metric(base, BYTES)
    best = min(others, key=lambda t: t["metrics"][PPL])
    change = best["metrics"][PPL] / base_ppl - 1
    said.append(
        f"Lowest perplexity: {name[best['trial']]} with {units.number(best['metrics'][PPL])}, "
        f"{units.percent(change, signed=True)} against the base ({units.number(base_ppl)}): {verdict(distinct(best, base))}."
    )
    no_worse = [
        t
        for t in others
        if metric(t, BYTES) and (distinct(t, base) is False or (distinct(t, base) and t["metrics"][PPL] < base_ppl))
    ]
    if base_bytes and no_worse:
        least = min(no_worse, key=lambda t: (t["metrics"][BYTES], t["metrics"][PPL]))
        ratio = base_bytes / least["metrics"][BYTES]
        if ratio > 1:
            said.append(
                f"Smallest that is not measurably worse than the base: {name[least['trial']]}, "
                f"{units.size(least['metrics'][BYTES])}, {units.number(ratio)} times smaller."
            )
    return said


def against_members(record: Record) -> list[str]:
    """Every merge against the member that was best on the selection split: both on the test split, which chose neither."""
    name, trials = labels(record), {t["trial"]: t for t in measured(record, PPL)}
    said = []
    for merge in trials.values():
        best = trials.get(next(iter(merge.get("members") or []), ""))
        difference = compare(merge, best) if best else None
        if best and difference:
            change, low, high = (units.percent(x, signed=True) for x in (difference.change, difference.low, difference.high))
            said.append(
                f"{name[merge['trial']]}, of {len(merge['members'])} members: perplexity on the test split {change} ({low} to "
                f"{high}) against {name[best['trial']]}, the best of them on the selection split: "
                f"{verdict(difference.beyond_noise)}."
            )
    more = len(said) - MOST_COMPARISONS
    return said[:MOST_COMPARISONS] + ([f"{more} more merges were made: see the table."] if more > 0 else [])


def describe(trial: Trial) -> str:
    return f"{units.size(trial['metrics'][BYTES])}, perplexity {units.number(trial['metrics'][PPL])}"


def at_equal_settings(record: Record) -> list[str]:
    """Wherever unlike recipes ran at equal settings: the best against the second best."""
    chosen = settings(record)
    groups: dict[str, dict[str, Trial]] = {}
    for trial in measured(record, PPL):
        place = ", ".join(f"{key}={value}" for key, value in sorted(chosen[trial["trial"]].items()))
        best_of = groups.setdefault(place, {}) if place else {}
        rival = best_of.get(trial["recipe"])
        if rival is None or trial["metrics"][PPL] < rival["metrics"][PPL]:
            best_of[trial["recipe"]] = trial
    contests = [(place, list(best_of.values())) for place, best_of in groups.items() if len(best_of) > 1]
    said = [contest(place, trials) for place, trials in contests[:MOST_COMPARISONS]]
    if len(contests) > MOST_COMPARISONS:
        said.append(f"{len(contests) - MOST_COMPARISONS} more settings were tried with several recipes: see the table.")
    return said


def contest(place: str, trials: list[Trial]) -> str:
    first, second = sorted(trials, key=lambda t: t["metrics"][PPL])[:2]
    a, b = first["metrics"][PPL], second["metrics"][PPL]
    figures = f"perplexity {units.number(a)} against {units.number(b)}"
    sizes = metric(first, BYTES), metric(second, BYTES)
    if sizes[0] and sizes[1] and not 0.95 < sizes[0] / sizes[1] < 1.05:
        figures += f", at {units.number(sizes[0] / sizes[1])} times its bytes"
    is_distinct = distinct(first, second)
    if is_distinct is False:
        return f"At {place}, {first['recipe']} and {second['recipe']} are not distinguishable ({figures})."
    by = units.percent(1 - a / b)
    return f"At {place}, {first['recipe']} beats {second['recipe']} by {by} ({figures}): {verdict(is_distinct)}."


def sharing(record: Record) -> list[str]:
    """What merging equal work saved."""
    tasks, saving = record["tasks"], record["saving"]
    if not saving["tasks_not_repeated"]:
        return [f"{tasks['unique']} tasks, {tasks['cached']} of them there already; no two trials had one in common."]
    said = [
        f"{tasks['unique']} tasks instead of {tasks['total_if_separate']}: {saving['tasks_not_repeated']} were not repeated, "
        f"which saved {units.duration(saving['wall_s_saved'])} of work."
    ]
    if tasks["cached"]:
        said.append(f"Executed in this run: {tasks['executed']}. Done before: {tasks['cached']}.")
    most = sorted(saving["shared"], key=lambda s: -(s["used_by"] - 1) * s["wall_s"])[:3]
    if most:
        named = "; ".join(f"{s['label']} ({units.duration(s['wall_s'])}, for {s['used_by']} trials)" for s in most)
        said.append(f"Shared most: {named}.")
    return said


def costs(record: Record) -> list[str]:
    """What the work took, what most of it went into, and how near the estimates came."""
    cost = record.get("cost")
    if not cost or not cost["total"]["tasks"]:
        return []
    total, saved, failed = cost["total"], cost["saved"], cost["failed_attempts"]
    figures = [f"{units.duration(total['wall_s'])} of work", f"{units.duration(total['cpu_s'])} of processor time"]
    figures += [f"{units.duration(total['gpu_s'])} on GPUs"] if total["gpu_s"] else []
    figures += [f"{units.number(total['tokens'])} tokens"] if total["tokens"] else []
    figures += [
        f"{units.size(total['disk_bytes'])} written",
        f"at most {units.size(total['peak_bytes'])} of memory for one task",
    ]
    said = [f"{total['tasks']} tasks: {', '.join(figures)}."]
    largest = [f"{name} {units.percent(one['wall_s'] / total['wall_s'])}" for name, one in list(cost["methods"].items())[:4]]
    if total["wall_s"]:
        said.append(f"Most of the work went into: {', '.join(largest)}.")
    if saved["by_cache_s"]:
        said.append(f"{units.duration(saved['by_cache_s'])} of it had been done before this run.")
    if failed["attempts"]:
        said.append(f"Failed attempts: {failed['attempts']}, which took {units.duration(failed['wall_s'])}.")
    return said + accuracy(cost["estimates"])


def accuracy(found: Record) -> list[str]:
    """How near the estimates made before the tasks ran came to what they cost."""
    if not found["tasks"]:
        return []
    peak = found["peak_within_15_percent"]
    memory = f", peak memory within 15 % for {units.percent(peak)} of tasks" if peak is not None else ""
    known = found["from"]["own"] + found["from"]["like"]
    basis = f"{known} of {found['tasks']} from what their like had cost" if known else "from the model's shape alone"
    ratio = f"{units.number(found['time_ratio'])} times what it took"
    return [f"Estimated before ({basis}): total time {ratio}{memory}."]
