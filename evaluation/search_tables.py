"""Tables of `hub_configs/methods/dmlr.md` that are made from code; `python -m evaluation.search_tables` prints them.

Options of the search (`modeling_latent/search_options.py`), and the published flags (`search_arguments.py`), both with
their defaults in the two modes.
"""

from typing import Any

from modeling_latent.search_options import SEARCH_OPTIONS

from .search_arguments import PUBLISHED_FLAGS


def _value(value: Any) -> str:
    return "" if value is None or value == "" else f"`{value}`"


def search_option_table() -> list[str]:
    """Lines of the table of options; an empty default is `None`."""
    lines = ["| option | paper | reference | meaning |", "|---|---|---|---|"]
    for name, option in SEARCH_OPTIONS.items():
        lines.append(f"| `{name}` | {_value(option.paper)} | {_value(option.reference)} | {option.help} |")
    return lines


def published_flag_table() -> list[str]:
    """Lines of the table of published flags, in the published order."""
    lines = ["| flag | paper | reference | effect |", "|---|---|---|---|"]
    for flag in PUBLISHED_FLAGS:
        effect = flag.help if flag.dead is None else f"refused when given: {flag.dead}"
        lines.append(f"| `--{flag.name}` | {_value(flag.paper)} | {_value(flag.reference)} | {effect} |")
    return lines


if __name__ == "__main__":
    print("\n".join([*search_option_table(), "", *published_flag_table()]))
