"""What `grpo_trl.py` relies on in the installed TRL, checked when a trainer is built."""

import inspect

import trl
from trl import GRPOTrainer

# Methods that are overridden or called there, with parameters that are relied on.
_METHODS = {
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_compute_loss": ("model", "inputs"),
    "_generate": ("prompts",),
    "_generate_and_score_completions": ("inputs",),
    "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields", "num_generations"),
    "_get_per_token_logps_and_entropies": (
        "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy", "compute_aux_loss",
        "pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids",
    ),
    "_log_completion_extra": ("column", "values"),
}  # fmt: skip
# What a method must still do, in this order.
_RELIED_ON = {
    "__init__": ("create_model_from_path(get_config_model_id(self.model.config)", "add_fused_lm_head("),
    "_generate_single_turn": ("unwrap_model_for_generation(", "unwrapped_model.generate(", "[:, prompt_length:]"),
    "_generate": ("self._generate_single_turn(", "return prompt_ids, completion_ids, tool_mask, completions,"),
    "_generate_and_score_completions": (
        "self._generate(prompts)",
        "for mask in tool_mask_list",
        "loss_mask = completion_mask if tool_mask is None else completion_mask * tool_mask",
        "old_per_token_logps, _, _ = self._get_per_token_logps_and_entropies(",
        "ref_per_token_logps, _, _ = self._get_per_token_logps_and_entropies(",
        "self._calculate_rewards(",
        '["reward_std"]',
        "_pending_extra_logs",
    ),
    "_compute_loss": (
        'completion_mask * inputs["tool_mask"]',
        "self._get_per_token_logps_and_entropies(",
        'inputs.get("old_per_token_logps")',
        'inputs["ref_per_token_logps"]',
    ),
    "_prepare_inputs": ("self._generate_and_score_completions(", "shuffle_sequence_dict(", "split_tensor_dict("),
}


def check_trl_grpo() -> None:
    """Check what this file relies on in the installed TRL.

    Raises:
        RuntimeError: names the TRL version whose `GRPOTrainer` has another form, and what is missing.
    """
    wrong = []
    for name, parameters in _METHODS.items():
        method = getattr(GRPOTrainer, name, None)
        if method is None or not set(parameters) <= set(inspect.signature(method).parameters):
            wrong.append(f"GRPOTrainer.{name}{parameters}")
    for name, parts in _RELIED_ON.items():
        source = _source(name)
        places = [source.find(part) for part in parts]
        if -1 in places or places != sorted(places):
            wrong.append(f"GRPOTrainer.{name} with {', '.join(parts)}")
    if wrong:
        raise RuntimeError(
            f"trl {trl.__version__} changed its GRPOTrainer (not found: {'; '.join(wrong)}); install a version in the "
            "range of pyproject.toml"
        )


def _source(name: str) -> str:
    method = getattr(GRPOTrainer, name, None)
    return "" if method is None else inspect.getsource(inspect.unwrap(method))


__all__ = ["check_trl_grpo"]
