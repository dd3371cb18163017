"""Effects of conditions against the clean run: accuracy, equivalence, log-probabilities (specification, section 3)."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..cluster_bootstrap import bootstrap_mean, resampled_means
from ..paired_comparison import compare_paired
from ..paired_tests import holm
from .card_data import ConditionResult, Effect

# What is compared beside the clean run: name -> (condition, minus condition).
COMPARISONS = {
    "oracle headroom": ("oracle", "clean"),
    "content effect": ("oracle", "oracle_wrong"),
    "presence effect": ("gauss_norm", "no_span"),
}


def effects_of(
    conditions: Mapping[str, ConditionResult],
    clusters: Sequence[str],
    *,
    margin: float = 2.0,
    base: Sequence[bool] | None = None,
    seed: int = 0,
) -> dict[str, Effect]:
    """The effect of every condition but the clean one, on the items where it applies.

    Args:
        conditions: by name, with `"clean"`.
        clusters: of the items, drawn together by the bootstrap.
        margin: of equivalence, points.
        base: whether a model without latents gets each item right, for `recovery`; default: the condition `no_span`.
        seed: of the bootstrap.

    A condition that applies to no item has no effect and is left out.
    """
    clean = conditions["clean"]
    if base is None and "no_span" in conditions:
        base = conditions["no_span"].correct
    effects = {
        name: _effect(clean, own, clusters, margin, base, seed)
        for name, own in conditions.items()
        if name != "clean" and any(own.applied)
    }
    for effect, p_value in zip(effects.values(), holm([each.p_mcnemar for each in effects.values()]), strict=True):
        effect.p_holm = p_value
    return effects


def _effect(
    clean: ConditionResult,
    own: ConditionResult,
    clusters: Sequence[str],
    margin: float,
    base: Sequence[bool] | None,
    seed: int,
) -> Effect:
    kept = [place for place, applied in enumerate(own.applied) if applied]
    groups = [clusters[place] for place in kept]
    before, after = (np.array([float(each.correct[place]) for place in kept]) for each in (clean, own))
    found = compare_paired(before, after, groups, margin, seed)
    parsed = np.array([clean.parsed[place] and own.parsed[place] for place in kept])
    shift = 100 * (np.mean([own.parsed[p] for p in kept]) - np.mean([clean.parsed[p] for p in kept]))
    return Effect(
        name=own.name,
        n=found.n,
        accuracy=100 * float(after.mean()),
        delta=found.difference,
        low=found.low,
        high=found.high,
        only_clean=found.only_first,
        only_condition=found.only_second,
        p_mcnemar=found.p_mcnemar,
        p_holm=found.p_mcnemar,
        discordant=found.discordant,
        flip=float(np.mean([clean.answers[place] != own.answers[place] for place in kept])),
        mde=found.mde,
        margin=margin,
        p_equivalence=found.p_equivalence,
        equivalent=found.equivalent,
        parse_rate=100 * float(np.mean([own.parsed[place] for place in kept])),
        parse_shift=float(shift),
        delta_parsed=100 * float((after - before)[parsed].mean()) if abs(shift) > 1 and parsed.any() else None,
        **_continuous(clean, own, kept, clusters, seed),
        **_recovery(clean, own, kept, groups, base, seed),
    )


def _continuous(
    clean: ConditionResult, own: ConditionResult, kept: Sequence[int], clusters: Sequence[str], seed: int
) -> dict[str, float | None]:
    """Effects on log-probabilities, nats; None where they were not taken."""
    scored = [p for p in kept if clean.gold_log_prob[p] is not None and own.gold_log_prob[p] is not None]
    values: dict[str, float | None] = {}
    if scored:
        drops = [clean.gold_log_prob[place] - own.gold_log_prob[place] for place in scored]
        mean = bootstrap_mean(drops, [clusters[place] for place in scored], seed=seed)
        tokens = [max(clean.gold_tokens[place], 1) for place in scored]
        values |= {"u": mean.mean, "u_low": mean.low, "u_high": mean.high,
                   "u_per_token": float(np.mean(np.divide(drops, tokens)))}  # fmt: skip
    options = [p for p in kept if clean.option_log_probs[p] and own.option_log_probs[p]]
    if options:
        pairs = [(_softmax(clean.option_log_probs[p]), _softmax(own.option_log_probs[p])) for p in options]
        values["kl_options"] = float(np.mean([_kl(first, second) for first, second in pairs]))
        gold = [_gold_option(clean, place) for place in options]
        moved = [second[g] - first[g] for (first, second), g in zip(pairs, gold, strict=True) if g is not None]
        values["delta_p_gold"] = float(np.mean(moved)) if moved else None
    for name, field in (("kl_first", "first_token_kl"), ("js_first", "first_token_js")):
        found = [getattr(own, field)[place] for place in kept if getattr(own, field)[place] is not None]
        values[name] = float(np.mean(found)) if found else None
    return values


def _gold_option(clean: ConditionResult, place: int) -> int | None:
    """Number of the option that is the gold answer: the one whose log-probability is the gold reply's."""
    gold = clean.gold_log_prob[place]
    if gold is None:
        return None
    gaps = [abs(value - gold) for value in clean.option_log_probs[place]]
    best = int(np.argmin(gaps))
    return best if gaps[best] < 1e-4 else None


def _softmax(values: Sequence[float]) -> np.ndarray:
    shifted = np.exp(np.asarray(values) - max(values))
    return shifted / shifted.sum()


def _kl(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.sum(first * (np.log(np.maximum(first, 1e-300)) - np.log(np.maximum(second, 1e-300)))))


def _recovery(
    clean: ConditionResult,
    own: ConditionResult,
    kept: Sequence[int],
    groups: Sequence[str],
    base: Sequence[bool] | None,
    seed: int,
) -> dict[str, float]:
    """Share of the clean gain over the base that the condition keeps; nothing where the gain is below one point or
    its interval covers 0."""
    if base is None:
        return {}
    columns = np.array([[own.correct[p], clean.correct[p], base[p]] for p in kept], dtype=np.float64)
    means = resampled_means(columns, groups, seed=seed)
    gain = 100 * (columns[:, 1] - columns[:, 2]).mean()
    if gain < 1 or np.quantile(means[:, 1] - means[:, 2], 0.025) <= 0:
        return {}
    ratios = (means[:, 0] - means[:, 2]) / np.maximum(means[:, 1] - means[:, 2], 1e-9)
    low, high = np.quantile(ratios, [0.025, 0.975])
    mean = columns.mean(axis=0)
    return {"recovery": float((mean[0] - mean[2]) / (mean[1] - mean[2])), "recovery_low": float(low),
            "recovery_high": float(high)}  # fmt: skip


def comparisons_of(
    conditions: Mapping[str, ConditionResult], clusters: Sequence[str], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Named differences of two conditions in points with 95 % intervals, on the items where both apply."""
    found: dict[str, dict[str, float]] = {}
    for name, (first, second) in COMPARISONS.items():
        if first not in conditions or second not in conditions:
            continue
        one, other = conditions[first], conditions[second]
        kept = [place for place, both in enumerate(zip(one.applied, other.applied, strict=True)) if all(both)]
        if kept:
            values = [100.0 * (one.correct[place] - other.correct[place]) for place in kept]
            mean = bootstrap_mean(values, [clusters[place] for place in kept], seed=seed)
            found[name] = {"difference": mean.mean, "low": mean.low, "high": mean.high, "n": len(kept)}
    return found


__all__ = ["COMPARISONS", "comparisons_of", "effects_of"]
