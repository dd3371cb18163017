"""The processor of Chameleon against the stock one: images in a text, markers, separator, latent tokens, chat."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, ChameleonImageProcessorPil, ChameleonProcessor

from modeling_latent import LATENT_METHODS, LatentChameleonProcessor
from tests.tiny import CHAMELEON, LASER_TOKENS, tiny_images, tiny_processor, tiny_prompts
from trainers.tiny_chameleon import (
    IMAGE_TOKENS,
    build_tiny_chameleon_image_processor,
    build_tiny_chameleon_tokenizer,
    save_tiny_chameleon_checkpoint,
)

TEXTS = ["What <image> is it?", "<image><image>Yes", "none"]
SEPARATOR, BEGIN, END = "<reserved08706>", "<racm3:break>", "<eoss>"


@pytest.fixture
def processor() -> LatentChameleonProcessor:
    return tiny_processor(CHAMELEON)


def decoded(processor: LatentChameleonProcessor, ids: list[int]) -> str:
    return processor.decode(ids).replace("<image>" * IMAGE_TOKENS, "[image]")


def test_a_call_is_that_of_the_stock_processor(processor: LatentChameleonProcessor) -> None:
    stock = ChameleonProcessor(build_tiny_chameleon_image_processor(), processor.tokenizer, IMAGE_TOKENS)
    options = {"return_tensors": "pt", "padding": True, "padding_side": "right", "return_for_text_completion": False}
    ours, theirs = (each(images=tiny_images(3), text=list(TEXTS), **options) for each in (processor, stock))
    assert ours.keys() == theirs.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours["pixel_values"].shape == (3, 3, 32, 32)


def test_markers_and_separator_are_options(processor: LatentChameleonProcessor) -> None:
    def texts(**options: object) -> list[str]:
        ids = processor(images=tiny_images(3), text=list(TEXTS), **options)["input_ids"]
        return [decoded(processor, row) for row in ids]

    marked = f"{BEGIN}[image]{END}"
    plain = [f"<s>What {marked} is it?", f"<s>{marked}{marked}Yes", "<s>none"]
    assert texts() == plain
    assert texts(return_for_text_completion=False) == [text + SEPARATOR for text in plain]
    bare = ["What [image] is it?", "[image][image]Yes", "none"]  # as IVT-LR was trained
    assert texts(image_markers=False, add_special_tokens=False) == bare
    assert texts() == [f"<s>What {marked} is it?", f"<s>{marked}{marked}Yes", "<s>none"], (
        "a call left an option behind"
    )


def test_it_pads_on_the_left(processor: LatentChameleonProcessor) -> None:
    batch = processor(images=tiny_images(3), text=list(TEXTS), padding=True, return_tensors="pt")
    assert (batch["attention_mask"].diff(dim=1) >= 0).all() and not batch["attention_mask"].all()
    assert "mm_token_type_ids" not in batch


def test_images_alone_and_text_alone(processor: LatentChameleonProcessor) -> None:
    assert processor(images=tiny_images(2), return_tensors="pt").keys() == {"pixel_values"}
    assert processor(text="a").keys() == {"input_ids", "attention_mask"}


def test_the_published_size(processor: LatentChameleonProcessor) -> None:
    """512 x 512 pixels, 1,024 tokens, without torchvision."""
    tokenizer = build_tiny_chameleon_tokenizer()
    published = LatentChameleonProcessor(ChameleonImageProcessorPil(), tokenizer)
    batch = published(images=tiny_images(1), text="<image>a", return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 512, 512)
    assert (batch["input_ids"] == published.image_token_id).sum() == 1024
    assert published.latent_tokens == {"start": "<|latent_start|>", "slot": "<|latent|>", "end": "<|latent_end|>"}


def test_user_text_may_not_hold_a_latent(processor: LatentChameleonProcessor) -> None:
    with pytest.raises(ValueError, match=r"text 1 contains the latent token '<\|laser\|>'"):
        processor(text=["a", "b <|laser|>"])
    ids = processor(text=["b <|laser|>"], allow_latent_tokens=True)["input_ids"][0]
    assert ids[-1] == processor.latent_token_id
    with pytest.raises(ValueError, match=r"message 0 \(role 'user'\) contains the latent token"):
        processor.apply_chat_template([{"role": "user", "content": "<|laser_start|>"}])


def test_counts_and_kinds_are_checked(processor: LatentChameleonProcessor) -> None:
    with pytest.raises(ValueError, match=r"2 images for 3 image placeholders \(\[1, 2, 0\] a text\); text 1"):
        processor(images=tiny_images(2), text=list(TEXTS))
    with pytest.raises(ValueError, match="takes images and text; got videos"):
        processor(text="a", videos=[[]])
    with pytest.raises(ValueError, match=r"images\[0\] cannot be read"):
        processor(text="<image>", images=[Path("no such file.png")])


def test_chat(processor: LatentChameleonProcessor) -> None:
    """A question ends with the separator; the answer and its end are what is learnt."""
    image = tiny_images(1)[0]
    question = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "A boat."}]
    assert processor.apply_chat_template(chat[:1], add_generation_prompt=True) == f"<image>What?{SEPARATOR}"
    assert processor.apply_chat_template(chat) == f"<image>What?{SEPARATOR}A boat.</s>"
    batch = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    ids, mask = batch["input_ids"][0], batch["assistant_masks"][0].bool()
    assert decoded(processor, ids) == f"<s>{BEGIN}[image]{END}What?{SEPARATOR}A boat.</s>"
    assert decoded(processor, ids[mask]) == "A boat.</s>" and batch["pixel_values"].shape == (1, 3, 32, 32)
    with pytest.raises(Exception, match="no videos"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


def test_a_tokenizer_without_the_tokens_is_refused() -> None:
    tokenizer = build_tiny_chameleon_tokenizer()
    lacking = copy.deepcopy(tokenizer)
    lacking.sep_token = None
    with pytest.raises(ValueError, match=r"lacks \[None\] \(None: no separator is named\)"):
        LatentChameleonProcessor(build_tiny_chameleon_image_processor(), lacking)
    with pytest.raises(ValueError, match=r"lacks \['<image>', '<racm3:break>', '<eoss>'"):
        LatentChameleonProcessor(build_tiny_chameleon_image_processor(), tiny_processor().tokenizer)


def test_saved_and_loaded(processor: LatentChameleonProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = LatentChameleonProcessor.from_pretrained(tmp_path)
    assert again.latent_tokens == processor.latent_tokens == LASER_TOKENS
    assert again.image_seq_length == IMAGE_TOKENS and again.chat_template == processor.chat_template
    texts = [processor.apply_chat_template(chat) for chat in tiny_prompts()]
    ours, theirs = (each(images=tiny_images(2), text=list(texts)) for each in (again, processor))
    assert ours["input_ids"] == theirs["input_ids"]


def test_a_stock_folder_gets_the_tokens_of_a_method(tmp_path: Path) -> None:
    folder = save_tiny_chameleon_checkpoint(tmp_path)
    assert type(AutoProcessor.from_pretrained(folder)) is ChameleonProcessor
    tokens = LATENT_METHODS["ivtlr"].tokens
    processor = LatentChameleonProcessor.from_pretrained(folder, latent_tokens=tokens)
    first = len(build_tiny_chameleon_tokenizer())
    assert processor.latent_tokens == tokens and processor.latent_start_token_id == first
    assert (processor.latent_token_id, processor.latent_patch_token_id) == (first + 2, first + 3)
