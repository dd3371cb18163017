"""Training of latent-reasoning models: data, losses, objectives and trainers.

| question | files |
|---|---|
| which options, and the trainer | `configs` (of LVR `lvr_config`, of LaViT `lavit_config`, of IVT-LR and Coconut \
`staged_config`, shared `config_parts`), `sft_trainer` |
| training in stages | `curriculum`, `staged_collator`, `data/stages` |
| what a method trains | `objectives/`, `losses/`, `latent_forward` (the loss inside the wrapped forward) |
| a teacher's signals | `teachers` (extraction; `teacher_*`, `judges`), `data/teacher_signals`, `lavit_collator`, \
`sensory_gate` |
| what is fed at latent positions | `exposure`, `free_running` |
| from records to batches | `data/`, `collators`, `sample_lengths`, `dynamic_loader` |
| several processes | `distributed`, `optimizer_groups` |
| killed and resumed runs, NaN | `checkpoints`, `checkpoint_files`, `tensor_names`, `run_facts`, `fault_tolerance` |
| from a recipe to a model | `model_loading`, `adapters`, `dry_run`, `batch_preview` |
| what the scripts in `examples/` share | `scripts`; names of published options: `published_arguments` |
| reinforcement learning | `grpo_config`, `grpo_trainer` (`grpo_*`, `prompt_lengths`), `rewards`, `reward_loading` |
| tiny models, built in code | `tiny`, `tiny_chameleon`, `tiny_text`, `tiny_tokenizer`, `graph_model` |

Names are imported when first used, so that `import trainers` costs nothing.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "LatentGRPOConfig": "grpo_config",
    "LatentGRPOTrainer": "grpo_trainer",
    "LatentSFTCollator": "collators",
    "LatentSFTConfig": "configs",
    "LatentSFTTrainer": "sft_trainer",
    "LavitCollator": "lavit_collator",
    "LavitSFTConfig": "lavit_config",
    "LVRSFTConfig": "lvr_config",
    "Curriculum": "curriculum",
    "OBJECTIVES": "objectives",
    "StagedCollator": "staged_collator",
    "StagedSFTConfig": "staged_config",
    "build_objective": "objectives",
    "register_objective": "objectives",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
