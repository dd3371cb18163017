"""What each process of the tests in this folder runs: short trainings, their logs and parameters written to files.

    torchrun --standalone --nproc_per_node 2 tests/distributed/worker.py FOLDER adamw own fsdp2
    accelerate launch --config_file hub_configs/accelerate/cpu_zero3.yaml tests/distributed/worker.py FOLDER adamw

Models are read from beside FOLDER ([`save_bases`]). The test calls [`run`] itself for the numbers of one process. Each
run sees the same micro-batches in the same order, whatever the number of processes: batch `i` goes to process
`i % processes`, and the accumulation steps make up for it.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from examples import train_laser
from tests.distributed import fsdp2
from tests.distributed.data import train_data
from tests.distributed.grpo import GRPORecorder, bent, build_grpo, save_grpo_base
from tests.latent import tiny_latent_model
from tests.tiny import tiny_processor
from tests.trainers.killed_runs import let_deepspeed_use_gloo
from tests.trainers.lavit_parts import lavit_parts, lavit_processor
from tests.trainers.staged_parts import staged_parts, staged_processor
from tests.trainers.test_lvr_sft import lvr_parts
from trainers import LatentSFTConfig, LatentSFTTrainer, LavitSFTConfig, LVRSFTConfig, StagedSFTConfig
from trainers.data.lvr_text import LVR_TOKENS
from trainers.data.mazes import maze_dataset
from trainers.tiny import build_tiny_processor

MICRO_BATCHES = 4  # in one optimizer step, over all processes


@dataclass(frozen=True)
class Run:
    """A training: its data, the model that it starts from and the options of its config that differ from `OPTIONS`."""

    data: str = "mazes"
    base: str = "untied"
    options: dict[str, Any] = field(default_factory=dict)


OPTIONS = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 2,
    "max_steps": 2,
    "learning_rate": 0.02,
    "optim": "sgd",
    "weight_decay": 0.01,
    "lr_scheduler_type": "linear",
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "disable_tqdm": True,
}
ADAMW = {"optim": "adamw_torch", "learning_rate": 2e-3, "adam_epsilon": 1e-6, "max_steps": 3}
CHECKPOINTING = {"activation_checkpointing": True}  # as in the recipes of the large models
STAGED = {
    "steps_per_stage": [1],
    "start_stage": 1,
    "num_stages": 4,
    "max_latent_stage": 3,
    "uniform_prob": 0.8,
    "num_latent_patches": 2,
}
RUNS = {
    "adamw": Run(options={**ADAMW, "vision_lr": 5e-4, "merger_lr": 1e-3}),
    "own": Run(base="tied", options={"latent_exposure": "own", "latent_exposure_passes": 2, **CHECKPOINTING}),
    "token": Run(data="mixed", options={"loss_average": "token"}),
    "text on one process": Run(data="text beside images", options=CHECKPOINTING),
    # All batches of the epoch in one step: how they are planned, for one process or two, must not matter.
    "dynamic": Run(
        base="tied",
        options={
            "loss_average": "token",
            "enable_dynamic_batch": True,
            "dynamic_batch_token_cap": 256,
            "train_sampling_strategy": "random",
            "gradient_accumulation_steps": 64,
            "max_steps": 1,
        },
    ),
    "stream": Run(data="stream", options={"max_steps": 5, "gradient_accumulation_steps": 1}),
    "lvr": Run(base="lvr", options={**ADAMW, **CHECKPOINTING, "mode_switch_loss": True}),
    "lvr, text on one process": Run(data="text beside images", base="lvr", options={"loss_average": "token"}),
    # As many steps on both processes as the longest span of either has.
    "lvr, free": Run(base="lvr", options={"latent_exposure": "free", "latent_exposure_forced": 1}),
    # Every row at a stage of its own: the processes have different numbers of latents.
    "ivtlr": Run(base="ivtlr", options={**ADAMW, **CHECKPOINTING, **STAGED}),
    "ivtlr, bptt": Run(base="ivtlr", options={**STAGED, "latent_gradient": "bptt", "loss_average": "token"}),
    "coconut, new optimizers": Run(
        base="coconut",
        options={
            **ADAMW,
            **STAGED,
            "num_latent_patches": 0,
            "reset_optimizer": "stage",
            "adam_epsilon": 1e-4,  # every step is the first one of an optimizer: as large where a gradient is nothing
        },
    ),
    # The gate opens during the run; heads and attention of the wrapped forward.
    "lavit": Run(base="lavit", options={**ADAMW, **CHECKPOINTING, "gate_steps": 2}),
    "lavit, own attention": Run(
        base="lavit",
        options={"attention_predictor": "attention", "latent_visibility": "bottleneck", "loss_average": "token"},
    ),
    # The published loss (bnpo) is a mean over the tokens of a micro-batch: one process has both, one after the other.
    "grpo": Run(base="grpo", options={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
    "grpo, adamw": Run(base="grpo", options={**ADAMW, **CHECKPOINTING, "learning_rate": 2e-4, "loss_type": "dapo"}),
    "grpo, two iterations": Run(
        base="grpo", options={"loss_type": "grpo", "num_iterations": 2, "max_steps": 3, "beta": 0.0}
    ),
    "grpo, gaussian": Run(
        base="grpo",
        options={
            "loss_type": "dr_grpo",
            "latent_policy": "gaussian",
            "latent_policy_sigma": 0.5,
            "latent_generation_kwargs": {"latent_hook": bent},
            "ds3_gather_for_generation": False,
        },
    ),
    "grpo, text on one process": Run(
        data="text beside images", base="grpo", options={**CHECKPOINTING, "loss_type": "grpo", "log_completions": True}
    ),
}


class Recorder(LatentSFTTrainer):
    """Keeps the token ids of each training batch of this process."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.seen = [*getattr(self, "seen", []), inputs["input_ids"].tolist()]
        return super().training_step(model, inputs, *args, **kwargs)


def save_bases(folder: Path) -> None:
    """Write the models that all runs start from; the head is sharp, so that some windows are confused and some not."""
    generation = {"latent_strategy": "dynamic", "max_latent_steps": 3}
    for name, tied in (("untied", False), ("tied", True)):
        model = tiny_latent_model(tie_word_embeddings=tied, latent_method="laser", latent_generation=generation)
        with torch.no_grad():
            model.lm_head.weight.mul_(8.0)
        model.save_pretrained(folder / name)
    model, _ = lvr_parts(head="simple", stop_vector=True)
    model.save_pretrained(folder / "lvr")
    lavit_parts()[0].save_pretrained(folder / "lavit")
    save_grpo_base(folder / "grpo")
    for name, family in (("ivtlr", "qwen2_5_vl"), ("coconut", "gpt2")):
        staged_parts(family)[0].save_pretrained(folder / name)


def load_base(folder: Path) -> PreTrainedModel:
    """The model of a folder of [`save_bases`]."""
    auto = AutoModelForCausalLM if folder.name == "coconut" else AutoModelForImageTextToText
    return auto.from_pretrained(folder)


def parts_of(base: str) -> tuple[type[LatentSFTConfig], dict[str, Any], Any]:
    """Class of the configuration, its options beside those of the run, and the processor of a model."""
    if base == "lvr":
        return LVRSFTConfig, {}, build_tiny_processor(latent_tokens=LVR_TOKENS)
    if base == "lavit":
        return LavitSFTConfig, {}, lavit_processor()
    if base == "ivtlr":
        return StagedSFTConfig, {}, staged_processor("qwen2_5_vl")
    if base == "coconut":
        return StagedSFTConfig, {"latent_method": "coconut", "staged_format": "coconut"}, staged_processor("gpt2")
    return LatentSFTConfig, {}, tiny_processor()


def build_trainer(name: str, folder: Path, processes: int) -> Recorder | GRPORecorder:
    """The trainer of a run. As in a script, the config comes first: under ZeRO-3 a model is loaded in shards then."""
    spec = RUNS[name]
    if spec.base == "grpo":
        return build_grpo(spec.data, spec.options, folder / name, folder.parent / spec.base, processes)
    steps = {"gradient_accumulation_steps": MICRO_BATCHES // processes}
    config_class, given, processor = parts_of(spec.base)
    args = config_class(output_dir=str(folder / name), **{**OPTIONS, **given, **steps, **spec.options})
    data, eval_data = train_data(spec.data), maze_dataset(5, seed=4, split="validation", sizes=(3, 4))
    if spec.base == "lavit":
        data, eval_data = train_data("teacher"), train_data("teacher").select(range(5))
    if spec.base == "coconut":
        data, eval_data = train_data("graphs"), train_data("graphs").select(range(5))
    return Recorder(
        model=load_base(folder.parent / spec.base),
        args=args,
        train_dataset=data,
        eval_dataset=eval_data,
        processing_class=processor,
    )


@contextlib.contextmanager
def gathered(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Whole parameters on every process, also under ZeRO-3."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


def run(name: str, folder: Path, processes: int = 1) -> dict[str, Any]:
    """Train, evaluate, save; write what happened to `<name>-<process>.json` and return it."""
    trainer = build_trainer(name, folder, processes)
    trainer.train()
    trainer.evaluate()
    trainer.save_model(folder / name)
    state = trainer.accelerator.state
    result = {
        "distributed_type": state.distributed_type.value,
        "num_processes": state.num_processes,
        "zero_stage": state.deepspeed_plugin.zero_stage if state.deepspeed_plugin else None,
        "log": trainer.state.log_history,
        "seen": trainer.seen,
        "optimizer": type(trainer.optimizer.optimizer).__name__,
        "groups": [
            {key: group[key] for key in ("name", "lr", "initial_lr", "weight_decay")}
            for group in trainer.optimizer.param_groups
        ],
    }
    model = trainer.accelerator.unwrap_model(trainer.model)
    with gathered(list(model.parameters())):
        trained = {key: value.detach().clone().contiguous() for key, value in model.named_parameters()}
    if trainer.accelerator.is_main_process:
        save_file(trained, folder / f"{name}.safetensors")
    (folder / f"{name}-{state.process_index}.json").write_text(json.dumps(result))
    return result


def run_script(folder: Path) -> None:
    """The example script, as a user starts it: a stock checkpoint is made latent, trained for a step and saved."""
    small = ["--per_device_train_batch_size", "1", "--max_steps", "1", "--num_eval_mazes", "2", "--warmup_steps", "0"]
    sys.argv = ["examples/train_laser.py", *small, "--report_to", "none", "--output_dir", str(folder / "script")]
    train_laser.main()


def main(folder: str, *names: str) -> None:
    """The runs, one after the other, in this process of several."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        let_deepspeed_use_gloo()
    for name in names:
        if name == "fsdp2":
            fsdp2.compare(Path(folder))
        elif name == "script":
            run_script(Path(folder))
        else:
            run(name, Path(folder), processes=int(os.environ["WORLD_SIZE"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
