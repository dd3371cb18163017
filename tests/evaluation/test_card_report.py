"""A card on disk: JSON, Markdown, figures, pictures of items, and the HTML that opens offline."""

import base64
import io
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.causal.card_data import CausalCard
from evaluation.causal.card_figures import card_figures, draw_cards, draw_states
from evaluation.causal.card_markdown import card_markdown, effects_table
from evaluation.causal.card_report import draw_summary, markdown_to_html, write_card
from evaluation.causal.item_picture import draw_item, heat_on_image, peak_box
from tests.evaluation.card_fixture import filled_card, images

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What a page holds: tags with attributes, cells of tables, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cells and self.tags[-1][0] in ("td", "th", "code"):
            self.cells[-1] += data.rstrip("\n")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_card(filled_card(), tmp_path_factory.mktemp("card"), images())


def test_all_files_are_there_and_pictures_open(written: dict[str, Path]) -> None:
    names = {"card.json", "card.md", "report.html", "summary.png", "effects", "slots an item", "effect by slot",
             "eigenvalues", "cosines across items", "enrichment by layer"}  # fmt: skip
    names |= {f"item item {number}" for number in (1, 2, 3)}
    assert set(written) == names
    for path in written.values():
        if path.suffix == ".png":
            assert np.asarray(Image.open(path).convert("L")).std() > 5, path  # not one colour
    assert CausalCard.load(written["card.json"]).to_json() == filled_card().to_json()


def test_the_markdown_has_the_numbers(written: dict[str, Path]) -> None:
    text, card = written["card.md"].read_text(encoding="utf-8"), filled_card()
    assert text.splitlines()[2] == f"**{card.verdict.sentence}**"
    row = next(line for line in effects_table(card).splitlines() if "gauss_norm" in line)
    effect = card.effects["gauss_norm"]
    assert "-30.0" in row and f"[{effect.low:+.1f}, {effect.high:+.1f}]" in row and f" {effect.mde:.1f} " in row
    assert "oracle headroom" in text and "+11.1" in text  # 4 of 36
    assert "- cf_donor: no pairs | none" in text and "`in`: collapse: of <everything>" in text
    assert "](figures/effects.png)" in text and "](items/1.png)" in text


def test_the_page_is_whole_and_escaped(written: dict[str, Path]) -> None:
    text = written["report.html"].read_text(encoding="utf-8")
    page = Page(text)
    assert "http" not in text.replace("http-equiv", "") and "<script" not in text and "<link" not in text
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 9
    for source in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    assert ("p", {"class": "verdict", "data-verdict": filled_card().verdict.label}) in page.tags
    assert "collapse: of <everything>" in page.text and "of <everything>" not in text
    assert "gauss_norm" in page.cells and "-30.0" in page.cells


def test_markdown_of_tables_code_and_bars() -> None:
    page = Page(markdown_to_html("# A <b>\n\n| x \\| y | `c` |\n| --- | --- |\n| 1 | 2 |\n\n- one\n- two"))
    assert page.cells == ["x | y", "c", "1", "2"] and "A <b>" in page.text
    assert [tag for tag, _ in page.tags].count("li") == 2


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path")
def test_the_page_is_drawn_by_a_browser_offline(written: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "page.png"
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,3000", f"--screenshot={target}"]
    subprocess.run(
        [CHROMIUM, *arguments, written["report.html"].as_uri()], check=True, capture_output=True, timeout=120
    )
    pixels = np.asarray(Image.open(target).convert("L"))
    assert pixels.shape[1] == 1200 and pixels.std() > 10


def test_figures_only_where_there_is_data(tmp_path: Path) -> None:
    card = filled_card()
    card.per_slot, card.geometry, card.attention = {}, {}, {}
    assert set(card_figures(card, tmp_path)) == {"effects", "slots an item"}
    assert draw_cards([filled_card(), card], tmp_path / "cards.png").is_file()
    with pytest.raises(ValueError, match="no card to draw"):
        draw_cards([], tmp_path / "none.png")
    rng = np.random.default_rng(0)
    groups = {"slots": rng.normal(size=(30, 8)), "image": rng.normal(size=(40, 8)) + 5, "none": np.zeros((0, 8))}
    first, second = (draw_states(groups, tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second  # seeded
    with pytest.raises(ValueError, match="3 states; a map needs ten"):
        draw_states({"slots": rng.normal(size=(3, 8))}, tmp_path / "c.png")


def test_a_summary_for_a_readme(written: dict[str, Path], tmp_path: Path) -> None:
    item = Image.open(written["item item 1"])
    path = draw_summary(filled_card(), tmp_path / "summary.png", item)
    alone = Image.open(draw_summary(filled_card(), tmp_path / "alone.png"))
    assert Image.open(path).height > alone.height > 200


# Heat maps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns", "size"), [(2, 4, (112, 56)), (4, 2, (57, 113)), (3, 3, (100, 90))])
def test_a_peak_on_a_patch_lands_on_its_pixels(rows: int, columns: int, size: tuple[int, int]) -> None:
    width, height = size
    for row in range(rows):
        for column in range(columns):
            heat = np.zeros((rows, columns))
            heat[row, column] = 1.0
            spread = heat_on_image(heat, size)
            assert spread.shape == (height, width)
            y, x = np.argwhere(spread > 0).T
            left, top, right, bottom = peak_box(heat, size)
            assert (left, top) == (column * width / columns, row * height / rows)
            assert abs(x.min() - left) < 1 and abs(x.max() + 1 - right) < 1
            assert abs(y.min() - top) < 1 and abs(y.max() + 1 - bottom) < 1


def test_pictures_of_items_have_a_row_an_image_and_refuse_missing_ones(tmp_path: Path) -> None:
    card, pictures = filled_card(), images()
    one, two = card.items[0], card.items[2]
    first = Image.open(draw_item(one, pictures[1], tmp_path / "one.png"))
    second = Image.open(draw_item(two, pictures[3], tmp_path / "two.png"))
    assert second.height > first.height * 1.4
    with pytest.raises(ValueError, match="item 3 has 2 pictures, 1 were given"):
        draw_item(two, pictures[3][:1], tmp_path / "three.png")


def test_files_that_are_no_card(tmp_path: Path) -> None:
    for name, text in (("a.json", "{"), ("b.json", json.dumps({"format": 9})), ("c.json", "[]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name} is no causal card .*; write it with examples/diagnose.py"):
            CausalCard.load(tmp_path / name)
    assert "undecided" in card_markdown(filled_card())
