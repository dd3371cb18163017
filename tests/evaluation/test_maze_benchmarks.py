"""Mazes as benchmarks: what is read, how it is asked, plans by simulation, gold replies as training writes them."""

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.maze_benchmarks import CELL_PIXELS, NUM_MAZES, SEED
from evaluation.benchmarks.registry import benchmark
from evaluation.runner import Prediction
from modeling_latent import load_latent_model
from tests.evaluation.choice_files import MAP, write_vsp
from tests.tiny import tiny_processor
from trainers.data.llava_text import record_messages
from trainers.data.lvr_text import region_messages
from trainers.data.maze_planning import Maze
from trainers.data.mazes import maze_record, render_maze
from trainers.data.records import Record, RecordError, RecordShareError, open_image
from trainers.data.staged_formats import STAGED_FORMATS

BASE = Path(__file__).resolve().parents[2] / "hub_configs/maze-tiny/base"
ROWS = ("@_#", "#__", "__*")  # the only plans of four moves: R D D R and R D R D


def said(text: str) -> Prediction:
    return Prediction("0", text, text, 0, 1, ())


def record() -> Record:
    return maze_record(Maze.from_rows(ROWS))


def write_maps(folder: Path, *maps: tuple[int, int, tuple[str, ...]]) -> Path:
    """Maps with pictures as published, 64 pixels a cell."""
    for level, number, rows in maps:
        maze = Maze.from_rows(rows)
        for name in ("table", "img"):
            (folder / f"level{level}" / name).mkdir(parents=True, exist_ok=True)
        (folder / f"level{level}/table/{number}.txt").write_text(maze.to_table())
        render_maze(maze, 64).save(folder / f"level{level}/img/{number}.png")
    return folder


# Reading


def test_generated_mazes_are_those_of_the_seed() -> None:
    mazes = benchmark("mazes")
    found = mazes.read(max_samples=3)
    assert [each["id"] for each in found] == [f"maze-test-{SEED}-{i}" for i in range(3)]
    assert found == mazes.read(num=3, seed=SEED) and found[:2] == mazes.read(num=9, max_samples=2)
    assert len(mazes.read()) == NUM_MAZES == 200
    small = mazes.read(num=4, seed=7, sizes=[4])
    assert {mazes.group(each) for each in small} == {"4x4"} and small[0]["id"] == "maze-test-7-0"
    assert mazes.sources == () and benchmark("maze") is mazes


def test_published_maps_have_pictures_of_the_trained_size(tmp_path: Path) -> None:
    vsp = benchmark("vsp")
    folder = write_maps(tmp_path, (3, 2, ROWS), (3, 10, ROWS[::-1]), (4, 0, ("@___", "____", "____", "___*")))
    found = vsp.read(folder)
    assert [each["meta"]["source"] for each in found] == [
        "level3/table/2.txt", "level3/table/10.txt", "level4/table/0.txt",
    ]  # fmt: skip
    assert [vsp.group(each) for each in found] == ["3x3", "3x3", "4x4"]
    assert [each["images"][0].width for each in found] == [3 * CELL_PIXELS, 3 * CELL_PIXELS, 4 * CELL_PIXELS]
    assert vsp.read(folder, cell_pixels=64)[0]["images"][0].width == 192
    assert [each["meta"]["level"] for each in vsp.read(folder, levels=[4])] == [4]
    assert len(vsp.read(folder, max_samples=2)) == 2


def test_lines_of_published_mazes_say_what_is_asked(tmp_path: Path) -> None:
    """`test_direct.jsonl`: the map `[[1, 0, -1], [0, 0, 0], [-1, 0, 2]]`, the player at the top left."""
    vsp, folder = benchmark("vsp"), write_vsp(tmp_path / "lines", [MAP, MAP])
    found = vsp.read(folder)
    assert found == vsp.read(folder / "test_direct.jsonl") and len(found) == 2
    assert [each["question"] for each in found] == ["Go.", "Go."] and vsp.group(found[0]) == "3x3"
    assert found[0]["meta"]["maze"] == "@_#\n___\n#_*"
    protocol = vsp.protocol("lavit")
    assert protocol.prompt(tiny_processor(), found[0]).count("Go.") == 1
    assert protocol.score(found[0], said("R D D R")).correct and not protocol.score(found[0], said("R R D D")).correct
    assert sorted(vsp.gold(found[0]).split()) == ["D", "D", "R", "R"]
    assert protocol.score(found[0], said(vsp.gold(found[0]))).correct
    assert len(vsp.read(folder, max_samples=1)) == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mazes", {"source": "x"}, "data_root='x': these mazes are generated; for published ones take 'vsp'"),
        ("mazes", {"image_folder": "x"}, "image_folder='x': these mazes are generated"),
        ("mazes", {"num": 0}, "num is 0"),
        ("mazes", {"max_samples": 0}, "max_samples=0 must be at least 1"),
        ("mazes", {"tasks": ["x"]}, "mazes has no tasks"),
        ("vsp", {}, "vsp needs data_root.*level3/table.*test_direct.jsonl"),
        ("vsp", {"source": "gone"}, "gone"),
        ("vsp", {"source": ".", "levels": [9]}, "no level9/table"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    if options.get("source") == ".":
        options = {**options, "source": write_maps(tmp_path, (3, 0, ROWS))}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        benchmark(name).read(**options)


def test_wrong_files(tmp_path: Path) -> None:
    vsp, folder = benchmark("vsp"), write_maps(tmp_path / "maps", (3, 0, ROWS))
    with pytest.raises(ValueError, match="image_folder='x': the pictures of .* are beside its maps"):
        vsp.read(folder, image_folder="x")
    (folder / "level3/table/0.txt").write_text("@_#\n#__\n__+\n")
    with pytest.raises(ValueError, match=r"0.txt, row 3, column 3: unknown symbol '\+'"):
        vsp.read(folder)
    lines = write_vsp(tmp_path / "lines", [MAP, [[1, 2], [3, 4]]])
    with pytest.raises(RecordShareError, match="map_desc is no maze"):
        vsp.read(lines)
    with pytest.raises(ValueError, match=r"levels=\[3\]: .* holds lines of mazes"):
        vsp.read(lines, levels=[3])
    row = json.loads((lines / "test_direct.jsonl").read_text().splitlines()[0])
    del row["map_desc"]
    (lines / "test_direct.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(RecordError, match=r"lacks the columns \['map_desc'\]"):
        vsp.read(lines)


# Asking and scoring


@pytest.mark.parametrize("name", ["default", "laser", "lvr", "lavit", "ivtlr"])
def test_the_prompt_is_that_of_training(name: str) -> None:
    assert benchmark("mazes").protocol(name).prompt(tiny_processor(), record()) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>Find a path from the elf to the gift without falling into a hole. "
        "Answer with the moves L, R, U, D.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert benchmark("mazes").protocol(name).ask(record()).startswith("Find a path")


@pytest.mark.parametrize(
    ("text", "right", "answer"),
    [
        ("<answer>R D D R</answer>", True, "R D D R"),
        ("<answer>R D R D</answer>", True, "R D R D"),  # not the gold plan, and a plan
        ("<answer>U L R D U D D R</answer>", True, "U L R D U D D R"),  # walls stop a move
        ("<answer>R R D D</answer>", False, "R R D D"),  # into the hole at the top right
        ("<answer>R D D</answer>", False, "R D D"),
        ("Move right to B1. Move down to B2.\nTherefore, the answer is R D D R", True, "R D D R"),
        (" R D D R", True, "R D D R"),
        ("I do not know.", False, None),
        ("", False, None),
    ],
)
def test_plans_are_simulated(text: str, right: bool, answer: str | None) -> None:
    for name, protocol in benchmark("mazes").protocols.items():
        assert tuple(protocol.score(record(), said(text))) == (right, answer), name


def test_gold_replies_are_what_training_writes() -> None:
    """Behind the latents: of LASER, LVR and IVT-LR against the texts that their collators encode; of LaViT a blank
    stands between learned tokens and answer."""
    mazes, made = benchmark("mazes"), record()
    gold = mazes.gold(made)
    assert gold == made["answer"] and gold in ("R D D R", "R D R D") and mazes.answers(made) is None
    replies = {name: "".join(mazes.protocol(name).gold_reply(gold)) for name in mazes.protocols}
    laser, lvr = record_messages(made)[-1]["content"], region_messages(made, join_regions=True)[-1]["content"]
    assert laser == f"<laser>{replies['laser']}" and lvr == f"<lvr>{replies['lvr']}"
    assert replies["default"] == f"<answer>{gold}</answer>" and replies["lavit"] == f" {gold}"
    assert replies["ivtlr"] == STAGED_FORMATS["plain"].answer_prefix + gold
    for name, protocol in mazes.protocols.items():
        assert protocol.gold_reply(gold).content == gold and protocol.score(made, said(replies[name])).correct


def test_another_rule_among_equally_short_plans_has_another_gold() -> None:
    plans = {benchmark("mazes").gold(maze_record(Maze.from_rows(ROWS), tie_seed=seed)) for seed in range(8)}
    assert plans == {"R D D R", "R D R D"}


def test_a_cell_is_an_image_token() -> None:
    """Of the base that the recipes of mazes train."""
    _, processor = load_latent_model(BASE, method="laser")
    (made,) = benchmark("mazes").read(num=1, sizes=[4])
    prompt = benchmark("mazes").protocol().prompt(processor, made)
    inputs = processor(text=[prompt], images=[open_image(image, made) for image in made["images"]])
    assert inputs["input_ids"][0].count(processor.image_token_id) == 16
