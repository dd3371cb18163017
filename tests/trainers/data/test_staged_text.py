"""Records as pieces of token ids: the formats, their prompts, the length limit and what is refused."""

import re
from dataclasses import replace
from typing import Any

import pytest

from modeling_latent.configuration_latent import LATENT_METHODS
from tests.tiny import FAMILIES, tiny_processor
from trainers.data.records import Record, RecordError, make_record
from trainers.data.staged_text import (
    COCONUT_TOKENS,
    IVTLR_TOKENS,
    STAGED_FORMATS,
    StagedFormat,
    encode_staged,
    question_text,
    truncated_steps,
    user_text,
)


def record(**changes: Any) -> Record:
    made = make_record(
        "r",
        " Which one? ",
        "B",
        images=["a.png"],
        choices=["x", " y "],
        steps=["Look.", "It is y."],
        meta={"source": "f.json", "row": 3},
    )
    return {**made, **changes}


class Characters:
    """One token a special token of the formats, else one a character; a special start token of its own."""

    eos_token_id = 0
    special = ("</s>", "<s>", "<image>", "<racm3:break>", "<eoss>", "<reserved08706>")

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        found = re.findall("|".join(self.special) + "|.", text, re.DOTALL)
        ids = [self.special.index(token) if token in self.special else ord(token) + 10 for token in found]
        return [1, *ids] if add_special_tokens else ids

    def text(self, ids: list[int]) -> str:
        return "".join(self.special[i] if i < len(self.special) else chr(i - 10) for i in ids)


TOKENIZER = Characters()


def texts(made: Any) -> list[str]:
    return [TOKENIZER.text(ids) for ids in (made.question, *made.steps, made.answer, made.after_latents)]


def test_the_tokens_are_those_of_the_methods() -> None:
    for name, tokens in (("ivtlr", IVTLR_TOKENS), ("coconut", COCONUT_TOKENS)):
        assert list(LATENT_METHODS[name].tokens.items()) == list(tokens.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_formats_use_the_template_of_the_processor(family: str) -> None:
    processor = tiny_processor(family)
    user = "[Question]:{Which one?}\n[Options]:\n(A).{x}\n(B).{y}\nAnswer:\n"
    content = [{"type": "image"}, {"type": "text", "text": user}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert question_text(record(), processor, "ivtlr-qwen") == text
    assert text.startswith("<|im_start|>system") is (processor.default_system_message is not None)
    made = encode_staged(record(), processor, "ivtlr-qwen", [5])
    decode = processor.tokenizer.decode
    assert decode(made.question) == text.replace("<|image_pad|>", "<|image_pad|>" * 5)
    assert [decode(step) for step in made.steps] == ["Look.\n", "It is y.\n"]
    assert decode(made.answer) == "Therefore, the answer is B<|im_end|>"
    assert made == encode_staged(record(), processor.tokenizer, STAGED_FORMATS["ivtlr-qwen"], [5])


@pytest.mark.parametrize(
    ("name", "prompt", "text"),
    [
        ("ivtlr-qwen", "training", "[Question]:{Which one?}\n[Options]:\n(A).{x}\n(B).{y}\nAnswer:\n"),
        ("ivtlr-qwen", "published_inference", "[Question]:{Which one?}\n[Options]:\nA.{x}\nB.{y}\nAnswer:"),
        ("ivtlr-chameleon", "training", "[Question]:{<image> Which one?}\n[Options]:\n(A).{x}\n(B).{y}"),
        (
            "ivtlr-chameleon",
            "published_inference",
            "<s><racm3:break><image><eoss>[Question]:{Which one?}\n[Options]:\n(A).{x}\n(B).{y}\nAnswer:",
        ),
        ("coconut", "training", "<image> Which one? \n"),
        ("coconut", "published_inference", "<image> Which one? \n"),
        ("plain", "training", " Which one? "),
    ],
)
def test_user_text(name: str, prompt: str, text: str) -> None:
    assert user_text(record(), name, prompt=prompt) == text


def test_a_question_without_options_has_no_line_of_them() -> None:
    for choices in (None, []):
        assert user_text(record(choices=choices), "ivtlr-qwen") == "[Question]:{Which one?}\nAnswer:\n"


def test_pieces_of_chameleon() -> None:
    run = "<image>" * 3
    made = encode_staged(record(), TOKENIZER, "ivtlr-chameleon", [3])
    question = f"[Question]:{{{run} Which one?}}\n[Options]:\n(A).{{x}}\n(B).{{y}}"
    assert texts(made) == [question, "Look.\n", "It is y.\n", "Therefore, the answer is B</s>", ""]
    made = encode_staged(record(), TOKENIZER, "ivtlr-chameleon", [3], prompt="published_inference")
    assert texts(made)[0].startswith(f"<s><racm3:break>{run}<eoss>[Question]:{{Which one?}}")
    assert texts(made)[-1] == "<reserved08706>"
    two = encode_staged(record(images=["a.png", "b.png"]), TOKENIZER, "ivtlr-chameleon", [1, 2])
    assert two.question[:14] == encode_staged(record(), TOKENIZER, "ivtlr-chameleon", [3]).question[:14]


def test_pieces_of_coconut() -> None:
    made = encode_staged(record(images=[]), TOKENIZER, "coconut")
    assert texts(made) == ["<s> Which one? \n", "Look.\n", "It is y.\n", "### B</s>", ""]


def test_plain_takes_any_record_and_its_prefix_is_an_option() -> None:
    processor = tiny_processor()
    maze = make_record("m", "Find a path.", "D R", images=["m.png"], steps=["Move down."])
    made = encode_staged(maze, processor, "plain", [2])
    decode = processor.tokenizer.decode
    assert decode(made.question).endswith("<|image_pad|><|image_pad|><|vision_end|>Find a path.<|im_end|>\n"
                                          "<|im_start|>assistant\n")  # fmt: skip
    assert decode(made.answer) == "Therefore, the answer is D R<|im_end|>"
    made = encode_staged(maze, processor, replace(STAGED_FORMATS["plain"], answer_prefix="", step_end=" "), [2])
    assert [decode(ids) for ids in (*made.steps, made.answer)] == ["Move down. ", "D R<|im_end|>"]


# The length limit


@pytest.mark.parametrize(
    ("lengths", "limit", "kept"),
    [
        ([3, 3, 3], None, 3),
        ([3, 3, 3], 19, 3),
        ([3, 3, 3], 18, 2),
        ([3, 3, 3], 15, 1),
        ([3, 3, 3], 12, 0),
        ([3, 3, 3], 1, 0),
        ([8, 1, 1], 19, 2),
        ([8, 1, 1], 13, 0),  # the first does not fit, so the short ones behind it go too
        ([1, 8, 1], 13, 1),
        ([], 5, 0),
    ],
)
def test_steps_are_kept_from_the_front_up_to_the_first_that_does_not_fit(
    lengths: list[int], limit: int | None, kept: int
) -> None:
    steps = [[number] * length for number, length in enumerate(lengths)]
    assert truncated_steps(steps, 10, limit) == steps[:kept]


def test_limit_of_the_format_and_of_the_call() -> None:
    fmt = StagedFormat("short", STAGED_FORMATS["coconut"].training, max_length=50)
    example = record(images=[], steps=["a" * 9, "b" * 2])
    whole = encode_staged(example, TOKENIZER, fmt, max_length=None)
    assert [len(whole.question) + len(whole.answer), *map(len, whole.steps)] == [40, 10, 3]
    sizes = [len(encode_staged(example, TOKENIZER, fmt, max_length=n).steps) for n in ("format", 53, 50, 49, 1)]
    assert sizes == [1, 2, 1, 0, 0]
    assert (encode_staged(example, TOKENIZER, fmt).num_dropped_steps, whole.num_dropped_steps) == (1, 0)
    for wrong in (0, "none", True, 1.5):
        with pytest.raises(ValueError, match=re.escape(f"max_length={wrong!r} must be 'format', None")):
            encode_staged(example, TOKENIZER, fmt, max_length=wrong)


# What is refused


def test_a_chat_without_images_is_text_and_not_a_list_of_parts() -> None:
    """The template of a text model writes what it is given: a list would be written as Python shows it."""
    text = question_text(record(images=[]), tiny_processor("llama"), "plain")
    assert text == "<|im_start|>user\n Which one? <|im_end|>\n<|im_start|>assistant\n"
    for without in (tiny_processor(), tiny_processor().tokenizer):
        assert "user\n Which one? <|im_end|>" in question_text(record(images=[]), without, "plain")


BAD_RECORDS = {
    "empty question": ({"question": " "}, "question holds ' '"),
    "empty answer": ({"answer": ""}, "answer holds ''"),
    "step that is no text": ({"steps": ["a", 3]}, "steps holds 3"),
    "blank step": ({"steps": ["a", " \n"]}, r"steps holds ' \\n'"),
    "image without count": ({"images": ["a.png", "b.png"]}, "2 images but 1 counts of image tokens"),
    "image token": ({"question": "<image> Which?"}, "contains the token <image>; remove it"),
    "latent token": ({"steps": ["a <|latent|>"]}, r"contains the token <\|latent\|>; remove it"),
    "marker in an option": ({"choices": ["<|end-latent|>"]}, r"contains the token <\|end-latent\|>"),
    "more options than letters": ({"choices": ["x"] * 27}, "27 choices, more than letters"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_is_named(case: str) -> None:
    changes, reason = BAD_RECORDS[case]
    with pytest.raises(RecordError, match=rf"^f\.json, row 3: .*{reason}"):
        encode_staged(record(**changes), TOKENIZER, "ivtlr-chameleon", [3])


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown staged format 'qwen'; choose one of ivtlr-qwen, ivtlr-chameleon"):
        encode_staged(record(), TOKENIZER, "qwen", [3])
    with pytest.raises(ValueError, match="prompt='test' is unknown; choose 'training' or 'published_inference'"):
        encode_staged(record(), TOKENIZER, "coconut", [3], prompt="test")
    with pytest.raises(ValueError, match="'plain' writes the question through the chat template, and Characters has"):
        encode_staged(record(images=[]), TOKENIZER, "plain")


def test_a_tokenizer_that_does_not_fit_is_refused() -> None:
    tokenizer = tiny_processor().tokenizer
    with pytest.raises(ValueError, match="'<image>' is not one token of"):
        encode_staged(record(), tokenizer, "ivtlr-chameleon", [3])
    with pytest.raises(ValueError, match="'<s>' is not one token of"):
        encode_staged(record(images=[]), tokenizer, "ivtlr-chameleon", prompt="published_inference")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token, with which every answer ends"):
        encode_staged(record(images=[]), tokenizer, "coconut")
