"""The method page of DMLR says what the code says: its tables of options and flags, and the names in it."""

import re
from collections.abc import Callable

import pytest

import modeling_latent
from evaluation.benchmarks.search_tasks import SEARCH_TASKS
from evaluation.search_arguments import build_parser
from evaluation.search_tables import published_flag_table, search_option_table
from modeling_latent.search_options import SEARCH_OPTIONS
from modeling_latent.search_rewards import REWARD_ROWS, REWARDS
from tests.hub import ROOT
from tests.test_readme import blocks, commands, problems, python_problems

TEXT = (ROOT / "hub_configs" / "methods" / "dmlr.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("block", "table"), [("options", search_option_table), ("published flags", published_flag_table)]
)
def test_the_page_has_the_tables_row_by_row(block: str, table: Callable[[], list[str]]) -> None:
    shown = re.search(rf"<!-- {block}: begin -->\n(.*)\n<!-- {block}: end -->", TEXT, re.DOTALL)
    assert shown and shown[1].splitlines() == table()


def test_every_option_has_a_row_with_both_defaults() -> None:
    rows = {line.split("|")[1].strip(): line for line in search_option_table()[2:]}
    assert set(rows) == {f"`{name}`" for name in SEARCH_OPTIONS}
    assert "| `0.1` | `20.0` |" in rows["`sigma`"] and "| `16` |  |" in rows["`num_selected_patches`"]


def test_rewards_and_rows_are_named() -> None:
    for name in (*REWARDS, *REWARD_ROWS, *SEARCH_TASKS):
        assert f"`{name}`" in TEXT, name


def test_files_of_the_page_exist() -> None:
    folder = ""
    for cell in re.findall(r"^\| [^|]+ \| (`[^|]+`) \|$", TEXT.split("## Use")[0], re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", cell):
            folder = name.rpartition("/")[0] or folder
            path = name if "/" in name else f"{folder}/{name}"
            assert (ROOT / path).is_file(), path


def test_commands_and_calls_of_the_page() -> None:
    found = blocks(TEXT)
    shell = [command for block in found if block.language == "bash" for command in commands(block)]
    assert len(shell) == 4 and not [problem for command in shell for problem in problems(command)]
    assert not [problem for block in found if block.language == "python" for problem in python_problems(block.text)]
    for name in re.findall(r"`(\w+)\(", TEXT):
        assert hasattr(modeling_latent, name) or name in ("logits", "search_prompt"), name


def test_flags_of_the_page_exist() -> None:
    known = set(re.findall(r"--\w+", build_parser("").format_help())) | {"--help", "--model", "--strategies"}
    assert not set(re.findall(r"--\w+", TEXT)) - known - {"--"}
