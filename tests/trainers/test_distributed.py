"""What several processes need, as far as one process can show it; `tests/distributed` runs the real ones."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.latent import tiny_latent_model
from tests.tiny import FAMILIES, tiny_images, tiny_processor
from trainers import LatentSFTCollator, LatentSFTConfig, LatentSFTTrainer
from trainers.data.records import Record, make_record, records_to_dataset
from trainers.distributed import first_rows, real_rows, with_blank_image
from trainers.latent_forward import LatentLoss, LatentObjective
from trainers.objectives import OBJECTIVES, register_objective

OPTIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "windows of two, twice the same token once": {"dwal_window_size": 2, "dwal_deduplicate_window": True},
    "time-aware": {"dwal_spatial_decay_gamma": 0.9, "dwal_time_weight_init": 0.5},
    "mse": {"dwal_loss_type": "mse", "dwal_deduplicate_window": True},
    "mean of examples": {"dwal_row_average": "example"},
    "cross entropy alone": {"latent_loss_weight": 0.0},
}


def records() -> list[Record]:
    """Six records with one, two and no images, and chains of one to five concepts."""
    one, two, three, four = tiny_images(4)
    chains = [["x"], ["Street", "dog", "dog"], ["map", "hole"], ["a boy", "Jeans", "a", "b", "c"], ["No"], ["grass"]]
    images = [[one], [two, three], [], [four], [], [one, four]]
    return [
        make_record(f"r{i}", "What is it?" * (i + 1), "Yes, it is safe" if i % 2 else "No", images[i], chain=chain)
        for i, chain in enumerate(chains)
    ]


def trainer(folder: Path, data: Dataset, batch_size: int, steps: int, **options: Any) -> LatentSFTTrainer:
    """A trainer of plain gradient descent on a model whose windows are partly confused."""
    model = tiny_latent_model(latent_method="laser")
    with torch.no_grad():
        model.lm_head.weight.mul_(8.0)
    eval_dataset = options.pop("eval_dataset", None)
    options = {"learning_rate": 0.02, **options}
    args = LatentSFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        activation_checkpointing=False,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=steps,
        train_sampling_strategy="sequential",
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        optim="sgd",
        **options,
    )
    return LatentSFTTrainer(model, args, data, eval_dataset, processing_class=tiny_processor())


# What a loss is divided by ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_a_token_average_over_micro_batches_is_that_of_one_batch(name: str, tmp_path: Path) -> None:
    data = records_to_dataset(records())
    runs = {}
    for average, batch_size in (("token", 6), ("token", 1), ("batch", 1)):
        run = trainer(tmp_path, data, batch_size, 6 // batch_size, loss_average=average, **OPTIONS[name])
        run.train()
        runs[average, batch_size] = run
    whole, parts, published = runs.values()
    metrics = ["loss", "loss_total", "loss_ce", "grad_norm"]
    metrics += ["loss_latent", "confused_ratio"] if name != "cross entropy alone" else []
    for one, other in zip(whole.state.log_history[:2], parts.state.log_history[:2], strict=True):
        assert {m: other[m] for m in metrics} == pytest.approx({m: one[m] for m in metrics}, rel=1e-5)
    for (key, one), (_, other) in zip(whole.model.named_parameters(), parts.model.named_parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7, msg=lambda m, n=key: f"{n}: {m}")
    first, mean = parts.state.log_history[0], published.state.log_history[0]
    assert abs(first["loss_ce"] - mean["loss_ce"]) > 1e-2
    if name == "published":
        assert abs(first["loss_latent"] - mean["loss_latent"]) > 1e-2


@pytest.mark.parametrize("name", OPTIONS)
def test_terms_are_counted_as_the_loss_counts_them(name: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, records_to_dataset(records()), 1, 1, **OPTIONS[name])
    for rows in (records(), records()[3:5]):
        inputs = run.data_collator(rows)
        labels, terms = run.objective.count_terms(inputs["input_ids"], inputs["labels"]).tolist()
        output = run.model(**inputs, fused_lm_head=True)
        assert labels == int(output.label_mask.sum())
        if output.latent_count is not None:
            assert terms == int(output.latent_count) > 0


def test_a_last_step_of_fewer_micro_batches_is_divided_by_its_own_count(tmp_path: Path) -> None:
    data = records_to_dataset(records()[:5])
    whole, parts = (trainer(tmp_path, data, *shape, loss_average="token") for shape in ((2, 2), (1, 4)))
    for run in (whole, parts):
        run.train()  # two steps: of four records, and of the one that is left
        assert [entry["epoch"] for entry in run.state.log_history[:2]] == pytest.approx([0.8, 1.0], abs=0.15)
    for (key, one), (_, other) in zip(whole.model.named_parameters(), parts.model.named_parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7, msg=lambda m, n=key: f"{n}: {m}")


def test_evaluation_weighs_batches_alike_with_either_average(tmp_path: Path) -> None:
    data, found = records_to_dataset(records()), {}
    for average in ("batch", "token"):
        run = trainer(
            tmp_path, data, 1, 3, loss_average=average, eval_strategy="steps", eval_steps=1, weight_decay=0.0,
            per_device_eval_batch_size=2, eval_dataset=data, learning_rate=0.0,
        )  # fmt: skip
        run.train()
        found[average] = [entry for entry in run.state.log_history if "eval_loss" in entry]
    names = ("eval_loss", "eval_loss_total", "eval_loss_ce", "eval_loss_latent", "eval_confused_ratio")
    for one, other in zip(found["batch"], found["token"], strict=True):
        assert {name: other[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-6)


def test_options_that_cannot_work_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="dispatch_batches=True joins batches of different lengths; leave it out"):
        LatentSFTConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, accelerator_config={"dispatch_batches": True}
        )
    monkeypatch.setattr("trainers.objectives.OBJECTIVES", dict(OBJECTIVES))

    @register_objective("countless")
    class Countless(LatentObjective):
        sum_names = ()

        def __init__(self, *_: Any) -> None: ...

        def ce_labels(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return labels

        def fed_positions(self, input_ids: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(input_ids, dtype=torch.bool)

        def loss(self, model: Any, hidden_states: torch.Tensor, inputs: dict[str, Any]) -> LatentLoss:
            return LatentLoss(hidden_states.sum() * 0, {})

    data = records_to_dataset(records())
    with pytest.raises(ValueError, match=r"loss_average='token' needs Countless.count_terms\(input_ids, labels\)"):
        trainer(tmp_path, data, 1, 1, latent_method="countless", loss_average="token")


# Rows that are taken out, or added ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remainder", "end", "processes", "expected"),
    [(5, True, 4, [2, 2, 1, 0]), (1, True, 2, [1, 0]), (4, True, 2, [2, 2]), (0, True, 2, [2, 2]),
     (-1, True, 2, [2, 2]), (3, False, 2, [2, 2]), (1, True, 1, [2])],
)  # fmt: skip
def test_real_rows_come_first(remainder: int, end: bool, processes: int, expected: list[int]) -> None:
    state = SimpleNamespace(end_of_dataloader=end, remainder=remainder)
    ranks = [
        SimpleNamespace(gradient_state=state, num_processes=processes, process_index=index)
        for index in range(processes)
    ]
    assert [real_rows(rank, 2) for rank in ranks] == expected


@pytest.mark.parametrize("kept", [1, 2, 3, 4, 5])
def test_the_first_rows_keep_their_images(kept: int) -> None:
    collate, processor = LatentSFTCollator(tiny_processor()), tiny_processor()
    inputs = first_rows(collate(records()), kept, processor)
    alone = collate(records()[:kept])
    assert set(inputs) == set(alone)
    for name, value in alone.items():
        found = inputs[name]
        if name in ("pixel_values", "image_grid_thw"):
            assert torch.equal(found, value)
        else:
            length = value.shape[1]  # the whole batch may be padded further
            assert torch.equal(found[:, :length], value)
            assert not inputs["attention_mask"][:, length:].any()


def test_without_a_real_row_nothing_is_labelled() -> None:
    whole = LatentSFTCollator(tiny_processor())(records())
    inputs = first_rows(whole, 0, tiny_processor())
    assert (inputs["labels"] == -100).all() and (whole["labels"] != -100).any()
    assert torch.equal(inputs["input_ids"], whole["input_ids"]) and first_rows(whole, 6, None) is whole


@pytest.mark.parametrize("family", FAMILIES)
def test_a_blank_image_runs_the_vision_tower_and_changes_nothing(family: str) -> None:
    model = tiny_latent_model(family=family, latent_method="laser").train()
    processor = tiny_processor(family)
    texts = [record for record in records() if not record["images"]]
    inputs = dict(LatentSFTCollator(processor)(texts))
    assert "pixel_values" not in inputs
    blank = with_blank_image(inputs, processor, model.config)
    assert len(blank["input_ids"]) == len(texts) + 1 and (blank["labels"][-1] == -100).all()
    losses = {}
    for name, batch in (("text", inputs), ("blank", blank)):
        model.zero_grad()
        losses[name] = model(**batch, use_cache=False).loss
        losses[name].backward()
        tower = {key: value.grad for key, value in model.named_parameters() if ".visual." in key}
        assert all((grad is None) == (name == "text") for grad in tower.values())
        assert name == "text" or not any(grad.any() for grad in tower.values())
    torch.testing.assert_close(losses["blank"], losses["text"])


def test_a_family_without_patches_is_left_alone() -> None:
    inputs = dict(LatentSFTCollator(tiny_processor())([records()[2]]))
    assert with_blank_image(inputs, tiny_processor(), SimpleNamespace()) is inputs
