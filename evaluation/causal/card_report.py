"""A causal card on disk: JSON, Markdown, figures, item pictures, and one HTML file that opens offline."""

import base64
import html
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from .card_data import CausalCard
from .card_figures import card_figures, effects_on
from .card_markdown import card_markdown
from .card_style import INK, new_figure, save_figure
from .item_picture import draw_item

_STYLE = """
:root{color-scheme:light dark;--ink:#1f2430;--back:#fff;--line:#d5dae3;--soft:#f4f6fa}
@media (prefers-color-scheme:dark){:root{--ink:#e5e9f0;--back:#15181f;--line:#343b49;--soft:#1f242e}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:76rem;margin:2rem auto;
padding:0 1rem}
.verdict{font-size:1.25rem;font-weight:600;border-left:5px solid #2b6cb0;background:var(--soft);padding:.7rem 1rem}
table{border-collapse:collapse;font-size:.85rem;display:block;overflow-x:auto;margin:.6rem 0}
td,th{border-bottom:1px solid var(--line);padding:.2rem .6rem;text-align:left;white-space:nowrap}
img{max-width:100%;background:#fff;border-radius:4px;margin:.4rem 0}
code{background:var(--soft);padding:0 .25em;border-radius:3px}
"""


def write_card(
    card: CausalCard, folder: str | Path, images: Mapping[int, Sequence[Image.Image]] | None = None
) -> dict[str, Path]:
    """Writes a card into a folder.

    Args:
        card: the card.
        folder: made if it is not there; files of the same names are replaced.
        images: pictures of the items in `card.items`, by their index; an item without is left out of the pictures.

    Returns:
        Name to file: `card.json`, `card.md`, `report.html`, `summary.png` (verdict, effects and one item), and figures
        and item pictures by their titles.
    """
    target = Path(folder)
    written = {"card.json": card.save(target / "card.json")}
    figures = card_figures(card, target / "figures")
    items = {
        f"item {card.ids[view.index]}": draw_item(view, images[view.index], target / "items" / f"{view.index}.png")
        for view in card.items
        if images and view.index in images
    }
    first = next(iter(items.values()), None)
    draw_summary(card, target / "summary.png", None if first is None else Image.open(first))
    pictures = {**figures, **items}
    relative = {title: path.relative_to(target).as_posix() for title, path in pictures.items()}
    markdown = card_markdown(card, relative)
    written["card.md"] = target / "card.md"
    written["card.md"].write_text(markdown, encoding="utf-8")
    written["report.html"] = target / "report.html"
    written["report.html"].write_text(report_html(card, pictures), encoding="utf-8")
    return {**written, "summary.png": target / "summary.png", **pictures}


def report_html(card: CausalCard, pictures: Mapping[str, Path]) -> str:
    """The card as one HTML page without links to anything; pictures are part of it."""
    body = markdown_to_html(card_markdown(card).replace(f"**{card.verdict.sentence}**", ""))
    title = html.escape(f"Causal card: {card.model} on {card.dataset}")
    drawn = [_figure(name, path) for name, path in pictures.items()]  # the effects come first
    verdict = f'<p class="verdict" data-verdict="{card.verdict.label}">{html.escape(card.verdict.sentence)}</p>'
    head, _, rest = body.partition("</h1>")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>{head}</h1>\n{verdict}\n{''.join(drawn[:1])}\n{rest}\n"
        + "\n".join([*drawn[1:], "</body></html>\n"])
    )


def _figure(name: str, path: Path) -> str:
    """A picture as a part of the page."""
    data, title = base64.b64encode(path.read_bytes()).decode(), html.escape(name)
    return f'<figure><figcaption>{title}</figcaption><img alt="{title}" src="data:image/png;base64,{data}"></figure>'


def markdown_to_html(text: str) -> str:
    """The Markdown that `card_markdown` writes, headings, tables, bullets, code and paragraphs; all text escaped."""
    blocks = []
    for block in text.strip().split("\n\n"):
        lines = block.strip().split("\n")
        if not lines[0]:
            continue
        if lines[0].startswith("#"):
            level = len(lines[0]) - len(lines[0].lstrip("#"))
            blocks.append(f"<h{level}>{_inline(lines[0][level:].strip())}</h{level}>")
        elif lines[0].startswith("|"):
            blocks.append(_table(lines))
        elif lines[0].startswith("- "):
            blocks.append("<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>")
        else:
            blocks.append(f"<p>{_inline(' '.join(lines))}</p>")
    return "\n".join(blocks)


def _table(lines: Sequence[str]) -> str:
    rows = [[cell.strip() for cell in line.replace("\\|", "\0")[1:-1].split("|")] for line in lines]
    head, body = rows[0], rows[2:]
    cells = [f"<tr>{''.join(f'<th>{_cell(cell)}</th>' for cell in head)}</tr>"]
    cells += [f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in body]
    return f"<table>{''.join(cells)}</table>"


def _cell(text: str) -> str:
    return _inline(text.replace("\0", "|"))


def _inline(text: str) -> str:
    """Escaped text with `code`."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts))


def draw_summary(card: CausalCard, path: str | Path, item: Image.Image | None = None) -> Path:
    """One picture for a README: the verdict, the effects, and the picture of one item.

    Args:
        card: the card.
        path: PNG file.
        item: a picture of [`draw_item`].
    """
    effects = list(card.effects.values())
    plot = 0.9 + 0.27 * len(effects)
    wide = 9.5
    below = 0.0 if item is None else wide * item.height / item.width
    height = 0.8 + plot + below
    figure = new_figure(wide, height)
    words = f"{card.model} on {card.dataset}, {len(card.ids)} items"
    figure.text(0.02, 1 - 0.22 / height, words, fontsize=9, color=INK, va="top")
    figure.text(
        0.02, 1 - 0.46 / height, _wrapped(card.verdict.sentence), fontsize=10, color=INK, weight="bold", va="top"
    )
    axes = figure.add_axes((0.2, (below + 0.55) / height, 0.77, (plot - 0.75) / height))
    effects_on(axes, effects, card.conditions)
    if item is not None:
        shown = figure.add_axes((0, 0, 1, below / height))
        shown.imshow(item)
        shown.axis("off")
    return save_figure(figure, path)


def _wrapped(text: str, width: int = 118) -> str:
    return "\n".join(textwrap.wrap(text, width)[:2])


__all__ = ["draw_summary", "markdown_to_html", "report_html", "write_card"]
