"""Results of an evaluation as lines for a terminal and as Markdown."""

from collections.abc import Mapping
from typing import Any

_HEAD = ("benchmark", "condition", "n", "accuracy", "95 %", "against the first", "p (Holm)", "equal", "MDE", "read",
         "latents", "forced", "latent steps", "text tokens", "s an item")  # fmt: skip


def condition_line(condition: Mapping[str, Any], seconds: float | None = None) -> str:
    """One line for the terminal.

    Args:
        condition: of `results.json`.
        seconds: mean time of an item.
    """
    strict = condition.get("strict_accuracy")
    parts = [
        f"{condition['benchmark']}, {condition['variant']}: {condition['accuracy']:.1f} % "
        f"[{condition['low']:.1f}, {condition['high']:.1f}]",
        *([] if strict is None else [f"strictly {strict:.1f} %"]),
        f"n={condition['n']}",
        *_groups(condition),
        f"read {condition['parse_rate']:.0f} %",
        f"latent steps {condition['latent_steps']:.1f} in {condition['trigger_rate']:.0f} % of replies",
        *_forced(condition),
        f"text tokens {condition['text_tokens']:.1f}",
        f"AR steps {condition['ar_steps']:.1f}",
        *([] if seconds is None else [f"{seconds:.2f} s an item"]),
    ]
    return "  ".join(parts)


def _groups(condition: Mapping[str, Any]) -> list[str]:
    found = condition["by_group"]
    return [f"{name} {group['accuracy']:.1f}" for name, group in found.items()] if len(found) > 1 else []


def _forced(condition: Mapping[str, Any]) -> list[str]:
    rate = condition["forced_close_rate"]
    return [] if rate is None else [f"closed by force {rate:.0f} %"]


def difference_line(condition: Mapping[str, Any]) -> str:
    """One line on a condition beside the first."""
    other = condition["against_first"]
    equal = f"equal within {other['margin']:g} points" if other["equivalent"] else "not shown to be equal"
    name = f"{condition['benchmark']}, {condition['variant']}"
    return (
        f"  {name} minus {other['variant']}: {other['difference']:+.1f} points "
        f"[{other['low']:+.1f}, {other['high']:+.1f}]  p={other['p_holm']:.3f} (McNemar, Holm)  {equal} "
        f"(p={other['p_equivalence']:.3f})  smallest difference that n={other['n']} finds: {other['mde']:.1f}"
    )


def results_markdown(results: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
    """Tables of all conditions.

    Args:
        results: content of `results.json`.
        seconds: mean time of an item by `benchmark/condition`.
    """
    rows = [_HEAD, ("---",) * len(_HEAD)]
    rows += [_row(each, seconds[f"{each['benchmark']}/{each['variant']}"]) for each in results["conditions"]]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    notes = [note for each in results["conditions"] for note in _notes(each)]
    parts = [f"# {results['model']}", table, *(["\n".join(notes)] if notes else [])]
    return "\n\n".join(parts) + "\n"


def _row(each: Mapping[str, Any], seconds: float) -> tuple[str, ...]:
    other, forced = each.get("against_first"), each["forced_close_rate"]
    against = ("", "", "", "") if not other else (
        f"{other['difference']:+.1f} [{other['low']:+.1f}, {other['high']:+.1f}]",
        f"{other['p_holm']:.3f}",
        "yes" if other["equivalent"] else "no",
        f"{other['mde']:.1f}",
    )  # fmt: skip
    return (
        each["title"], each["variant"], str(each["n"]), f"{each['accuracy']:.1f}",
        f"[{each['low']:.1f}, {each['high']:.1f}]", *against, f"{each['parse_rate']:.0f} %",
        f"{each['trigger_rate']:.0f} %", "" if forced is None else f"{forced:.0f} %", f"{each['latent_steps']:.1f}",
        f"{each['text_tokens']:.1f}", f"{seconds:.2f}",
    )  # fmt: skip


def _notes(each: Mapping[str, Any]) -> list[str]:
    """What the table has no column for."""
    facts = [f"{name} {group['accuracy']:.1f} (n={group['n']})" for name, group in each["by_group"].items()]
    facts = facts if len(facts) > 1 else []
    if "strict_accuracy" in each:
        facts.append(f"scored strictly {each['strict_accuracy']:.1f}")
    if "cluster_accuracy" in each:
        facts.append(f"all items of a cluster right {each['cluster_accuracy']:.1f} (n={each['clusters']})")
    if each["chance"] is not None:
        facts.append(f"chance {each['chance']:.1f}")
    return [f"- {each['title']}, {each['variant']}, protocol {each['protocol']}: {', '.join(facts)}"] if facts else []


__all__ = ["condition_line", "difference_line", "results_markdown"]
