"""The maze benchmark (spatial planning of VSP, arXiv 2407.01863): accuracy by simulation, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainers.data.mazes import chance_level, maze_of_record, score_plan
from trainers.data.records import Record

from ..conditions import accuracy_text
from ..runner import Prediction, predict


@dataclass(frozen=True)
class MazeReport:
    """Result on a set of mazes.

    Args:
        name: of the condition.
        correct: per maze, in order.
        sizes: side of each maze.
        predictions: what was written.
        chance: expected accuracy of random plans of the shortest length.
    """

    name: str
    correct: list[bool]
    sizes: list[int]
    predictions: list[Prediction]
    chance: float

    @property
    def accuracy(self) -> float:
        """Share of mazes solved."""
        return sum(self.correct) / len(self.correct)

    def by_size(self) -> dict[int, float]:
        """Accuracy for each side length."""
        pairs = list(zip(self.sizes, self.correct, strict=True))
        return {n: sum(c for s, c in pairs if s == n) / sum(s == n for s, _ in pairs) for n in sorted(set(self.sizes))}

    def line(self) -> str:
        """One line: accuracy with its 95 % Wilson interval, by size, latent steps and generated positions."""
        sizes = "  ".join(f"{n}x{n} {100 * share:5.1f}" for n, share in self.by_size().items())
        steps = sum(p.num_latent_steps for p in self.predictions) / len(self.predictions)
        tokens = sum(p.num_tokens for p in self.predictions) / len(self.predictions)
        return (
            f"{self.name:<34} {accuracy_text(self.correct)}"
            f"  n={len(self.correct)}  {sizes}  latent steps {steps:.1f}  positions {tokens:.1f}"
        )

    def summary(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "accuracy": self.accuracy,
            "by_size": self.by_size(),
            "chance": self.chance,
            "predictions": [vars(p) | {"correct": c} for p, c in zip(self.predictions, self.correct, strict=True)],
        }


def evaluate_mazes(
    name: str, model: Any, processor: Any, records: Sequence[Record], batch_size: int = 50, **options: Any
) -> MazeReport:
    """Generate plans and score them by simulation.

    Args:
        name: of the condition, for the report.
        model, processor: a latent model.
        records: from `maze_dataset` or `read_published_mazes`.
        batch_size: prompts per call of `generate`.
        options: for [`predict`], e.g. `latent_strategy="off"`.
    """
    return _report(name, records, predict(model, processor, records, batch_size=batch_size, **options))


def _report(name: str, records: Sequence[Record], predictions: list[Prediction]) -> MazeReport:
    mazes = [maze_of_record(record) for record in records]
    correct = [score_plan(maze, prediction.text) for maze, prediction in zip(mazes, predictions, strict=True)]
    return MazeReport(name, correct, [maze.size for maze in mazes], predictions, chance_level(mazes))
