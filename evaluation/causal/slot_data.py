"""What edits of slots draw on: statistics of the clean run, donors, oracles, and noise by item and slot."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from .contexts import CleanItem


class NotApplicable(ValueError):
    """An intervention that an item does not allow; the message says why."""


def derangement(groups: Sequence[str], seed: int, rule: Callable[[str, str], bool] | None = None) -> list[int]:
    """For each item another one, a permutation without fixed points where every pair is allowed.

    Args:
        groups: of each item, a label that `rule` reads.
        seed: the same seed gives the same donors, whatever the model.
        rule: `(own label, donor's label)` whether the donor is allowed; -1 where an item has none. With a rule a donor
            may serve several items.
    """
    count, generator = len(groups), torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator).tolist()
    if rule is None:
        donors = [-1] * count
        for place, item in enumerate(order):
            donors[item] = order[(place + 1) % count] if count > 1 else -1
        return donors
    place_of = {item: place for place, item in enumerate(order)}
    donors = []
    for item in range(count):
        ring = (order[(place_of[item] + step) % count] for step in range(1, count))
        donors.append(next((other for other in ring if rule(groups[item], groups[other])), -1))
    return donors


@dataclass
class SlotData:
    """Of all items of a card, in order; vectors float32 on the CPU.

    Args:
        items: the clean run.
        gold: answers, for donors of the same or of another answer.
        seed: of noise, orders and donors.
        embeddings: `(V, H)` token embeddings.
        patches: of each item the `(n, H)` image embeddings of its prompt, None where it has none or they are unknown.
        oracles: of each item the `(m, H)` target vectors, None without.
        runs: further runs of the same items by name (`other_image`, `cf_donor`, `initial`): `(N, H)` or None each.
        token_id: from the text of a token to its id, raises `ValueError` for several.
        unembedding: `(V, H)` rows of the LM head.
        letters: ids of the answer letters, for the basis of their rows.
        attention: of each item the `(N,)` attention of the answer to its latents, or None.
    """

    items: Sequence[CleanItem]
    gold: Sequence[str]
    seed: int
    embeddings: torch.Tensor
    patches: Sequence[torch.Tensor | None] = ()
    oracles: Sequence[torch.Tensor | None] = ()
    runs: dict[str, list[torch.Tensor | None]] = field(default_factory=dict)
    token_id: Callable[[str], int] | None = None
    unembedding: torch.Tensor | None = None
    letters: Sequence[int] = ()
    attention: Sequence[torch.Tensor | None] = ()
    _bases: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict, repr=False)

    def vectors(self, item: int) -> torch.Tensor:
        """`(N, H)` clean latents of an item, float32."""
        return self.items[item].inputs.float()

    def noise(self, item: int, number: int, size: int, name: str = "") -> torch.Tensor:
        """`(H,)` standard normal, the same for every model that has this item and latent."""
        key = f"{self.seed}/{self.items[item].record['id']}/{number}/{name}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
        return torch.randn(size, generator=torch.Generator().manual_seed(seed))

    def order(self, item: int, count: int) -> list[int]:
        """A derangement of the latents of an item.

        Raises:
            NotApplicable: fewer than two latents.
        """
        if count < 2:
            raise NotApplicable("an order needs two latents")
        key = f"{self.seed}/{self.items[item].record['id']}/order".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
        return derangement([""] * count, seed)

    # Statistics of the clean run

    @cached_property
    def embedding_norm(self) -> float:
        """Mean norm of the token embeddings."""
        return float(self.embeddings.norm(dim=-1).mean())

    @cached_property
    def mean_by_number(self) -> torch.Tensor:
        """`(K, H)` mean over the items of the latent with that number."""
        most = max((len(item.inputs) for item in self.items), default=0)
        rows = [[each for each in (self._at(i, k) for i in range(len(self.items))) if each is not None]
                for k in range(most)]  # fmt: skip
        if not rows:
            raise NotApplicable("the clean run has no latent")
        return torch.stack([torch.stack(row).mean(dim=0) for row in rows])

    def _at(self, item: int, number: int) -> torch.Tensor | None:
        vectors = self.items[item].inputs
        return vectors[number].float() if number < len(vectors) else None

    @cached_property
    def stacked(self) -> torch.Tensor:
        """`(all latents, H)` of the clean run."""
        found = [self.vectors(item) for item in range(len(self.items)) if len(self.items[item].inputs)]
        if not found:
            raise NotApplicable("the clean run has no latent")
        return torch.cat(found)

    def without_item(self, item: int, number: int) -> torch.Tensor:
        """`(H,)` mean at a number over the other items: what is specific to the item is left out of its own mean.

        Raises:
            NotApplicable: no other item has that many latents.
        """
        others = sum(number < len(each.inputs) for each in self.items) - 1
        if others < 1:
            raise NotApplicable("no other item has as many latents")
        total = self.mean_by_number[number] * (others + 1) - self.vectors(item)[number]
        return total / others

    def basis(self, name: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Orthonormal rows `(r, H)` of a subspace, and the mean `(H,)` of the latents.

        Args:
            name: `"image"` (principal directions of image embeddings), `"latents"` (of the clean latents) or
                `"letters"` (span of the LM head's rows of the answer letters).
            rank: number of directions, at most.

        Raises:
            ValueError: an unknown name, or a rank below 1.
            NotApplicable: there are no image embeddings, or no letters.
        """
        if rank < 1 or name not in ("image", "latents", "letters"):
            raise ValueError(f"basis {name!r} of rank {rank}: choose image, latents or letters, and a rank from 1 on")
        if (name, rank) not in self._bases:
            self._bases[name, rank] = self._directions(name, rank)
        return self._bases[name, rank], self.stacked.mean(dim=0)

    def _directions(self, name: str, rank: int) -> torch.Tensor:
        if name == "letters":
            if self.unembedding is None or not len(self.letters):
                raise NotApplicable("the benchmark has no answer letters")
            rows = self.unembedding[list(self.letters)].float()
        else:
            found = [each.float() for each in self.patches if each is not None] if name == "image" else [self.stacked]
            if not found:
                raise NotApplicable("there are no image embeddings")
            rows = torch.cat(found)
            rows = rows - rows.mean(dim=0)
        return torch.linalg.svd(rows, full_matrices=False).Vh[:rank]

    # Donors

    @cached_property
    def donors(self) -> list[int]:
        """Another item for each, a permutation without fixed points."""
        return derangement([item.record["id"] for item in self.items], self.seed)

    @cached_property
    def same_answer(self) -> list[int]:
        """A donor with the same gold answer, -1 for none."""
        return derangement(list(self.gold), self.seed, lambda own, other: own == other)

    @cached_property
    def other_answer(self) -> list[int]:
        """A donor with another gold answer, -1 for none."""
        return derangement(list(self.gold), self.seed, lambda own, other: own != other)

    @cached_property
    def wrong_oracle(self) -> list[int]:
        """A donor of oracle vectors."""
        has = ["1" if oracle is not None else "" for oracle in self.oracles]
        return derangement(has, self.seed, lambda own, other: bool(other))

    def oracle(self, item: int) -> torch.Tensor:
        """`(m, H)` oracle vectors of an item.

        Raises:
            NotApplicable: it has none.
        """
        found = self.oracles[item] if self.oracles else None
        if found is None:
            raise NotApplicable(
                f"item {self.items[item].record['id']!r} has no oracle vectors: they are the image embeddings inside "
                "the boxes of its record; give records with boxes"
            )
        return found.float()

    def run(self, name: str, item: int) -> torch.Tensor:
        """`(N, H)` latents of an item in a further run.

        Raises:
            NotApplicable: it has none there.
        """
        found = self.runs[name][item] if name in self.runs else None
        if found is None or not len(found):
            raise NotApplicable(f"item {self.items[item].record['id']!r} has no latents in the run {name!r}")
        return found.float()


def at_number(vectors: torch.Tensor, number: int) -> torch.Tensor:
    """The latent with a number, the last one where there are fewer.

    Raises:
        NotApplicable: there is none.
    """
    if not len(vectors):
        raise NotApplicable("the donor has no latents")
    return vectors[min(number, len(vectors) - 1)]


def pooled(vectors: torch.Tensor, count: int) -> torch.Tensor:
    """`(count, H)` means of `count` consecutive, nearly equal parts of `(m, H)`; parts overlap where m < count."""
    moved = torch.nn.functional.adaptive_avg_pool1d(vectors.t().unsqueeze(0), count)
    return moved[0].t()


__all__ = ["NotApplicable", "SlotData", "at_number", "derangement", "pooled"]
