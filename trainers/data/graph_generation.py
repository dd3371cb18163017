"""Generated graph questions in the manner of ProsQA: an unlimited, seeded source, split by the identity of the graph.

Task: ProsQA of "Training Large Language Models to Reason in a Continuous Latent Space", arXiv 2412.06769 (Coconut).

Distribution. Nodes are entities ("Alex") and concepts ("zumpus"); every edge is a sentence. Two entities are rivals,
each with a chain of concepts to an option of its own, equally long (up to `depth_gap`). The rest of the edges is drawn
from all of a topological order that neither shorten a chain nor lead a rival to the other's option. Rivals have the
same number of sentences, options too. **Then a coin says which rival is asked about**, another the order of the
options, and the sentences are shuffled: only a path from the entity tells the options apart, not their order, depth,
number of sentences or of nodes that reach them. With the defaults (23 nodes, 36 edges) the shortest path has 3.8 edges
on average and there are 1.2 of them; the paper reports 23.0, 36.0, 3.8 and 1.6 for ProsQA.

Splits. The set of edges, with its names, decides the split of a graph, whatever the seed, the rival asked about and
the order of the sentences: no graph is ever in two.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from .maze_generation import SPLITS, split_of

ENTITIES = (
    *("Alex", "Bob", "Carol", "Davis", "Ella", "Frank", "Grace", "Henry", "Iris", "Jack"),
    *("Kate", "Leo", "Mary", "Nora", "Oscar", "Polly", "Quinn", "Rex", "Sally", "Tom"),
)
CONCEPTS = tuple(
    onset + stem + "us" for stem in ("ump", "emp", "imp", "omp", "orp", "erp") for onset in "zlgbdftrwyjnkhvs"
)
MAX_DRAWS = 2_000
# How often the nodes of one draw are named anew when the graph is not of the split.
NAMINGS = 50
Edge = tuple[str, str]
Node = TypeVar("Node", bound=Hashable)


@dataclass(frozen=True)
class GraphQuestion:
    """A question about a graph.

    Args:
        edges: pairs (what is it, what it is) in the order of the sentences; the first part of a pair that is one of
            `entities` is a person, else a concept.
        entities: names of the persons.
        subject: the person asked about.
        options: two concepts in the order asked.
        path: from the subject to the right option, along a shortest path.
    """

    edges: tuple[Edge, ...]
    entities: tuple[str, ...]
    subject: str
    options: tuple[str, str]
    path: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The right option."""
        return self.path[-1]

    @property
    def wrong(self) -> str:
        """The other option."""
        return self.options[self.options[0] == self.answer]

    @property
    def identity(self) -> str:
        """16 hexadecimal digits of the set of edges; the same for every question about the same graph."""
        text = ";".join(sorted(f"{child}>{parent}" for child, parent in self.edges))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def distances(edges: Iterable[tuple[Node, Node]], start: Node) -> dict[Node, int]:
    """Edges of a shortest path from `start` to every node that it reaches, itself (0) included."""
    above: dict[Node, list[Node]] = {}
    for child, parent in edges:
        above.setdefault(child, []).append(parent)
    found, queue = {start: 0}, deque([start])
    while queue:
        node = queue.popleft()
        for parent in above.get(node, ()):
            if parent not in found:
                found[parent] = found[node] + 1
                queue.append(parent)
    return found


@dataclass(frozen=True)
class GraphGenerator:
    """An unlimited, seeded source of graph questions; the distribution is described in the module docstring.

    `GraphGenerator(**SMALL_GRAPHS)` is a size for tiny models.

    Args:
        seed: of all draws; another seed gives other questions.
        split: `"train"`, `"validation"` or `"test"`; only graphs of this split are drawn (80, 10 and 10 %).
        num_nodes: entities and concepts of a graph.
        num_edges: sentences of a graph.
        num_entities: the two rivals and others.
        path_lengths: the number of edges of the shortest path to an option, i.e. of steps, is drawn from these; an
            entry that occurs twice is twice as likely.
        depth_gap: by how much the path of one of the options, right or wrong, may be shorter than drawn.
        entities, concepts: names to draw from.

    Raises:
        ValueError: an option out of its range.
    """

    seed: int = 0
    split: str = "train"
    num_nodes: int = 23
    num_edges: int = 36
    num_entities: int = 4
    path_lengths: Sequence[int] = (3, 3, 3, 3, 3, 4, 4, 4, 5, 6)
    depth_gap: int = 0
    entities: Sequence[str] = ENTITIES
    concepts: Sequence[str] = CONCEPTS

    def __post_init__(self) -> None:
        for name in ("path_lengths", "entities", "concepts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}; use one of {', '.join(SPLITS)}")
        if not self.path_lengths or not all(isinstance(n, int) and n >= 1 for n in self.path_lengths):
            raise ValueError(f"path_lengths is {self.path_lengths}; give whole numbers of at least 1")
        if self.depth_gap < 0:
            raise ValueError(f"depth_gap is {self.depth_gap}; use 0 or more")
        self._check_sizes()
        names = (*self.entities, *self.concepts)
        if len(set(names)) != len(names) or not all(isinstance(name, str) and name.isalpha() for name in names):
            raise ValueError("entities and concepts must be different words of letters only; repair the lists")

    def _check_sizes(self) -> None:
        concepts = self.num_nodes - self.num_entities
        if not 2 <= self.num_entities <= len(self.entities):
            raise ValueError(f"num_entities is {self.num_entities}; use 2 to {len(self.entities)} (the names given)")
        needed = 2 * max(self.path_lengths)
        if not needed <= concepts <= len(self.concepts):
            raise ValueError(
                f"num_nodes is {self.num_nodes}, {concepts} of them concepts; with num_entities={self.num_entities} "
                f"and path_lengths={self.path_lengths} use {needed} to {len(self.concepts)} concepts"
            )
        most = sum(range(self.num_entities, self.num_nodes))
        if not concepts <= self.num_edges <= most:
            raise ValueError(f"num_edges is {self.num_edges}; {concepts} concepts need {concepts} to {most} edges")

    def question(self, index: int, taken: Collection[str] = frozenset()) -> GraphQuestion:
        """Question number `index`; it depends on the options and `index` only (and on `taken`: graphs to avoid).

        Raises:
            ValueError: none was found in 2,000 draws.
        """
        rng = Random(f"graph:{self.seed}:{index}")
        length = self.path_lengths[_below(rng, len(self.path_lengths))]
        for _ in range(MAX_DRAWS):
            skeleton = self._skeleton(rng, length)
            for _ in range(NAMINGS if skeleton else 0):
                question = self._named(rng, *skeleton)
                if split_of(question.identity) == self.split and question.identity not in taken:
                    return question
        raise ValueError(
            f"no new graph in {MAX_DRAWS} draws (index {index}, {len(taken)} already taken): num_nodes="
            f"{self.num_nodes}, num_edges={self.num_edges}, path_lengths={self.path_lengths}, depth_gap="
            f"{self.depth_gap}; use shorter paths, more nodes, fewer edges or more names"
        )

    def _skeleton(self, rng: Random, length: int) -> tuple[list[tuple[int, int]], tuple[int, int]] | None:
        gap = _below(rng, min(self.depth_gap, length - 1) + 1)
        lengths = (length, length - gap) if _below(rng, 2) else (length - gap, length)
        return _grow(rng, self.num_nodes, self.num_entities, self.num_edges, lengths)

    def _named(self, rng: Random, numbers: Sequence[tuple[int, int]], pair: tuple[int, int]) -> GraphQuestion:
        names = _sample(rng, self.entities, self.num_entities)
        names += _sample(rng, self.concepts, self.num_nodes - self.num_entities)
        edges = [(names[child], names[parent]) for child, parent in numbers]
        asked = _below(rng, 2)
        path = _shortest_path(rng, edges, names[asked], names[pair[asked]])
        options = [names[node] for node in _sample(rng, pair, 2)]
        entities = tuple(sorted(names[: self.num_entities]))
        return GraphQuestion(tuple(_sample(rng, edges, len(edges))), entities, names[asked], tuple(options), path)


SMALL_GRAPHS: dict[str, object] = {
    "num_nodes": 10,
    "num_edges": 12,
    "num_entities": 2,
    "path_lengths": (2, 3),
    "concepts": CONCEPTS[:12],
    "entities": ENTITIES[:6],
}


def _grow(
    rng: Random, num_nodes: int, num_entities: int, num_edges: int, lengths: tuple[int, int]
) -> tuple[list[tuple[int, int]], tuple[int, int]] | None:
    """Edges and the two options of a graph over numbers, the rivals 0 and 1 first; None when the draw does not fit.

    Nodes are in topological order, entities in front. A chain leads from each rival to its option, every other node
    gets an edge, and the rest of the edges is drawn from all that neither shorten a chain nor lead a rival to the
    other's option.
    """
    concepts = range(num_entities, num_nodes)
    chosen = sorted(_sample(rng, concepts, sum(lengths)))
    sides = _sample(rng, [0] * lengths[0] + [1] * lengths[1], sum(lengths))
    chains = [[side, *(node for node, other in zip(chosen, sides, strict=True) if other == side)] for side in (0, 1)]
    graph = _Growing(num_nodes, chains)
    for entity in range(2, num_entities):
        graph.add(rng, [(entity, node) for node in concepts], 1)
    for node in concepts:
        if node not in chosen:
            graph.add(rng, [(other, node) for other in range(node)], 1)
    graph.add(rng, [(a, b) for b in concepts for a in range(b)], num_edges - len(graph.edges))
    return (list(graph.edges), (chains[0][-1], chains[1][-1])) if graph.is_fair(num_edges) else None


class _Growing:
    """A graph to which edges are added as long as the two chains stay the shortest way to their ends."""

    def __init__(self, num_nodes: int, chains: Sequence[Sequence[int]]) -> None:
        self.chains = chains
        self.edges: dict[tuple[int, int], None] = {}
        self.parents: list[list[int]] = [[] for _ in range(num_nodes)]
        self.children: list[list[int]] = [[] for _ in range(num_nodes)]
        # Distances of nodes from the beginnings of the chains, and to their ends.
        self.from_start = [{chain[0]: 0} for chain in chains]
        self.to_end = [{chain[-1]: 0} for chain in chains]
        for edge in itertools.chain.from_iterable(map(itertools.pairwise, chains)):
            self._insert(*edge)

    def _insert(self, child: int, parent: int) -> None:
        self.edges[child, parent] = None
        self.parents[child].append(parent)
        self.children[parent].append(child)
        for found in self.from_start:
            _shorten(found, self.parents, child, parent)
        for found in self.to_end:
            _shorten(found, self.children, parent, child)

    def add(self, rng: Random, candidates: Sequence[tuple[int, int]], num: int) -> None:
        """Adds up to `num` of the candidates, in random order, as far as they may be added."""
        for edge in _sample(rng, candidates, len(candidates)):
            if num < 1:
                return
            if edge not in self.edges and self._keeps(*edge):
                self._insert(*edge)
                num -= 1

    def _keeps(self, child: int, parent: int) -> bool:
        for side, chain in enumerate(self.chains):
            before = self.from_start[side].get(child)
            if before is None:
                continue
            behind = self.to_end[side].get(parent)
            shorter = behind is not None and before + 1 + behind < len(chain) - 1
            if shorter or parent in self.to_end[1 - side]:
                return False
        return True

    def is_fair(self, num_edges: int) -> bool:
        """All edges were added, and neither rival nor option has more sentences than the other."""
        degree = Counter((place, node) for edge in self.edges for place, node in enumerate(edge))
        pairs = ((place, *(chain[at] for chain in self.chains)) for place, at in ((0, 0), (0, -1), (1, -1)))
        return len(self.edges) == num_edges and all(degree[place, a] == degree[place, b] for place, a, b in pairs)


def _shorten(found: dict[int, int], following: Sequence[Sequence[int]], node: int, target: int) -> None:
    """Updates distances for a new edge from `node` to `target`."""
    if node not in found or found.get(target, len(following)) <= found[node] + 1:
        return
    found[target] = found[node] + 1
    for other in following[target]:
        _shorten(found, following, target, other)


def _shortest_path(rng: Random, edges: Sequence[Edge], start: str, end: str) -> tuple[str, ...]:
    """One of the shortest paths, drawn step by step from the end."""
    depth = distances(edges, start)
    path = [end]
    while path[-1] != start:
        before = [
            child for child, parent in edges if parent == path[-1] and depth.get(child, -1) == depth[path[-1]] - 1
        ]
        path.append(before[_below(rng, len(before))])
    return tuple(path[::-1])


def _below(rng: Random, num: int) -> int:
    """A number from 0 to `num - 1`; by `rng.random()` only, whose sequence Python keeps between versions."""
    return int(rng.random() * num)


def _sample(rng: Random, values: Sequence, num: int) -> list:
    """`num` of the values, in random order."""
    pool = list(values)
    for place in range(num):
        other = place + _below(rng, len(pool) - place)
        pool[place], pool[other] = pool[other], pool[place]
    return pool[:num]
