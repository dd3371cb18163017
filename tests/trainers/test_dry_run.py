"""The dry run: the numbers it prints, that it is the trainer that would train, and that it leaves nothing behind."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_processor
from trainers import LatentSFTConfig, LatentSFTTrainer
from trainers.batch_preview import batch_lines, first_batch
from trainers.data.dynamic_batching import BalancedBatches
from trainers.data.mazes import maze_dataset, maze_stream
from trainers.dry_run import dry_run_report, dry_run_settings
from trainers.model_loading import LatentModelConfig, load_for_training
from trainers.tiny import save_tiny_stock_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_stock_checkpoint(tmp_path_factory.mktemp("model") / "base")


def settings(folder: Path, **options: Any) -> LatentSFTConfig:
    small = {"max_steps": 6, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "warmup_steps": 3}
    return LatentSFTConfig(output_dir=str(folder / "out"), **{**small, "disable_tqdm": True, **options})


def build(
    base: Path, args: LatentSFTConfig, data: Any = None, weights: bool = False, **options: Any
) -> LatentSFTTrainer:
    torch.manual_seed(0)
    model_args = LatentModelConfig(model_name_or_path=str(base), **options)
    model, processor, peft_config = load_for_training(model_args, "laser", weights=weights)
    data = maze_dataset(10, seed=2, sizes=(3, 4)) if data is None else data
    return LatentSFTTrainer(model, args, train_dataset=data, processing_class=processor, peft_config=peft_config)


def report(base: Path, args: LatentSFTConfig, processes: int | None = None, data: Any = None, **options: Any) -> str:
    with dry_run_settings(args):
        return dry_run_report(build(base, args, data, **options), processes)


def number(text: str, pattern: str) -> int:
    """The number that a pattern of the report catches."""
    match = re.search(pattern, text)
    assert match, f"{pattern!r} is not in\n{text}"
    return int(match[1].replace(",", ""))


# Model -----------------------------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_real_model(base: Path, tmp_path: Path) -> None:
    text = report(base, settings(tmp_path), freeze_vision_tower=True)
    real = build(base, settings(tmp_path), weights=True, freeze_vision_tower=True).model
    counts = {name: p.numel() for name, p in real.named_parameters()}
    vision = sum(count for name, count in counts.items() if "visual" in name)
    total = sum(counts.values())
    assert number(text, r"parameters  ([\d,]+) in all") == total
    assert number(text, r"([\d,]+) trainable \(") == total - vision
    assert number(text, r"vision tower +([\d,]+)  frozen") == vision
    assert number(text, r"LM head +([\d,]+)  trainable") == counts["lm_head.weight"]
    groups = re.findall(r"(\d+) tensors +([\d,]+) parameters  lr \S+  weight decay", text)
    assert sum(int(parameters.replace(",", "")) for _, parameters in groups) == total - vision
    assert sum(int(tensors) for tensors, _ in groups) == sum(p.requires_grad for p in real.parameters())


def test_an_adapter_is_counted(base: Path, tmp_path: Path) -> None:
    text = report(base, settings(tmp_path), use_peft=True, lora_r=2)
    real = build(base, settings(tmp_path), weights=True, use_peft=True, lora_r=2).model
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert number(text, r"([\d,]+) trainable \(") == number(text, r"adapter +([\d,]+)  trainable") == trained
    assert number(text, r"language model +([\d,]+)  frozen") > 10 * trained


def test_memory_is_that_of_the_tensors(base: Path, tmp_path: Path) -> None:
    args = settings(tmp_path)
    with dry_run_settings(args):
        trainer = build(base, args, dtype="bfloat16")
        text = dry_run_report(trainer, 4)
        total = sum(p.numel() for p in trainer.model.parameters())
        in_bits = dry_run_report(trainer, 4, bits=4.127)
        linear = sum(
            p.numel()
            for name, p in trainer.model.named_parameters()
            if re.search(r"language_model.*(proj)\.weight", name)
        )
    size = f"{2 * total / 2**20:.1f} MiB"
    assert f"weights {size} + gradients {size} + moments {4 * total / 2**20:.1f} MiB" in text
    assert f"{16 * total / 4 / 2**20:.1f} MiB with ZeRO-3 over 4 processes" in text
    assert f"weights {(2 * (total - linear) + 4.127 / 8 * linear) / 2**20:.1f} MiB" in in_bits


# Steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, epochs", [(6, 3.0), (-1, 2.0)])
def test_steps_are_those_of_the_trainer(steps: int, epochs: float, base: Path, tmp_path: Path) -> None:
    options = {"max_steps": steps, "num_train_epochs": 2, "gradient_accumulation_steps": 3, "warmup_steps": 0.25}
    args = settings(tmp_path, **options)
    with dry_run_settings(args):
        trainer = build(base, args)
        text = dry_run_report(trainer)
        real = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    total = number(text, r"steps +([\d,]+) \(")
    assert total == real[-1] == (6 if steps > 0 else 4)
    assert f"({epochs:.2f} epochs of {real[1]} steps), {epochs * 10:.0f} samples" in text
    assert "2 samples x 3 accumulated x 1 processes = 6 samples a step" in text
    assert f"warm-up {args.get_warmup_steps(total)} steps" in text
    assert "data        10 records" in text
    wide = report(base, args, 4)
    expected = 6 if steps > 0 else 2
    assert "= 24 samples a step" in wide and f"steps       {expected} ({expected:.2f} epochs of 1 steps)" in wide
    assert f"{expected * 10} samples" in wide


def test_a_stream_has_no_end(base: Path, tmp_path: Path) -> None:
    text = report(base, settings(tmp_path), data=maze_stream(seed=2, sizes=(3,)))
    assert "a stream of records" in text and "steps       6 (the data has no end), 12 samples" in text


@pytest.mark.parametrize("processes", [1, 3])
def test_dynamic_batches_are_planned_for_the_real_number_of_processes(
    processes: int, base: Path, tmp_path: Path
) -> None:
    cap = {"enable_dynamic_batch": True, "dynamic_batch_token_cap": 320, "dynamic_batch_max_bs": 3}
    args = settings(tmp_path, gradient_accumulation_steps=2, **cap)
    with dry_run_settings(args):
        trainer = build(base, args)
        text = dry_run_report(trainer, processes)
    lengths = trainer.train_batches.lengths
    plan = BalancedBatches(lengths, 320, 3, processes, seed=args.seed)
    assert plan.summary() in text
    batches = len(plan)
    assert len(lengths) == 10 and batches % processes == 0
    steps = -(-batches // (2 * processes))
    tokens, padded = sum(lengths) / steps, plan.tokens.sum() / steps
    assert f"about {10 / steps:.0f} samples, {tokens:,.0f} tokens, {padded:,.0f} with padding a step" in text
    assert f"epochs of {steps} steps)" in text


def test_the_published_plan_is_described(base: Path, tmp_path: Path) -> None:
    cap = {"enable_dynamic_batch": True, "dynamic_batch_token_cap": 320, "dynamic_batch_max_bs": 3}
    text = report(base, settings(tmp_path, dynamic_batch_plan="reference", **cap), 2)
    assert "dynamic (reference): at most 3 samples and 320 tokens, x 1 accumulated x 2 processes" in text
    assert "the published plan: 6 batches for each of 2 ranks" in text and "steps       6 (" in text
    assert 2 < number(text, r"about (\d+) samples") <= 6


# The first batch -------------------------------------------------------------------------------------------------


def test_the_first_batch_is_the_one_that_training_takes(base: Path, tmp_path: Path) -> None:
    args = settings(tmp_path, per_device_train_batch_size=3, dataloader_num_workers=1)
    with dry_run_settings(args):
        found = first_batch(build(base, args))
    assert args.dataloader_num_workers == 1
    trainer, taken = build(base, settings(tmp_path, per_device_train_batch_size=3, max_steps=1), weights=True), []
    trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: taken.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    trainer.train()
    assert len(found.rows) == 3 and torch.equal(found.tensors["input_ids"], taken[0])


def test_text_labels_and_images_of_the_first_batch(base: Path, tmp_path: Path) -> None:
    trainer = build(base, settings(tmp_path))
    batch = first_batch(trainer)
    text = "\n".join(batch_lines(trainer, batch))
    processor, ids = trainer.processing_class, batch.tensors["input_ids"]
    for row, tokens, grid in zip(batch.rows, ids, batch.tensors["image_grid_thw"].tolist(), strict=True):
        chain, answer = row["chain"], row["answer"]
        rows = len(processor.tokenizer.encode(" ".join(chain), add_special_tokens=False))
        rest = len(processor.tokenizer.encode(f"<answer>{answer}</answer><|im_end|>\n", add_special_tokens=False)) + 2
        length = int((tokens != processor.tokenizer.pad_token_id).sum())
        assert f"id {row['id']!r}: {length} tokens: {rest} cross entropy, {rows} latent loss" in text
        assert f"latent loss   | {' '.join(chain)}\n" in text
        assert f"cross entropy | <|laser_end|><answer>{answer}</answer><|im_end|>\\n" in text
        image, count = row["images"][0], grid[1] * grid[2] // 4
        size = f"{image.width} x {image.height} pixels -> {14 * grid[2]} x {14 * grid[1]}, {count} tokens"
        assert size in text and f"<|vision_start|><|image_pad|>x{count}<|vision_end|>" in text
        assert "not trained   | <|im_start|>system\\nYou are" in text and "<|im_end|>\\n<|im_start|>user\\n" in text


def test_slots_are_shown_and_carry_no_label(base: Path, tmp_path: Path) -> None:
    trainer = build(base, settings(tmp_path, latent_form="slots", num_slots=4))
    text = "\n".join(batch_lines(trainer, first_batch(trainer)))
    assert text.count("not trained   | <|laser|>x4") == 2 and "0 rows in the latent loss" in text


# What it leaves behind, and what it refuses ----------------------------------------------------------------------


def test_nothing_is_written_and_the_model_has_no_memory(base: Path, tmp_path: Path) -> None:
    args = settings(tmp_path, report_to="tensorboard", push_to_hub=True)
    before = sorted(base.iterdir())
    with dry_run_settings(args):
        trainer = build(base, args)
        dry_run_report(trainer)
    assert all(tensor.device.type == "meta" for tensor in trainer.model.state_dict().values())
    assert not list(tmp_path.iterdir()) and sorted(base.iterdir()) == before
    assert args.output_dir == str(tmp_path / "out") and args.push_to_hub


def test_no_weight_file_is_needed(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "base"
    copy.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (copy / path.name).write_bytes(path.read_bytes())
    text = report(copy, settings(tmp_path))
    assert number(text, r"parameters  ([\d,]+) in all") == number(
        report(base, settings(tmp_path)), r"parameters  ([\d,]+) in all"
    )


@pytest.mark.parametrize("name, value", [("WORLD_SIZE", "2"), ("ACCELERATE_USE_DEEPSPEED", "true")])
def test_launchers_are_refused(name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = settings(tmp_path)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="dry_run=True under a launcher of several processes.*dry_run_processes"):
        with dry_run_settings(args):
            pass


def test_a_number_of_processes_is_at_least_one(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dry_run_processes=0 must be at least 1"):
        report(base, settings(tmp_path), 0)


def test_a_stream_without_steps_is_refused(base: Path, tmp_path: Path) -> None:
    args = settings(tmp_path)
    args.max_steps = -1
    with pytest.raises(ValueError, match="max_steps"):
        report(base, args, data=maze_stream(seed=2, sizes=(3,)))


def test_the_processor_is_the_one_of_the_recipe(base: Path, tmp_path: Path) -> None:
    assert "36 tokens" not in report(base, settings(tmp_path))
    data = maze_dataset(4, seed=2, sizes=(6,))
    text = report(base, settings(tmp_path), data=data, max_pixels=784 * 36)
    assert "168 x 168 pixels -> 168 x 168, 36 tokens" in text
    assert tiny_processor().image_processor.size["longest_edge"] < 784 * 36
