"""Tests of the maze task: the generator and its splits, records, tables and streams, and the published mazes.

The published mazes are in LATENT_VSP_DIR, by default `../shared/data/vsp_maze` beside the project.
"""

import itertools
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from trainers.data import maze_generation, mazes
from trainers.data.maze_generation import MazeGenerator, split_of
from trainers.data.maze_planning import Maze, chance_level, distances_to_goal, is_valid_plan, score_plan, shortest_plan
from trainers.data.maze_rendering import render_maze, render_steps
from trainers.data.mazes import (
    maze_dataset,
    maze_of_record,
    maze_record,
    maze_stream,
    published_identities,
    read_published_mazes,
)
from trainers.data.records import RECORD_FIELDS, record_features, record_from_row, validate_record

MAZE = Maze.from_rows(["@_#", "__*", "#__"])


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def same_rows(left: dict, right: dict) -> bool:
    """Equality of two rows or records, pictures by their pixels."""
    pictures = ("images", "step_images")
    plain = all(left[name] == right[name] for name in RECORD_FIELDS if name not in pictures)
    return plain and all(
        [image.tobytes() for image in left[name] or []] == [image.tobytes() for image in right[name] or []]
        for name in pictures
    )


# The generator


def test_the_first_mazes_of_seed_0_never_change() -> None:
    """Published numbers rest on these draws; a change here is a change of every data set."""
    pinned = {
        "train": ["91c32ba934f13945", "f8100f861afd3466", "200a2ef3f1399eae"],
        "validation": ["3413b4daf463a842", "cf75812c1b5cd5b1", "6835d51eb8b3a2f0"],
        "test": ["8a51fac71c2dcaca", "264b0a4feae87013", "135b56df21680f9f"],
    }
    drawn = {split: [MazeGenerator(split=split).maze(index).identity for index in range(3)] for split in pinned}
    assert drawn == pinned


def test_a_maze_depends_on_seed_and_index_only() -> None:
    generator = MazeGenerator(seed=4)
    forward = [generator.maze(index) for index in range(30)]
    assert [MazeGenerator(seed=4).maze(index) for index in reversed(range(30))] == forward[::-1]
    assert pickle.loads(pickle.dumps(generator)).maze(7) == forward[7]
    assert len({maze.identity for maze in forward}) > 25
    assert sum(MazeGenerator(seed=5).maze(index) == forward[index] for index in range(30)) < 3


def test_mazes_are_solvable_and_as_asked() -> None:
    for sizes, min_moves in [((3,), 1), ((4, 6), 3), ((8,), 9)]:
        generator = MazeGenerator(sizes=sizes, min_moves=min_moves, hole_probability=0.3)
        drawn = [generator.maze(index) for index in range(60)]
        assert {maze.size for maze in drawn} == set(sizes)
        for maze in drawn:
            plan = shortest_plan(maze)
            assert len(plan) >= min_moves
            assert is_valid_plan(maze, plan, strict=True)
            assert maze.rows() == tuple(maze.to_text().split("\n"))
    assert not any(MazeGenerator(hole_probability=0.0).maze(index).holes for index in range(20))


def test_no_map_is_in_two_splits() -> None:
    drawn = {
        split: {
            MazeGenerator(seed=seed, split=split, sizes=(2, 3)).maze(i).identity for seed in (0, 1) for i in range(700)
        }
        for split in ("train", "validation", "test")
    }
    assert all(split_of(identity) == split for split, identities in drawn.items() for identity in identities)
    for one, other in itertools.combinations(drawn.values(), 2):
        assert not one & other
    assert min(map(len, drawn.values())) > 100


def test_splits_have_their_shares() -> None:
    """Of all 9,216 maps of size 3, counted one by one."""
    cells = list(itertools.product(range(3), repeat=2))
    counts = dict.fromkeys(("train", "validation", "test"), 0)
    for start, goal in itertools.permutations(cells, 2):
        free = [cell for cell in cells if cell not in (start, goal)]
        for chosen in itertools.product([False, True], repeat=7):
            holes = frozenset(itertools.compress(free, chosen))
            counts[split_of(Maze(3, start, goal, holes).identity)] += 1
    assert sum(counts.values()) == 9216
    for split, share in [("train", 0.8), ("validation", 0.1), ("test", 0.1)]:
        assert counts[split] / 9216 == pytest.approx(share, abs=4 * (share * (1 - share) / 9216) ** 0.5)


def test_draws_are_uniform_where_they_should_be() -> None:
    """Start and goal over all pairs of cells and holes with the probability given, where every map is solvable."""
    generator = MazeGenerator(sizes=(2,), hole_probability=0.0, split="train")
    allowed = [
        maze
        for start, goal in itertools.permutations(itertools.product(range(2), repeat=2), 2)
        if split_of((maze := Maze(2, start, goal)).identity) == "train"
    ]
    drawn = [generator.maze(index) for index in range(3000)]
    for maze in allowed:
        share = 1 / len(allowed)
        assert drawn.count(maze) / 3000 == pytest.approx(share, abs=4.5 * (share * (1 - share) / 3000) ** 0.5)
    assert len(allowed) > 5


def test_excluded_maps_are_never_drawn() -> None:
    first = [MazeGenerator(sizes=(3,)).maze(index) for index in range(50)]
    exclude = {maze.identity for maze in first[:20]}
    second = [MazeGenerator(sizes=(3,), exclude=exclude).maze(index) for index in range(50)]
    assert not exclude & {maze.identity for maze in second}
    for before, after in zip(first, second, strict=True):
        assert before == after or before.identity in exclude


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split is 'dev'; use one of train, validation, test"),
        ({"sizes": ()}, r"sizes is \(\)"),
        ({"sizes": (3, 1)}, r"sizes is \(3, 1\); give whole numbers from 2 to 26"),
        ({"hole_probability": 1.0}, "hole_probability is 1.0"),
        ({"min_moves": 0}, "min_moves is 0"),
        ({"exclude": "91c32ba934f13945"}, "exclude is the string"),
        ({"exclude": [MAZE]}, "give the 16-digit identities"),
    ],
)
def test_wrong_options_are_refused_everywhere(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MazeGenerator(**options)
    with pytest.raises(ValueError, match=message):
        maze_dataset(1, **options)
    with pytest.raises(ValueError, match=message):
        maze_stream(**options)


def test_running_out_of_maps_is_an_error_with_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maze_generation, "MAX_DRAWS", 500)
    with pytest.raises(ValueError, match=r"no new maze of size 2 in 500 draws .*unique=False"):
        maze_dataset(40, sizes=(2,), split="test")
    assert len(maze_dataset(40, sizes=(2,), split="test", unique=False)) == 40
    with pytest.raises(ValueError, match="no new maze of size 3 .*min_moves=9"):
        MazeGenerator(sizes=(3,), min_moves=9).maze(0)


# Records


def test_a_record_by_hand() -> None:
    record = maze_record(MAZE, tie_seed=0, attention="one_hot", step_images=True)
    validate_record(record, "maze", 0)
    assert record["answer"] == "R D R"
    assert record["chain"] == ["A1", "B1", "B2", "C2"]
    assert record["steps"] == ["Move right to B1.", "Move down to B2.", "Move right to C2."]
    third = pytest.approx([1 / 3, 0, 2 / 3, 1 / 3])
    assert (record["boxes"][1]["image"], record["boxes"][1]["xyxy"]) == (0, third)
    assert record["teacher"] == {
        "attention": [[0, 1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0, 0]],
        "grid": [3, 3],
        "image": 0,
    }
    assert record["meta"] == {
        "maze": "@_#\n__*\n#__",
        "size": 3,
        "identity": MAZE.identity,
        "tie_seed": 0,
        "path_cells": [[0, 0], [0, 1], [1, 1], [1, 2]],
    }
    assert np.array_equal(pixels(record["images"][0]), pixels(render_maze(MAZE, 28)))
    assert [step.tobytes() for step in record["step_images"]] == [
        step.tobytes() for step in render_steps(MAZE, list("RDR"), 28)
    ]
    assert record["id"] == f"maze-{MAZE.identity}"
    assert record["choices"] is record["messages"] is None
    json.dumps(record["meta"])


def test_the_annotations_of_a_record_agree() -> None:
    """Each is turned back into cells by a rule of its own."""
    for index in range(60):
        maze = MazeGenerator(seed=3).maze(index)
        record = maze_record(maze, attention="remaining", tie_seed=index, cell_pixels=8)
        validate_record(record, "maze", index)
        size, cells = maze.size, [tuple(cell) for cell in record["meta"]["path_cells"]]
        assert score_plan(maze, f"<answer>{record['answer']}</answer>")
        assert (cells[0], cells[-1]) == (maze.start, maze.goal)
        assert len(cells) - 1 == len(record["answer"].split()) == distances_to_goal(maze)[maze.start]
        assert not maze.holes & set(cells)
        assert [(int(name[1:]) - 1, "ABCDEF".index(name[0])) for name in record["chain"]] == cells
        words = {"U": "up", "D": "down", "L": "left", "R": "right"}
        moves = record["answer"].split()
        assert record["steps"] == [
            f"Move {words[m]} to {name}." for m, name in zip(moves, record["chain"][1:], strict=True)
        ]
        for cell, box in zip(cells, record["boxes"], strict=True):
            x0, y0, x1, y1 = box["xyxy"]
            assert (int((y0 + y1) / 2 * size), int((x0 + x1) / 2 * size)) == cell
            assert (x1 - x0, y1 - y0) == pytest.approx((1 / size, 1 / size))
        for step, row in enumerate(record["teacher"]["attention"], start=1):
            assert sum(row) == pytest.approx(1)
            assert {divmod(place, size) for place, weight in enumerate(row) if weight > 0} == set(cells[step:])
            assert len(row) == size * size
        assert len(record["teacher"]["attention"]) == len(moves)


def test_annotations_that_cost_are_made_only_if_asked_for() -> None:
    record = maze_record(MAZE)
    assert record["step_images"] is record["teacher"] is None
    with pytest.raises(ValueError, match="attention is 'soft'; use 'one_hot', 'remaining' or None"):
        maze_record(MAZE, attention="soft")


def test_question_and_pictures_can_be_replaced() -> None:
    image = Image.new("RGB", (90, 90))
    record = maze_record(MAZE, image=image, question="Which way?", id="one", meta={"split": "test"})
    assert (record["images"], record["question"], record["id"]) == ([image], "Which way?", "one")
    assert record["meta"]["split"] == "test"


# Tables and streams


def test_a_table_holds_the_records() -> None:
    table = maze_dataset(12, seed=2, step_images=True, attention="one_hot", cell_pixels=28)
    assert table.features == record_features()
    for index, row in enumerate(table):
        maze = MazeGenerator(seed=2).maze(index)
        assert maze_of_record(row) == maze
        record = record_from_row(row)
        validate_record(record, "table", index)
        origin = {"ds_name": "generated mazes", "split": "train", "seed": 2, "row": index}
        options = {"step_images": True, "attention": "one_hot", "id": f"maze-train-2-{index}", "meta": origin}
        assert same_rows(record, maze_record(maze, **options))
        assert maze_of_record(record) == maze


def test_a_longer_table_begins_with_the_shorter_one() -> None:
    for split in ("train", "test"):
        short, long = maze_dataset(5, seed=1, split=split), maze_dataset(9, seed=1, split=split)
        assert all(same_rows(short[index], long[index]) for index in range(5))
        assert {json.loads(meta)["split"] for meta in long["meta"]} == {split}
        assert len(set(long["id"])) == 9


def test_evaluation_tables_hold_a_map_once() -> None:
    for split in ("validation", "test"):
        identities = [json.loads(meta)["identity"] for meta in maze_dataset(120, sizes=(3,), split=split)["meta"]]
        assert len(set(identities)) == 120
    train = [json.loads(meta)["identity"] for meta in maze_dataset(400, sizes=(3,), cell_pixels=1)["meta"]]
    assert len(set(train)) < 400
    once = maze_dataset(400, sizes=(3,), cell_pixels=1, unique=True)
    assert len({json.loads(meta)["identity"] for meta in once["meta"]}) == 400


def test_a_stream_is_the_table_without_end() -> None:
    options = {"seed": 6, "sizes": (3, 5), "attention": "remaining", "step_images": True}
    table, stream = maze_dataset(10, **options), maze_stream(**options)
    assert stream.features == record_features()
    assert stream.column_names == list(RECORD_FIELDS)
    streamed = list(itertools.islice(stream, 10))
    assert all(same_rows(left, right) for left, right in zip(table, streamed, strict=True))
    assert len(list(maze_stream(num=7))) == 7


def test_a_stream_resumes_where_it_stopped_without_drawing_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(itertools.islice(maze_stream(seed=8), 9))
    stream = maze_stream(seed=8)
    iterator = iter(stream)
    for _ in range(5):
        next(iterator)
    state = pickle.loads(pickle.dumps(stream.state_dict()))
    resumed = maze_stream(seed=8)
    resumed.load_state_dict(state)
    drawn = []
    draw = MazeGenerator.maze
    monkeypatch.setattr(MazeGenerator, "maze", lambda self, index: drawn.append(index) or draw(self, index))
    rest = list(itertools.islice(resumed, 4))
    assert all(same_rows(left, right) for left, right in zip(rest, expected[5:], strict=True))
    assert drawn[:4] == [5, 6, 7, 8]


def test_shards_share_the_mazes_out() -> None:
    whole = [row["id"] for row in maze_stream(num=11)]
    stream = maze_stream(num=11, num_shards=4)
    assert stream.num_shards == 4
    shards = [[row["id"] for row in stream.shard(num_shards=4, index=shard)] for shard in range(4)]
    assert shards == [whole[shard::4] for shard in range(4)]


def test_loader_workers_share_the_mazes_out() -> None:
    loader = DataLoader(maze_stream(num=10, num_shards=2), batch_size=None, num_workers=2)
    rows = list(loader)
    expected = {row["id"]: row for row in maze_stream(num=10)}
    assert sorted(row["id"] for row in rows) == sorted(expected)
    assert all(same_rows(row, expected[row["id"]]) for row in rows)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num": 0}, ValueError, "num is 0"),
        ({"num": 3, "num_shards": 4}, ValueError, "num_shards is 4 for 3 examples"),
        ({"num_shards": 0}, ValueError, "num_shards is 0 for endless examples"),
        ({"attention": "soft"}, ValueError, "attention is 'soft'"),
        ({"cell_pixel": 28}, TypeError, "cell_pixel"),
    ],
)
def test_a_stream_refuses_wrong_options_when_it_is_made(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        maze_stream(**options)


def test_a_table_refuses_wrong_options() -> None:
    with pytest.raises(ValueError, match="num is 0"):
        maze_dataset(0)
    with pytest.raises(TypeError, match="cell_pixel"):
        maze_dataset(1, cell_pixel=28)


# The published mazes


@pytest.fixture(scope="module")
def vsp() -> Path:
    default = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "vsp_maze"
    folder = Path(os.environ.get("LATENT_VSP_DIR", default))
    if not folder.is_dir():
        pytest.skip("the published mazes are absent: set LATENT_VSP_DIR to their folder")
    return folder


def test_published_pictures_are_drawn_pixel_for_pixel(vsp: Path) -> None:
    from_file, drawn = read_published_mazes(vsp), read_published_mazes(vsp, from_file=False)
    assert len(from_file) == len(drawn) == len(list(vsp.glob("level*/img/*.png"))) > 0
    for left, right in zip(from_file, drawn, strict=True):
        assert np.array_equal(pixels(left["images"][0]), pixels(right["images"][0])), left["meta"]["source"]
        assert same_rows(left, right)


def test_published_pictures_in_small_are_the_drawn_ones(vsp: Path) -> None:
    from_file = read_published_mazes(vsp, levels=[3, 6], cell_pixels=28)
    drawn = read_published_mazes(vsp, levels=[3, 6], cell_pixels=28, from_file=False)
    assert {record["images"][0].size for record in from_file} == {(84, 84), (168, 168)}
    assert all(same_rows(left, right) for left, right in zip(from_file, drawn, strict=True))


def test_published_maps_survive_the_round_trip(vsp: Path) -> None:
    for path in sorted(vsp.glob("level*/table/*.txt")):
        text = path.read_text(encoding="utf-8")
        assert Maze.from_file(path).to_table() == text
        symbols = re.findall(r"(?<= )[_#@*](?= )", text)
        assert "".join(Maze.from_file(path).rows()) == "".join(symbols)


def test_published_answers_solve_the_published_mazes(vsp: Path) -> None:
    records = read_published_mazes(vsp, from_file=False, cell_pixels=1, attention="one_hot")
    for record in records:
        validate_record(record, record["meta"]["source"], None)
        maze = maze_of_record(record)
        assert score_plan(maze, f"<answer>{record['answer']}</answer>"), record["id"]
        assert is_valid_plan(maze, record["answer"].split(), strict=True)
        assert record["id"] == f"vsp-maze-level{maze.size}-{record['meta']['number']}"
        assert record["meta"]["source"] == f"level{maze.size}/table/{record['meta']['number']}.txt"
    order = [(record["meta"]["level"], record["meta"]["number"]) for record in records]
    assert order == sorted(set(order))
    # A plan for another maze of the same size rarely solves a maze: the score tells mazes apart.
    shifted = [record["answer"] for record in records[1:] + records[:1]]
    wrong = [not score_plan(maze_of_record(record), plan) for record, plan in zip(records, shifted, strict=True)]
    assert sum(wrong) > 0.7 * len(records)
    assert 0.02 < chance_level(map(maze_of_record, records)) < 0.2


def test_parity_and_levels_select(vsp: Path) -> None:
    options = {"from_file": False, "cell_pixels": 1}
    everything = read_published_mazes(vsp, **options)
    even, odd = (read_published_mazes(vsp, parity=parity, **options) for parity in ("even", "odd"))
    assert {record["meta"]["number"] % 2 for record in even} == {0}
    assert {record["meta"]["number"] % 2 for record in odd} <= {1}
    assert len(even) + len(odd) == len(everything)
    levels = read_published_mazes(vsp, levels=[4, 5], parity="even", **options)
    assert [record for record in even if record["meta"]["level"] in (4, 5)][0]["id"] == levels[0]["id"]
    assert {record["meta"]["level"] for record in levels} == {4, 5}


def test_published_maps_can_be_kept_out_of_training(vsp: Path) -> None:
    published = published_identities(vsp)
    assert published == {maze_of_record(r).identity for r in read_published_mazes(vsp, from_file=False, cell_pixels=1)}
    plain = maze_dataset(1500, sizes=(3,), cell_pixels=1)
    without = maze_dataset(1500, sizes=(3,), cell_pixels=1, exclude=published)
    assert {json.loads(meta)["identity"] for meta in plain["meta"]} & published
    assert not {json.loads(meta)["identity"] for meta in without["meta"]} & published


def test_generated_mazes_are_distributed_as_the_published_ones(vsp: Path) -> None:
    """Means of holes and of moves by size, within three standard errors of the published mean."""
    for size in (3, 4, 5, 6):
        published = [maze_of_record(r) for r in read_published_mazes(vsp, [size], from_file=False, cell_pixels=1)]
        generator = MazeGenerator(sizes=(size,))
        generated = [generator.maze(index) for index in range(2000)]
        for measure in (lambda maze: len(maze.holes), lambda maze: len(shortest_plan(maze))):
            there, here = [measure(maze) for maze in published], [measure(maze) for maze in generated]
            error = np.std(here) / len(there) ** 0.5
            assert abs(np.mean(there) - np.mean(here)) < 3 * error, (size, np.mean(there), np.mean(here))


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    """Two published-style mazes, made here."""
    for size, number, maze in [(3, 4, MAZE), (3, 5, Maze(3, (0, 0), (2, 2)))]:
        for kind in ("table", "img"):
            (tmp_path / f"level{size}" / kind).mkdir(parents=True, exist_ok=True)
        (tmp_path / f"level{size}" / "table" / f"{number}.txt").write_text(maze.to_table(), encoding="utf-8")
        render_maze(maze).save(tmp_path / f"level{size}" / "img" / f"{number}.png")
    return tmp_path


def test_a_folder_of_ones_own_is_read(small_folder: Path) -> None:
    assert [maze_of_record(record).start for record in read_published_mazes(small_folder)] == [(0, 0), (0, 0)]
    assert [record["meta"]["number"] for record in read_published_mazes(str(small_folder), parity="odd")] == [5]
    assert read_published_mazes(small_folder, question="Q")[0]["question"] == "Q"
    assert published_identities(small_folder) == {MAZE.identity, Maze(3, (0, 0), (2, 2)).identity}


def test_a_broken_folder_is_refused_by_name(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(FileNotFoundError, match=r"no level<number>/table/<number>.txt in .*nowhere"):
        read_published_mazes(small_folder / "nowhere")
    with pytest.raises(FileNotFoundError, match="no level6/table"):
        read_published_mazes(small_folder, levels=[3, 6])
    with pytest.raises(ValueError, match="parity is 'Even'"):
        read_published_mazes(small_folder, parity="Even")

    def broken(change: str) -> Path:
        folder = tmp_path_factory.mktemp("broken") / "mazes"
        shutil.copytree(small_folder, folder)
        level = folder / "level3"
        if change == "picture":
            (level / "img" / "5.png").unlink()
        elif change == "size":
            Image.new("RGB", (192, 128)).save(level / "img" / "5.png")
        elif change == "level":
            (level / "table" / "5.txt").write_text(Maze(4, (0, 0), (2, 2)).to_table(), encoding="utf-8")
        elif change == "symbol":
            (level / "table" / "5.txt").write_text(MAZE.to_table().replace("#", "H"), encoding="utf-8")
        else:
            (level / "table" / "notes.txt").write_text("hello", encoding="utf-8")
        return folder

    for change, error, message in [
        ("picture", FileNotFoundError, r"img/5\.png: the picture of this map is missing"),
        ("size", ValueError, r"img/5\.png: 192x128 pixels; a 3x3 maze has 192x192"),
        ("level", ValueError, r"table/5\.txt: the maze is 4x4, but level 3 has 3x3"),
        ("symbol", ValueError, r"table/5\.txt, row 1, column 3: unknown symbol 'H'"),
        ("name", ValueError, r"notes\.txt: is not named level<number>/table/<number>\.txt"),
    ]:
        with pytest.raises(error, match=message):
            read_published_mazes(broken(change))


def test_everything_of_the_task_is_at_the_front_door() -> None:
    assert set(mazes.__all__) >= {"Maze", "MazeGenerator", "draw_plan", "is_valid_plan", "parse_plan", "score_plan"}
    assert all(hasattr(mazes, name) for name in mazes.__all__)
