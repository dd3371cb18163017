"""The one file that touches private methods of `trl.GRPOTrainer`: rollouts with their latents, replay, loss mask.

Paper: "Latent Visual Reasoning" (LVR), arXiv 2509.24251, stage 2; for `latent_policy="gaussian"` "Monet: Reasoning in
Latent Visual Space Beyond Images and Language", arXiv 2511.21395 (VLPO).

| what TRL does | what happens here |
|---|---|
| `_generate_single_turn` calls `generate` | with the latent options, in evaluation mode; the trace is kept |
| `_generate` decodes | texts keep the latent tokens; the loss mask goes out as TRL's `tool_mask` |
| `_get_per_token_logps_and_entropies` | one teacher-forced forward with the recorded latents and positions |
| `_generate_and_score_completions` | recorded latents become entries of the batch |
| `_compute_loss` | takes them out of the (shuffled, split) batch; Gaussian credit for latents |

What must hold in TRL for that is in `grpo_trl_check.py`.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import trl
from accelerate.utils import gather_object
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer
from trl.trainer import grpo_trainer as trl_grpo

from modeling_latent import LatentTrace

from .fault_tolerance import RECORD_LABELS, LabelledCollator
from .grpo_batches import check_images_of_all, scored_batches
from .grpo_data import with_parts
from .grpo_replay import (
    LossMasks,
    Replay,
    completion_texts,
    credit_latents,
    latent_counts,
    latent_metrics,
    latent_paths,
)
from .losses.grpo_latent import completion_metrics, group_reward_std
from .prompt_lengths import refuse_long

# Image inputs of families that have no latent class.
_FOREIGN_INPUTS = ("pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes", "token_type_ids",
                   "image_position_ids")  # fmt: skip


@contextmanager
def reference_from_policy(trainer: GRPOTrainer) -> Iterator[None]:
    """While TRL's trainer is built, its reference is a copy of the policy instead of what `config._name_or_path` says:
    that may be a stock checkpoint, which TRL would load without latents.

    With ZeRO-3 the policy is in shards already, and TRL loads the reference from the folder.

    Raises:
        ValueError: with ZeRO-3, a folder that is no latent model.
    """
    load = trl_grpo.create_model_from_path

    def create(name: str, *args: Any, **kwargs: Any) -> PreTrainedModel:
        policy = vars(trainer).get("model")
        if policy is None:
            return load(name, *args, **kwargs)
        if not is_deepspeed_zero3_enabled():
            return copy.deepcopy(policy)
        reference = load(name, *args, **kwargs)
        if not hasattr(reference, "slot_hidden_states"):
            raise ValueError(
                f"the reference would be loaded from {name!r}, a {type(reference).__name__} without latents; with "
                "ZeRO-3 save the latent model first (save_pretrained) and train from that folder, or set beta: 0"
            )
        return reference

    trl_grpo.create_model_from_path = create
    try:
        yield
    finally:
        trl_grpo.create_model_from_path = load


class LatentRolloutMixin:
    """Mixin before `GRPOTrainer`; the trainer sets `latent_options` (arguments of `generate`) after its `__init__`."""

    latent_options: dict[str, Any]
    _trace: LatentTrace | None = None
    _replay: Replay | None = None
    _rewards: torch.Tensor | None = None
    _batch: dict[str, Any] | None = None  # of the loss that is being computed
    _rows: list[dict[str, Any]] | None = None  # whose completions are made
    _scored_means: list[torch.Tensor]

    # Rollouts

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """`generate` of the model with the latent options and without dropout or checkpointing; keeps its trace."""
        model = self.accelerator.unwrap_model(self.model_wrapped)
        stock, training, own = model.generate, model.training, vars(model).get("generate")

        def generate(**kwargs: Any) -> torch.LongTensor:
            output = stock(**kwargs, **self.latent_options)
            self._trace = output.latent_trace
            return output.sequences

        model.generate = generate
        model.eval()
        try:
            yield
        finally:
            del model.generate
            if own is not None:
                model.generate = own
            model.train(training)

    def _generate_single_turn(self, prompt_ids: list, images: list | None, *args: Any, **kwargs: Any) -> Any:
        lengths = zip(self._rows, map(len, prompt_ids), strict=True)
        refuse_long("this batch", lengths, self.args.max_prompt_length)
        check_images_of_all(self, images)
        if self.log_completions and self.args.log_multimodal:
            self._logs["images"].extend(gather_object(images or [None] * len(prompt_ids)))
        with self._recorded():
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)

    def _generate(self, prompts: list) -> tuple:
        mode = "train" if self.model.training else "eval"
        prompt_ids, completion_ids, _, completions, logprobs, extra, images, tool_images = super()._generate(prompts)
        trace, self._trace = self._trace, None
        self._replay = Replay.from_trace(trace)
        masks = LossMasks.from_trace(trace, self.eos_token_ids, self.args.train_start_token)
        trained = masks.tokens
        if self.args.latent_policy == "gaussian":
            trained = trained | (masks.latents & masks.completion)
        lengths = masks.completion.sum(1).tolist()
        if lengths != [len(ids) for ids in completion_ids]:
            raise RuntimeError(f"trl {trl.__version__} cuts completions at another place than their first EOS")
        loss_mask = [row[:length].int().tolist() for row, length in zip(trained, lengths, strict=True)]
        texts = completion_texts(self.processing_class, completion_ids)
        chat = bool(completions) and isinstance(completions[0], list)
        completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
        self._log_rollout(mode, trace, masks)
        return prompt_ids, completion_ids, loss_mask, completions, logprobs, extra, images, tool_images

    def _log_rollout(self, mode: str, trace: LatentTrace, masks: LossMasks) -> None:
        """Metrics as the published code defines them, over the completions of all processes."""
        metrics = self._metrics[mode]
        completion = masks.completion
        if self.mask_truncated_completions:
            completion = completion & masks.terminated[:, None]
        completion = self.accelerator.pad_across_processes(completion.long(), dim=1)
        completion, terminated = self.accelerator.gather((completion, masks.terminated))
        for name, value in completion_metrics(completion, terminated).items():
            metrics[name][-1:] = [value]  # in place of TRL's
        counts = self.accelerator.reduce(latent_counts(trace), reduction="sum")
        for name, value in latent_metrics(counts).items():
            metrics[name].append(value)
        if self.log_completions:
            self._log_completion_extra("latent path", latent_paths(self.processing_class, trace))

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._rewards = super()._calculate_rewards(*args, **kwargs)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        self._scored_means, self._rows = [], [with_parts(row) for row in inputs]
        output = super()._generate_and_score_completions(self._rows)
        self._log_group_std(mode)
        replay = self._replay.to_length(output["prompt_ids"].shape[1] + output["completion_ids"].shape[1])
        if self._scored_means:
            scored = [name for name in ("old", "ref") if f"{name}_per_token_logps" in output]
            replay = replace(replay, **{f"{n}_means": m for n, m in zip(scored, self._scored_means, strict=True)})
        self._replay, self._scored_means, self._rows = None, [], []
        labels = LabelledCollator(lambda rows: {})(inputs)[RECORD_LABELS].to(output["prompt_ids"].device)
        return {**output, **replay.batch(), RECORD_LABELS: labels}

    def _log_group_std(self, mode: str) -> None:
        """`reward_std` inside the groups, as published; TRL's, over all completions, is `reward_std_batch`."""
        metrics = self._metrics[mode]
        size = self.num_generations if mode == "train" else self.num_generations_eval
        total = (self._rewards * self.reward_weights.to(self._rewards.device)).nansum(1)
        metrics["reward_std_batch"].append(metrics["reward_std"].pop())
        metrics["reward_std"].append(group_reward_std(total, size) if size > 1 else 0.0)

    # Replay

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **inputs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Log-probabilities and entropies `(B, C)` of the completion, teacher forced on the recorded latents; 0 at
        latents and padding (in the loss with `latent_policy="gaussian"`: see [`credit_latents`])."""
        foreign = [name for name in _FOREIGN_INPUTS if inputs.get(name) is not None]
        if foreign or compute_aux_loss:
            raise ValueError(f"{foreign or 'router_aux_loss_coef'}: no latent model takes it; leave it out")
        replay = self._replay.to_length(input_ids.shape[1])
        gaussian = self.args.latent_policy == "gaussian"
        labels = input_ids.masked_fill((attention_mask == 0) | replay.mask(input_ids.shape[1]), -100)
        inputs.update(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        logps, entropies, means = [], [], []
        for given, part, count in scored_batches(self, inputs, replay, batch_size):
            positions = part.position_ids
            with self.accelerator.autocast():
                output = model(
                    **given,
                    position_ids=None if positions is None else positions.transpose(0, 1),
                    fused_lm_head=True,
                    num_scored=logits_to_keep,
                    replay_vectors=part.vectors,
                    replay_index=part.index,
                    replay_means=gaussian,
                    replay_latents=self.args.latent_replay,
                )
            logps.append(output.log_probs[:count])
            if compute_entropy:
                entropies.append(output.entropy[:count])
            if gaussian:
                means.append(output.means[:count])
        scores = torch.cat(logps)
        if gaussian and self._batch is None:  # while completions are scored
            self._scored_means.append(torch.cat(means).detach())
        elif gaussian:
            options = (self.args.latent_policy_sigma, self.args.latent_policy_reduction)
            scores = credit_latents(self._batch, scores, torch.cat(means), replay, *options)
        return scores, torch.cat(entropies) if compute_entropy else None, None

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        self._batch, self._replay = dict(inputs), Replay.from_batch(inputs)
        try:
            loss = super()._compute_loss(model, self._batch)
        finally:
            self._batch = self._replay = None
        if self.model.training:
            self._guard.label(inputs.get(RECORD_LABELS))
            self.watch_losses(loss)
        return loss


__all__ = ["LatentRolloutMixin", "reference_from_policy"]
