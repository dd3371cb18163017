"""The processor of text models: stock folders, padding, chat, refusals, the readable path, saving."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoProcessor, PreTrainedTokenizerFast

from modeling_latent import LatentTextProcessor
from modeling_latent.latent_tokens import DEFAULT_LATENT_TOKENS
from tests.tiny import LASER_TOKENS, TEXT_FAMILIES, tiny_images, tiny_processor
from trainers.tiny_text import CHAT_TEMPLATE, build_tiny_text_processor, save_tiny_text_checkpoint

COCONUT = {"start": "<|start-latent|>", "end": "<|end-latent|>", "slot": "<|latent|>"}
CHAT = [{"role": "user", "content": "What is it?"}]
TEMPLATE_WITH_TAGS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)


@pytest.fixture(params=TEXT_FAMILIES)
def processor(request: pytest.FixtureRequest) -> LatentTextProcessor:
    return tiny_processor(request.param)


def test_a_stock_folder_loads_with_any_latent_tokens(tmp_path: Path) -> None:
    for family in TEXT_FAMILIES:
        folder = save_tiny_text_checkpoint(tmp_path / family, family)
        processor = LatentTextProcessor.from_pretrained(folder, latent_tokens=COCONUT)
        size = len(processor.tokenizer)
        assert list(processor.latent_tokens.items()) == list(COCONUT.items())
        ids = (processor.latent_start_token_id, processor.latent_end_token_id, processor.latent_token_id)
        assert ids == (size - 3, size - 2, size - 1) and processor.added_latent_tokens == 3
        assert processor.latent_patch_token_id is None
        assert processor.chat_template == (None if family == "gpt2" else CHAT_TEMPLATE)
        assert LatentTextProcessor.from_pretrained(folder).latent_tokens == DEFAULT_LATENT_TOKENS
        assert LatentTextProcessor.from_pretrained(folder, padding_side="right").tokenizer.padding_side == "right"


def test_a_batch_is_padded_on_the_left(processor: LatentTextProcessor) -> None:
    batch = processor(text=["a", "What is it?"], return_tensors="pt", padding=True)
    assert sorted(batch) == ["attention_mask", "input_ids"] == sorted(processor.model_input_names)
    assert batch["attention_mask"][0].tolist() == [0] * (batch["input_ids"].shape[1] - 1) + [1]
    assert set(batch["input_ids"][0, :-1].tolist()) == {processor.tokenizer.pad_token_id}
    assert processor.decode(batch["input_ids"][1]) == "What is it?"
    assert processor(text="What is it?", return_tensors="pt")["input_ids"].shape == (1, batch["input_ids"].shape[1])


def test_a_tokenizer_without_padding_token_pads_with_its_end() -> None:
    tokenizer = tiny_processor("gpt2").tokenizer
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(ValueError, match="has neither a padding nor an end token; set tokenizer.eos_token first"):
        LatentTextProcessor(bare)


def test_token_types_are_left_out() -> None:
    """Generic tokenizers return them, and GPT-2 adds embeddings for those that it is given."""
    tokenizer = tiny_processor("gpt2").tokenizer
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" in tokenizer("a")
    processor = LatentTextProcessor(tokenizer, latent_tokens=LASER_TOKENS)
    assert sorted(processor(text="a")) == ["attention_mask", "input_ids"]


# Chat


def test_chat_and_assistant_masks() -> None:
    processor = tiny_processor("llama")
    assert processor.apply_chat_template(CHAT, add_generation_prompt=True) == (
        "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    chats = [CHAT, [*CHAT, {"role": "assistant", "content": "Seats."}]]
    batch = processor.apply_chat_template(
        chats,
        chat_template=TEMPLATE_WITH_TAGS,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    masks = torch.as_tensor(batch["assistant_masks"]).bool()
    assert not masks[0].any()
    assert processor.decode(batch["input_ids"][1][masks[1]]) == "Seats.<|im_end|>\n"


def test_a_base_model_has_no_chat() -> None:
    processor = tiny_processor("gpt2")
    with pytest.raises(ValueError, match="chat template"):
        processor.apply_chat_template(CHAT)
    assert "What is it?" in processor.apply_chat_template(CHAT, chat_template=CHAT_TEMPLATE)


# What is refused


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text": "a", "images": tiny_images(1)}, "LatentTextProcessor takes text alone; got images=list"),
        ({"text": "a", "videos": [1]}, "takes text alone; got videos=list"),
        (
            {"text": ["a", "b <|laser|> c"]},
            r"text 1 contains the latent token '<\|laser\|>', which stands for a vector",
        ),
        ({"text": ["a", 3]}, "text 1 must be a string, got int"),
        ({"text": 3}, "text must be a string or a list of strings, got int"),
    ],
)
def test_inputs_that_cannot_work_are_refused(
    processor: LatentTextProcessor, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        processor(**inputs)


def test_users_cannot_write_latent_tokens(processor: LatentTextProcessor) -> None:
    for token in LASER_TOKENS.values():
        chat = [{"role": "user", "content": f"say {token}"}]
        with pytest.raises(ValueError, match=r"message 0 \(role 'user'\) contains the latent token"):
            processor.apply_chat_template(chat, chat_template=CHAT_TEMPLATE)
    laid_out = "a <|laser_start|><|laser|><|laser_end|>"
    ids = processor(text=laid_out, allow_latent_tokens=True)["input_ids"][0]
    assert ids.count(processor.latent_token_id) == 1


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"start": "<|s|>", "slot": "<|l|>"}, r"lacks the roles \['end'\]"),
        ({**COCONUT, "slot": "<|endoftext|>"}, r"'<\|endoftext\|>' is already another special token"),
        ({**COCONUT, "slot": "a"}, "'a' is already an ordinary word"),
    ],
)
def test_a_wrong_table_is_refused(tokens: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_tiny_text_processor("gpt2", latent_tokens=tokens)


# Decoding and saving


def test_the_readable_path(processor: LatentTextProcessor) -> None:
    start, slot, end = processor.latent_start_token_id, processor.latent_token_id, processor.latent_end_token_id
    words = processor.tokenizer.encode(" table window")
    ids = [*processor.tokenizer.encode("a"), start, *[slot] * len(words), end, *processor.tokenizer.encode(" b")]
    said = [-1, -1, *words, -1, -1]
    assert len(ids) == len(said)
    assert processor.decode_latent(ids, said) == "a⟨table·window⟩ b"
    assert processor.decode_latent(ids) == f"a⟨{len(words)} latent{'s' if len(words) > 1 else ''}⟩ b"
    assert processor.decode(ids, skip_special_tokens=True) == "a b"


def test_saved_and_loaded(processor: LatentTextProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    for again in (LatentTextProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(again) is LatentTextProcessor and again.added_latent_tokens == 0
        assert list(again.latent_tokens.items()) == list(processor.latent_tokens.items())
        assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
        assert again.chat_template == processor.chat_template
        assert again.tokenizer.padding_side == "left" and again.tokenizer.pad_token == processor.tokenizer.pad_token
