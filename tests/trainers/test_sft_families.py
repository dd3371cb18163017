"""One step of the trainer on each family: TRL's fused head calls the backbone with latents whatever its signature."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.latent import tiny_latent_model
from tests.tiny import FAMILIES, tiny_images, tiny_processor
from trainers import LatentSFTConfig, LatentSFTTrainer
from trainers.data.records import Record, make_record, records_to_dataset
from trainers.losses.dwal import DwalOptions, dwal_loss, find_latent_rows


def scenes() -> list[Record]:
    """Two images of different sizes, and text alone."""
    first, second = ([image] for image in tiny_images(2))
    return [
        make_record("a", "What is it?", "A dog", first, chain=["Street", "dog", "A red bicycle"]),
        make_record("b", "What is the boy wearing?", "Jeans", second, chain=["a boy", "Jeans"]),
        make_record("c", "Is the path safe?", "Yes", chain=["No", "hole"]),
    ]


def expected_loss(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **latents: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the labelled positions outside the chain plus DWAL, from the plain forward's logits."""
    ids, labels, config = inputs["input_ids"], inputs["labels"], model.config
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**unlabelled, **latents).logits
    rows = find_latent_rows(ids, config.latent_start_token_id, config.latent_end_token_id, None)
    outside = (labels != -100) & ~(rows.region_mask & (ids != config.latent_end_token_id))
    ce = [-logits[b, t - 1].log_softmax(0)[ids[b, t]] for b, t in outside.nonzero().tolist() if t > 0]
    return torch.stack(ce).mean() + dwal_loss(rows.select(logits), rows, DwalOptions()).loss


@pytest.mark.parametrize("exposure", ["text", "own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_step(family: str, exposure: str, tmp_path: Path) -> None:
    """The loss is that of the plain forward, every parameter moves, and the saved model computes the same."""
    processor = tiny_processor(family)
    model = tiny_latent_model(family=family, latent_method="laser")
    plain = copy.deepcopy(model).train()
    options: dict[str, Any] = {
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none", "activation_checkpointing": False,
        "per_device_train_batch_size": 3, "max_steps": 1, "logging_steps": 1, "save_strategy": "no",
        "latent_exposure": exposure, "learning_rate": 1e-3, "warmup_steps": 0, "dwal_window_size": None,
    }  # fmt: skip
    args = LatentSFTConfig(output_dir=str(tmp_path), **options)
    data = records_to_dataset(scenes())
    trainer = LatentSFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    inputs = trainer.data_collator(scenes())
    latents = {}
    if exposure == "own":
        hidden = plain.model(**{name: value for name, value in inputs.items() if name != "labels"}).last_hidden_state
        latents["latent_embeds"] = torch.nn.functional.pad(hidden[:, :-1], (0, 0, 1, 0)).detach()
        latents["latent_mask"] = trainer.objective.fed_positions(inputs["input_ids"])
        assert latents["latent_mask"].any()
    expected = expected_loss(plain, inputs, **latents)
    expected.backward()
    loss = trainer.compute_loss(trainer.model.train(), dict(inputs))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    found = dict(trainer.model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)

    trainer.model.zero_grad()
    trainer.train()
    assert trainer.state.global_step == 1 and torch.isfinite(torch.tensor(trainer.state.log_history[0]["loss"]))
    assert all(not torch.equal(found[name], parameter) for name, parameter in plain.named_parameters())
    trainer.save_model()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).train()
    assert type(again) is type(model)
    trained = expected_loss(trainer.model, inputs)
    assert torch.equal(expected_loss(again, inputs), trained) and trained < expected_loss(plain, inputs)
