"""The processor on folders as each Qwen-VL family publishes them: image settings, chat template, vocabulary."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from modeling_latent import LatentProcessor, convert_stock_checkpoint
from modeling_latent.processing_latent import LATENT_CHAT_TEMPLATE, LATENT_CHAT_TEMPLATE_QWEN3
from tests.tiny import FAMILIES, LASER_TOKENS, tiny_images, tiny_prompts
from trainers import LatentSFTCollator
from trainers.data.records import make_record
from trainers.losses.dwal import find_latent_rows
from trainers.tiny import (
    QWEN3_ADDED_TOKENS,
    QWEN3_CHAT_TEMPLATE,
    STOCK_CHAT_TEMPLATE,
    build_tiny_processor,
    build_tiny_tokenizer,
    save_tiny_stock_checkpoint,
)

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# What the published folders say of images and videos.
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor",
    },
    "qwen2_5_vl": {
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
    },
    "qwen3_vl": {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor",
    },
}  # fmt: skip
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "  Hi \n"}],
    [
        {"role": "user", "content": [{"type": "text", "text": "a\n"}, {"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "{{ c }}"}]},
        {"role": "assistant", "content": ""},
    ],
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def published(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny stock folder with the settings of the published one, also those of the videos that nothing here reads."""
    folder = save_tiny_stock_checkpoint(tmp_path_factory.mktemp("published"), family=family)
    (folder / "preprocessor_config.json").write_text(json.dumps(PUBLISHED[family]))
    video = {**PUBLISHED[family], "video_processor_type": f"{PUBLISHED[family]['processor_class'][:-9]}VideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["processor_class"] = PUBLISHED[family]["processor_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def test_images_are_cut_as_the_family_cuts_them(family: str, published: Path) -> None:
    """Patches, tokens an image, token types and pixel values (white is 1.0 where mean and deviation are 0.5)."""
    processor = LatentProcessor.from_pretrained(published, latent_tokens=LASER_TOKENS)
    assert type(processor.image_processor).__name__ == "Qwen2VLImageProcessorPil"
    side = 2 * PUBLISHED[family]["patch_size"]
    images = [Image.new("RGB", (side * 12, side * 9), "white"), Image.new("RGB", (side * 16, side * 8), "white")]
    text = "<|vision_start|><|image_pad|><|vision_end|> and <|vision_start|><|image_pad|><|vision_end|>?"
    out = processor(images=images, text=text, return_tensors="pt")
    assert out["image_grid_thw"].tolist() == [[1, 18, 24], [1, 16, 32]]
    is_image = out["input_ids"] == processor.image_token_id
    assert int(is_image.sum()) == 12 * 9 + 16 * 8
    assert torch.equal(out["mm_token_type_ids"].bool(), is_image)
    assert out["pixel_values"].shape == (4 * int(is_image.sum()), 3 * 2 * PUBLISHED[family]["patch_size"] ** 2)
    mean, std = (torch.tensor(PUBLISHED[family][name]) for name in ("image_mean", "image_std"))
    white = ((1 - mean) / std)[:, None].expand(3, out["pixel_values"].shape[1] // 3).flatten()
    torch.testing.assert_close(out["pixel_values"][0], white, atol=1e-4, rtol=1e-4)


def test_the_template_of_the_family(family: str, published: Path, tmp_path: Path) -> None:
    """The text of the published template, with what is learnt marked; saved and loaded it is the same."""
    processor = LatentProcessor.from_pretrained(published, latent_tokens=LASER_TOKENS)
    stock = QWEN3_CHAT_TEMPLATE if family == "qwen3_vl" else STOCK_CHAT_TEMPLATE
    ours = LATENT_CHAT_TEMPLATE_QWEN3 if family == "qwen3_vl" else LATENT_CHAT_TEMPLATE
    assert processor.chat_template == processor.tokenizer.chat_template == ours
    for conversation in CONVERSATIONS:
        for options in ({}, {"add_generation_prompt": True, "add_vision_id": True}):
            (expected,), _ = render_jinja_template([conversation], chat_template=stock, **options)
            assert processor.apply_chat_template(conversation, **options) == expected
    message = None if family == "qwen3_vl" else "You are a helpful assistant."
    assert processor.default_system_message == message
    chat = [*tiny_prompts()[0], {"role": "assistant", "content": "<|laser_start|>A dog<|laser_end|>Jeans"}]
    out = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    learnt = [i for i, m in zip(out["input_ids"][0], out["assistant_masks"][0], strict=True) if m]
    assert processor.decode(learnt) == "<|laser_start|>A dog<|laser_end|>Jeans<|im_end|>\n"
    processor.save_pretrained(tmp_path)
    again = LatentProcessor.from_pretrained(tmp_path)
    assert again.chat_template == ours and again.default_system_message == message
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()


def test_tools_are_refused_where_the_published_template_renders_them() -> None:
    processor = build_tiny_processor(family="qwen3_vl")
    chat = [{"role": "user", "content": "Hi"}]
    with pytest.raises(Exception, match="renders no tools; leave them out or pass chat_template"):
        processor.apply_chat_template(chat, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(Exception, match="renders no tools"):
        processor.apply_chat_template([*chat, {"role": "tool", "content": "1"}])


# The vocabulary of Qwen3: the ids behind the special tokens of Qwen2.5 are taken


def test_latent_tokens_come_behind_those_of_qwen3(tmp_path: Path) -> None:
    """From a stock folder to labels and to decoding, with other ids than in Qwen2.5's vocabulary."""
    older = build_tiny_processor(latent_tokens=LASER_TOKENS)
    roles = [older.latent_start_token_id, older.latent_token_id, older.latent_end_token_id]
    stock = save_tiny_stock_checkpoint(tmp_path / "stock", family="qwen3_vl")
    model, processor = convert_stock_checkpoint(stock)
    tokenizer = processor.tokenizer
    taken = tokenizer.convert_tokens_to_ids(list(QWEN3_ADDED_TOKENS))
    assert taken[:3] == roles, "the tiny vocabulary is laid out as the published ones are"
    start, slot, end = processor.latent_start_token_id, processor.latent_token_id, processor.latent_end_token_id
    assert [start, slot, end] == [taken[-1] + 1, taken[-1] + 2, taken[-1] + 3]
    config = model.config
    assert [config.latent_start_token_id, config.latent_token_id, config.latent_end_token_id] == [start, slot, end]
    assert model.get_input_embeddings().num_embeddings == 512, "spare rows take them: nothing is resized"

    image = tiny_images(1)
    record = make_record("a", "<think> is a word here</think>?", "Jeans", image, chain=["a fence", "Jeans"])
    batch = LatentSFTCollator(processor)([record])
    ids, rows = batch["input_ids"], find_latent_rows(batch["input_ids"], start, end, 2)
    region = tokenizer.decode(ids[0][rows.region_mask[0] & (ids[0] != end)])
    assert region == "a fence Jeans" and set(taken[2:]) <= set(ids[0].tolist())
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == (
        "<|laser_start|>a fence Jeans<|laser_end|><answer>Jeans</answer><|im_end|>\n"
    )
    assert not find_latent_rows(ids, *[taken[0], taken[2]], 2).region_mask.any(), "the older ids mean nothing here"

    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": image[0]}, {"type": "text", "text": record["question"]}],
        }
    ]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert set(taken[2:]) <= set(inputs["input_ids"][0].tolist())
    output = model.generate(
        **inputs, max_new_tokens=8, do_sample=False, max_latent_steps=4, return_dict_in_generate=True
    )
    new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert new[:6] == [start, slot, slot, slot, slot, end]
    assert int(output.latent_trace.latent_mask.sum()) == 4, "no position of the prompt is a latent"
    assert "⟨4 latents⟩" in processor.decode_latent(output.sequences[0])


def test_added_tokens_are_no_special_tokens() -> None:
    tokenizer = build_tiny_tokenizer(["a b c"], added_tokens=QWEN3_ADDED_TOKENS)
    ids = tokenizer("<think>a</think><|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think>"
    assert [ids[0], ids[2]] == tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
