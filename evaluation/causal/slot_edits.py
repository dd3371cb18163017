"""Edits of what slots are fed: the content interventions (specification, section 2.1).

An edit is a function of the item's data that returns a function `(number, own) -> vector`: `number` counts the latents
of the item from 0, `own` `(H,)` is what would be fed there, from the clean trace (frozen) or worked out from the
edited past (live). Edits with `reads_own` need it; the others give the same vectors in both regimes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .slot_data import NotApplicable, SlotData, at_number, pooled

Feed = Callable[[int, torch.Tensor], torch.Tensor]
MakeFeed = Callable[..., Feed]  # (data, item, *arguments)


@dataclass(frozen=True)
class SlotEditRule:
    """A content intervention.

    Args:
        name: as it is spelled, without arguments.
        make: `(data, item, *arguments)` to a `Feed`.
        help: one line.
        arguments: their defaults; an argument without default is `None` there and must be given.
        reads_own: whether it needs what would be fed.
        needs: `"oracles"`, `"patches"`, or the name of a further run (`"other_image"`, `"cf_donor"`, `"initial"`).
    """

    name: str
    make: MakeFeed
    help: str
    arguments: tuple[Any, ...] = ()
    reads_own: bool = False
    needs: str | None = None


SLOT_EDITS: dict[str, SlotEditRule] = {}


def register_slot_edit(
    name: str, help: str, arguments: tuple[Any, ...] = (), *, reads_own: bool = False, needs: str | None = None
) -> Callable[[MakeFeed], MakeFeed]:
    """Decorator that adds a content intervention.

    Raises:
        ValueError: the name is taken.
    """

    def add(make: MakeFeed) -> MakeFeed:
        if name in SLOT_EDITS:
            raise ValueError(f"slot edit {name!r} is already registered; choose another name")
        SLOT_EDITS[name] = SlotEditRule(name, make, help, arguments, reads_own, needs)
        return make

    return add


def _count(data: SlotData, item: int) -> int:
    return len(data.items[item].inputs)


@register_slot_edit("identity", "the clean vector: must change nothing")
def identity(data: SlotData, item: int) -> Feed:
    vectors = data.vectors(item)
    return lambda number, own: vectors[number]


@register_slot_edit("zero", "zeros")
def zero(data: SlotData, item: int) -> Feed:
    return lambda number, own: torch.zeros_like(own)


@register_slot_edit("noise_abs", "own + sigma * n", (None,), reads_own=True)
def noise_abs(data: SlotData, item: int, sigma: float) -> Feed:
    return lambda number, own: own + sigma * data.noise(item, number, len(own))


@register_slot_edit("noise_rel", "own + rho * |own| / sqrt(d) * n", (None,), reads_own=True)
def noise_rel(data: SlotData, item: int, rho: float) -> Feed:
    return lambda number, own: own + rho * own.norm() / len(own) ** 0.5 * data.noise(item, number, len(own))


@register_slot_edit("gauss_unit", "standard normal")
def gauss_unit(data: SlotData, item: int) -> Feed:
    return lambda number, own: data.noise(item, number, len(own))


@register_slot_edit("gauss_norm", "normal direction with the norm of the vector it replaces", reads_own=True)
def gauss_norm(data: SlotData, item: int) -> Feed:
    def feed(number: int, own: torch.Tensor) -> torch.Tensor:
        noise = data.noise(item, number, len(own))
        return noise * own.norm() / noise.norm()

    return feed


@register_slot_edit("gauss_model", "normal with mean and deviation over all entries of the item's latents")
def gauss_model(data: SlotData, item: int) -> Feed:
    return _scalar_gauss(data, item, data.vectors(item))


@register_slot_edit("gauss_model_diag", "normal with mean and deviation of each dimension over the data set")
def gauss_model_diag(data: SlotData, item: int) -> Feed:
    mean, deviation = data.stacked.mean(dim=0), data.stacked.std(dim=0, correction=0)
    return lambda number, own: mean + deviation * data.noise(item, number, len(own))


@register_slot_edit("gauss_oracle", "normal with the statistics of the oracle", needs="oracles")
def gauss_oracle(data: SlotData, item: int) -> Feed:
    return _scalar_gauss(data, item, data.oracle(item))


def _scalar_gauss(data: SlotData, item: int, vectors: torch.Tensor) -> Feed:
    mean, deviation = vectors.mean(), vectors.std(correction=0)
    return lambda number, own: mean + deviation * data.noise(item, number, len(own))


@register_slot_edit("mean", "mean of the other items at the same number")
def mean(data: SlotData, item: int) -> Feed:
    return lambda number, own: data.without_item(item, number)


@register_slot_edit("clamp", "one vector for all items and slots: the mean of the data set")
def clamp(data: SlotData, item: int) -> Feed:
    vector = data.stacked.mean(dim=0)
    return lambda number, own: vector


@register_slot_edit("extreme", "c times the mean absolute entry in every dimension", (10.0,))
def extreme(data: SlotData, item: int, factor: float) -> Feed:
    value = factor * data.stacked.abs().mean()
    return lambda number, own: value.expand_as(own)


@register_slot_edit("first_repeat", "the first latent everywhere")
def first_repeat(data: SlotData, item: int) -> Feed:
    first = at_number(data.vectors(item), 0)
    return lambda number, own: first


@register_slot_edit("perm", "the latents of the item in another order")
def perm(data: SlotData, item: int) -> Feed:
    vectors, order = data.vectors(item), data.order(item, _count(data, item))
    return lambda number, own: vectors[order[number]]


@register_slot_edit("dummy_token", "the embedding of a token: its text, or its id", (None,))
def dummy_token(data: SlotData, item: int, token: str | int) -> Feed:
    token_id = token if isinstance(token, int) else data.token_id(token)
    if not 0 <= token_id < len(data.embeddings):
        raise ValueError(
            f"dummy_token({token!r}): the model has no such token; give an id below {len(data.embeddings)}"
        )
    vector = data.embeddings[token_id].float()
    return lambda number, own: vector


@register_slot_edit("random_patch", "embeddings of random patches of the item's image", needs="patches")
def random_patch(data: SlotData, item: int) -> Feed:
    patches = data.patches[item] if data.patches else None
    if patches is None or not len(patches):
        raise NotApplicable(f"item {data.items[item].record['id']!r} has no image")
    chosen = data.noise(item, -1, len(patches), "patches").argsort().tolist()
    return lambda number, own: patches[chosen[number % len(chosen)]].float()


# Donors


def _from_donor(data: SlotData, donor: int, reason: str) -> Feed:
    if donor < 0:
        raise NotApplicable(reason)
    vectors = data.vectors(donor)
    if not len(vectors):
        raise NotApplicable(f"the donor {data.items[donor].record['id']!r} has no latents")
    return lambda number, own: at_number(vectors, number)


@register_slot_edit("shuffle_items", "the latents of another item")
def shuffle_items(data: SlotData, item: int) -> Feed:
    return _from_donor(data, data.donors[item], "there is no other item")


@register_slot_edit("swap_pool", "the latents of one of n recorded items (PRISM: 64)", (64,))
def swap_pool(data: SlotData, item: int, size: int) -> Feed:
    pool = [other for other in range(min(int(size), len(data.items))) if other != item]
    if not pool:
        raise NotApplicable("there is no other item in the pool")
    chosen = data.noise(item, -1, len(pool), "pool").argmax()
    return _from_donor(data, pool[int(chosen)], "")


@register_slot_edit("shuffle_same_answer", "the latents of an item with the same answer")
def shuffle_same_answer(data: SlotData, item: int) -> Feed:
    return _from_donor(data, data.same_answer[item], "no other item has the same answer")


@register_slot_edit("shuffle_other_answer", "the latents of an item with another answer")
def shuffle_other_answer(data: SlotData, item: int) -> Feed:
    return _from_donor(data, data.other_answer[item], "no item has another answer")


def _from_run(data: SlotData, item: int, name: str) -> Feed:
    vectors = data.run(name, item)
    return lambda number, own: at_number(vectors, number)


@register_slot_edit("other_image", "the model's latents for the same question on another image", needs="other_image")
def other_image(data: SlotData, item: int) -> Feed:
    return _from_run(data, item, "other_image")


@register_slot_edit("cf_donor", "the model's latents for the edited image of the pair", needs="cf_donor")
def cf_donor(data: SlotData, item: int) -> Feed:
    return _from_run(data, item, "cf_donor")


@register_slot_edit("initial", "the vectors that a search started from", needs="initial")
def initial(data: SlotData, item: int) -> Feed:
    return _from_run(data, item, "initial")


@register_slot_edit(
    "random_walk", "as far from the start of a search as its result, in a random direction", needs="initial"
)
def random_walk(data: SlotData, item: int) -> Feed:
    start, found = data.run("initial", item), data.vectors(item)

    def feed(number: int, own: torch.Tensor) -> torch.Tensor:
        noise = data.noise(item, number, len(own), "walk")
        origin = at_number(start, number)
        return origin + noise / noise.norm() * (found[number] - origin).norm()

    return feed


@register_slot_edit("text_fed", "the embedding of the token that the slot would have said")
def text_fed(data: SlotData, item: int) -> Feed:
    said = data.items[item].said.tolist()
    return lambda number, own: data.embeddings[said[number]].float()


# Oracles


@register_slot_edit("oracle", "target vectors of the item, pooled to the number of its latents", needs="oracles")
def oracle(data: SlotData, item: int) -> Feed:
    return _pooled_feed(data.oracle(item), _count(data, item))


@register_slot_edit("oracle_wrong", "target vectors of another item", needs="oracles")
def oracle_wrong(data: SlotData, item: int) -> Feed:
    data.oracle(item)  # the same items as `oracle`
    donor = data.wrong_oracle[item]
    if donor < 0:
        raise NotApplicable("no other item has oracle vectors")
    return _pooled_feed(data.oracle(donor), _count(data, item))


def _pooled_feed(vectors: torch.Tensor, count: int) -> Feed:
    if not count:
        raise NotApplicable("the item has no latents")
    vectors = pooled(vectors, count)
    return lambda number, own: vectors[number]


@register_slot_edit(
    "force_k", "the oracle for the first n latents, own ones after", (None,), reads_own=True, needs="oracles"
)
def force_k(data: SlotData, item: int, number_forced: float) -> Feed:
    feed = oracle(data, item)
    return lambda number, own: feed(number, own) if number < number_forced else own


# Subspaces


@register_slot_edit("proj_out", "without the subspace: image, latents or letters, rank r", (None, 16), reads_own=True)
def proj_out(data: SlotData, item: int, basis: str, rank: float) -> Feed:
    rows, centre = data.basis(basis, int(rank))
    return lambda number, own: own - (own @ rows.t()) @ rows


@register_slot_edit(
    "proj_in", "the subspace alone, and the mean: image, latents or letters, rank r", (None, 16), reads_own=True
)
def proj_in(data: SlotData, item: int, basis: str, rank: float) -> Feed:
    rows, centre = data.basis(basis, int(rank))
    return lambda number, own: centre + ((own - centre) @ rows.t()) @ rows


__all__ = ["SLOT_EDITS", "Feed", "SlotEditRule", "register_slot_edit"]
