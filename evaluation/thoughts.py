"""Where the thought tokens of the strategy `search` (DMLR, arXiv 2512.12623) stand in the prompts of an evaluation.

`generate` lays them out behind a prompt that marks none: behind the opening of the reply, where a stock model has
never seen anything. The published code puts placeholders at the end of the user's turn, and so does an evaluation. The
text around them stays as it is (`modeling_latent/search_prompts.py` has the published one, `examples/dmlr.py` asks
with it). A model that has never seen the placeholders may be hurt by them alone, so compare with
`search:max_num_steps=0`; where the last words of the question are the thought tokens, nothing is added, and a model
that was trained with tokens of its own behind the prompt (pause tokens, slots) can have them there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from modeling_latent.search_options import SEARCH_OPTIONS
from modeling_latent.search_prompts import DEFAULT_PLACEHOLDER

PLACES = ("turn", "question", "reply")


@dataclass(frozen=True)
class ThoughtPlace:
    """Thought tokens of a batch of prompts.

    Args:
        number: of a prompt.
        place: `"turn"`: placeholders at the end of the user's turn, `"question"`: the last tokens that are there.
        token: the placeholder.
        token_id: its id.
        end: the token that ends a turn; a prompt without it has its thought tokens at its end.
        end_id: its id.
    """

    number: int
    place: str
    token: str
    token_id: int
    end: str | None
    end_id: int | None

    @classmethod
    def of(
        cls, model: PreTrainedModel, processor: Any, options: Mapping[str, Any], place: str = "turn"
    ) -> "ThoughtPlace | None":
        """What the options of `generate` ask for; `None` for another strategy, thought tokens that are marked, or
        those that `generate` lays out itself, behind the prompt.

        Args:
            model: whose saved options count where the call has none.
            processor: with a tokenizer.
            options: of `generate`.
            place: one of `PLACES`; `"reply"` is where `generate` lays them out.

        Raises:
            ValueError: an unknown place, or a tokenizer without a placeholder.
        """
        if place not in PLACES:
            raise ValueError(f"thoughts={place!r} is unknown; choose one of {list(PLACES)}")
        sources = [options, vars(model.generation_config), getattr(model.config, "latent_generation", None) or {}]

        def option(name: str) -> Any:
            return next((source[name] for source in sources if source.get(name) is not None), None)

        if place == "reply" or option("latent_strategy") != "search" or option("thought_mask") is not None:
            return None
        number = option("num_thought_tokens")
        if number is None:
            number = getattr(SEARCH_OPTIONS["num_thought_tokens"], option("mode") or "paper")
        tokenizer, token_id = processor.tokenizer, option("thought_token_id")
        if token_id is None:
            known = DEFAULT_PLACEHOLDER in tokenizer.get_vocab()
            token_id = tokenizer.convert_tokens_to_ids(DEFAULT_PLACEHOLDER) if known else tokenizer.pad_token_id
        if token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no {DEFAULT_PLACEHOLDER} and no padding token that could be a "
                "thought; pass thought_token_id=..."
            )
        token = tokenizer.convert_ids_to_tokens(token_id)
        return cls(number, place, token, token_id, tokenizer.eos_token, tokenizer.eos_token_id)

    def in_prompt(self, prompt: str) -> str:
        """The prompt with its placeholders."""
        if self.place == "question":
            return prompt
        stop = prompt.rfind(self.end) if self.end else -1
        stop = len(prompt) if stop < 0 else stop
        return prompt[:stop] + self.token * self.number + prompt[stop:]

    def mask(self, inputs: Mapping[str, torch.Tensor]) -> torch.BoolTensor:
        """`(B, L)` where the thought tokens stand.

        Args:
            inputs: of the processor for prompts of [`in_prompt`].

        Raises:
            ValueError: a prompt that is too short.
        """
        ids, kept = inputs["input_ids"], inputs["attention_mask"].bool()
        mask = torch.zeros_like(kept)
        for row, (tokens, real) in enumerate(zip(ids.tolist(), kept.tolist(), strict=True)):
            inside = [place for place, keep in enumerate(real) if keep]
            ends = [place for place in inside if tokens[place] == self.end_id]
            stop = ends[-1] if ends else inside[-1] + 1
            start = stop - self.number
            placed = self.place == "question" or set(tokens[start:stop]) == {self.token_id}
            if start <= inside[0] or not placed:
                raise ValueError(
                    f"row {row}: no {self.number} thought tokens before the end of the user's turn; take fewer by "
                    "num_thought_tokens"
                )
            mask[row, start:stop] = True
        return mask


__all__ = ["PLACES", "ThoughtPlace"]
