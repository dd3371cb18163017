"""Prompts of the search: every kind of processor, templates and placeholders that need care, limits of image sizes.

The published texts and ids are checked by the golden vectors (`tests/golden/dmlr_prompts.py`)."""

import copy
import logging
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import ChameleonProcessor, PreTrainedTokenizerBase, ProcessorMixin, Qwen2_5_VLProcessor

from modeling_latent.search_messages import COT_TEMPLATES, SYSTEM_PROMPT
from modeling_latent.search_prompts import (
    PROMPT_MODES,
    SearchPrompt,
    pixel_limits,
    published_prompt_field,
    search_prompt,
    search_prompts,
)
from tests.tiny import CHAMELEON, FAMILIES, tiny_images, tiny_processor, tiny_stock_model
from trainers.tiny import QWEN3_CHAT_TEMPLATE, STOCK_CHAT_TEMPLATE, build_tiny_tokenizer
from trainers.tiny_chameleon import IMAGE_TOKENS, build_tiny_chameleon_image_processor
from trainers.tiny_text import CHAT_TEMPLATE, build_tiny_text_tokenizer
from trainers.tiny_tokenizer import TINY_TEXTS

QUESTION = "Is it 'red'?\nSay so."
GEMMA = (  # of a template without system turns
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
WITH_IMAGES = (*FAMILIES, CHAMELEON)


class StockQwen(Qwen2_5_VLProcessor):
    """The stock processor where torchvision, which its processor of videos needs, is not installed."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, "<|video_pad|>"])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def stock_qwen() -> StockQwen:
    image_processor = tiny_processor().image_processor
    return StockQwen(image_processor, build_tiny_tokenizer(TINY_TEXTS), chat_template=STOCK_CHAT_TEMPLATE)


def stock_chameleon() -> ChameleonProcessor:
    ours = tiny_processor(CHAMELEON)
    stock = ChameleonProcessor(build_tiny_chameleon_image_processor(), ours.tokenizer, IMAGE_TOKENS)
    stock.chat_template = ours.chat_template
    return stock


def text_tokenizer(template: str | None = CHAT_TEMPLATE, family: str = "llama") -> PreTrainedTokenizerBase:
    tokenizer = build_tiny_text_tokenizer(family)
    tokenizer.chat_template = template
    return tokenizer


def spans_hold_the_placeholder(prompt: SearchPrompt, token_id: int, number: int) -> None:
    assert prompt.thought_mask.shape == prompt.inputs["input_ids"].shape and prompt.thought_mask.dtype == torch.bool
    for ids, (start, end) in zip(prompt.inputs["input_ids"], prompt.thought_spans, strict=True):
        assert end - start == number and set(ids[start:end].tolist()) == {token_id}
        assert ids[start - 1] != token_id and token_id not in ids[end:].tolist()


# Every processor


@pytest.mark.parametrize("mode", PROMPT_MODES)
@pytest.mark.parametrize("family", WITH_IMAGES)
def test_processors_with_images(family: str, mode: str) -> None:
    processor, (image, other) = tiny_processor(family), tiny_images(2)
    questions, images = [QUESTION, "No?", "What?"], [image, None, other]
    single = search_prompt(processor, QUESTION, image, num_thought_tokens=3, mode=mode)
    batch = search_prompts(processor, questions, images, num_thought_tokens=3, mode=mode)
    pad = processor.tokenizer.pad_token_id
    for prompt in (single, batch):
        spans_hold_the_placeholder(prompt, pad, 3)
    tokens = (single.inputs["input_ids"] == processor.image_token_id).sum()
    assert tokens == {CHAMELEON: IMAGE_TOKENS, "qwen3_vl": 4}.get(family, 2)
    ids = single.inputs["input_ids"][0]
    assert torch.equal(batch.inputs["input_ids"][0][batch.inputs["attention_mask"][0].bool()], ids)
    assert (batch.inputs["attention_mask"].diff(dim=1) >= 0).all() and not batch.inputs["attention_mask"].all()
    pictures = batch.inputs["pixel_values"] if family == CHAMELEON else batch.inputs["image_grid_thw"]
    assert len(pictures) == 2
    assert "mm_token_type_ids" in batch.inputs or family == CHAMELEON
    assert SYSTEM_PROMPT in single.text[0] and single.text == batch.text[:1]


@pytest.mark.parametrize("family", WITH_IMAGES)
def test_a_stock_model_reads_the_prompt(family: str) -> None:
    prompt = search_prompt(tiny_processor(family), QUESTION, tiny_images(1)[0], num_thought_tokens=2)
    with torch.no_grad():
        logits = tiny_stock_model(family=family)(**prompt.inputs).logits
    assert logits.shape[:2] == prompt.thought_mask.shape


@pytest.mark.parametrize(
    ("stock", "family"), [(stock_qwen, "qwen2_5_vl"), (stock_chameleon, CHAMELEON)], ids=["qwen", CHAMELEON]
)
def test_stock_processors_give_the_same(stock: Any, family: str) -> None:
    options = {"num_thought_tokens": 2, "mode": "reference"}
    images = [*tiny_images(1), None]
    ours = search_prompts(tiny_processor(family), [QUESTION, "b"], images, **options)
    theirs = search_prompts(stock(), [QUESTION, "b"], images, **options)
    assert ours.text == theirs.text and ours.inputs.keys() == theirs.inputs.keys()
    assert all(torch.equal(ours.inputs[name], theirs.inputs[name]) for name in ours.inputs)
    assert torch.equal(ours.thought_mask, theirs.thought_mask)


def test_models_of_text_alone() -> None:
    tokenizer, processor = text_tokenizer(), tiny_processor("llama")
    ours = search_prompts(processor, [QUESTION, "b"], num_thought_tokens=2)
    theirs = search_prompts(tokenizer, [QUESTION, "b"], [None, None], num_thought_tokens=2)
    assert ours.inputs.keys() == theirs.inputs.keys() == {"input_ids", "attention_mask"}
    assert torch.equal(ours.inputs["input_ids"], theirs.inputs["input_ids"])
    spans_hold_the_placeholder(theirs, tokenizer.convert_tokens_to_ids("<|endoftext|>"), 2)
    for each in (tokenizer, processor):
        with pytest.raises(
            ValueError, match=f"row 1: {type(each).__name__} takes text alone, and the row has an imag"
        ):
            search_prompts(each, ["a", "b"], [None, tiny_images(1)[0]], num_thought_tokens=2)


# Texts


def test_texts_of_the_two_modes() -> None:
    processor, end = tiny_processor(), "<|endoftext|>" * 2 + "<|im_end|>\n<|im_start|>assistant\n"
    space = (
        "The following special tokens represent YOUR INTERNAL THINKING SPACE where your reasoning happens "
        "implicitly.\n"
    )
    for index, template in enumerate(COT_TEMPLATES):
        texts = {
            mode: search_prompt(processor, QUESTION, num_thought_tokens=2, mode=mode, prompt_index=index).text[0]
            for mode in PROMPT_MODES
        }
        begin = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n{template}"
        assert texts["paper"] == (
            f"{begin}{QUESTION}\n\n{space}You do NOT need to output explicit reasoning steps. After these tokens, "
            f"directly provide your final answer. Here are the 2 special tokens: {end}"
        )
        assert texts["reference"] == (
            f"{begin}{[QUESTION]!r}\n\nPROBLEM: {QUESTION}\n\n{space}You do NOT need to output explicit reasoning "
            "stepsAfter these tokens, directly provide your final answer."
            f"Here are the 2 special tokens: {end}"
        )
    alone = search_prompt(processor, QUESTION, num_thought_tokens=2, prompt_index=None).text[0]
    assert f"<|im_start|>user\nPROBLEM: {QUESTION}\n\n{space}" in alone


def test_the_prompt_field_of_result_files_has_the_templates_own_system_message() -> None:
    asked = f"<|im_start|>user\n{COT_TEMPLATES[2]}{[QUESTION]!r}<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert published_prompt_field(tiny_processor(), QUESTION, False, 2) == system + asked
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    found = published_prompt_field(tiny_processor("qwen3_vl"), QUESTION, True, 2)
    assert found == asked.replace("user\n", f"user\n{image}")


# Messages of the caller


def image_messages(image: Any = None) -> list[dict[str, Any]]:
    part = {"type": "image"} if image is None else {"type": "image", "image": image}
    return [{"role": "user", "content": [part, {"type": "text", "text": f"Look. {QUESTION}"}]}]


@pytest.mark.parametrize("mode", PROMPT_MODES)
def test_messages_are_extended_in_a_copy(mode: str) -> None:
    processor, (image, other) = tiny_processor(), tiny_images(2)
    messages = image_messages(other)
    before = copy.copy(messages[0]["content"])
    prompt = search_prompt(processor, QUESTION, image, num_thought_tokens=2, mode=mode, messages=messages)
    assert messages == [{"role": "user", "content": before}]
    assert prompt.text[0].count(QUESTION) == (2 if mode == "reference" else 1), "restated as published, or not at all"
    direct = search_prompt(processor, QUESTION, image, num_thought_tokens=2)
    assert torch.equal(prompt.inputs["pixel_values"], direct.inputs["pixel_values"]), "the image given comes first"
    held = search_prompt(processor, QUESTION, num_thought_tokens=2, mode=mode, messages=messages)
    assert held.inputs["image_grid_thw"].tolist() == [[1, 4, 4]], "else that of the messages"


def test_messages_in_paper_mode() -> None:
    processor = tiny_processor()
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Count."}]
    options = {"num_thought_tokens": 1, "messages": own}
    plain = search_prompt(processor, None, **options).text[0]
    assert plain == search_prompt(processor, "Count", **options).text[0]
    assert plain.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCount.\n\nThe following")
    other = search_prompt(processor, "What?", **options).text[0]
    assert "Count.\n\nPROBLEM: What?\n\nThe following" in other, "a question that the turn lacks is written out"
    assert SYSTEM_PROMPT not in plain


@pytest.mark.parametrize(
    ("messages", "image", "message"),
    [
        ([], None, r"row 0: messages must be a list of .* ends with the user's turn"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None, "it ends with 'assistant'"),
        (
            [{"role": "user", "content": 3}],
            None,
            "the content of a message must be a string or a list of parts, got 3",
        ),
        ([{"role": "user", "content": [{"type": "video"}]}], None, "a part of a message must be an image or a text"),
        ([{"role": "user", "content": "a"}], "image", "an image is given, and the messages hold no"),
        (image_messages(), None, "row 0: image 0 of the messages has no source; pass image=..."),
        (
            [{"role": "user", "content": "a <|endoftext|>"}],
            None,
            r"contains '<\|endoftext\|>', which stands for a tho",
        ),
    ],
)
def test_wrong_messages(messages: Any, image: Any, message: str) -> None:
    image = tiny_images(1)[0] if image else None
    with pytest.raises(ValueError, match=message):
        search_prompt(tiny_processor(), None, image, num_thought_tokens=1, messages=messages)


def test_text_models_take_lists_of_text_parts() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    text = [{"role": "user", "content": "ab"}]
    tokenizer, options = text_tokenizer(), {"num_thought_tokens": 1}
    first, second = (search_prompt(tokenizer, None, messages=each, **options) for each in (parts, text))
    assert first.text == second.text
    with pytest.raises(ValueError, match="takes text alone, and the messages hold an image"):
        search_prompt(tokenizer, None, messages=image_messages(), **options)


# Templates


def test_a_template_without_system_turns_gets_the_text_in_the_users() -> None:
    prompt = search_prompt(text_tokenizer(GEMMA), "What?", num_thought_tokens=2, prompt_index=2)
    assert prompt.text[0].startswith(f"<|im_start|>user\n{SYSTEM_PROMPT}\n\n{COT_TEMPLATES[2]}What?")
    assert prompt.generation_prompt == ["<|im_start|>model\n"]
    silent = GEMMA.replace("{{ raise_exception('no system role') }}", "{% continue %}").replace(
        "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
    )
    assert search_prompt(text_tokenizer(silent), "What?", num_thought_tokens=2, prompt_index=2).text == prompt.text
    image = tiny_images(1)[0]
    vision = QWEN3_CHAT_TEMPLATE.replace(
        "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
    )
    prompt = search_prompt(stock_qwen(), "What?", image, num_thought_tokens=2, chat_template=vision)
    assert f"user\n{SYSTEM_PROMPT}\n\n<|vision_start|>" in prompt.text[0] and prompt.thought_mask.sum() == 2


def test_templates_that_cannot_render_are_named() -> None:
    with pytest.raises(ValueError, match=r"\w+ has no chat template; set its chat_template, or"):
        search_prompt(text_tokenizer(None), "a", num_thought_tokens=1)
    broken = "{{ raise_exception('out of order') }}"
    with pytest.raises(ValueError, match="fails with a system message and without.*out of order.*pass chat_template"):
        search_prompt(text_tokenizer(broken), "a", num_thought_tokens=1)
    with pytest.raises(ValueError, match="row 0: the chat template of LatentProcessor fails .out of order"):
        published_prompt_field(tiny_processor(), "a", chat_template=broken)
    prompt = search_prompt(text_tokenizer(None), "a", num_thought_tokens=1, chat_template=CHAT_TEMPLATE)
    assert prompt.text == search_prompt(text_tokenizer(), "a", num_thought_tokens=1).text


def test_a_template_that_writes_its_own_beginning_token() -> None:
    processor = tiny_processor(CHAMELEON)
    begun = "{{ bos_token }}" + processor.chat_template
    prompts = [
        search_prompt(processor, "a", num_thought_tokens=1, chat_template=template) for template in (begun, None)
    ]
    assert torch.equal(*(prompt.inputs["input_ids"] for prompt in prompts)), "not twice"


def test_a_template_whose_text_changes_with_the_generation_prompt() -> None:
    template = "{% if add_generation_prompt %}go\n{% endif %}" + CHAT_TEMPLATE
    prompt = search_prompt(text_tokenizer(template), "a", num_thought_tokens=2)
    assert prompt.text[0].startswith("go\n") and prompt.generation_prompt == [""]


# Placeholders


def test_placeholders() -> None:
    gpt2 = text_tokenizer(CHAT_TEMPLATE, "gpt2")
    with pytest.raises(ValueError, match=r"has no free token that can stand for a thought.*pass placeholder="):
        search_prompt(gpt2, "a", num_thought_tokens=2)
    with pytest.raises(ValueError, match="has no free token"):
        search_prompt(tiny_processor("gpt2"), "a", num_thought_tokens=2, chat_template=CHAT_TEMPLATE)
    gpt2.add_tokens("<thought>", special_tokens=True)
    prompt = search_prompt(gpt2, "a", num_thought_tokens=2, placeholder="<thought>")
    spans_hold_the_placeholder(prompt, gpt2.convert_tokens_to_ids("<thought>"), 2)
    for placeholder in ("<nothing>", ""):
        with pytest.raises(ValueError, match=f"placeholder='{placeholder}' is no single token of "):
            search_prompt(gpt2, "a", num_thought_tokens=2, placeholder=placeholder)
    with pytest.raises(ValueError, match="is the image token"):
        search_prompt(tiny_processor(), "a", num_thought_tokens=2, placeholder="<|image_pad|>")


def test_a_placeholder_that_the_template_writes_is_refused() -> None:
    template = CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] }}<|endoftext|>")
    with pytest.raises(ValueError, match=r"row 0: the ids have no run of exactly 2 x '<\|endoftext\|>'"):
        search_prompt(text_tokenizer(template), "a", num_thought_tokens=2)
    cut = CHAT_TEMPLATE.replace("message['content']", "message['content'][:-13]")
    with pytest.raises(ValueError, match="no run of exactly 2"):
        search_prompt(text_tokenizer(cut), "a", num_thought_tokens=2)


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|image_pad|>"])
def test_questions_may_not_hold_a_placeholder(token: str) -> None:
    with pytest.raises(ValueError, match=r"row 1: the question contains '<\|\w+\|>', which stands for a"):
        search_prompts(tiny_processor(), ["a", f"b {token}"], num_thought_tokens=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "published"}, r"unknown mode 'published'; choose one of \['paper', 'reference'\]"),
        ({"num_thought_tokens": 0}, "num_thought_tokens=0 must be 1 or more"),
        ({"num_thought_tokens": True}, "num_thought_tokens=True must be"),
        ({"prompt_index": 3}, "prompt_index=3 must be 0 to 2, or None"),
        ({"images": [None, None]}, "2 images for 1 questions; give one a row"),
        ({"messages": []}, "0 messages for 1 questions"),
        ({"questions": []}, "questions are empty"),
        ({"questions": [None]}, "row 0: question must be a string, got None"),
        ({"messages": [[{"role": "user", "content": "a"}]], "questions": [3]}, "question must be a string, got 3"),
        (
            {"messages": [[{"role": "user", "content": "a"}]], "questions": [None], "mode": "reference"},
            "row 0: mode='reference' repeats the question of the messages; pass it too",
        ),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    options = {"questions": ["a"], "num_thought_tokens": 2, **options}
    with pytest.raises(ValueError, match=message):
        search_prompts(tiny_processor(), **options)


def test_a_batch_needs_a_padding_token() -> None:
    tokenizer = text_tokenizer()
    tokenizer.pad_token = None
    assert search_prompt(tokenizer, "a", num_thought_tokens=2).thought_mask.sum() == 2
    with pytest.raises(ValueError, match="has no padding token for 2 rows; set tokenizer.pad_token"):
        search_prompts(tokenizer, ["a", "b"], num_thought_tokens=2)


# Sizes of images


@pytest.mark.parametrize("bounds", [(1, 4), (4, 16), (6, 9), (20, 40)])
@pytest.mark.parametrize("family", FAMILIES)
def test_image_tokens_lie_within_their_bounds(family: str, bounds: tuple[int, int]) -> None:
    """In tokens of the processor at hand: squares of 28 pixels, of 32 in Qwen3-VL."""
    processor = tiny_processor(family)
    side = 32 if family == "qwen3_vl" else 28
    low, high = bounds
    expected = {"shortest_edge": low * side**2, "longest_edge": high * side**2}
    assert pixel_limits(processor, *bounds) == expected
    sizes = [(8, 8), (28, 56), (100, 60), (131, 150), (300, 420), (900, 500)]
    for size in sizes:
        image = Image.new("RGB", size)
        prompt = search_prompt(processor, "a", image, num_thought_tokens=1, min_tokens=low, max_tokens=high)
        tokens = int((prompt.inputs["input_ids"] == processor.image_token_id).sum())
        assert low <= tokens <= high, (size, tokens)
        assert tokens == prompt.inputs["image_grid_thw"].prod() // 4


def test_a_bound_left_out_is_the_processors_own() -> None:
    processor = tiny_processor()
    own = dict(processor.image_processor.size)
    assert pixel_limits(processor) == {name: own[name] for name in ("shortest_edge", "longest_edge")}
    assert pixel_limits(processor, 2) == {"shortest_edge": 2 * 784, "longest_edge": own["longest_edge"]}
    assert pixel_limits(processor, max_tokens=2) == {"shortest_edge": own["shortest_edge"], "longest_edge": 2 * 784}
    assert dict(processor.image_processor.size) == own


def test_an_image_that_cannot_lie_within_the_bounds_is_named(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        strip = Image.new("RGB", (2800, 28))
        options = {"num_thought_tokens": 1, "min_tokens": 1, "max_tokens": 4}
        prompt = search_prompts(tiny_processor(), ["a", "b"], [tiny_images(1)[0], strip], **options)
    finally:
        logger.removeHandler(caplog.handler)
    tokens = int((prompt.inputs["input_ids"][1] == tiny_processor().image_token_id).sum())
    assert tokens > 4
    assert [record.message for record in caplog.records if "tokens" in record.message] == [
        f"image 1 of this call has {tokens} tokens, a grid of 2x{tokens * 2} patches, outside the bounds of 1 to 4 "
        "tokens: no size of its shape lies between; crop it, or widen min_tokens and max_tokens"
    ]


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0, 4), "min_tokens=0 must be a number of image tokens, 1 or more"),
        ((1, 2.0), "max_tokens=2.0 must be a number of image tokens"),
        ((5, 4), "min_tokens=5 and max_tokens=4 leave no size: 3920 to 3136 pixels"),
        (
            (9, None),
            r"min_tokens=9 and max_tokens=None leave no size.*the processor's own\), and a token is 784 pixels",
        ),
    ],
)
def test_bounds_without_a_size(bounds: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pixel_limits(tiny_processor(), *bounds)


def test_processors_without_such_bounds() -> None:
    with pytest.raises(ValueError, match="the images of ChameleonImageProcessorPil have one number of tokens"):
        search_prompt(tiny_processor(CHAMELEON), "a", num_thought_tokens=1, min_tokens=1)
    with pytest.raises(ValueError, match="min_tokens=None, max_tokens=3: \\w+ takes no images"):
        search_prompt(text_tokenizer(), "a", num_thought_tokens=1, max_tokens=3)
