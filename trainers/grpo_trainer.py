"""`LatentGRPOTrainer`: GRPO_latent on TRL's `GRPOTrainer`.

Papers: "Latent Visual Reasoning" (LVR), arXiv 2509.24251, stage 2; for `latent_policy="gaussian"` "Monet: Reasoning in
Latent Visual Space Beyond Images and Language", arXiv 2511.21395 (VLPO).
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel
from trl import GRPOTrainer

from modeling_latent.latent_strategies import resolve_latent_options

from .checkpoints import FaultTolerantTrainer
from .distributed import LatentSavingMixin
from .fault_tolerance import LossGuard, check_model_precision
from .grpo_config import LatentGRPOConfig
from .grpo_data import prompt_dataset
from .grpo_forward import add_latent_replay
from .grpo_trl import LatentRolloutMixin, reference_from_policy
from .grpo_trl_check import check_trl_grpo
from .model_loading import check_processor, check_token_ids
from .optimizer_groups import optimizer_groups, part_of, with_optimizer_groups
from .prompt_lengths import check_prompt_lengths
from .reward_loading import checked_reward, load_rewards

# Arguments of TRL's trainer that would make a completion of several turns, or rollouts without a trace.
_REFUSED_ARGUMENTS = {
    "tools": "a tool's turns would be generated anew, without the latents before them",
    "environment_factory": "an environment's turns would be generated anew, without the latents before them",
    "rollout_func": "its completions have no recorded latents",
}
RewardSource = str | Path | ModuleType | Callable[..., Any] | nn.Module


class LatentGRPOTrainer(LatentRolloutMixin, LatentSavingMixin, FaultTolerantTrainer, GRPOTrainer):
    """GRPO on completions that think in latents, for every method whose spans open in the completion.

    Rollouts are made by the model's own `generate`, with its strategy, in batches padded on the left. Each completion
    keeps its recorded latents and positions. Policy, old policy and reference then run one teacher-forced forward over
    it, with the same latents as constants, the same images, positions and temperature: before the first update the
    ratio to the rollout is 1. The loss is over the tokens that the policy sampled: no latents, nothing that decoding
    wrote by force. Advantages, clipping, KL and all reductions are TRL's.

    With `latent_policy="gaussian"` a recorded latent `a` counts as an action of the policy `N(mu, sigma^2 I)`, `mu`
    the vector that the current weights would feed there (the state at the position before, through the latent head):

        log pi(a) = -||a - mu||^2 / (2 sigma^2) + const,   d log pi / d mu = (a - mu) / sigma^2

    divided by the hidden size with `latent_policy_reduction="mean"`. It enters ratio, clipping and KL like a token
    (`losses/grpo_latent.py`). In the first update after a rollout without `latent_noise`, `a = mu` and it gives no
    gradient.

    Logged, besides what TRL logs: `latent/steps_mean` (latents of a completion), `latent/trigger_rate` (share of
    completions with a span), `latent/forced_close_rate` (share of spans that a cap or a repetition closed). Lengths of
    completions and `reward_std` follow the published definitions: lengths count latents, `reward_std` is the mean
    deviation inside a group (TRL's is `reward_std_batch`). With `log_completions` the table shows what the latents
    would have said, in the column `latent path`.

    Args:
        model: a latent model, also with an adapter; a folder or Hub id of one.
        reward_funcs: functions, reward models, or names as in `reward_loading.load_rewards`; default
            `args.reward_module` and `args.reward_funcs`. A function gets `completions` (texts with the latent tokens,
            without EOS), `prompts`, `completion_ids` and every column of the data set.
        args: [`LatentGRPOConfig`].
        train_dataset, eval_dataset: records (`trainers/data/records.py`), or prompts in TRL's format.
        processing_class: the model's `LatentProcessor`.
        kwargs: further arguments of `trl.GRPOTrainer`, e.g. `peft_config`; with an adapter the reference is the model
            without it.

    Raises:
        ValueError: a stock model, no rewards, missing columns, or an option that cannot work; names it and the remedy.
        RuntimeError: TRL changed what this relies on.
    """

    _tag_names = ["trl", "grpo", "latent-reasoning"]

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardSource | Sequence[RewardSource] | None = None,
        args: LatentGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        check_trl_grpo()
        if not isinstance(args, LatentGRPOConfig):
            raise ValueError(
                f"args must be a LatentGRPOConfig, got {type(args).__name__}; build it from the same options"
            )
        check_processor(processing_class)
        for name, why in _REFUSED_ARGUMENTS.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: {why}; leave it out")
        if not isinstance(model, str):
            check_latent_model(model, processing_class)
        rewards = find_rewards(reward_funcs, args)
        train_dataset = prompt_dataset("train_dataset", train_dataset, args.system_prompt)
        check_size(train_dataset, args)
        with reference_from_policy(self):
            super().__init__(
                model=model,
                reward_funcs=rewards,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=prompt_dataset("eval_dataset", eval_dataset, args.system_prompt),
                processing_class=processing_class,
                **kwargs,
            )
        check_prompt_lengths(self)
        self._guard = RolloutGuard()
        self.log_multimodal = False  # done in `LatentRolloutMixin`: TRL waits for ever for a process without an image
        base = self.trained_base()
        check_latent_model(base, processing_class)
        freeze_unreached(base, args.latent_policy)
        optimizer_groups(self.model, args)  # refuses a learning rate for a part that is not trained
        check_model_precision(self.model, self.args, self.is_deepspeed_enabled)
        self.latent_options = rollout_options(base, args)
        self.generation_config.return_dict_in_generate = True
        add_latent_replay(base)
        if self.ref_model is not None:
            add_latent_replay(self.accelerator.unwrap_model(self.ref_model))

    def get_train_dataloader(self) -> Any:
        return GRPOTrainer.get_train_dataloader(self)  # batches are lists of rows, which keep their own names

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: LatentGRPOConfig, model: PreTrainedModel | None = None) -> tuple[Any, Any]:
        return with_optimizer_groups(*GRPOTrainer.get_optimizer_cls_and_kwargs(args, model), args, model)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None, None]:
        """As TRL's, with the mean loss of all processes: of the last batches the evaluation loop keeps as many rows as
        there are prompts, those of the first processes."""
        loss, *nothing = super().prediction_step(*args, **kwargs)
        return self.accelerator.reduce(loss, reduction="mean"), *nothing


class RolloutGuard(LossGuard):
    """A guard whose micro-batches say which records they hold once their completions are made."""

    terms = ("loss",)

    def label(self, labels: torch.Tensor | None) -> None:
        """Name the records of the micro-batch that is noted next."""
        if len(self._losses) < len(self._labels):
            self._labels[len(self._losses)] = labels


def check_latent_model(model: nn.Module, processor: Any) -> None:
    """Refuse a stock model, and a processor whose latent tokens are not those of the model.

    Raises:
        ValueError: names the class, or the token, its ids and the remedy.
    """
    if not hasattr(model.config, "latent_token_id"):
        raise ValueError(
            f"{type(model).__name__} is no latent model; load one with load_latent_model(folder, method=...)"
        )
    check_token_ids(model.config, processor)


def freeze_unreached(model: PreTrainedModel, latent_policy: str) -> None:
    """Freeze what no log-probability depends on: the vector that spans stop at and, where latents are constants, the
    head that made them. ZeRO would apply weight decay to parameters without a gradient."""
    head = latent_policy == "none" and not model.head_at_slots
    for name, parameter in model.named_parameters():
        if "latent_stop_vector" in name.split(".") or (head and part_of(name) == "latent head"):
            parameter.requires_grad_(False)


def check_size(dataset: Any, args: LatentGRPOConfig) -> None:
    """Refuse fewer prompts than one rollout takes: TRL leaves incomplete ones out, and would train no step.

    Raises:
        ValueError: names both numbers and the remedy.
    """
    needed = args.generation_batch_size // args.num_generations
    if isinstance(dataset, Dataset) and len(dataset) < needed:
        raise ValueError(
            f"train_dataset has {len(dataset)} prompts, and one rollout takes {needed} (generation_batch_size="
            f"{args.generation_batch_size} / num_generations={args.num_generations}); give more prompts, or lower "
            "per_device_train_batch_size or gradient_accumulation_steps"
        )


def find_rewards(given: Any, args: LatentGRPOConfig) -> list[Any]:
    """Reward functions, checked at every call (`reward_loading.checked_reward`), and reward models as they are.

    Raises:
        ValueError: no reward is named, or one that has no name.
        RewardError: a name that leads to no function.
    """
    several = isinstance(given, Sequence) and not isinstance(given, str)
    sources = list(given) if several else [] if given is None else [given]
    sources = sources or args.reward_sources()
    if not sources:
        raise ValueError(
            "no reward: pass reward_funcs, or set reward_funcs or reward_module, e.g. reward_funcs: "
            "[verified_accuracy_reward, span_format_reward] (trainers/rewards.py)"
        )
    found: list[Any] = []
    for source in sources:
        if isinstance(source, str | Path | ModuleType):
            found += load_rewards(source)
        elif isinstance(source, nn.Module):
            found.append(source)
        elif callable(source) and hasattr(source, "__name__"):
            found.append(checked_reward(source))
        else:
            raise ValueError(f"reward {source!r} is no function with a name; write one with def, or name a module")
    names = [function.__name__ for function in found if inspect.isfunction(function)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"reward functions named twice: {twice}; their metrics would be one")
    return found


def rollout_options(model: PreTrainedModel, args: LatentGRPOConfig) -> dict[str, Any]:
    """Latent arguments of `generate` for the rollouts, checked against the model.

    Raises:
        ValueError: no strategy, neither given nor saved with the model, or options that it does not read.
    """
    config, saved = model.config, vars(model.generation_config)
    method = config.latent_generation or {}
    name = args.latent_strategy or saved.get("latent_strategy") or method.get("latent_strategy")
    if name is None:
        raise ValueError(
            "the model has no decoding strategy of its own; set latent_strategy: fixed (with num_latent_steps) or "
            "dynamic, or latent_strategy: off for completions without latents"
        )
    given = args.latent_options()
    options = resolve_latent_options(config.strategy_of_method(name), given, [saved, method])
    if options.values.latent_ids == "readable":
        raise ValueError(
            "latent_ids='readable' is saved with the model; set latent_generation_kwargs: {latent_ids: placeholder}"
        )
    if options.strategy.opens_span:
        config.require_latent_tokens("slots")
        given.setdefault("latent_topk", 0)  # nobody reads them
    return {"latent_strategy": name, **given}


__all__ = [
    "LatentGRPOTrainer",
    "RolloutGuard",
    "check_latent_model",
    "check_size",
    "find_rewards",
    "freeze_unreached",
    "rollout_options",
]
