"""Repositories of the checkpoints that recipes name: real shapes, a tiny tokenizer, and no weights."""

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import ChameleonConfig, GPT2Config, PreTrainedTokenizerFast

from tests.hub import StoredFile
from trainers.tiny import save_tiny_stock_checkpoint, tiny_config
from trainers.tiny_chameleon import save_tiny_chameleon_checkpoint, tiny_chameleon_config
from trainers.tiny_text import save_tiny_text_checkpoint

QWEN2_VL, CHAMELEON, GPT2 = "Qwen/Qwen2-VL-7B-Instruct", "facebook/chameleon-7b", "openai-community/gpt2"
STAGED_MODELS = (QWEN2_VL, CHAMELEON, GPT2)
STAGED_TOTALS = {QWEN2_VL: 8_291_375_616, GPT2: 124_439_808}


def _shape(name: str, tokenizer: Any) -> dict[str, Any]:
    """The entries of the configuration of a published checkpoint, with the ids of a tiny tokenizer."""
    if name == GPT2:
        ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        return {**GPT2Config(**ids).to_dict(), "architectures": ["GPT2LMHeadModel"]}
    if name == CHAMELEON:
        config = tiny_chameleon_config(
            65536, tokenizer, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=32, intermediate_size=11008
        )
        values = {**config.to_dict(), "vq_config": ChameleonConfig().vq_config.to_dict()}
        return {**values, "architectures": ["ChameleonForConditionalGeneration"], "dtype": "bfloat16"}
    config = tiny_config(
        "qwen2_vl", 152064, tokenizer, hidden_size=3584, num_layers=28, num_heads=28, num_kv_heads=4,
        intermediate_size=18944, vision_depth=32, vision_hidden_size=1280, vision_num_heads=16,
        vision_intermediate_size=5120,
    )  # fmt: skip
    return {**config.to_dict(), "architectures": ["Qwen2VLForConditionalGeneration"], "dtype": "bfloat16"}


def staged_files(name: str) -> dict[str, StoredFile]:
    """The files of a repository, the weights left out."""
    save = {
        QWEN2_VL: save_tiny_stock_checkpoint,
        CHAMELEON: save_tiny_chameleon_checkpoint,
        GPT2: save_tiny_text_checkpoint,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save[name](folder)
        values = _shape(name, PreTrainedTokenizerFast.from_pretrained(folder))
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}
    files["config.json"] = json.dumps(values).encode()
    return {path: StoredFile(content, lfs=False) for path, content in files.items()}
