"""Training data of the tests in this folder."""

from typing import Any

from datasets import Dataset

from tests.tiny import tiny_images
from tests.trainers.lavit_parts import lavit_records
from trainers.data.graphs import SMALL_GRAPHS, graph_dataset
from trainers.data.mazes import maze_dataset, maze_stream
from trainers.data.records import make_record, records_to_dataset

STREAM_LENGTH = 7


def text_records(n: int) -> list[dict[str, Any]]:
    """Records without an image or a box, with chains of one to three concepts."""
    chains = [["x"], ["map", "hole"], ["Street", "dog", "dog"]]
    return [make_record(f"t{i}", "What is it?" * (i + 1), "No", chain=chains[i % 3], boxes=[]) for i in range(n)]


def train_data(kind: str) -> Any:
    """Training data; the examples differ in length, images and number of concepts."""
    if kind == "stream":
        return maze_stream(seed=1, num=STREAM_LENGTH, num_shards=2, sizes=(3, 4))
    if kind == "teacher":
        records = [{**each, "question": each["question"] * (i % 3 + 1)} for i, each in enumerate(lavit_records(12))]
        return records_to_dataset(records)
    if kind == "graphs":
        return graph_dataset(12, seed=3, **SMALL_GRAPHS)
    mazes = maze_dataset(12, seed=3, sizes=(3, 4, 5))
    if kind == "mazes":
        return mazes
    texts = records_to_dataset(text_records(4))
    if kind == "text beside images":  # the second of two processes never sees an image
        rows = [row for pair in zip(mazes, texts, strict=False) for row in pair]
    else:
        rows = [mazes[0], texts[0], mazes[1], mazes[2], texts[1], mazes[3], mazes[4], texts[2]]
    return type(mazes).from_list(rows, features=mazes.features)


def prompt_data(kind: str) -> Dataset:
    """Questions for GRPO, of different length and with images of different size."""
    images = tiny_images(6)
    if kind == "text beside images":  # the second of two processes never sees an image
        images[1::2] = [None] * 3
    questions = ["What is it?" + " Look, and say yes or no." * (i % 3) for i in range(6)]
    pairs = zip(questions, images, strict=True)
    return records_to_dataset(
        [make_record(f"g{i}", question, "No", [image] if image else []) for i, (question, image) in enumerate(pairs)]
    )
