"""Colours and figures of a card; matplotlib is loaded when something is drawn."""

import warnings
from pathlib import Path
from typing import Any

INK, GREY, BLUE, RED, GREEN, BAND = "#1f2430", "#6b7280", "#2b6cb0", "#c0392b", "#1e8449", "#e8eef6"
READS = {"image": "#2b6cb0", "slots": "#c05621", "markers": "#b7791f", "question": "#4a5568", "sink": "#718096",
         "other": "#a0aec0"}  # fmt: skip
FAMILIES = {"content": "#c05621", "structure": "#2b6cb0", "edges": "#6b46c1", "state": "#b83280", "graft": "#2f855a",
            "input": "#2f855a"}  # fmt: skip
_DPI = 130


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches, for files only."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | Path) -> Path:
    """Writes a PNG file; characters that the font lacks are drawn as boxes."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(target, facecolor="white", metadata={"Software": None})
    return target


def plain_axes(axes: Any) -> None:
    """No frame but the axes."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)


__all__ = [
    "BAND",
    "BLUE",
    "FAMILIES",
    "GREEN",
    "GREY",
    "INK",
    "READS",
    "RED",
    "new_figure",
    "plain_axes",
    "save_figure",
]
