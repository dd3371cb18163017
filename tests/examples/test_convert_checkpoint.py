"""`examples/convert_checkpoint.py`: a published file becomes a folder that the Auto classes load."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor

from examples.convert_checkpoint import main
from modeling_latent import LATENT_METHODS
from modeling_latent.conversion_published import convert_published_checkpoint
from tests.modeling_latent.test_conversion_published import ALPHA, published, write
from trainers.tiny import TINY_TEXTS, build_tiny_processor, save_tiny_stock_checkpoint


def test_a_folder_for_the_auto_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny_stock_checkpoint(tmp_path / "base", family="qwen2_vl")
    (tmp_path / "qwen_vl").mkdir()
    write(tmp_path / "qwen_vl", published())
    output = tmp_path / "converted"
    arguments = [str(tmp_path), "--filename", "qwen_vl/model.pth", "--base", str(base), "--lora_alpha", str(ALPHA)]
    assert main([*arguments, "--dtype", "float32", "--output", str(output)]) == output
    said = capsys.readouterr().out
    assert "LatentQwen2VLForConditionalGeneration, torch.float32" in said and "3 slots of 32 patches" in said
    model, processor = AutoModel.from_pretrained(output), AutoProcessor.from_pretrained(output)
    direct, _ = convert_published_checkpoint(tmp_path / "qwen_vl", base, lora_alpha=ALPHA, dtype=torch.float32)
    ours, theirs = model.state_dict(), direct.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert processor.latent_patch_token_id == model.config.latent_patch_token_id
    assert model.generation_config.latent_strategy == "staged"


def test_a_tokenizer_of_another_folder(tmp_path: Path) -> None:
    base = save_tiny_stock_checkpoint(tmp_path / "base", family="qwen2_vl")
    other = build_tiny_processor(TINY_TEXTS, latent_tokens=LATENT_METHODS["ivtlr"].tokens, family="qwen2_vl")
    other.tokenizer.add_tokens(["<|one|>"])
    other.save_pretrained(tmp_path / "other")
    write(tmp_path, published())
    arguments = [str(tmp_path), "--base", str(base), "--lora_alpha", str(ALPHA), "--output", str(tmp_path / "out")]
    main([*arguments, "--tokenizer", str(tmp_path / "other")])
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.convert_tokens_to_ids("<|one|>") == processor.latent_patch_token_id + 1
