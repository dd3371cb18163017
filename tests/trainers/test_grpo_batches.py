"""What several processes need of GRPO_latent, as far as one can show it; `tests/distributed` runs the real ones."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.trainers.grpo_parts import build, eager_model, policy_logps, prompts, rollout, trained_mask
from trainers import grpo_batches
from trainers.grpo_batches import check_images_of_all, image_rows
from trainers.grpo_data import with_parts

MEAN = {"latent_policy": "gaussian", "latent_policy_sigma": 0.5}


def test_images_of_rows() -> None:
    grids = torch.tensor([[1, 2, 2], [1, 4, 2], [1, 2, 4]])
    inputs = {
        "pixel_values": torch.arange(20.0).view(20, 1),
        "image_grid_thw": grids,
        "num_images": [1, 0, 2],
        "mm_token_type_ids": torch.arange(6).view(3, 2),
    }
    part = image_rows(inputs, slice(1, 3))
    assert torch.equal(part["image_grid_thw"], grids[1:]) and part["pixel_values"][:, 0].tolist() == list(range(4, 20))
    assert set(image_rows(inputs, slice(1, 2))) == {"mm_token_type_ids"}
    assert image_rows({"pixel_values": None}, slice(0, 2)) == {}


@pytest.mark.parametrize("options", [{}, MEAN], ids=["latents as context", "latents with credit"])
def test_the_vision_tower_runs_for_text_too(options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row with a blank image, where another process may have one, changes neither scores nor gradients."""
    data = prompts().select([2, 0])
    trainer = build(tmp_path, eager_model(latent_head="simple"), data=data, num_iterations=2, **options)
    batch, calls = rollout(trainer, 2), []
    trainer.model.model.visual.register_forward_hook(lambda *args: calls.append(1))
    assert batch["num_images"] == [0] * 4 + [1] * 4

    def scored() -> tuple[int, torch.Tensor, dict[str, torch.Tensor]]:
        calls.clear()
        trainer.model.zero_grad()
        scores = policy_logps(trainer, batch, batch_size=4)
        scores[trained_mask(batch)].sum().backward()
        grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
        return len(calls), scores.detach(), grads

    runs, scores, grads = scored()
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    runs_of_two, scores_of_two, grads_of_two = scored()
    assert (runs, runs_of_two) == (1, 2)
    torch.testing.assert_close(scores_of_two, scores)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_of_two[name], grad, msg=name)


def test_parameters_that_no_score_depends_on_are_frozen(tmp_path: Path) -> None:
    """Under ZeRO they would decay."""

    def trained(**options: Any) -> set[str]:
        fields = {"latent_head": "simple", "latent_head_timing": options.pop("timing", "train")}
        model = build(tmp_path, eager_model(latent_stop_vector=True, **fields), **options).model
        return {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}

    assert trained() == {"model", "lm_head"}
    assert trained(**MEAN) == trained(timing="reference") == {"model", "lm_head", "latent_head"}
    with pytest.raises(ValueError, match=r"latent_head_lr=0.001, but no .* is trained; .*latent_policy: gaussian"):
        trained(latent_head_lr=1e-3)


def test_text_on_one_process_alone_is_refused_where_it_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = SimpleNamespace(device="cpu", gather=lambda flag: torch.cat([flag, torch.ones(1)]))
    trainer = SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(ds3_gather_for_generation=False))
    check_images_of_all(trainer, None)
    monkeypatch.setattr(grpo_batches, "is_deepspeed_zero3_enabled", lambda: True)
    check_images_of_all(trainer, [[]])
    with pytest.raises(ValueError, match="ds3_gather_for_generation=False: one process has prompts with images"):
        check_images_of_all(trainer, None)
    trainer.args.ds3_gather_for_generation = True
    check_images_of_all(trainer, None)


def test_prompts_have_one_form_with_and_without_images() -> None:
    turns = [{"role": "user", "content": "Hi"}]
    structured = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert with_parts({"prompt": turns, "images": [], "id": "a"}) == {"prompt": structured, "images": [], "id": "a"}
    assert with_parts({"prompt": structured}) == {"prompt": structured}
    for row in ({"prompt": "Hi"}, {"prompt": turns, "images": ["x.png"]}, {"prompt": turns, "image": "x.png"}):
        assert with_parts(row) is row
