"""The processor: stock folders, chat template, masks, refusals, the readable path, and a folder that carries it."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from modeling_latent.processing_latent import DEFAULT_LATENT_TOKENS, LATENT_CHAT_TEMPLATE, LatentProcessor
from tests.hub import ROOT, run_python
from tests.tiny import LASER_TOKENS, tiny_images, tiny_inputs, tiny_processor, tiny_prompts, tiny_stock_model
from trainers.tiny import (
    QWEN_SPECIAL_TOKENS,
    STOCK_CHAT_TEMPLATE,
    TINY_TEXTS,
    build_tiny_image_processor,
    build_tiny_processor,
    build_tiny_tokenizer,
    save_tiny_stock_checkpoint,
    tiny_config,
)

GOLDEN = Path(os.environ.get("LATENT_GOLDEN_DIR", ROOT.parent / "shared" / "golden")) / "laser"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture
def processor() -> LatentProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_stock_checkpoint(tmp_path_factory.mktemp("stock"))


def qwen_like_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with as many entries as that of Qwen2.5-VL: 151,643 ordinary ones and its 22 added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [f"{i} filler" for i in range(151_643 - len(alphabet))]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
    <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call>
    </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"""
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names.split()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
    )


# Latent tokens


def test_laser_markers_get_the_ids_of_the_published_checkpoint() -> None:
    tokenizer = qwen_like_tokenizer()
    assert len(tokenizer) == 151_665
    processor = LatentProcessor(build_tiny_image_processor(), tokenizer, latent_tokens=LASER_TOKENS)
    ids = (processor.latent_start_token_id, processor.latent_token_id, processor.latent_end_token_id)
    assert ids == (151_665, 151_666, 151_667)
    assert processor.latent_patch_token_id is None
    assert len(tokenizer) == 151_668


def test_the_order_of_the_table_fixes_the_ids_and_survives_saving(tmp_path: Path) -> None:
    tokens = {"start": "<|s|>", "end": "<|e|>", "slot": "<|l|>", "patch": "<|p|>"}  # not the alphabetical order
    processor = build_tiny_processor(latent_tokens=tokens)
    size = len(processor.tokenizer)
    assert processor.tokenizer.convert_tokens_to_ids(list(tokens.values())) == list(range(size - 4, size))
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["latent_tokens"] == tokens
    again = LatentProcessor.from_pretrained(tmp_path)
    assert list(again.latent_tokens.items()) == list(tokens.items())
    assert len(again.tokenizer) == size
    assert again.latent_patch_token_id == processor.latent_patch_token_id == size - 1


def test_adding_twice_changes_nothing(processor: LatentProcessor) -> None:
    before = processor.tokenizer.get_vocab()
    assert processor.add_latent_tokens() == 0
    wrapped_again = LatentProcessor(processor.image_processor, processor.tokenizer, latent_tokens=LASER_TOKENS)
    assert wrapped_again.tokenizer.get_vocab() == before


def test_tokens_that_were_added_as_ordinary_ones_become_special() -> None:
    tokenizer = build_tiny_tokenizer(TINY_TEXTS)
    tokenizer.add_tokens(list(DEFAULT_LATENT_TOKENS.values()))
    processor = LatentProcessor(build_tiny_image_processor(), tokenizer)
    ids = tokenizer.convert_tokens_to_ids(list(DEFAULT_LATENT_TOKENS.values()))
    assert processor.decode(ids, skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"start": "<|s|>", "slot": "<|l|>"}, r"lacks the roles \['end'\]"),
        ({**DEFAULT_LATENT_TOKENS, "pach": "<|p|>"}, r"unknown roles \['pach'\]"),
        ({**DEFAULT_LATENT_TOKENS, "slot": " "}, "latent_tokens\\['slot'\\] must be a token string"),
        ({**DEFAULT_LATENT_TOKENS, "slot": "<|latent_end|>"}, "one token to two roles"),
        ({**DEFAULT_LATENT_TOKENS, "slot": "<|image_pad|>"}, "'<|image_pad|>' is already another special token"),
        ({**DEFAULT_LATENT_TOKENS, "slot": "a"}, "'a' is already an ordinary word"),
    ],
)
def test_a_wrong_table_is_refused(tokens: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        build_tiny_processor(latent_tokens=tokens)


def test_a_tokenizer_without_image_token_is_refused(processor: LatentProcessor) -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(ValueError, match=r"no image token '<\|image_pad\|>'"):
        LatentProcessor(processor.image_processor, PreTrainedTokenizerFast(tokenizer_object=backend))


# Loading


def test_a_stock_folder_loads_with_any_latent_tokens(stock_folder: Path) -> None:
    stock = build_tiny_tokenizer(TINY_TEXTS)
    processor = LatentProcessor.from_pretrained(stock_folder, latent_tokens=LASER_TOKENS)
    assert processor.latent_tokens == LASER_TOKENS
    assert processor.latent_token_id == len(stock) + 1
    assert processor.chat_template == processor.tokenizer.chat_template == LATENT_CHAT_TEMPLATE
    assert processor.tokenizer.padding_side == "left"
    assert type(processor.image_processor).__name__ == "Qwen2VLImageProcessorPil"
    assert processor.image_processor.size["longest_edge"] == 3136
    assert LatentProcessor.from_pretrained(stock_folder).latent_tokens == DEFAULT_LATENT_TOKENS
    assert LatentProcessor.from_pretrained(stock_folder, padding_side="right").tokenizer.padding_side == "right"


def test_latent_tokens_are_saved_once(stock_folder: Path, tmp_path: Path) -> None:
    LatentProcessor.from_pretrained(stock_folder, latent_tokens=LASER_TOKENS).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["latent_tokens"] == LASER_TOKENS
    assert "latent_tokens" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (tmp_path / "chat_template.jinja").read_text() == LATENT_CHAT_TEMPLATE


FRESH = """
import json, sys
import torch
from PIL import Image
from transformers import AutoProcessor

folder, again, picture = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules"), type(processor).__module__
processor.save_pretrained(again)
processor = AutoProcessor.from_pretrained(again, trust_remote_code=True)
messages = [
    {"role": "user", "content": [{"type": "image", "path": picture}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "Jeans"},
]
out = processor.apply_chat_template(
    messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
)
shown = {name: value.tolist() for name, value in out.items() if name != "pixel_values"}
shown["pixels"] = out["pixel_values"].double().sum().item()
shown["names"] = [type(processor).__name__, type(processor.image_processor).__name__]
shown["latent"] = processor.decode_latent([processor.latent_start_token_id, processor.latent_token_id])
names = ("modeling_latent", "trainers", "torchvision")
shown["loaded"] = [name for name in names if sys.modules.get(name) is not None]
print("RESULT" + json.dumps(shown))
"""


def test_a_saved_folder_loads_without_the_library(processor: LatentProcessor, tmp_path: Path) -> None:
    (image,) = tiny_images(1)
    image.save(tmp_path / "picture.png")
    LatentProcessor.register_for_auto_class()
    processor.save_pretrained(tmp_path / "saved")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    printed = run_python(
        FRESH,
        *[str(tmp_path / name) for name in ("saved", "saved-again", "picture.png")],
        blocked=("modeling_latent", "trainers", "evaluation", "tests", "torchvision"),
        env={"PYTHONPATH": "", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        cwd=elsewhere,
    )
    shown = json.loads(printed.split("RESULT")[1])
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "Jeans"},
    ]
    here = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", "assistant_masks"):
        assert shown[name] == here[name].tolist(), name
    assert shown["pixels"] == pytest.approx(here["pixel_values"].double().sum().item())
    assert shown["names"] == ["LatentProcessor", "Qwen2VLImageProcessorPil"]
    assert shown["latent"] == "⟨1 latent⟩"
    assert shown["loaded"] == []


# Chat template

CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "  Hi \n"}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
    [
        {"role": "user", "content": [{"type": "text", "text": "a\n"}, {"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "{{ c }}"}]},
        {"role": "assistant", "content": ""},
    ],
    [{"role": "assistant", "content": "d"}, {"role": "tool", "content": "e"}],
    [{"role": "system", "content": [{"type": "text", "text": "f"}]}, {"role": "user", "content": []}],
]


@pytest.mark.parametrize("add_vision_id", [False, True])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_the_template_renders_what_the_stock_one_renders(
    processor: LatentProcessor, conversation: list[dict], add_generation_prompt: bool, add_vision_id: bool
) -> None:
    options = {"add_generation_prompt": add_generation_prompt, "add_vision_id": add_vision_id}
    stock, _ = render_jinja_template([conversation], chat_template=STOCK_CHAT_TEMPLATE, **options)
    assert processor.apply_chat_template(conversation, **options) == stock[0]


def test_the_text_of_a_prompt_and_of_its_training_example(processor: LatentProcessor) -> None:
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    prompt = f"{SYSTEM}<|im_start|>user\n{PICTURE}What?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.apply_chat_template([user], add_generation_prompt=True) == prompt
    answer = "<|laser_start|>Seats Fence<|laser_end|><answer>B</answer>"
    example = [user, {"role": "assistant", "content": answer}]
    assert processor.apply_chat_template(example) == f"{prompt}{answer}<|im_end|>\n"
    begun = processor.apply_chat_template(
        [user, {"role": "assistant", "content": "<answer>"}], continue_final_message=True
    )
    assert begun == f"{prompt}<answer>"


def test_a_foreign_template_is_kept_and_one_with_tags_is_too(caplog: pytest.LogCaptureFixture) -> None:
    parts = (build_tiny_image_processor(), build_tiny_tokenizer(TINY_TEXTS))
    tagged = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    assert LatentProcessor(*parts, chat_template=tagged).chat_template == tagged
    several = {"default": STOCK_CHAT_TEMPLATE, "other": "{{ messages[0]['content'] }}"}
    processor = LatentProcessor(*parts, chat_template=several)
    assert processor.chat_template == {"default": LATENT_CHAT_TEMPLATE, "other": several["other"]}
    assert processor.apply_chat_template([{"role": "user", "content": "x"}], chat_template="other") == "x"
    logging.enable_propagation()
    try:
        for foreign in ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "{{ raise_exception('no') }}"):
            caplog.clear()
            assert LatentProcessor(*parts, chat_template=foreign).chat_template == foreign
            assert "no {% generation %} tags" in caplog.text
    finally:
        logging.disable_propagation()


def test_assistant_masks_with_images_in_a_padded_batch(processor: LatentProcessor) -> None:
    answers = ["<|laser_start|>Seats fence<|laser_end|><answer>B</answer>", "Jeans"]
    batch = [[*p, {"role": "assistant", "content": a}] for p, a in zip(tiny_prompts(), answers, strict=True)]
    second_turn = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "Red"}]
    batch[0] += second_turn
    for side in ("left", "right"):
        out = processor.apply_chat_template(
            batch,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": side},
        )
        assert out["assistant_masks"].shape == out["input_ids"].shape
        learnt = [out["input_ids"][row][out["assistant_masks"][row].bool()] for row in range(2)]
        assert processor.decode(learnt[0]) == f"{answers[0]}<|im_end|>\nRed<|im_end|>\n"
        assert processor.decode(learnt[1]) == "Jeans<|im_end|>\n"
    alone = processor.apply_chat_template(batch[1], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    kept = [i for i, m in zip(alone["input_ids"][0], alone["assistant_masks"][0], strict=True) if m]
    assert processor.decode(kept) == "Jeans<|im_end|>\n"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="set LATENT_GOLDEN_DIR to the folder of reference vectors")
def test_ids_and_learnt_positions_equal_those_of_the_reference_code() -> None:
    data = json.loads((GOLDEN / "data.json").read_text())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / "tiny_tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
    )
    size = len(tokenizer)
    images = build_tiny_image_processor(**data["pixel_budget"])
    processor = LatentProcessor(images, tokenizer, latent_tokens=LASER_TOKENS)
    assert len(tokenizer) == size
    for token, index in data["special_tokens"].items():
        assert tokenizer.convert_tokens_to_ids(token) == index
    assert len(data["examples"]) >= 6
    for example in data["examples"]:
        region = "<|laser_start|>" + " ".join(example["sample"]["reasoning_chain"]) + "<|laser_end|>"
        messages = []
        for turn in example["sample"]["conversations"]:
            text = turn["value"].replace("<laser>\n", "<laser>").replace("<laser>", region)
            text = text.replace("\n<image>\n", "<image>").replace("<image>\n", "<image>").replace("<image>", PICTURE)
            messages.append({"role": "user" if turn["from"] == "human" else "assistant", "content": text})
        pictures = [Image.new("RGB", (14 * w, 14 * h)) for _, h, w in example["image_grid_thw"]]
        out = processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"images": pictures},
        )
        assert out["input_ids"][0] == example["input_ids"], example["sample"]["question_id"]
        assert out["image_grid_thw"].tolist() == example["image_grid_thw"]
        learnt = [int(label != -100) for label in example["labels"]]
        assert out["assistant_masks"][0] == learnt, example["sample"]["question_id"]


# Calls


def test_every_image_becomes_its_tokens(processor: LatentProcessor) -> None:
    images = tiny_images(3)
    text = [f"{PICTURE}a{PICTURE}", "no image here", f"b {PICTURE}"]
    nested = processor(images=[images[:2], [], images[2:]], text=text, return_tensors="pt", padding=True)
    flat = processor(images=images, text=text, return_tensors="pt", padding=True)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"):
        assert torch.equal(nested[name], flat[name]), name
    assert set(nested) == set(processor.model_input_names)
    patches = nested["image_grid_thw"].prod(-1)
    assert nested["pixel_values"].shape == (patches.sum(), 3 * 2 * 14 * 14)
    is_image = nested["input_ids"] == processor.image_token_id
    assert is_image.sum(-1).tolist() == [(patches[0] + patches[1]).item() // 4, 0, patches[2].item() // 4]
    assert torch.equal(nested["mm_token_type_ids"], is_image.long())
    assert nested["attention_mask"][:, -1].all() and not nested["attention_mask"][1, 0]  # padded on the left
    right = processor(images=images, text=text, return_tensors="pt", padding=True, padding_side="right")
    assert right["attention_mask"][:, 0].all() and not right["attention_mask"][1, -1]
    for row in range(3):
        assert torch.equal(*[out["input_ids"][row][out["attention_mask"][row].bool()] for out in (nested, right)])


def test_text_only_batches_and_single_strings(processor: LatentProcessor) -> None:
    out = processor(text=["one two", "three"], padding=True, return_tensors="pt")
    assert set(out) == {"input_ids", "attention_mask", "mm_token_type_ids"}
    assert out["mm_token_type_ids"].sum() == 0
    for images in ([[], []], [None, None], []):
        same = processor(images=images, text=["one two", "three"], padding=True, return_tensors="pt")
        assert torch.equal(same["input_ids"], out["input_ids"])
    single = processor(text="three")
    assert single["input_ids"] == [processor.tokenizer("three")["input_ids"]]


def test_images_in_every_form_give_the_same_pixels(processor: LatentProcessor, tmp_path: Path) -> None:
    (image,) = tiny_images(1)
    image.save(tmp_path / "a.png")
    forms = [image, str(tmp_path / "a.png"), tmp_path / "a.png", np.asarray(image), [image], [[image]]]
    forms.append(np.asarray(image)[None])
    outs = [processor(images=form, text=PICTURE, return_tensors="pt") for form in forms]
    for form, out in zip(forms, outs, strict=True):
        assert torch.equal(out["pixel_values"], outs[0]["pixel_values"]), type(form)
        assert torch.equal(out["input_ids"], outs[0]["input_ids"])


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        ([[1], [1, 1]], [PICTURE, PICTURE], "text 1 has 1 image placeholders and 2 images"),
        ([[1, 1], []], [PICTURE, PICTURE], "text 0 has 1 image placeholders and 2 images"),
        (None, ["a", PICTURE], "text 1 has 1 image placeholders and 0 images; put one"),
        ([1], ["a", "b"], "1 images for 0 image placeholders"),
        ([1, 1], [PICTURE, PICTURE * 2, "a"], r"2 images for 3 image placeholders \(\[1, 2, 0\] a text\); text 1 is"),
        ([[1]], ["a", PICTURE], "1 lists of images for 2 texts"),
        ([[1], 1], [PICTURE, PICTURE], r"images\[1\] is a Image among lists"),
    ],
)
def test_counts_that_differ_are_named(
    processor: LatentProcessor, images: list | None, text: list[str], message: str
) -> None:
    (picture,) = tiny_images(1)
    fill = {1: picture}
    given = images and [[fill[i] for i in row] if isinstance(row, list) else fill[row] for row in images]
    with pytest.raises(ValueError, match=message):
        processor(images=given, text=text)


def test_unreadable_images_are_named(processor: LatentProcessor, tmp_path: Path) -> None:
    good, other = tiny_images(2)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 30)
    good.save(tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    cut = Image.open(tmp_path / "cut.jpg")  # Pillow reads the pixels later
    for bad in (str(tmp_path / "broken.png"), tmp_path / "absent.png", cut, 3, None):
        with pytest.raises(ValueError, match=r"images\[1\]\[0\] cannot be read .*pass a PIL image"):
            processor(images=[[good], [bad]], text=[PICTURE, PICTURE])
    with pytest.raises(ValueError, match=r"image 1 of this call \(Image, size \(300, 1\)\) was refused by"):
        processor(images=[other, Image.new("RGB", (300, 1))], text=[PICTURE, PICTURE])


def test_what_it_does_not_take_is_refused(processor: LatentProcessor) -> None:
    with pytest.raises(ValueError, match="got videos=list"):
        processor(text="a", videos=[1])
    with pytest.raises(ValueError, match="text 1 contains '<|video_pad|>'".replace("|", r"\|")):
        processor(text=["a", "<|vision_start|><|video_pad|><|vision_end|>"])
    with pytest.raises(ValueError, match="text must be a string or a list"):
        processor(text=7)
    with pytest.raises(ValueError, match="text 1 must be a string, got list"):
        processor(text=["a", ["b"]])
    with pytest.raises(ValueError, match="at least one input"):
        processor()
    with pytest.raises(ValueError, match="the conversation is empty"):
        processor.apply_chat_template([])


# Latent tokens in text


def test_a_text_with_a_slot_is_refused_unless_allowed(processor: LatentProcessor) -> None:
    text = ["fine <|laser_start|><|laser_end|>", "a<|laser|>b"]
    with pytest.raises(ValueError, match=r"text 1 contains the latent token '<\|laser\|>'.*allow_latent_tokens=True"):
        processor(text=text)
    out = processor(text=text, allow_latent_tokens=True)
    assert processor.latent_token_id in out["input_ids"][1]
    with_patch = build_tiny_processor(latent_tokens={**DEFAULT_LATENT_TOKENS, "patch": "<|latent_patch|>"})
    with pytest.raises(ValueError, match=r"'<\|latent_patch\|>'"):
        with_patch(text="<|latent_patch|>")


@pytest.mark.parametrize("token", list(LASER_TOKENS.values()))
@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_no_other_role_may_write_latent_tokens(processor: LatentProcessor, role: str, token: str) -> None:
    fine = {"role": "user", "content": "fine"}
    as_part = {"role": role, "content": [{"type": "image"}, {"type": "text", "text": f"x{token}"}]}
    for message in ({"role": role, "content": f"x{token}"}, as_part):
        for tokenize in (False, True):
            with pytest.raises(ValueError) as error:
                processor.apply_chat_template([fine, message], tokenize=tokenize, allow_latent_tokens=True)
            for word in ("message 1", repr(role), repr(token), "remove it", "sanitize_control_tokens=True"):
                assert word in str(error.value)
    with pytest.raises(ValueError, match="message 1 of conversation 1"):
        processor.apply_chat_template([[fine], [fine, as_part]])


def test_the_path_of_an_image_is_not_text(processor: LatentProcessor, tmp_path: Path) -> None:
    (image,) = tiny_images(1)
    image.save(tmp_path / "<|laser|>.png")
    part = {"type": "image", "path": str(tmp_path / "<|laser|>.png")}
    out = processor.apply_chat_template([{"role": "user", "content": [part]}], tokenize=True, return_dict=True)
    assert len(out["image_grid_thw"]) == 1


def test_an_assistant_may_open_and_close_a_span(processor: LatentProcessor) -> None:
    user = {"role": "user", "content": "x"}
    said = [user, {"role": "assistant", "content": "<|laser_start|>a<|laser_end|>b"}]
    out = processor.apply_chat_template(said, tokenize=True, return_dict=True)
    assert {processor.latent_start_token_id, processor.latent_end_token_id} <= set(out["input_ids"][0])
    laid_out = [user, {"role": "assistant", "content": "<|laser_start|><|laser|><|laser|><|laser_end|>b"}]
    for tokenize in (False, True):
        with pytest.raises(ValueError, match=r"message 1 \(role 'assistant'\).*allow_latent_tokens=True"):
            processor.apply_chat_template(laid_out, tokenize=tokenize)
    for options in ({"allow_latent_tokens": True}, {"processor_kwargs": {"allow_latent_tokens": True}}):
        out = processor.apply_chat_template(laid_out, tokenize=True, return_dict=True, **options)
        assert out["input_ids"][0].count(processor.latent_token_id) == 2


def test_sanitized_user_text_is_plain_text(processor: LatentProcessor) -> None:
    text = "a<|laser_start|><|laser|><|laser_end|>b"
    out = processor.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=True, return_dict=True, sanitize_control_tokens=True
    )
    (ids,) = out["input_ids"]
    assert not {processor._latent_id(role) for role in LASER_TOKENS} & set(ids)
    assert text in processor.decode(ids)


# Decoding


def test_skipping_special_tokens_hides_the_latents(processor: LatentProcessor) -> None:
    ids = processor(text="<|laser_start|><|laser|><|laser|><|laser_end|>Jeans<|im_end|>", allow_latent_tokens=True)
    assert processor.decode(ids["input_ids"][0], skip_special_tokens=True) == "Jeans"
    assert processor.batch_decode(ids["input_ids"], skip_special_tokens=True) == ["Jeans"]
    assert processor.post_process_image_text_to_text(ids["input_ids"]) == ["Jeans"]


def span(processor: LatentProcessor, said: list[int]) -> tuple[list[int], list[int]]:
    """A prompt, a span whose slots said these ids, and an answer: sequence ids and readable ids."""
    head = [*processor.tokenizer("What?<|im_end|>")["input_ids"], processor.latent_start_token_id]
    tail = [processor.latent_end_token_id, *processor.tokenizer("<answer>B</answer><|im_end|>")["input_ids"]]
    ids = head + [processor.latent_token_id] * len(said) + tail
    return ids, [-1] * len(head) + said + [0] * len(tail)


def test_the_readable_path(processor: LatentProcessor) -> None:
    vocab = processor.tokenizer.convert_tokens_to_ids
    word = processor.tokenizer("Seats fence outside")["input_ids"]
    assert len(word) > 3  # at least one of the words is several tokens
    ids, readable = span(processor, word)
    expected = "What?⟨Seats·fence·outside⟩<answer>B</answer>"
    assert processor.decode_latent(ids, readable) == expected
    assert processor.decode_latent(torch.tensor(ids), torch.tensor(readable)) == expected
    assert processor.decode_latent(np.array(ids), np.array(readable)) == expected
    assert processor.decode_latent(ids) == f"What?⟨{len(word)} latents⟩<answer>B</answer>"
    cases = {
        "⟨T-s·,·a⟩": [vocab("T"), vocab("-"), vocab("s"), vocab(","), vocab("a")],
        "⟨1 latent⟩": [-1],
        "⟨?·a·?⟩": [-1, vocab("a"), -1],
        "⟨a·<|laser_end|>·b⟩": [vocab("a"), processor.latent_end_token_id, vocab("b")],
        "⟨␣·a⟩": [vocab("Ċ"), vocab("a")],
        "⟨é⟩": [vocab("Ã"), vocab("©")],
    }
    for shown, said in cases.items():
        assert processor.decode_latent(*span(processor, said)) == f"What?{shown}<answer>B</answer>", shown


def test_the_readable_path_of_ids_written_in_place(processor: LatentProcessor) -> None:
    word = processor.tokenizer("Seats fence")["input_ids"]
    ids, readable = span(processor, word)
    mask = [i == processor.latent_token_id for i in ids]
    in_place = [r if m else i for i, r, m in zip(ids, readable, mask, strict=True)]
    assert processor.decode_latent(in_place, latent_mask=mask) == "What?⟨Seats·fence⟩<answer>B</answer>"
    assert processor.decode_latent(ids, latent_mask=mask) == f"What?⟨{len(word)} latents⟩<answer>B</answer>"
    assert processor.decode_latent(in_place) == "What?Seats fence<answer>B</answer>"


def test_two_spans_and_inserted_patches() -> None:
    processor = build_tiny_processor(latent_tokens={**DEFAULT_LATENT_TOKENS, "patch": "<|latent_patch|>"})
    a, b = processor.tokenizer.convert_tokens_to_ids(["a", "b"])
    start, slot, end, patch = (processor._latent_id(role) for role in ("start", "slot", "end", "patch"))
    ids = [start, slot, patch, patch, slot, end, a, start, slot, end, b]
    readable = [0, a, 0, 0, b, 0, 0, 0, -1, 0, 0]
    assert processor.decode_latent(ids, readable) == "⟨a·[2 patches]·b⟩a⟨1 latent⟩b"
    assert processor.decode_latent(ids) == "⟨1 latent·[2 patches]·1 latent⟩a⟨1 latent⟩b"


def test_batches_of_readable_paths(processor: LatentProcessor) -> None:
    rows = [span(processor, processor.tokenizer(text)["input_ids"]) for text in ("Seats", "a fence")]
    shown = processor.batch_decode_latent([ids for ids, _ in rows], [readable for _, readable in rows])
    assert shown == ["What?⟨Seats⟩<answer>B</answer>", "What?⟨a·fence⟩<answer>B</answer>"]
    ids = torch.tensor([rows[0][0], rows[0][0]])
    assert processor.batch_decode_latent(ids, latent_mask=torch.zeros_like(ids)) == ["What?<answer>B</answer>"] * 2
    with pytest.raises(ValueError, match="takes one sequence; use batch_decode_latent"):
        processor.decode_latent(ids)
    with pytest.raises(ValueError, match=f"readable_ids has 1 entries for {ids.shape[1]} ids"):
        processor.decode_latent(ids[0], [0])
    with pytest.raises(ValueError, match="latent_mask has 1 rows for 2 sequences"):
        processor.batch_decode_latent(ids, latent_mask=[[True]])


# Tiny parts


def test_the_tiny_batch_runs_through_the_stock_model(processor: LatentProcessor) -> None:
    inputs = tiny_inputs()
    lengths = inputs["attention_mask"].sum(-1).tolist()
    assert lengths[0] < lengths[1] == inputs["input_ids"].shape[1]
    assert inputs["attention_mask"][0, 0] == 0
    model = tiny_stock_model(seed=1)
    assert len(processor.tokenizer) <= model.config.get_text_config().vocab_size
    logits = model(**inputs).logits
    assert torch.isfinite(logits).all()
    assert torch.equal(tiny_stock_model(seed=1)(**inputs).logits, logits)
    assert not torch.equal(tiny_stock_model(seed=2)(**inputs).logits, logits)
    # each row equals the row alone: positions, padding and image order are right
    alone = processor.apply_chat_template(
        tiny_prompts()[0], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    torch.testing.assert_close(model(**alone).logits[0], logits[0, -lengths[0] :], rtol=1e-4, atol=1e-5)
    blank = {**alone, "pixel_values": torch.zeros_like(alone["pixel_values"])}
    assert not torch.allclose(model(**blank).logits, model(**alone).logits)


def test_building_a_model_keeps_the_random_state() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    tiny_stock_model(seed=77)
    assert torch.equal(torch.rand(2), expected)


def test_the_stock_folder_loads_with_the_stock_class(stock_folder: Path) -> None:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(stock_folder)
    tokenizer = build_tiny_tokenizer(TINY_TEXTS)
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert model.config.get_text_config().pad_token_id == tokenizer.pad_token_id
    assert set(model.generation_config.eos_token_id) == set(
        tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    )
    assert not any("latent" in path.name for path in stock_folder.iterdir())


def test_the_tiny_tokenizer_is_reversible_and_the_same_each_time() -> None:
    tokenizer = build_tiny_tokenizer(TINY_TEXTS, vocab_size=400)
    assert len(tokenizer) == 400
    ids = [tokenizer.convert_tokens_to_ids(token) for token in QWEN_SPECIAL_TOKENS]
    assert ids == list(range(392, 400))
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|endoftext|>", "<|im_end|>", None)
    again = build_tiny_tokenizer(TINY_TEXTS, vocab_size=400)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    for text in ("A1 12x34  don't\n\nstop", "Größe → 木", " leading", "a\tb "):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer.tokenize("a12") == ["a", "1", "2"]
    assert len(build_tiny_tokenizer(["<|im_start|><|im_end|>" * 9])) == 256 + len(
        QWEN_SPECIAL_TOKENS
    )  # nothing learnt


def test_words_are_single_tokens_and_survive_loading(tmp_path: Path) -> None:
    words = [f"{letter}{digit}" for letter in "ABCDEFGH" for digit in range(1, 13)] + ["<answer>", "Seats", "Größe"]
    tokenizer = build_tiny_tokenizer(TINY_TEXTS, vocab_size=560, words=words)
    assert len(tokenizer) <= 560
    save_tiny_stock_checkpoint(tmp_path, tokenizer=tokenizer)
    loaded = LatentProcessor.from_pretrained(tmp_path).tokenizer
    for word in words:
        for form in (word, f" {word}"):
            (index,) = loaded(form)["input_ids"]
            assert loaded.decode([index]) == form
            assert index < tokenizer.convert_tokens_to_ids("<|endoftext|>")  # an ordinary entry
    assert loaded.tokenize("go A1, (B12) A1") == [*loaded.tokenize("go"), "ĠA1", ",", "Ġ", "(", "B12", ")", "ĠA1"]
    assert loaded.tokenize("A13")[0] == "A" and loaded.tokenize("xA1") == ["x", "A", "1"]
    rng = random.Random(0)
    for _ in range(50):
        text = "".join(rng.choice([*words, " ", "a", "7", ", ", "\n"]) for _ in range(12))
        assert loaded.decode(loaded(text)["input_ids"]) == "".join(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": "one string"}, "texts must be several lines"),
        ({"vocab_size": 200}, "vocab_size must be at least 264, got 200"),
        ({"vocab_size": 266, "words": ["A1", "B2"]}, "2 words need vocab_size >= 268, got 266"),
        ({"words": ["two words"]}, "without white space"),
        ({"words": ["<|im_end|>"]}, "no special token"),
    ],
)
def test_an_impossible_tokenizer_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_tiny_tokenizer(**{"texts": TINY_TEXTS, **options})


def test_an_impossible_size_is_refused(processor: LatentProcessor) -> None:
    tokenizer = processor.tokenizer
    with pytest.raises(ValueError, match="vocab_size 300 is smaller than the tokenizer"):
        tiny_config("qwen2_5_vl", 300, tokenizer)
    with pytest.raises(ValueError, match="hidden_size 60 must be a multiple"):
        tiny_config("qwen2_5_vl", None, tokenizer, hidden_size=60)
    with pytest.raises(ValueError, match="vision_hidden_size 20 must be"):
        tiny_config("qwen2_5_vl", None, tokenizer, vision_hidden_size=20)
    with pytest.raises(ValueError, match="min_pixels"):
        build_tiny_image_processor(min_pixels=4000, max_pixels=3000)
    with pytest.raises(ValueError, match="vision_intermediate_size 48 must be a multiple of vision_hidden_size 32"):
        tiny_config("qwen2_vl", None, tokenizer, vision_intermediate_size=48)
    with pytest.raises(ValueError, match=r"unknown family 'qwen4_vl'; choose one of \['qwen2_5_vl', 'qwen2_vl', "):
        tiny_config("qwen4_vl", None, tokenizer)
    with pytest.raises(ValueError, match="max_pixels >= 1024, got 784 and 900"):
        build_tiny_image_processor(784, 900, family="qwen3_vl")
    with pytest.raises(ValueError, match="family='qwen3_vl' does not fit a configuration of 'qwen2_vl'"):
        save_tiny_stock_checkpoint("unused", config=tiny_config("qwen2_vl", None, tokenizer), family="qwen3_vl")


def test_rotary_sections_as_published(processor: LatentProcessor) -> None:
    for family, sections in (("qwen2_vl", [16, 24, 24]), ("qwen2_5_vl", [16, 24, 24]), ("qwen3_vl", [24, 20, 20])):
        options = {"hidden_size": 512, "num_heads": 4, "tie_word_embeddings": True}
        config = tiny_config(family, None, processor.tokenizer, **options)
        assert config.text_config.rope_parameters["mrope_section"] == sections
        assert config.tie_word_embeddings
