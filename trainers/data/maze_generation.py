"""Generated FrozenLake mazes: an unlimited, seeded source, split by the identity of the map.

Task: the maze of the Visual Spatial Planning benchmark (VSP, arXiv 2407.01863).

Distribution. Start and goal are two different cells drawn uniformly, every other cell is a hole with probability 0.2
(the share that `gymnasium` draws its random FrozenLake maps with), and a map without a path is drawn again. Compared
with 200 published maps, 50 of each level 3 to 6 (columns: published, then 20,000 generated ones):

| size | holes a map | moves of a shortest plan | maps by moves 1, 2, 3, ... of 50 |
|---|---|---|---|
| 3 | 1.14, 1.29 | 1.84, 2.03 | 22 14 14, 18 18 10 4 |
| 4 | 2.70, 2.70 | 2.78, 2.77 | 10 14 14 6 3 1 2, 11 14 12 8 4 1 |
| 5 | 4.32, 4.49 | 3.30, 3.53 | 8 8 12 12 5 4 0 1, 7 10 10 9 7 4 2 1 |
| 6 | 6.58, 6.68 | 4.18, 4.32 | 4 10 6 11 5 7 3 2 1 1, 5 7 8 8 7 6 4 2 1 1 |

No mean differs by more than 1.5 standard errors of the published one; with a probability of 0.15 or 0.25 the holes
differ by more than 3 on most levels. Published starts and goals are spread over all cells.

Splits. The identity of a map decides its split, whatever the seed: no map is ever in two. Published maps are not known
here, and small maps are few (6,792 solvable ones of size 3), so a long draw meets some of them: keep them out with
`exclude` (`mazes.published_identities`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from random import Random

from .maze_planning import MAX_SIZE, Maze, distances_to_goal

SIZES = (3, 4, 5, 6)
HOLE_PROBABILITY = 0.2
SPLITS = {"train": range(80), "validation": range(80, 90), "test": range(90, 100)}
MAX_DRAWS = 100_000


def split_of(identity: str) -> str:
    """The split of a map: its identity as a number, modulo 100; below 80 train, below 90 validation, else test."""
    bucket = int(identity, 16) % 100
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


@dataclass(frozen=True)
class MazeGenerator:
    """An unlimited, seeded source of solvable mazes; the distribution is described in the module docstring.

    Args:
        seed: of all draws; another seed gives other mazes.
        split: `"train"`, `"validation"` or `"test"`; only mazes of this split are drawn (80, 10 and 10 % of all maps).
        sizes: drawn from uniformly.
        hole_probability: of each cell that is neither start nor goal, before mazes without a path are drawn again.
        min_moves: mazes with a shorter shortest plan are drawn again.
        exclude: identities ([`Maze.identity`]) never to be drawn, e.g. [`published_identities`].

    Raises:
        ValueError: an option out of its range.
    """

    seed: int = 0
    split: str = "train"
    sizes: Sequence[int] = SIZES
    hole_probability: float = HOLE_PROBABILITY
    min_moves: int = 1
    exclude: Collection[str] = field(default=frozenset(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if isinstance(self.exclude, str):
            raise ValueError(f"exclude is the string {self.exclude!r}; give a collection of identities")
        object.__setattr__(self, "exclude", frozenset(self.exclude))
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}; use one of {', '.join(SPLITS)}")
        if not self.sizes or not all(isinstance(size, int) and 2 <= size <= MAX_SIZE for size in self.sizes):
            raise ValueError(f"sizes is {self.sizes}; give whole numbers from 2 to {MAX_SIZE}")
        if not 0 <= self.hole_probability < 1:
            raise ValueError(f"hole_probability is {self.hole_probability}; use at least 0 and less than 1")
        if self.min_moves < 1:
            raise ValueError(f"min_moves is {self.min_moves}; use at least 1 (start and goal differ)")
        for identity in self.exclude:
            if not isinstance(identity, str) or len(identity) != 16:
                raise ValueError(f"exclude holds {identity!r}; give the 16-digit identities of mazes")

    def maze(self, index: int, taken: Collection[str] = frozenset()) -> Maze:
        """Maze number `index`; it depends on the options and `index` only (and on `taken`: more identities to avoid).

        Raises:
            ValueError: none was found in 100,000 draws.
        """
        rng = Random(f"maze:{self.seed}:{index}")
        size = self.sizes[int(rng.random() * len(self.sizes))]
        for _ in range(MAX_DRAWS):
            maze = _random_maze(rng, size, self.hole_probability)
            if split_of(maze.identity) != self.split or maze.identity in self.exclude or maze.identity in taken:
                continue
            distance = distances_to_goal(maze).get(maze.start)
            if distance is not None and distance >= self.min_moves:
                return maze
        raise ValueError(
            f"no new maze of size {size} in {MAX_DRAWS} draws (index {index}, {len(taken)} already taken, {self}); "
            "ask for fewer or larger mazes, lower min_moves or hole_probability, or allow repeats with unique=False"
        )


def _random_maze(rng: Random, size: int, hole_probability: float) -> Maze:
    """One draw, path or not. Uses `rng.random()` only: Python keeps its sequence the same between versions."""
    num_cells = size * size
    start = int(rng.random() * num_cells)
    goal = (start + 1 + int(rng.random() * (num_cells - 1))) % num_cells
    holes = [cell for cell in range(num_cells) if rng.random() < hole_probability and cell not in (start, goal)]
    return Maze(size, divmod(start, size), divmod(goal, size), frozenset(divmod(cell, size) for cell in holes))
