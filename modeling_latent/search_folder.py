"""A folder for `custom_generate`: the search over latents for stock checkpoints, where this library is not installed.

    save_search_folder("dmlr-search")
    model.generate(**inputs, custom_generate="dmlr-search", trust_remote_code=True, num_thought_tokens=4)

Pushed as a Hub repository, or beside the weights of a model, its name is given instead.
"""

import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

FOLDER = "custom_generate"  # the name that transformers looks for
ENTRY = '''"""`generate` behind a search over latents (DMLR, arXiv 2512.12623); written by `save_search_folder`."""

from .search_generate import generate_with_search as generate

__all__ = ["generate"]
'''
REQUIREMENTS = ("torch>=2.10", "transformers>=5.23")


def save_search_folder(path: str | Path) -> Path:
    """Write `custom_generate/generate.py` with the files that it needs, and `requirements.txt`.

    Args:
        path: a folder, created when absent; files of ours that are there are written again, others are kept.

    Returns:
        The folder, for `generate(custom_generate=str(folder), trust_remote_code=True, ...)`: its function is
        [`generate_with_search`], and takes the arguments of `generate` and the options of the search.
    """
    target = Path(path) / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    start = Path(__file__).with_name("search_generate.py")
    for source in {start, *map(Path, get_relative_import_files(start))}:
        shutil.copyfile(source, target / source.name)
    (target / "generate.py").write_text(ENTRY, encoding="utf-8")
    (target / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n", encoding="utf-8")
    return Path(path)


__all__ = ["save_search_folder"]
