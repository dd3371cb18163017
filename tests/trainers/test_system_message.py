"""What is trained is what is decoded: the prompt part of a sample equals the rendered chat template of its family."""

from pathlib import Path

import pytest
from PIL import Image

from modeling_latent import LatentProcessor
from trainers.collators import LatentSFTCollator
from trainers.tiny import TINY_FAMILIES, save_tiny_stock_checkpoint


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_prompt_of_training_is_prompt_of_decoding(family: str, tmp_path: Path) -> None:
    folder = save_tiny_stock_checkpoint(tmp_path / family, family=family)
    processor = LatentProcessor.from_pretrained(folder)
    image = Image.new("RGB", (64, 64), (200, 30, 90))
    row = {"images": [image], "question": "What is in the picture?", "answer": "A bus", "chain": ["street", "bus"]}
    batch = LatentSFTCollator(processor)([row])
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": row["question"]}]}
    ]
    prompt = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"][0]
    trained = batch["input_ids"][0][batch["labels"][0] == -100]
    assert trained[: len(prompt)].tolist() == prompt.tolist()
    assert batch["labels"][0][len(prompt)] == processor.latent_start_token_id
