"""Every command of README.md is one that exists, with options that its script accepts; marked blocks are really run.

A fenced block of `bash` or `python` is run when the line before it is the comment `<!-- run -->`. It runs in an empty
folder that shows the project's folders, so relative paths work and what it writes stays out of the checkout.
"""

import ast
import functools
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from modeling_latent import LATENT_OPTIONS
from tests.hub import ROOT

README = ROOT / "README.md"
RUN_SECONDS = 120
SHOWN = ("examples", "hub_configs", "modeling_latent", "trainers", "evaluation")
PLAIN = {"cd", "source", "git", "export", "ls", "cat", "venv", "pytest", "ruff"}  # no script or option of ours in them


class Block(NamedTuple):
    """A fenced block: line of its first row, language, text, and whether it is marked to be run."""

    line: int
    language: str
    text: str
    run: bool


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text."""
    pattern = re.compile(r"^(<!-- run -->\n+)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Block(text[: m.start(3)].count("\n") + 1, m.group(2), m.group(3), m.group(1) is not None)
        for m in pattern.finditer(text)
    ]


def commands(block: Block) -> list[list[str]]:
    """The commands of a bash block as words: comments, variables set in front and line continuations are gone."""
    lines = block.text.replace("\\\n", " ").split("\n")
    words = [word for line in lines for word in [*shlex.split(line, comments=True), ";"]]
    found: list[list[str]] = [[]]
    for word in words:
        if word in (";", "&&", "||", "|"):
            found.append([])
        elif found[-1] or not re.fullmatch(r"\w+=.*", word):
            found[-1].append(word)
    return [command for command in found if command]


def make_targets() -> set[str]:
    """The targets that the Makefile declares."""
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@functools.cache
def help_text(script: str) -> str:
    """What a script prints for `--help`."""
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise AssertionError(f"{script} --help exits with {done.returncode}:\n{done.stderr}")
    return done.stdout


def script_problems(script: str, arguments: list[str]) -> list[str]:
    """Options that a script does not know."""
    if not (ROOT / script).is_file():
        return []  # reported as a missing file
    known = set(re.findall(r"--[\w-]+", help_text(script)))
    if re.search("TrlParser|parse_recipe", (ROOT / script).read_text()):
        known.add("--config")  # TRL's parser takes it before argparse sees the arguments
    options = [word.split("=")[0] for word in arguments if re.match(r"--\w", word)]
    return [f"{script} has no option {option}" for option in options if option not in known]


def pip_problems(arguments: list[str]) -> list[str]:
    """Extras that `pyproject.toml` does not have."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    groups = [group for word in arguments for group in re.findall(r"\[(.*?)\]", word)]
    named = [extra.strip() for group in groups for extra in group.split(",")]
    return [f"no extra {extra!r}" for extra in named if extra not in extras]


def plugin_problems(arguments: list[str]) -> list[str]:
    """Arguments for the model of the plugin of lmms-eval that it does not have."""
    options = dict(zip(arguments, arguments[1:], strict=False))
    names = [pair.partition("=")[0] for pair in options.get("--model_args", "").split(",")]
    known = {"pretrained", "latent_strategy", "method", "revision", "dtype", "max_new_tokens", *LATENT_OPTIONS}
    bad = [f"no argument {name!r} of the plugin" for name in names if name not in known]
    return bad + ([] if options.get("--model") == "latent" else ["the model of the plugin is 'latent'"])


def missing_files(words: list[str]) -> list[str]:
    """Words, or values of `--option=value`, that name a file of the project which does not exist."""
    pattern = re.compile(r"(?:hub_configs|examples|tests)/\S+|[\w-]+\.txt")
    files = [word.split("=")[-1].split("::")[0] for word in words]
    return [f"no file {name}" for name in files if pattern.fullmatch(name) and not (ROOT / name).exists()]


def problems(command: list[str]) -> list[str]:
    """What is wrong with one command of the README; an unknown kind of command is wrong too."""
    name, rest = os.path.basename(command[0]), command[1:]
    if name in ("python", "python3") and rest[:1] == ["-m"] and len(rest) > 1:
        name, rest = rest[1], rest[2:]
    bad = missing_files(rest)
    if name == "make":
        targets = [word for word in rest if "=" not in word and not word.startswith("-")]
        return bad + [f"no make target {target!r}" for target in targets if target not in make_targets()]
    if name == "pip":
        return bad + pip_problems(rest)
    if name == "lmms_eval":
        return bad + plugin_problems(rest)
    if name in ("python", "python3", "torchrun") or (name == "accelerate" and rest[:1] == ["launch"]):
        scripts = [position for position, word in enumerate(rest) if word.endswith(".py")]
        if scripts:
            return bad + script_problems(rest[scripts[0]], rest[scripts[0] + 1 :])
    elif name in PLAIN:
        return bad
    return [*bad, f"unknown command {shlex.join(command)!r}"]


def python_problems(source: str) -> list[str]:
    """Syntax errors of a Python block, and names that it imports from this project in vain."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return [f"syntax error: {error}"]
    bad = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in SHOWN:
            try:
                module = importlib.import_module(node.module)
            except ModuleNotFoundError as error:
                bad.append(str(error))
                continue
            bad += [f"{node.module} has no {a.name}" for a in node.names if not hasattr(module, a.name)]
    return bad


def readme() -> list[Block]:
    """The blocks of README.md."""
    assert README.is_file(), "README.md is missing"
    return blocks(README.read_text(encoding="utf-8"))


def test_every_command_exists_with_its_options() -> None:
    shell = [block for block in readme() if block.language in ("bash", "sh", "shell", "console")]
    assert shell, "README.md shows no command"
    bad = [
        f"README.md:{block.line}: {problem}"
        for block in shell
        for command in commands(block)
        for problem in problems(command)
    ]
    assert not bad, "\n" + "\n".join(bad)


def test_every_python_block_parses_and_imports_what_exists() -> None:
    bad = [
        f"README.md:{block.line}: {problem}"
        for block in readme()
        if block.language == "python"
        for problem in python_problems(block.text)
    ]
    assert not bad, "\n" + "\n".join(bad)


def run_block(block: Block, folder: Path, seconds: float = RUN_SECONDS) -> None:
    """Runs one block in `folder`; the `python` it calls is the one that runs the tests."""
    program = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*program, block.text], cwd=folder, env=env, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"README.md:{block.line}\n{block.text}\n{done.stdout}\n{done.stderr}"


def test_marked_blocks_run(tmp_path: Path) -> None:
    marked = [block for block in readme() if block.run]
    assert marked, "no block of README.md is marked with <!-- run -->"
    for name in SHOWN:
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    for block in marked:
        run_block(block, tmp_path)


SAMPLE = """
# Title
```bash
make test quickstart
pip install -c constraints.txt -e ".[dev]"  # a comment
A=1 python examples/none.py \\
    --data x && echo hi
```
<!-- run -->
```python
from trainers.data import no_such_name
```
"""


def test_the_blocks_and_commands_are_found() -> None:
    shell, python = blocks(SAMPLE)
    assert (shell.line, shell.language, shell.run) == (4, "bash", False)
    assert (python.line, python.language, python.run) == (11, "python", True)
    assert commands(shell) == [
        ["make", "test", "quickstart"],
        ["pip", "install", "-c", "constraints.txt", "-e", ".[dev]"],
        ["python", "examples/none.py", "--data", "x"],
        ["echo", "hi"],
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("make test VENV=other", None),
        ("make tests", "no make target 'tests'"),
        ('pip install -e ".[dev,deepspeed]"', None),
        ('pip install -e ".[everything]"', "no extra 'everything'"),
        ("pip install -c constraint.txt -e .", "no file constraint.txt"),
        ("python examples/none.py --data x", "no file examples/none.py"),
        ("accelerate launch --num_processes 2 examples/none.py", "no file examples/none.py"),
        ("torchrun --nproc_per_node 2 examples/none.py", "no file examples/none.py"),
        ("python -m pytest tests/test_none.py -k x", "no file tests/test_none.py"),
        ("cd latent-reasoning", None),
        ("latent-train --now", "unknown command 'latent-train --now'"),
    ],
)
def test_wrong_commands_are_found(line: str, problem: str | None) -> None:
    (command,) = commands(Block(1, "bash", line, False))
    assert problems(command) == ([] if problem is None else [problem])


def test_wrong_options_and_files_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import argparse\np = argparse.ArgumentParser()\np.add_argument('--data')\np.parse_args()\n"
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "train.py").write_text(script)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    help_text.cache_clear()
    given = ["--data=x", "--rows", "3", "--config", "hub_configs/none.yaml"]
    assert problems(["accelerate", "launch", "--config_file=hub_configs/two.yaml", "examples/train.py", *given]) == [
        "no file hub_configs/two.yaml",
        "no file hub_configs/none.yaml",
        "examples/train.py has no option --rows",
        "examples/train.py has no option --config",
    ]
    help_text.cache_clear()


def test_wrong_python_is_found() -> None:
    assert python_problems("from trainers.data import no_such_name") == ["trainers.data has no no_such_name"]
    assert python_problems("from trainers.nothing import x") == ["No module named 'trainers.nothing'"]
    assert python_problems("x = = 1")[0].startswith("syntax error")
    assert python_problems("import torch\nmodel.generate(...)") == []


def test_a_failing_block_is_reported_with_its_line(tmp_path: Path) -> None:
    run_block(Block(1, "bash", 'python -c \'open("made", "w")\'\ntest -f made', True), tmp_path)
    with pytest.raises(AssertionError, match="README.md:7"):
        run_block(Block(7, "bash", "false\ntrue", True), tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        run_block(Block(8, "python", "import time; time.sleep(60)", True), tmp_path, seconds=1)
