"""What every head class with latents shares, whatever its family: its heads, their initial weights, its output, and
the renaming of checkpoint tensors.

A head class of the library is this mixin before the stock class. Its `__init__` builds the backbone and calls
`build_heads`; its `forward`, whose signature is that of the family, runs the backbone and returns `latent_output`.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .generation_latent import LatentGenerationMixin
from .latent_heads import build_latent_head
from .latent_inputs import LatentCausalLMOutputWithPast, LatentHeadMixin
from .latent_lavit import AttentionHead, ConceptHead
from .latent_lvr import LatentStopVector


class LatentHeadClassMixin(LatentGenerationMixin, LatentHeadMixin):
    """For a head class, before the stock one."""

    def build_heads(self, config: Any) -> None:
        """The LM head of the stock class, and the latent head, the vector that ends a span and the heads for training,
        if the configuration names them; initialises weights."""
        text = config.get_text_config()
        self.lm_head = self.build_lm_head(text.hidden_size, text.vocab_size)
        self.latent_head = build_latent_head(config)
        self.latent_stop_vector = LatentStopVector(text.hidden_size) if config.latent_stop_vector else None
        size = config.concept_head_size
        self.concept_head = None if size is None else ConceptHead(text.hidden_size, size)
        self.attention_head = AttentionHead(text.hidden_size) if config.attention_head else None
        self.head_at_slots = self.latent_head is not None and config.latent_head_timing == "reference"
        self.post_init()

    def build_lm_head(self, hidden_size: int, vocab_size: int) -> nn.Linear:
        """The LM head of the stock class."""
        return nn.Linear(hidden_size, vocab_size, bias=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the stock class; layers of the latent head as PyTorch makes them, the end vector at random."""
        super()._init_weights(module)
        if isinstance(module, LatentStopVector):
            direction = torch.randn_like(module.weight, dtype=torch.float32)
            length = direction.norm().clamp(min=1e-12)
            init.copy_(module.weight, direction / length * module.weight.numel() ** 0.5)
        elif isinstance(module, nn.Linear) and self.latent_head is not None:
            if any(module is layer for layer in self.latent_head.modules()):
                init.kaiming_uniform_(module.weight, a=5**0.5)
                if module.bias is not None:
                    init.uniform_(module.bias, -(module.in_features**-0.5), module.in_features**-0.5)

    def latent_output(
        self,
        outputs: Any,
        *,
        input_ids: torch.LongTensor | None,
        latent_embeds: torch.Tensor | None,
        latent_mask: torch.BoolTensor | None,
        latent_plan: Any | None,
        labels: torch.LongTensor | None,
        logits_to_keep: int | torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
        return_dict: bool | None,
    ) -> LatentCausalLMOutputWithPast | tuple:
        """What `forward` returns.

        Args:
            outputs: of the backbone, a `LatentPlanOutput` with `latent_plan`.
            input_ids, latent_embeds, latent_mask, latent_plan: what the forward was given.
            labels, logits_to_keep, num_items_in_batch: see [`LatentHeadMixin.project_hidden_states`].
            return_dict: `False` for a tuple; default that of the configuration.
        """
        fed = latent_embeds if latent_plan is None else outputs.latent_embeds
        hidden_states = self.slot_hidden_states(outputs[0], input_ids, fed, latent_mask)
        loss, logits, kept = self.project_hidden_states(hidden_states, labels, logits_to_keep, num_items_in_batch)
        output = LatentCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            last_hidden_state=kept,
            latent_states=self.latent_step(kept),
            plan_output=None if latent_plan is None else outputs,
        )
        use_dict = self.config.return_dict if return_dict is None else return_dict
        return output if use_dict else output.to_tuple()


def register_checkpoint_renaming(*stock_names: str) -> None:
    """Give the latent classes the renaming of checkpoint tensors of the stock classes.

    Stock checkpoints name their tensors `visual.*` and `model.layers.*`; the renaming is looked up by class name and
    skips custom classes. A family without a renaming needs none.
    """
    for name in stock_names:
        mapping = get_checkpoint_conversion_mapping(name)
        if mapping is not None:
            register_checkpoint_conversion_mapping("Latent" + name, mapping, overwrite=True)


__all__ = ["LatentHeadClassMixin", "register_checkpoint_renaming"]
