"""Options in texts, letters of labels, facts of MMStar."""

import pytest

from evaluation.benchmarks.choice_items import letter_of, mmstar_facts, options_in


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("(a) Yes (b) No", ["Yes", "No"]),
        ("Which?\nOptions: A: up, B: down, and left, C: a (B) sign", ["up", "down, and left", "a (B) sign"]),
        ("What?\n(A) red\n(B) blue\nAnswer with A or B.", ["red", "blue"]),
        ("A. cold\nB. hot\nC. mild", ["cold", "hot", "mild"]),
        ("Is the letter (a) red?", None),
        ("(b) No (a) Yes", None),
        ("What is it? (A) (B) dog", None),
        ("", None),
    ],
)
def test_options_in_a_text(text: str, options: list[str] | None) -> None:
    assert options_in(text) == options


def test_letters_of_labels() -> None:
    labels = ["(a)", "A", " b. ", "(H)", "i", "AB", "neither", "", "()"]
    assert [letter_of(label) for label in labels] == ["A", "A", "B", "H", "", "", "", "", ""]


def test_facts_of_mmstar() -> None:
    assert mmstar_facts({}) == {"category": None, "l2_category": None, "source": None}
    row = {"category": "c", "l2_category": "s", "meta_info": '{"source": "toy", "split": "val"}', "question": "?"}
    assert mmstar_facts(row) == {"category": "c", "l2_category": "s", "source": "toy"}
    assert mmstar_facts({**row, "meta_info": {"source": "other"}})["source"] == "other"
    for wrong in ("{cut", "[1]", 3):
        with pytest.raises(ValueError, match="meta_info|Expecting"):
            mmstar_facts({"meta_info": wrong})
