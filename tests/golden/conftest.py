"""Where the golden vectors are, and tests made from their files.

A set is a folder of one method: `manifest.json` with the tolerances, JSON tables and safetensors. The tests know the
layout and no value. All sets are in the folder that the environment variable LATENT_GOLDEN_DIR names, by default
`../shared/golden` beside the repository.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for _part in (
    *(f"laser_{name}" for name in ("batching", "data", "decoding", "evaluation", "losses")),
    "dmlr_naive",
    "dmlr_prompts",
    "dmlr_protocols",
    "dmlr_results",
    "dmlr_search",
    "dmlr_verify",
    "ivtlr_chameleon",
    "ivtlr_coconut",
    "ivtlr_data",
    "ivtlr_stages",
    "ivtlr_naive",
    "ivtlr_plan",
    "ivtlr_protocols",
    "ivtlr_published",
    "ivtlr_stock",
    "lavit_adapters",
    "lavit_answers",
    "lavit_builder",
    "lavit_data",
    "lavit_decoding",
    "lavit_losses",
    "lavit_teacher",
    "lavit_trainer",
    "lvr_data",
    "lvr_decoding",
    "lvr_losses",
    "lvr_rewards",
    "lvr_rl",
):
    pytest.register_assert_rewrite(f"tests.golden.{_part}")

REPOSITORY = Path(__file__).resolve().parents[2]


def golden_dir(method: str) -> Path:
    """Folder of a method's set. Skips the calling module or test, with the reason, when there is none."""
    root = Path(os.environ.get("LATENT_GOLDEN_DIR") or REPOSITORY.parent / "shared" / "golden")
    folder = root / method
    if not folder.is_dir():
        reason = f"no golden vectors of {method!r} in {root}: set LATENT_GOLDEN_DIR to the folder that holds them"
        pytest.skip(reason, allow_module_level=True)
    return folder


def golden_json(folder: Path, name: str, default: Any = None) -> Any:
    """Content of a JSON file of the set, or `default` when the set lacks the file."""
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default


def each(argument: str, values: list[Any], ids: Callable[[Any], str] = str) -> Callable[[Callable], Callable | None]:
    """Decorator: one test per value, and no test at all when the set has no values."""

    def decorate(test: Callable) -> Callable | None:
        return pytest.mark.parametrize(argument, values, ids=ids)(test) if values else None

    return decorate


def tolerance(text: str) -> float:
    """First number of a tolerance as the manifest words it: "relative 1e-5 (...)" gives 1e-5, "exact" gives 0."""
    if text.strip().startswith("exact"):
        return 0.0
    number = re.search(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?", text)
    if number is None:
        raise ValueError(f"manifest tolerance {text!r} holds no number")
    return float(number.group())
