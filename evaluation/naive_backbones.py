"""Stock models as the naive staged schedule sees them (`naive_staged.py`): images in place, states, weights, logits.

Nothing of the decoding or planning code of this library is used: what is measured and tested against these runs must
not run in them.
"""

from typing import Any

import torch
from transformers import PreTrainedModel


class NaiveBackbone:
    """A causal language model of transformers with eager attention: text alone.

    Args:
        model: head class, e.g. `GPT2LMHeadModel`, loaded with `attn_implementation="eager"`.

    Attributes:
        calls: how often the backbone ran.

    Raises:
        ValueError: another attention implementation, which returns no weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if model.config._attn_implementation != "eager":
            raise ValueError(
                f"attn_implementation={model.config._attn_implementation!r} returns no attention weights; load the "
                "model with attn_implementation='eager'"
            )
        self.model = model
        self.calls = 0

    def embed(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """`(B, S, H)` input embeddings, those of the images in place."""
        return self.model.get_input_embeddings()(input_ids)

    def image_columns(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        """`(B, S)` columns that hold an image embedding."""
        return torch.zeros_like(input_ids, dtype=torch.bool)

    def positions(self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor) -> torch.LongTensor:
        """`(B, S)` positions, or `(3, B, S)`: the index in the row, pads not counted."""
        return (attention_mask.cumsum(-1) - 1).clamp(min=0)

    def run(
        self,
        embeds: torch.Tensor,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        position_ids: torch.LongTensor,
        **options: Any,
    ) -> Any:
        """The backbone on embeddings `(B, Q, H)`.

        Args:
            embeds: of the columns to run.
            input_ids: `(B, Q)` ids of these columns.
            attention_mask: `(B, L)`, what is in the cache included.
            position_ids: of these columns.
            options: `output_attentions`, `use_cache`, `past_key_values`.

        Returns:
            An output with `last_hidden_state` `(B, Q, H)` after the final norm.
        """
        self.calls += 1
        options = {"use_cache": False, **options, **self.further(input_ids)}
        return self.decoder(inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, **options)

    def further(self, input_ids: torch.LongTensor) -> dict[str, Any]:
        """Further arguments of the decoder for these columns."""
        return {}

    @property
    def decoder(self) -> torch.nn.Module:
        """The module that maps embeddings to states."""
        return self.model.base_model

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., V)` scores of states `(..., H)`."""
        return self.model.get_output_embeddings()(hidden)


class NaiveQwenVL(NaiveBackbone):
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL with images.

    Args:
        model: stock head class, eager attention.
        pixel_values, image_grid_thw: all images of the batch, in the order of the placeholders.
        rope_positions: `"mrope"`, or `"flat"` for the plain index on all axes as in the IVT-LR reference.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        rope_positions: str = "mrope",
    ) -> None:
        super().__init__(model)
        if rope_positions not in ("mrope", "flat"):
            raise ValueError(f"rope_positions={rope_positions!r} is unknown; choose 'mrope' or 'flat'")
        self.pixel_values = pixel_values
        self.image_grid_thw = image_grid_thw
        self.rope_positions = rope_positions
        self.deep: list[torch.Tensor] | None = None

    def embed(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """`(B, S, H)` input embeddings; the vision tower runs here, once."""
        embeds = super().embed(input_ids)
        if self.pixel_values is None:
            return embeds
        features = self.model.model.get_image_features(self.pixel_values, self.image_grid_thw)
        if "deepstack_features" in features:  # Qwen3-VL: added behind the first text layers, at the images only
            self.deep = [torch.cat(list(layer)) for layer in features.deepstack_features]
        rows = torch.cat(list(features.pooler_output)).to(embeds)
        return embeds.masked_scatter(self.image_columns(input_ids)[..., None], rows)

    def image_columns(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        """`(B, S)` image placeholders."""
        return input_ids == self.model.config.image_token_id

    def positions(self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor) -> torch.LongTensor:
        """`(3, B, S)`: rotary positions of the stock model; copies and slots count as text."""
        if self.rope_positions == "flat":
            return super().positions(input_ids, attention_mask).expand(3, -1, -1)
        types = self.image_columns(input_ids).int()
        options = {"mm_token_type_ids": types, "image_grid_thw": self.image_grid_thw}
        return self.model.model.get_rope_index(input_ids, attention_mask=attention_mask, **options)[0]

    def further(self, input_ids: torch.LongTensor) -> dict[str, Any]:
        """Deep-stack features, where these columns hold the images."""
        columns = self.image_columns(input_ids)
        if self.deep is None or not columns.any():
            return {}
        return {"visual_pos_masks": columns, "deepstack_visual_embeds": self.deep}

    @property
    def decoder(self) -> torch.nn.Module:
        """The text decoder."""
        return self.model.model.language_model


class NaiveChameleon(NaiveBackbone):
    """Chameleon: images are discrete tokens in the vocabulary.

    Args:
        model: stock head class, eager attention.
        pixel_values: `(images, 3, height, width)`, in the order of the placeholders.
    """

    def __init__(self, model: PreTrainedModel, pixel_values: torch.Tensor | None = None) -> None:
        super().__init__(model)
        self.pixel_values = pixel_values

    def embed(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """`(B, S, H)` input embeddings; the image encoder runs here, once."""
        if self.pixel_values is not None:
            tokens = self.model.model.get_image_tokens(self.pixel_values)
            input_ids = input_ids.masked_scatter(self.image_columns(input_ids), tokens.to(input_ids))
        return super().embed(input_ids)

    def image_columns(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        """`(B, S)` image placeholders."""
        return input_ids == self.model.model.vocabulary_mapping.image_token_id

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., V)` scores; tokens that stand for pieces of an image are never said."""
        logits = super().logits(hidden)
        pieces = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        pieces[self.model.model.vocabulary_mapping.image_tokens] = True
        return logits.masked_fill(pieces, torch.finfo(logits.dtype).min)


__all__ = ["NaiveBackbone", "NaiveChameleon", "NaiveQwenVL"]
