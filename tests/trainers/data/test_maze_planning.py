"""Tests of maze planning: text forms, shortest plans, simulation, scoring and chance level against brute force."""

import itertools
import random

import pytest

from trainers.data.maze_planning import (
    MOVES,
    Maze,
    cell_name,
    chance_level,
    distances_to_goal,
    is_valid_plan,
    move_preference,
    parse_plan,
    random_plan_success,
    score_plan,
    shortest_plan,
    simulate_plan,
)

TABLE = """| | Col 1 | Col 2 | Col 3 |
| Row 1 | _ | _ | # |
| Row 2 | * | @ | _ |
| Row 3 | _ | _ | # |
"""
ROWS = ("__#", "*@_", "__#")


def random_mazes(num: int, sizes: tuple[int, ...] = (2, 3, 4), seed: int = 0) -> list[Maze]:
    """Mazes of any kind, with and without a path, written as text by a rule of their own."""
    rng = random.Random(seed)
    mazes = []
    for _ in range(num):
        size = rng.choice(sizes)
        symbols = [rng.choice("___#") for _ in range(size * size)]
        start, goal = rng.sample(range(size * size), 2)
        symbols[start], symbols[goal] = "@", "*"
        text = "".join(symbols)
        mazes.append(Maze.from_rows([text[row * size : (row + 1) * size] for row in range(size)]))
    return mazes


def naive_play(maze: Maze, moves: str | tuple[str, ...] | list[str]) -> str:
    """The published rule on the text of the maze, with a fence around it."""
    width = maze.size + 2
    board = "X" * width + "".join(f"X{row}X" for row in maze.rows()) + "X" * width
    here = board.index("@")
    for move in moves:
        there = here + {"L": -1, "R": 1, "U": -width, "D": width}[move]
        here = here if board[there] == "X" else there
        if board[here] in "#*":
            return {"#": "hole", "*": "goal"}[board[here]]
    return "unfinished"


# Text forms


def test_table_and_rows_are_two_forms_of_one_maze() -> None:
    maze = Maze(3, start=(1, 1), goal=(1, 0), holes=frozenset({(0, 2), (2, 2)}))
    assert maze == Maze.from_text(TABLE) == Maze.from_rows(ROWS) == Maze.from_text("\n".join(ROWS))
    assert maze.rows() == ROWS
    assert maze.to_text() == "__#\n*@_\n__#"
    assert maze.to_table() == TABLE
    assert [maze.symbol(cell) for cell in [(0, 0), (0, 2), (1, 0), (1, 1)]] == ["_", "#", "*", "@"]


def test_identity_names_the_map_and_never_changes() -> None:
    """Splits rest on it: a change of this value moves mazes from one split to another."""
    maze = Maze.from_rows(ROWS)
    assert maze.identity == "d27236db5e0656b2"
    assert Maze(3, (1, 1), (1, 0), {(2, 2), (0, 2)}).identity == maze.identity
    mazes = {maze.to_text(): maze for maze in random_mazes(500)}
    assert len({maze.identity for maze in mazes.values()}) == len(mazes)


def test_round_trip_of_random_mazes() -> None:
    for maze in random_mazes(100):
        assert Maze.from_text(maze.to_text()) == Maze.from_text(maze.to_table()) == maze


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("| Row 2 | * |", "| Row 2 | x |", r"map\.txt, row 2, column 1: unknown symbol 'x'; use one of _ # @ \*"),
        ("| Row 2 | * |", "| Row 2 | *_ |", r"map\.txt, row 2, column 1: '\*_' is not one symbol"),
        ("| Row 2 | * |", "| Row 2 |  |", r"map\.txt, row 2, column 1: '' is not one symbol"),
        ("| Row 3 |", "| Row 4 |", r"map\.txt, row 3: label 'Row 4'; expected 'Row 3'"),
        (" Col 3 |", "", r"map\.txt, header: '\| \| Col 1 \| Col 2 \|'; 3 rows need the columns Col 1, Col 2, Col 3"),
        ("| Row 1 | _ | _ | # |", "| Row 1 | _ | _ |", r"map\.txt, row 1: 2 cells in '__'; a maze of 3 rows needs 3"),
        ("*", "_", r"map\.txt: needs exactly one goal '\*', found: none"),
        ("*", "@", r"exactly one player '@', found: row 2 column 1, row 2 column 2"),
        (TABLE, " \n", r"map\.txt: is empty"),
        (TABLE, "@", r"map\.txt: needs exactly one goal"),
    ],
)
def test_errors_of_a_table_name_the_file_the_row_and_the_value(old: str, new: str, message: str, tmp_path) -> None:
    path = tmp_path / "map.txt"
    assert old in TABLE
    path.write_text(TABLE.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Maze.from_file(path)


@pytest.mark.parametrize(
    ("size", "start", "goal", "holes", "message"),
    [
        (1, (0, 0), (0, 0), [], "maze size is 1"),
        (27, (0, 0), (0, 1), [], "maze size is 27"),
        (3, (0, 3), (0, 1), [], r"cell \(0, 3\) lies outside"),
        (3, (0, 0), (0, 1), [(-1, 0)], r"cell \(-1, 0\) lies outside"),
        (3, (0, 1), (0, 1), [], "the same cell"),
        (3, (0, 0), (0, 1), [(0, 1)], r"goal \(0, 1\) is a hole"),
    ],
)
def test_impossible_mazes_are_refused(size: int, start: tuple, goal: tuple, holes: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Maze(size, start, goal, frozenset(holes))


def test_cells_are_named_as_in_a_spreadsheet() -> None:
    assert [cell_name(cell) for cell in [(0, 0), (1, 0), (0, 1), (5, 3), (25, 25)]] == ["A1", "A2", "B1", "D6", "Z26"]


# Shortest plans


@pytest.mark.parametrize("seed", [0, 1, 2, 7])
def test_shortest_plan_is_the_first_of_all_shortest_plans(seed: int) -> None:
    """Brute force: all plans of 0, 1, 2, ... moves in the order of preference, until one of them solves the maze."""
    order = move_preference(seed)
    solved = 0
    for maze in random_mazes(60, sizes=(2, 3), seed=seed):
        plans = (plan for length in range(7) for plan in itertools.product(order, repeat=length))
        expected = next((list(plan) for plan in plans if naive_play(maze, plan) == "goal"), None)
        if expected is None:
            assert maze.start not in distances_to_goal(maze)
            with pytest.raises(ValueError, match="no plan reaches the goal"):
                shortest_plan(maze, seed)
        else:
            solved += 1
            assert shortest_plan(maze, seed) == expected
            assert distances_to_goal(maze)[maze.start] == len(expected)
    assert solved > 20


def test_tie_rule_depends_on_the_seed_only() -> None:
    assert sorted(move_preference(0)) == sorted(MOVES)
    assert len({move_preference(seed) for seed in range(200)}) == 24
    corner = Maze(3, (0, 0), (2, 2))
    plans = {tuple(shortest_plan(corner, seed)) for seed in range(50)}
    assert plans == {tuple("RRDD"), tuple("DDRR")}
    assert all(shortest_plan(corner, seed) == shortest_plan(corner, seed) for seed in range(5))


# Simulation and scoring


def test_simulation_matches_the_naive_player() -> None:
    rng = random.Random(1)
    seen = set()
    for maze in random_mazes(300):
        for _ in range(5):
            moves = [rng.choice("LRUD") for _ in range(rng.randrange(9))]
            status = naive_play(maze, moves)
            seen.add(status)
            outcome = simulate_plan(maze, moves)
            assert outcome.status == status
            assert is_valid_plan(maze, moves) == (status == "goal")
            assert outcome.cells[0] == maze.start
            assert len(outcome.cells) - 1 == len(moves) or status != "unfinished"
            jumps = [
                abs(row - before_row) + abs(col - before_col)
                for (before_row, before_col), (row, col) in itertools.pairwise(outcome.cells)
            ]
            assert all(jump <= 1 for jump in jumps)
            assert outcome.moves_off_board == jumps.count(0)
    assert seen == {"goal", "hole", "unfinished"}


def test_published_rule_and_strict_rule() -> None:
    maze = Maze.from_rows(["@_#", "__*", "#__"])
    cases = {  # plan: (published rule, strict)
        "RDR": (True, True),
        "DRR": (True, True),
        "LRDR": (True, False),  # the first move is off the board: the player stays
        "DRRD": (True, False),  # goes on after the goal
        "DRRRUUU": (True, False),
        "RRD": (False, False),  # through the hole
        "DD": (False, False),
        "DR": (False, False),  # stops early
        "": (False, False),
    }
    for plan, (published, strict) in cases.items():
        assert is_valid_plan(maze, list(plan)) is published, plan
        assert is_valid_plan(maze, list(plan), strict=True) is strict, plan
    assert simulate_plan(maze, "LRDRU") == ([(0, 0), (0, 0), (0, 1), (1, 1), (1, 2)], "goal", 1)
    assert simulate_plan(maze, "DDL") == ([(0, 0), (1, 0), (2, 0)], "hole", 0)


def test_unknown_move_is_refused_even_after_the_end() -> None:
    with pytest.raises(ValueError, match="move 4 of the plan is 'X'; use one of L R U D"):
        simulate_plan(Maze.from_rows(["@_", "_*"]), ["R", "D", "D", "X"])


# Reading a plan


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("<answer>D R R</answer>", "DRR"),
        ("<answer>D,R,R</answer>", "DRR"),
        ("<answer>DRR</answer>", "DRR"),
        ("<answer> d r\nr </answer>", "DRR"),
        ("<answer>down, right and then Right.</answer>", "DRR"),
        ("<answer>Move down, move right, go RIGHT</answer>", "DRR"),
        ("<answer>1. Down\n2. Right\n3. Right</answer>", "DRR"),
        ("<answer>[D] -> [R] -> [R]</answer>", "DRR"),
        ("<ANSWER>D R R<|im_end|>", "DRR"),
        ("<answer>D R R", "DRR"),
        ("Left? <answer>L</answer> No: <answer>D R R</answer>", "DRR"),
        ("<answer>The plan is D R R since U is blocked</answer>", "DRR"),
        ("D R R", "DRR"),
        ("DRR", "DRR"),
        ("Down is free, left is not. So: D R R", "DRR"),
        ("I pass B1, D2 and D3, thus DRR.", "DRR"),
        ("<|laser_start|>A1 D1 D2<|laser_end|>D R R<|im_end|>", "DRR"),
        ("<answer></answer> D R R", ""),
        ("<answer>none</answer>", ""),
        ("There is no path.", ""),
        ("D2 R3", ""),
        ("dull drr", ""),
        ("", ""),
    ],
)
def test_plans_are_read(text: str, plan: str) -> None:
    assert parse_plan(text) == list(plan)


def test_score_is_the_simulation_of_the_plan_read() -> None:
    maze = Maze.from_rows(["@_#", "__*", "#__"])
    assert score_plan(maze, "<answer>D R R</answer>")
    assert score_plan(maze, "<answer>R D R</answer>")
    assert not score_plan(maze, "<answer>R R D</answer>")
    assert not score_plan(maze, "no idea")
    for other in random_mazes(50):
        if other.start in distances_to_goal(other):
            assert score_plan(other, f"<answer>{' '.join(shortest_plan(other))}</answer>")


# Chance level


@pytest.mark.parametrize("num_moves", range(6))
def test_success_of_random_plans_matches_counting_them_all(num_moves: int) -> None:
    for maze in random_mazes(25):
        solved = sum(naive_play(maze, plan) == "goal" for plan in itertools.product("LRUD", repeat=num_moves))
        assert random_plan_success(maze, num_moves) == pytest.approx(solved / 4**num_moves, abs=1e-12)


def test_chance_level_is_the_share_of_shortest_plans() -> None:
    next_to_it, corner = Maze.from_rows(["@*", "__"]), Maze(3, (0, 0), (2, 2))
    assert random_plan_success(next_to_it) == 1 / 4
    assert random_plan_success(corner) == 6 / 4**4
    assert chance_level([next_to_it, corner]) == (1 / 4 + 6 / 4**4) / 2
    assert chance_level([next_to_it], num_moves=2) == random_plan_success(next_to_it, 2) > 1 / 4
    with pytest.raises(ValueError, match="empty list of mazes"):
        chance_level([])
    with pytest.raises(ValueError, match="no plan reaches the goal"):
        random_plan_success(Maze.from_rows(["@#", "#*"]))
