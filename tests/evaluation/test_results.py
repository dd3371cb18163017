"""Numbers of conditions against values worked out by hand, the files, the tables, the figure and the model card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from evaluation.benchmarks.registry import benchmark
from evaluation.harness.model_index import draw_accuracies, model_index, write_model_card
from evaluation.harness.replies import item_key, line_of
from evaluation.harness.results import chance_of, forced_close_rate, write_results
from evaluation.harness.tables import condition_line, difference_line
from evaluation.harness.variants import Asked, Variant, variants_of
from evaluation.runner import Prediction
from tests.evaluation.evaluation_parts import asked, letter_records, letters
from trainers.data.maze_planning import chance_level
from trainers.data.mazes import maze_of_record

DYNAMIC = Variant("dynamic", {"latent_strategy": "dynamic"})
OFF = Variant("off", {"latent_strategy": "off"})


def reply(name: str, raw: str, steps: int, tokens: int, *closed_by: str, markers: int = 0) -> Prediction:
    return Prediction(name, raw, raw, steps, tokens, closed_by, num_markers=markers, raw=raw)


def lines_of(given: Asked, replies: dict[str, Sequence[Prediction]]) -> dict[str, Any]:
    """Lines of a run, half a second for the first item, a second more for each further one."""
    return {
        item_key(given.benchmark.name, variant, number): line_of("", [each], 0.5 + number)
        for variant, own in replies.items()
        for number, each in enumerate(own)
    }


# Gold answers of the six records are A B A B A B; clusters are pairs.
REPLIES = {
    "dynamic": [
        reply("q0", "A", 4, 9, "end_token"),
        reply("q1", "B", 4, 9, "max_latent_steps", markers=2),
        reply("q2", "?", 0, 3),
        reply("q3", "A", 2, 6, "end_token", "open"),
        reply("q4", "A", 0, 4),
        reply("q5", "A", 0, 2),
    ],
    "off": [reply(f"q{i}", text, 0, 2) for i, text in enumerate("ABAAAB")],
}


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Any]:
    given = asked(number=6)
    return write_results(tmp_path, [given], [DYNAMIC, OFF], "org/tiny", lines_of(given, REPLIES))


def test_numbers_of_a_condition(found: dict[str, Any]) -> None:
    first = found["conditions"][0]
    assert first["accuracy"] == pytest.approx(50) and first["n"] == 6  # right: q0, q1, q4
    assert (first["low"], first["high"]) == pytest.approx((18.76, 81.24), abs=0.01)
    assert first["by_group"] == {
        "A": {"n": 3, "accuracy": pytest.approx(200 / 3)},
        "B": {"n": 3, "accuracy": pytest.approx(100 / 3)},
    }
    assert first["parse_rate"] == pytest.approx(500 / 6)
    assert first["trigger_rate"] == pytest.approx(50)
    assert first["forced_close_rate"] == pytest.approx(50)  # two of the four spans
    assert first["latent_steps"] == pytest.approx(10 / 6)
    assert first["text_tokens"] == pytest.approx((5 + 3 + 3 + 4 + 4 + 2) / 6)  # positions without slots and markers
    assert first["ar_steps"] == pytest.approx((9 + 7 + 3 + 6 + 4 + 2) / 6)
    assert (first["cluster_accuracy"], first["clusters"]) == (pytest.approx(100 / 3), 3)
    assert first["chance"] == 50 and "strict_accuracy" not in first and "against_first" not in first
    assert first["items"][1] == {
        "id": "q1", "gold": "B", "answer": "B", "correct": True, "text": "B", "raw": "B", "latent_path": "B",
        "latent_steps": 4, "prefilled": 0, "tokens": 9, "closed_by": ["max_latent_steps"],
    }  # fmt: skip


def test_difference_to_the_first(found: dict[str, Any]) -> None:
    """`off` is right where `dynamic` is and on q2 and q5: +2 of 6."""
    other = found["conditions"][1]["against_first"]
    assert found["conditions"][1]["forced_close_rate"] is None
    assert other["variant"] == "dynamic" and other["difference"] == pytest.approx(100 / 3)
    assert (other["only_first"], other["only_second"]) == (0, 2)
    assert other["p_mcnemar"] == other["p_holm"] == 0.5 and not other["equivalent"]
    assert other["discordant"] == pytest.approx(1 / 3) and other["mde"] == pytest.approx(280 * (1 / 18) ** 0.5)
    assert other["low"] == 0 and other["high"] == pytest.approx(50)  # of three pairs with 0, 1/2 and 1/2


def test_several_conditions_are_corrected_together(tmp_path: Path) -> None:
    """Holm: the smallest p-value times the number of conditions."""
    given = asked(number=6)
    wrong = [reply(f"q{i}", text, 0, 2) for i, text in enumerate("BABABA")]
    right = [reply(f"q{i}", text, 0, 2) for i, text in enumerate("ABABAB")]
    variants = [Variant(name, {"latent_strategy": "off"}) for name in ("right", "wrong", "same")]
    lines = lines_of(given, {"right": right, "wrong": wrong, "same": right})
    _, first, second = write_results(tmp_path, [given], variants, "m", lines)["conditions"]
    assert first["against_first"]["p_mcnemar"] == pytest.approx(2 / 64)
    assert first["against_first"]["p_holm"] == pytest.approx(4 / 64)
    assert second["against_first"]["p_holm"] == 1


def test_files(found: dict[str, Any], tmp_path: Path) -> None:
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(found))
    times = json.loads((tmp_path / "timings.json").read_text())
    assert times["conditions"] == {"letters/dynamic": 3.0, "letters/off": 3.0}
    assert times["items"]["letters/off/5"] == 5.5 and len(times["items"]) == 12
    table = (tmp_path / "results.md").read_text().splitlines()
    assert table[0] == "# org/tiny"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("| Letters")]
    assert cells[0] == ["Letters", "dynamic", "6", "50.0", "[18.8, 81.2]", "", "", "", "", "83 %", "50 %", "50 %",
                        "1.7", "3.5", "3.00"]  # fmt: skip
    assert cells[1][5:9] == ["+33.3 [+0.0, +50.0]", "0.500", "no", "66.0"] and cells[1][11] == ""
    assert "all items of a cluster right 33.3 (n=3), chance 50.0" in "\n".join(table)


def test_seconds_are_in_no_other_file(tmp_path: Path) -> None:
    given, texts = asked(number=6), []
    for seconds in (1.0, 2.0):
        lines = {key: {**line, "seconds": seconds} for key, line in lines_of(given, REPLIES).items()}
        write_results(tmp_path, [given], [DYNAMIC, OFF], "m", lines)
        texts.append((tmp_path / "results.json").read_bytes())
    assert texts[0] == texts[1]


def test_lines_for_a_terminal(found: dict[str, Any]) -> None:
    first, other = found["conditions"]
    assert condition_line(first, 0.25) == (
        "letters, dynamic: 50.0 % [18.8, 81.2]  n=6  A 66.7  B 33.3  read 83 %  latent steps 1.7 in 50 % of replies  "
        "closed by force 50 %  text tokens 3.5  AR steps 5.2  0.25 s an item"
    )
    line = difference_line(other)
    assert line.startswith("  letters, off minus dynamic: +33.3 points [+0.0, +50.0]  p=0.500")
    assert "not shown to be equal" in line and line.endswith("n=6 finds: 66.0")


def test_the_corrected_scorer_stands_beside_a_published_one(tmp_path: Path) -> None:
    given = asked("never", 6)
    first, _ = write_results(tmp_path, [given], [DYNAMIC, OFF], "m", lines_of(given, REPLIES))["conditions"]
    assert first["accuracy"] == 0 and first["strict_accuracy"] == pytest.approx(50)
    assert "strictly 50.0 %" in condition_line(first)


@pytest.mark.parametrize(
    ("strategy", "closed_by", "rate"),
    [
        ("dynamic", [("end_token",), ("max_latent_steps",)], 50),
        ("fixed", [("num_latent_steps",)], 0),
        ("end_vector_reference", [("cap_since_start",), ("end_vector_reference",)], 50),
        ("dynamic", [("repetition", "open", "end_token")], 200 / 3),
        ("dynamic", [(), ()], None),
        ("learned", [("open",)], None),
        ("staged", [("open",)], None),
        ("off", [()], None),
    ],
)
def test_spans_closed_by_force(strategy: str, closed_by: list[tuple[str, ...]], rate: float | None) -> None:
    found = forced_close_rate([reply("q", "A", 1, 2, *each) for each in closed_by], strategy)
    assert found == (None if rate is None else pytest.approx(rate))


def test_chance() -> None:
    """Among two options and among four; of mazes random plans; none for open answers."""
    records = letter_records(2)
    mixed = letters(answers=lambda record: "AB" if record["id"] == "q0" else "ABCD")
    assert chance_of(Asked(mixed, mixed.protocol(), records)) == pytest.approx(100 * (1 / 2 + 1 / 4) / 2)
    opened = letters(answers=lambda record: None)
    assert chance_of(Asked(opened, opened.protocol(), records)) is None
    bench = benchmark("mazes")
    mazes = bench.read(num=3, seed=1)
    assert chance_of(Asked(bench, bench.protocol(), mazes)) == 100 * chance_level(map(maze_of_record, mazes))


# Model card and figure


def test_model_index(found: dict[str, Any], tmp_path: Path) -> None:
    """One entry a condition; another model's results are not its own."""
    found["conditions"].append({**found["conditions"][0], "model": "org/other"})
    (entry,) = yaml.safe_load(model_index(found))["model-index"]
    assert entry["name"] == "tiny" and len(entry["results"]) == 2
    first = entry["results"][0]
    assert first["dataset"]["config"] == "dynamic" and first["dataset"]["type"] == "letters"
    assert first["dataset"]["args"] == {"protocol": "default", "n": 6, "latent_strategy": "dynamic", "votes": 0}
    (metric,) = first["metrics"]
    assert (metric["type"], metric["value"]) == ("accuracy", 50.0)
    assert metric["args"]["wilson_95"] == [18.76, 81.24]
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: apache-2.0\n---\n# Mine\n\nText.\n")
    assert write_model_card(card, found) == card
    data = ModelCard.load(card)
    assert data.text.strip() == "# Mine\n\nText." and data.data.license == "apache-2.0"
    assert [(each.dataset_config, each.metric_value) for each in data.data.eval_results] == [
        ("dynamic", 50.0),
        ("off", 83.33),
    ]


def test_published_data_sets_have_their_hub_id(found: dict[str, Any]) -> None:
    for each in found["conditions"]:
        each["benchmark"] = "mmstar"
    (entry,) = yaml.safe_load(model_index(found))["model-index"]
    assert {each["dataset"]["type"] for each in entry["results"]} == {"Lin-Chen/MMStar"}


def test_figure(found: dict[str, Any], tmp_path: Path) -> None:
    """A dot and an interval for each condition: their colours are in the picture."""
    colours = Image.open(draw_accuracies(found, tmp_path / "figure.png")).convert("RGB").getcolors(1 << 24)
    assert {(0x2B, 0x6C, 0xB0), (0xC0, 0x39, 0x2B)} <= {colour for _, colour in colours}


# Conditions


def test_every_strategy_with_every_number() -> None:
    found = variants_of(["dynamic", "fixed:num_latent_steps=2", "off"], {"max_latent_steps": [4, 8]})
    assert [(each.name, each.options) for each in found] == [
        ("dynamic, max_latent_steps 4", {"latent_strategy": "dynamic", "max_latent_steps": 4}),
        ("dynamic, max_latent_steps 8", {"latent_strategy": "dynamic", "max_latent_steps": 8}),
        ("fixed:num_latent_steps=2", {"latent_strategy": "fixed", "num_latent_steps": 2}),
        ("off", {"latent_strategy": "off"}),
    ]
    own = variants_of(["fixed:num_latent_steps=2", "fixed"], {"num_latent_steps": [3, 4]})
    assert [each.options["num_latent_steps"] for each in own] == [2, 3, 4]


@pytest.mark.parametrize(
    ("strategies", "numbers", "votes", "message"),
    [
        (
            ["off"],
            {"max_latent_steps": [4]},
            [],
            r"max_latent_steps=\[4\] is read by none of the strategies",
        ),
        (["slow"], {}, [], "latent_strategy='slow' is unknown"),
        (["off", "off"], {}, [], r"the conditions \['off'\] are asked for several times"),
        (["dynamic"], {"max_latent_steps": [4, 4]}, [], "asked for several times"),
        (["off"], {}, [3, 0], "give numbers of replies, 1 or more"),
    ],
)
def test_wrong_conditions(strategies: list[str], numbers: dict, votes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        variants_of(strategies, numbers, votes)
