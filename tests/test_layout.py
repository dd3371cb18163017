"""The rules that keep the packages apart, checked on the source: imports, what goes to the Hub, no stubs, the wheel.

Each rule is a function of a project folder that returns the violations it finds; the tests apply it to this project,
and to a small project that breaks every rule.
"""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

from tests.hub import ROOT, run_python

PACKAGES = ("modeling_latent", "trainers", "evaluation")
PROJECT = (*PACKAGES, "examples", "tests")
# What code on the Hub may rely on: torch, transformers and what that requires itself; the processor also Pillow.
TRAVELLING = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "tokenizers"}
OPTIONAL = ("torchvision", "deepspeed", "flash_attn", "liger_kernel", "bitsandbytes", "vllm")
# Part of the project -> the parts it may import. The longest matching prefix is a module's part.
DIRECTIONS = {
    "modeling_latent": {"modeling_latent"},
    "trainers.data": {"modeling_latent", "trainers.data"},
    "trainers": {"modeling_latent", "trainers.data", "trainers"},
    "evaluation": {"modeling_latent", "trainers.data", "evaluation"},
    "examples": {"modeling_latent", "trainers.data", "trainers", "evaluation", "examples"},
    "tests": {"modeling_latent", "trainers.data", "trainers", "evaluation", "examples", "tests"},
}


class Imported(NamedTuple):
    """One import: line, absolute dotted name, dots of a relative import, names taken, whether it runs on import."""

    line: int
    module: str
    level: int
    names: tuple[str, ...]
    at_import: bool


def python_files(root: Path, folders: tuple[str, ...]) -> list[Path]:
    """The Python files of some folders of a project."""
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def module_name(root: Path, path: Path) -> str:
    """`trainers/data/mazes.py` -> `trainers.data.mazes`; a package's `__init__` has the package's name."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(root: Path, path: Path) -> Iterator[Imported]:
    """Every import of a file, also those inside functions and `import_module("...")` with a literal name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    deferred = {id(node) for outer in ast.walk(tree) if isinstance(outer, functions) for node in ast.walk(outer)}
    name = module_name(root, path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        now = id(node) not in deferred
        if isinstance(node, ast.Import):
            yield from (Imported(node.lineno, alias.name, 0, (), now) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield Imported(node.lineno, module, node.level, tuple(alias.name for alias in node.names), now)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield Imported(node.lineno, str(node.args[0].value), 0, (), now)


def part(module: str) -> str | None:
    """The part of the project that a module belongs to, or None for a module of somebody else."""
    matches = [prefix for prefix in DIRECTIONS if module == prefix or module.startswith(f"{prefix}.")]
    return max(matches, key=len, default=None)


def targets(root: Path, found: Imported) -> list[str]:
    """The modules an import loads: `from trainers import data` loads `trainers.data`, not something of `trainers`."""
    folder = root.joinpath(*found.module.split("."))
    inner = [name for name in found.names if (folder / name).is_dir() or (folder / f"{name}.py").is_file()]
    return [f"{found.module}.{name}" for name in inner] if inner == list(found.names) and inner else [found.module]


def wrong_directions(root: Path) -> list[str]:
    """Imports against `modeling_latent <- trainers.data <- trainers, evaluation <- examples, tests`."""
    bad = []
    for path in python_files(root, PROJECT):
        allowed = DIRECTIONS[part(module_name(root, path))]
        for found in imports(root, path):
            for target in targets(root, found):
                owner = part(target)
                if owner is not None and owner not in allowed:
                    bad.append(f"{path.relative_to(root)}:{found.line}: imports {target}")
    return bad


def wrong_travellers(root: Path) -> list[str]:
    """What would break `modeling_latent` once its files are copied, flat, into a model repository."""
    folder = root / "modeling_latent"
    bad = [f"{path.relative_to(root)}: a sub-folder" for path in folder.rglob("*.py") if path.parent != folder]
    for path in sorted(folder.glob("*.py")):
        allowed = TRAVELLING | ({"PIL"} if path.name.startswith("processing_") else set())
        for found in imports(root, path):
            where = f"{path.relative_to(root)}:{found.line}: "
            top = found.module.split(".")[0]
            if found.level == 0:
                if top not in allowed and top not in sys.stdlib_module_names:
                    bad.append(f"{where}imports {found.module}")
            elif found.level > 1 or found.module.count(".") != 1:
                bad.append(f"{where}relative import is not of the form `from .file import name`")
            elif not (folder / f"{found.module.split('.')[1]}.py").is_file():
                bad.append(f"{where}no file modeling_latent/{found.module.split('.')[1]}.py")
    return bad


def wrong_text_imports(root: Path) -> list[str]:
    """What transformers' copier takes for a relative import (also in docstrings) and finds no file for."""
    from transformers.dynamic_module_utils import get_relative_imports

    folder = root / "modeling_latent"
    return [
        f"modeling_latent/{path.name}: reads like an import of .{name}, and there is no such file"
        for path in sorted(folder.glob("*.py"))
        for name in get_relative_imports(path)
        if not (folder / f"{name}.py").is_file()
    ]


def unfinished(root: Path) -> list[str]:
    """`NotImplementedError` and notes of things to do."""
    note = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    bad = []
    for path in python_files(root, PROJECT):
        text = path.read_text(encoding="utf-8")
        found = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if note.search(line)]
        names = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name))
        found += [(name.lineno, name.id) for name in names if name.id == "NotImplementedError"]
        bad += [f"{path.relative_to(root)}:{line}: {what}" for line, what in found]
    return bad


def eager_optionals(root: Path) -> list[str]:
    """Optional dependencies that are imported as soon as a package is."""
    return [
        f"{path.relative_to(root)}:{found.line}: imports {found.module} at module level"
        for path in python_files(root, PACKAGES)
        for found in imports(root, path)
        if found.at_import and found.module.split(".")[0] in OPTIONAL
    ]


def undeclared(root: Path) -> list[str]:
    """Third-party imports that are no dependency in `pyproject.toml`; inside a function an extra is enough."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {canonical(Requirement(line).name) for line in project["dependencies"]}
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    known = needed | {canonical(Requirement(line).name) for line in extras} | {"tokenizers"}  # comes with transformers
    distributions = importlib.metadata.packages_distributions()
    bad = []
    for path in python_files(root, PACKAGES):
        for found in imports(root, path):
            top = found.module.split(".")[0]
            if top in sys.stdlib_module_names or top in PROJECT:
                continue
            owners = {canonical(name) for name in distributions.get(top, [top])}
            if not owners & (needed | {"tokenizers"} if found.at_import else known):
                bad.append(f"{path.relative_to(root)}:{found.line}: imports {found.module}, not in pyproject.toml")
    return bad


def canonical(name: str) -> str:
    """The name of a distribution as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


RULES = (wrong_directions, wrong_travellers, wrong_text_imports, unfinished, eager_optionals, undeclared)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py").is_file(), f"package {package} has no __init__.py"
    bad = rule(ROOT)
    assert not bad, "\n" + "\n".join(bad)


BAD_FILES = {
    "modeling_latent/inputs.py": "import torch\n",
    "modeling_latent/__init__.py": "from .inputs import x\n",
    "modeling_latent/processing_x.py": "from PIL import Image\nimport json\n",
    "modeling_latent/a.py": "from . import inputs\n",
    "modeling_latent/b.py": "from ..trainers import y\n",
    "modeling_latent/c.py": "from modeling_latent.inputs import x\nimport PIL\n",
    "modeling_latent/d.py": "def f():\n    from trainers.data import z\n",
    "modeling_latent/e.py": 'text = """\nfrom .ghost import Q\n"""\n',
    "modeling_latent/f.py": "from .absent import x\n",
    "modeling_latent/sub/deep.py": "import torch\n",
    "trainers/__init__.py": "",
    "trainers/sft.py": "import evaluation.runner\nfrom .data import x\ntry:\n    import deepspeed\nfinally:\n    1\n",
    "trainers/grpo.py": "def f():\n    import deepspeed, wandb\n",
    "trainers/data/__init__.py": "import modeling_latent\n",
    "trainers/data/records.py": "from ..sft import a\nfrom . import mazes\nimport scipy\n",
    "trainers/data/mazes.py": "from tests.tiny import a\nfrom examples import b\n",
    "evaluation/__init__.py": "from trainers import data\nfrom trainers.data.mazes import a\n",
    "evaluation/runner.py": "from trainers import sft\nimport importlib\nimportlib.import_module('trainers.sft')\n",
    "examples/run.py": "import tests.hub\nfrom trainers import sft\nraise NotImplementedError\n",
    "tests/hub.py": "import examples.run\nimport evaluation\n# TO" + "DO: later\n",
    "pyproject.toml": "[project]\ndependencies=['torch', 'pillow']\noptional-dependencies={gpu=['deepspeed']}\n",
}
# rule -> the files it must name, with the lines
EXPECTED = {
    "wrong_directions": """
        modeling_latent/b.py:1 modeling_latent/d.py:2 trainers/sft.py:1 trainers/data/records.py:1
        trainers/data/mazes.py:1 trainers/data/mazes.py:2 evaluation/runner.py:1 evaluation/runner.py:3
        examples/run.py:1
    """,
    "wrong_travellers": """
        modeling_latent/sub/deep.py modeling_latent/a.py:1 modeling_latent/b.py:1 modeling_latent/c.py:1
        modeling_latent/c.py:2 modeling_latent/d.py:2 modeling_latent/f.py:1
    """,
    "wrong_text_imports": "modeling_latent/b.py modeling_latent/e.py modeling_latent/f.py",
    "unfinished": "examples/run.py:3 tests/hub.py:3",
    "eager_optionals": "trainers/sft.py:4",
    "undeclared": "trainers/sft.py:4 trainers/grpo.py:2 trainers/data/records.py:3",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_finds_what_breaks_it(rule: Callable[[Path], list[str]], tmp_path: Path) -> None:
    for name, text in BAD_FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = {re.match(r"[^:]+(?::\d+)?", line).group() for line in rule(tmp_path)}
    assert found == set(EXPECTED[rule.__name__].split())


def test_packages_import_without_optional_dependencies() -> None:
    code = f"""
    import modeling_latent, trainers, trainers.data, evaluation
    import sys
    print([name for name in {OPTIONAL!r} if sys.modules.get(name) is not None])
    """
    assert run_python(code, blocked=OPTIONAL, cwd=ROOT) == "[]\n"


def test_the_wheel_holds_the_three_packages_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns("__pycache__")
    for name in PROJECT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("latent_reasoning-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(ROOT).as_posix() for path in python_files(ROOT, PACKAGES)}
    assert {name for name in names if name.endswith(".py")} == expected
    assert {name.split("/")[0] for name in names} == set(PACKAGES)
