"""The files of `hub_configs/accelerate` and `hub_configs/deepspeed`, as accelerate and DeepSpeed read them."""

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env

from tests.hub import ROOT
from tests.latent import tiny_latent_model
from trainers import LatentSFTConfig

LAUNCH = sorted((ROOT / "hub_configs" / "accelerate").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "hub_configs" / "deepspeed").glob("*.json"))
KINDS = {"ddp": "multi_gpu", "fsdp2": "use_fsdp"}
NO_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def by_name(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def autos(config: dict[str, Any]) -> list[str]:
    """Dotted names of the entries that are "auto"."""
    found = []
    for key, value in config.items():
        found += [f"{key}.{name}" for name in autos(value)] if isinstance(value, dict) else [key] * (value == "auto")
    return found


def launch_arguments(path: Path) -> Any:
    """What `accelerate launch --config_file path script.py` makes of the file."""
    args = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    return _validate_launch_command(args)[0]


def test_the_files_are_those_that_the_documents_name() -> None:
    assert [path.stem for path in DEEPSPEED] == ["zero2", "zero3", "zero3_offload"]
    names = {"ddp", "fsdp2", "zero2", "zero3", "zero3_offload", "cpu_zero2", "cpu_zero3"}
    assert {path.stem for path in LAUNCH} == names


@by_name(LAUNCH)
def test_accelerate_takes_the_file(path: Path) -> None:
    args = launch_arguments(path)
    on_cpu = path.stem.startswith("cpu_")
    assert (args.use_cpu, args.num_processes, args.num_machines) == (on_cpu, 2 if on_cpu else 8, 1)
    kind = KINDS.get(path.stem, "use_deepspeed")
    assert {name for name in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(args, name)} == {kind}
    if kind == "use_deepspeed":
        assert args.deepspeed_config_file == f"hub_configs/deepspeed/{path.stem.removeprefix('cpu_')}.json"
        assert (ROOT / args.deepspeed_config_file).is_file()
        assert args.zero3_init_flag == ("zero3" in path.stem)
    if kind == "use_fsdp":
        env = prepare_multi_gpu_env(args)
        with patch_environment(**{name: value for name, value in env.items() if os.environ.get(name) != value}):
            plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward
        assert str(plugin.state_dict_type) == "StateDictType.FULL_STATE_DICT"


@by_name(DEEPSPEED)
def test_options_of_the_trainer_rule_over_the_deepspeed_file(path: Path) -> None:
    config = json.loads(path.read_text())
    # An optimizer section would put all parameters into one group.
    assert not {"optimizer", "scheduler"} & set(config)
    zero = config["zero_optimization"]
    assert zero["stage"] == int(path.stem[4])
    assert zero.get("stage3_gather_16bit_weights_on_model_save", zero["stage"] < 3)
    assert ("offload_optimizer" in zero and "offload_param" in zero) == ("offload" in path.stem)
    ruled = ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"]
    assert {*ruled, "bf16.enabled", "fp16.enabled"} <= set(autos(config))


@pytest.fixture
def forget_deepspeed() -> Iterator[None]:
    """Without this every later model of this process would be made for DeepSpeed."""
    yield
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


@NO_DEEPSPEED
@by_name(DEEPSPEED)
def test_deepspeed_takes_the_file(path: Path, tmp_path: Path, forget_deepspeed: None) -> None:
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    args = LatentSFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=True, per_device_train_batch_size=3,
        gradient_accumulation_steps=5, max_grad_norm=0.7, report_to="none",
    )  # fmt: skip
    config = HfTrainerDeepSpeedConfig(str(path))
    config.trainer_config_process(args)
    config.trainer_config_finalize(args, tiny_latent_model(), num_training_steps=7)
    assert autos(config.config) == [] and config.mismatches == []
    assert config.config["gradient_clipping"] == 0.7 and config.config["bf16"]["enabled"] is True
    assert DeepSpeedPlugin(hf_ds_config=config).zero_stage == int(path.stem[4])
    parsed = DeepSpeedConfig(config.config)
    assert (parsed.train_micro_batch_size_per_gpu, parsed.gradient_accumulation_steps) == (3, 5)
    assert parsed.zero_optimization_stage == int(path.stem[4]) and parsed.bfloat16_config.enabled
    assert parsed.zero_config.gather_16bit_weights_on_model_save == (parsed.zero_optimization_stage == 3)
