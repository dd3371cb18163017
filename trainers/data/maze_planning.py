"""FrozenLake mazes as plain values: text forms, shortest plans, simulation, scoring and chance level.

The task is the maze of the Visual Spatial Planning benchmark (VSP, arXiv 2407.01863): from a picture, give the
moves that take the player to the goal without entering a hole. Nothing here draws or draws at random; see `mazes`
and `maze_rendering`.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import NamedTuple

from .answers import extract_answer

Cell = tuple[int, int]

SAFE, HOLE, START, GOAL = "_", "#", "@", "*"
SYMBOLS = (SAFE, HOLE, START, GOAL)
MOVES: dict[str, Cell] = {"L": (0, -1), "R": (0, 1), "U": (-1, 0), "D": (1, 0)}
MOVE_WORDS = {"L": "left", "R": "right", "U": "up", "D": "down"}
MAX_SIZE = 26  # columns are named by one letter

_WORD_TO_MOVE = {word: move for move, word in MOVE_WORDS.items()} | {move.lower(): move for move in MOVES}
_CONNECTING_WORDS = frozenset({"and", "then", "move", "go"})


@dataclass(frozen=True)
class Maze:
    """A square maze. Cells are `(row, column)`, both from 0, row 0 at the top.

    Args:
        size: number of rows and of columns, 2 to 26.
        start: cell of the player.
        goal: cell of the goal, not the start.
        holes: cells that must not be entered; neither start nor goal.

    Raises:
        ValueError: a cell outside the grid, or two things in one cell.
    """

    size: int
    start: Cell
    goal: Cell
    holes: frozenset[Cell] = frozenset()

    def __post_init__(self) -> None:
        if not 2 <= self.size <= MAX_SIZE:
            raise ValueError(f"maze size is {self.size}; use 2 to {MAX_SIZE}")
        object.__setattr__(self, "holes", frozenset(self.holes))
        for cell in (self.start, self.goal, *self.holes):
            if not self.contains(cell):
                raise ValueError(f"cell {cell} lies outside the {self.size}x{self.size} grid")
        if self.start == self.goal:
            raise ValueError(f"start and goal are the same cell {self.start}")
        for name, cell in [("start", self.start), ("goal", self.goal)]:
            if cell in self.holes:
                raise ValueError(f"{name} {cell} is a hole")

    def contains(self, cell: Cell) -> bool:
        """Whether `cell` lies on the grid."""
        return 0 <= cell[0] < self.size and 0 <= cell[1] < self.size

    def symbol(self, cell: Cell) -> str:
        """The published symbol of a cell: `_` safe, `#` hole, `@` player, `*` goal."""
        if cell == self.start:
            return START
        if cell == self.goal:
            return GOAL
        return HOLE if cell in self.holes else SAFE

    def rows(self) -> tuple[str, ...]:
        """One string of `size` symbols a row, top row first, e.g. `("__#", "*@_", "__#")`."""
        grid = [[SAFE] * self.size for _ in range(self.size)]
        for cells, symbol in [(self.holes, HOLE), ((self.start,), START), ((self.goal,), GOAL)]:
            for row, col in cells:
                grid[row][col] = symbol
        return tuple(map("".join, grid))

    def to_text(self) -> str:
        """The rows joined by newlines: the short text form, read back by [`Maze.from_text`]."""
        return "\n".join(self.rows())

    def to_table(self) -> str:
        """The text of a published table file, byte for byte (last newline included)."""
        header = "| |" + "".join(f" Col {col} |" for col in range(1, self.size + 1))
        body = [f"| Row {number} | " + " | ".join(row) + " |" for number, row in enumerate(self.rows(), start=1)]
        return "\n".join([header, *body]) + "\n"

    @cached_property
    def identity(self) -> str:
        """16 hexadecimal digits that name the map: the head of the SHA-256 of the rows joined by `/`."""
        return hashlib.sha256("/".join(self.rows()).encode("ascii")).hexdigest()[:16]

    @classmethod
    def from_rows(cls, rows: Sequence[str], source: str = "maze") -> Maze:
        """Builds a maze from one string a row.

        Raises:
            ValueError: naming `source`, the row and column (from 1) and the value that is wrong.
        """
        size = len(rows)
        cells: dict[str, list[Cell]] = {symbol: [] for symbol in SYMBOLS}
        for row, line in enumerate(rows):
            if len(line) != size:
                raise ValueError(
                    f"{source}, row {row + 1}: {len(line)} cells in {line!r}; a maze of {size} rows needs {size}"
                )
            for col, symbol in enumerate(line):
                if symbol not in cells:
                    where = f"{source}, row {row + 1}, column {col + 1}"
                    raise ValueError(f"{where}: unknown symbol {symbol!r}; use one of {' '.join(SYMBOLS)}")
                cells[symbol].append((row, col))
        for name, symbol in [("player", START), ("goal", GOAL)]:
            if len(cells[symbol]) != 1:
                found = ", ".join(f"row {row + 1} column {col + 1}" for row, col in cells[symbol]) or "none"
                raise ValueError(f"{source}: needs exactly one {name} {symbol!r}, found: {found}")
        try:
            return cls(size, cells[START][0], cells[GOAL][0], frozenset(cells[HOLE]))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    @classmethod
    def from_text(cls, text: str, source: str = "maze") -> Maze:
        """Reads either text form: plain rows ([`Maze.to_text`]) or a published table (`| | Col 1 | ...`).

        Raises:
            ValueError: naming `source`, the row and the value that is wrong.
        """
        lines = [line.strip() for line in text.strip().splitlines()]
        if not lines:
            raise ValueError(f"{source}: is empty; expected the rows of a maze")
        return cls.from_rows(_rows_of_table(lines, source) if lines[0].startswith("|") else lines, source)

    @classmethod
    def from_file(cls, path: str | Path) -> Maze:
        """Reads a published table file (`level{n}/table/{k}.txt`); errors name the file."""
        return cls.from_text(Path(path).read_text(encoding="utf-8"), source=str(path))


def _rows_of_table(lines: list[str], source: str) -> list[str]:
    """Strips the frame of a published table: `| Row 1 | _ | # |` becomes `_#`; row labels and header are checked."""
    size = len(lines) - 1
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    expected = ["", *(f"Col {col}" for col in range(1, size + 1))]
    if header != expected:
        raise ValueError(f"{source}, header: {lines[0]!r}; {size} rows need the columns {', '.join(expected[1:])}")
    rows = []
    for number, line in enumerate(lines[1:], start=1):
        label, *symbols = (cell.strip() for cell in line.strip("|").split("|"))
        if label != f"Row {number}":
            raise ValueError(f"{source}, row {number}: label {label!r}; expected 'Row {number}'")
        for col, symbol in enumerate(symbols, start=1):
            if len(symbol) != 1:
                raise ValueError(f"{source}, row {number}, column {col}: {symbol!r} is not one symbol")
        rows.append("".join(symbols))
    return rows


def cell_name(cell: Cell) -> str:
    """Name of a cell as in a spreadsheet: column letter, then row number from the top, e.g. `(1, 0)` is `"A2"`."""
    return f"{chr(ord('A') + cell[1])}{cell[0] + 1}"


def move_preference(seed: int = 0) -> tuple[str, ...]:
    """The order in which equally short moves are preferred: a permutation of L R U D that depends on the seed only."""
    rng = Random(f"moves:{seed}")
    return tuple(sorted(MOVES, key=lambda move: rng.random()))


def distances_to_goal(maze: Maze) -> dict[Cell, int]:
    """Number of moves from each cell to the goal (breadth-first search); cells that cannot reach it are absent."""
    distances = {maze.goal: 0}
    queue = deque([maze.goal])
    while queue:
        row, col = queue.popleft()
        distance = distances[row, col] + 1
        for cell in ((row, col - 1), (row, col + 1), (row - 1, col), (row + 1, col)):
            if cell not in distances and cell not in maze.holes and maze.contains(cell):
                distances[cell] = distance
                queue.append(cell)
    return distances


def shortest_plan(maze: Maze, seed: int = 0) -> list[str]:
    """A shortest plan from start to goal, as a list of moves.

    Ties are broken by [`move_preference`]: of all shortest plans the one that comes first when moves are ranked in
    that order. One seed gives one rule for every maze, so a model can learn it; another seed gives other plans of
    the same length.

    Raises:
        ValueError: the goal cannot be reached.
    """
    distances = distances_to_goal(maze)
    if maze.start not in distances:
        raise ValueError(f"no plan reaches the goal of maze {'/'.join(maze.rows())}")
    order = move_preference(seed)
    cell, plan = maze.start, []
    while cell != maze.goal:
        for move in order:
            after = (cell[0] + MOVES[move][0], cell[1] + MOVES[move][1])
            if distances.get(after) == distances[cell] - 1:
                plan.append(move)
                cell = after
                break
    return plan


class PlanOutcome(NamedTuple):
    """What happened when a plan was followed.

    Fields:
        cells: the cells visited, start first, one more per executed move (a move off the board repeats the cell).
        status: how it ended, `"goal"`, `"hole"` or `"unfinished"`.
        moves_off_board: how many executed moves pointed off the board.
    """

    cells: list[Cell]
    status: str
    moves_off_board: int


def simulate_plan(maze: Maze, moves: Iterable[str]) -> PlanOutcome:
    """Follows `moves` from the start by the rules of the published benchmark.

    A move off the board leaves the player where it is; entering a hole or the goal ends the game, later moves are
    not executed.

    Raises:
        ValueError: a move that is not L, R, U or D.
    """
    cell, cells, off_board = maze.start, [maze.start], 0
    moves = list(moves)
    for number, move in enumerate(moves, start=1):
        if move not in MOVES:
            raise ValueError(f"move {number} of the plan is {move!r}; use one of {' '.join(MOVES)}")
    for move in moves:
        after = (cell[0] + MOVES[move][0], cell[1] + MOVES[move][1])
        if maze.contains(after):
            cell = after
        else:
            off_board += 1
        cells.append(cell)
        if cell == maze.goal:
            return PlanOutcome(cells, "goal", off_board)
        if cell in maze.holes:
            return PlanOutcome(cells, "hole", off_board)
    return PlanOutcome(cells, "unfinished", off_board)


def is_valid_plan(maze: Maze, moves: Sequence[str], strict: bool = False) -> bool:
    """Whether a plan solves the maze.

    The default is the rule of the published benchmark: scored by simulation, moves off the board leave the player
    where it is, entering a hole fails, reaching the goal succeeds (whatever moves follow). `strict=True` also asks
    that no move points off the board and that the last move is the one that enters the goal.
    """
    outcome = simulate_plan(maze, moves)
    if outcome.status != "goal":
        return False
    return not strict or (outcome.moves_off_board == 0 and len(outcome.cells) == len(moves) + 1)


def parse_plan(text: str) -> list[str]:
    """Reads the moves out of a model's text; `[]` when there are none.

    1. If the text has an `<answer>` tag, only the content of the last one counts (`answers.extract_answer`).
    2. Words (runs of letters, digits and underscores) are read as moves if they are, in any case, `left`, `right`,
       `up`, `down` or one of the letters L R U D, or several of these letters in capitals (`DRR`). Numbers,
       punctuation and line breaks separate words and mean nothing, as in `1. Down, 2. Right`; `and`, `then`, `move`
       and `go` are passed over. Any other word (`to`, `D2`) ends a run of moves.
    3. Inside a tag the first run is the plan (an explanation may follow); without a tag it is the last run
       (reasoning may precede).
    """
    answer = extract_answer(text)
    runs: list[list[str]] = [[]]
    for word in re.findall(r"\w+", text if answer is None else answer):
        if word.lower() in _WORD_TO_MOVE:
            runs[-1].append(_WORD_TO_MOVE[word.lower()])
        elif all(letter in MOVES for letter in word):
            runs[-1].extend(word)
        elif not word.isdecimal() and word.lower() not in _CONNECTING_WORDS:
            runs.append([])
    runs = [run for run in runs if run]
    if not runs:
        return []
    return runs[-1] if answer is None else runs[0]


def score_plan(maze: Maze, text: str) -> bool:
    """Whether the plan that [`parse_plan`] finds in a model's text solves the maze by the published rule."""
    return is_valid_plan(maze, parse_plan(text))


def random_plan_success(maze: Maze, num_moves: int | None = None) -> float:
    """Probability that `num_moves` random moves (L, R, U or D, 1/4 each) solve the maze by the published rule.

    Exact: the distribution of the player over the cells is carried from move to move, holes and goal absorb. By
    default `num_moves` is the length of a shortest plan, so this is (number of shortest plans) / 4 ** length.

    Raises:
        ValueError: the goal cannot be reached and no `num_moves` was given.
    """
    if num_moves is None:
        num_moves = len(shortest_plan(maze))
    where, solved = {maze.start: 1.0}, 0.0
    for _ in range(num_moves):
        after: dict[Cell, float] = {}
        for (row, col), probability in where.items():
            for step_row, step_col in MOVES.values():
                cell = (row + step_row, col + step_col)
                cell = cell if maze.contains(cell) else (row, col)
                if cell == maze.goal:
                    solved += probability / 4
                elif cell not in maze.holes:
                    after[cell] = after.get(cell, 0.0) + probability / 4
        where = after
    return solved


def chance_level(mazes: Iterable[Maze], num_moves: int | None = None) -> float:
    """Expected accuracy of random plans on a set of mazes: the mean of [`random_plan_success`].

    Raises:
        ValueError: no mazes.
    """
    values = [random_plan_success(maze, num_moves) for maze in mazes]
    if not values:
        raise ValueError("chance level of an empty list of mazes; give at least one")
    return sum(values) / len(values)
