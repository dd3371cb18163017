"""Which interventions a card runs: the suites of the specification (section 7), fitted to method and data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .contexts import CleanItem
from .interventions import Intervention, parse_intervention

SUITES: dict[str, tuple[str, ...]] = {
    # Token Replacement Test, 2605.21642
    "trt": ("identity", "zero", "gauss_unit", "gauss_model", "first_repeat", "oracle", "oracle_wrong", "gauss_oracle"),
    # CapImagine, 2602.22766
    "mediation": (
        "identity", "zero", "gauss_norm", "clamp", "extreme", "blur(1)", "brightness(0.2)", "other_image",
        "swap_image", "counterfactual", "cf_donor", "A⇸I+Q⇸I",
    ),
    # Cosine Misleads, 2606.05753
    "prism": ("identity", "zero", "noise_abs(0.1)", "noise_abs(0.3)", "noise_abs(1.0)", "swap_pool(64)"),
    # Beyond Visual Memory, 2606.01287
    "slots": (
        "identity", "markers_only", "slots_only", "no_span", "filler(.)", "gauss_norm", "shuffle_items", "A⇸L",
        "all⇸L", "A⇸M", "L⇸I", "oracle", "oracle_wrong",
    ),
}  # fmt: skip
SUITES["full"] = tuple(
    dict.fromkeys(
        (
            *SUITES["slots"], *SUITES["trt"], *SUITES["mediation"], *SUITES["prism"], "noise_rel(0.5)", "noise_rel(2)",
            "gauss_model_diag", "mean", "perm", "dummy_token(.)", "random_patch", "shuffle_same_answer",
            "shuffle_other_answer", "force_k(2)", "silent", "L⇸L", "L⇸Q", "A⇸I", "drop_KV(I)", "K=1", "K=2", "K=4",
            "K=8", "K=12", "K=16", "mask_roi(1)", "mask_random(1)", "blank_image", "A⇸L@0-25", "A⇸L@25-50",
            "A⇸L@50-75", "A⇸L@75-100",
        )
    )
)  # fmt: skip
# What a method needs in addition.
FOR_LEARNED = ("zero_kv", "mean_kv", "shuffle_kv")
FOR_PATCHES = ("gauss_norm[hidden]", "gauss_norm[patches]")
FOR_SEARCH = ("initial", "random_walk")


@dataclass(frozen=True)
class Traits:
    """What method and data allow.

    Args:
        constant: latents are the same for every item (learned tokens).
        searched: latents are found by a search for every item.
        markers: some span has markers.
        patches: image embeddings are inserted.
        opens_span: the model opens spans itself.
        boxes: some record has boxes.
        images: some record has images.
        pairs: some record has a counterfactual view.
    """

    constant: bool
    searched: bool
    markers: bool
    patches: bool
    opens_span: bool
    boxes: bool
    images: bool
    pairs: bool


def traits_of(items: Sequence[CleanItem], strategy: str, opens_span: bool, patch_id: int | None) -> Traits:
    """The traits of a clean run with a strategy."""
    records = [item.record for item in items]
    return Traits(
        constant=strategy == "learned",
        searched=strategy == "search",
        markers=any(span.start >= 0 for item in items for span in item.spans),
        patches=patch_id is not None and any(bool((item.ids == patch_id).any()) for item in items),
        opens_span=opens_span,
        boxes=any(record.get("boxes") and record["images"] for record in records),
        images=any(record["images"] for record in records),
        pairs=any((record.get("meta") or {}).get("counterfactual") for record in records),
    )


def suite_interventions(suite: str | Sequence[str], traits: Traits) -> tuple[list[Intervention], list[str]]:
    """The interventions of a suite that method and data allow, and why others were left out.

    Args:
        suite: a name in `SUITES`, or spelled interventions (which are never left out).
        traits: of the clean run.

    Raises:
        ValueError: an unknown suite or intervention, or one that was asked for by name and cannot be done.
    """
    if not isinstance(suite, str):
        chosen = [parse_intervention(text) for text in suite]
        refused = [f"{each.name}: {why}" for each in chosen if (why := reason_against(each, traits))]
        if refused:
            raise ValueError(f"interventions that cannot be done here: {'; '.join(refused)}")
        return list(dict.fromkeys(chosen)), []
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; choose one of {list(SUITES)}, or list interventions")
    extra = [*(FOR_LEARNED if traits.constant else ()), *(FOR_PATCHES if traits.patches else ()),
             *(FOR_SEARCH if traits.searched else ())]  # fmt: skip
    kept, left_out = [], []
    for each in map(parse_intervention, (*SUITES[suite], *extra)):
        why = reason_against(each, traits)
        if why:
            left_out.append(f"{each.name}: {why}")
        else:
            kept.append(each)
    return list(dict.fromkeys(kept)), left_out


_CONSTANT = ("mean", "shuffle_items", "swap_pool", "shuffle_same_answer", "shuffle_other_answer", "other_image",
             "cf_donor", "clamp")  # fmt: skip


def reason_against(each: Intervention, traits: Traits) -> str:
    """Why an intervention cannot be done, empty when it can."""
    if each.needs in ("oracles", "boxes") and not traits.boxes:
        return "the records have no boxes, from which oracle vectors and regions come; give records with boxes"
    if (each.needs == "patches" or each.family in ("graft", "input")) and each.rule != "paraphrase":
        if not traits.images and each.rule != "other_question":
            return "the records have no images"
    if each.needs in ("cf_donor", "counterfactual") and not traits.pairs:
        return "the records have no counterfactual view (meta['counterfactual'])"
    if each.needs == "initial" and not traits.searched:
        return "the strategy does not search"
    if traits.constant and each.rule in _CONSTANT:
        return "learned tokens are the same for every item, so this changes nothing; use shuffle_kv"
    if each.rule in ("markers_only", "slots_only") and not traits.markers:
        return "the spans have no markers; use no_span"
    if any(keys == "M" for _, keys, _ in each.edges) and not traits.markers:
        return "the spans have no markers"
    if any("I" in (queries, keys) for queries, keys, _ in each.edges) and not traits.images:
        return "the records have no images"
    if each.rule == "force_span" and not traits.opens_span:
        return "the strategy lays its latents out itself"
    if each.rule == "extend" and (traits.constant or traits.searched):
        return "the method feeds no state back"
    if each.rule == "K" and (traits.constant or traits.searched) and each.arguments[0]:
        return "the method feeds no state back; use K=0 or truncate(j)"
    return ""


def roles_of(traits: Traits) -> Mapping[str, str]:
    """Which condition plays which role in the rule of the verdict: methods without markers or with latents that are
    the same for every item have stand-ins."""
    roles = {"noise": "gauss_norm", "swap": "shuffle_items", "mask": "all⇸L", "empty": "markers_only",
             "off": "no_span", "oracle": "oracle"}  # fmt: skip
    if traits.constant:
        roles |= {"swap": "shuffle_kv"}
    if not traits.markers:
        roles |= {"empty": "no_span"}
    return roles


__all__ = ["SUITES", "Traits", "reason_against", "roles_of", "suite_interventions", "traits_of"]
