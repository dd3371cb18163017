"""Prompts of the search over latents: a question with its image, the thought tokens at its end, and where they stand.

Source: DMLR ("Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space", arXiv 2512.12623) and its
published code. A prompt is

    system: instruction | user: [image] wrapped question, blank line, thought block | generation prompt

and the thought block ends with `T` placeholder tokens, whose embeddings the search moves.

`mode="reference"` is the published text, byte for byte: the wrapped question is the Python `repr` of a list of one
string, the thought block repeats it as text, and two sentences join without a space. `mode="paper"` has the same parts
with the question once, as text, and the spaces. Deviations in both modes, on purpose: the caller's messages are not
modified, the thought tokens are found in the ids instead of counted from the end, padding stays masked, and limits of
image sizes are in tokens of the processor at hand (there always in squares of 28 pixels).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchFeature, ChameleonProcessor
from transformers.utils import logging

from .search_messages import COT_TEMPLATES, SYSTEM_PROMPT, ChatStyle, SearchChat, caller_chat, question_chat, text_of

logger = logging.get_logger(__name__)

PROMPT_MODES = ("paper", "reference")
DEFAULT_PLACEHOLDER = "<|endoftext|>"
_CHATML_START = "<|im_start|>"
_CHATML_GENERATION = "<|im_start|>assistant\n"


@dataclass(frozen=True)
class SearchPrompt:
    """Prompts, one a row.

    Args:
        text: the rendered chat with the generation prompt, an image as its one placeholder.
        inputs: `input_ids` and `attention_mask` `(B, L)` with padding on the left, and what else the processor returns
            (`pixel_values`, `image_grid_thw`, `mm_token_type_ids`).
        thought_mask: `(B, L)` bool, true at the thought tokens, `T` in a row, side by side.
        generation_prompt: the end of each text, behind the user's turn.
    """

    text: list[str]
    inputs: BatchFeature
    thought_mask: torch.Tensor
    generation_prompt: list[str]

    @property
    def thought_spans(self) -> list[tuple[int, int]]:
        """First thought token and the position behind the last one, of each row."""
        places = [row.nonzero().flatten().tolist() for row in self.thought_mask]
        return [(row[0], row[-1] + 1) for row in places]


def search_prompt(
    processor: Any,
    question: str | None,
    image: Any = None,
    *,
    num_thought_tokens: int,
    mode: str = "paper",
    prompt_index: int | None = 0,
    messages: Sequence[Mapping[str, Any]] | None = None,
    placeholder: str | None = None,
    chat_template: str | None = None,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
) -> SearchPrompt:
    """The prompt of one question, as one row.

    Args:
        processor: a processor, or a tokenizer for questions without image.
        question: may be None with `messages` in mode `"paper"`.
        image: a PIL image, path or URL; None for text alone.
        num_thought_tokens: `T`.
        mode: `"paper"` or `"reference"`, see above.
        prompt_index: 0 (step by step), 1 (numbered instructions) or 2 (the answer alone) of `COT_TEMPLATES`; None for
            the thought block without a wrapped question, as published for calls without messages.
        messages: a chat whose last turn, the user's, is extended by the thought block; `image` stands in for its first
            image. It is not modified. In mode `"paper"` the question is restated only if the last turn lacks it.
        placeholder: the token that stands for a thought. Default: `<|endoftext|>`, else the padding token, if it has
            no other use in this tokenizer.
        chat_template: another template for this call.
        min_tokens, max_tokens: bounds of an image, see [`pixel_limits`].

    Raises:
        ValueError: an unknown mode or number, a text that holds a placeholder, a tokenizer or template that cannot
            express the prompt, an image that the prompt cannot take.

    Example:
        ```python
        prompt = search_prompt(processor, "What is it?", image, num_thought_tokens=4)
        model.generate(**prompt.inputs, latent_strategy="search", thought_mask=prompt.thought_mask)
        ```
    """
    return search_prompts(
        processor,
        [question],
        [image],
        num_thought_tokens=num_thought_tokens,
        mode=mode,
        prompt_index=prompt_index,
        messages=None if messages is None else [messages],
        placeholder=placeholder,
        chat_template=chat_template,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
    )


def search_prompts(
    processor: Any,
    questions: Sequence[str | None],
    images: Sequence[Any] | None = None,
    *,
    num_thought_tokens: int,
    mode: str = "paper",
    prompt_index: int | None = 0,
    messages: Sequence[Sequence[Mapping[str, Any]]] | None = None,
    placeholder: str | None = None,
    chat_template: str | None = None,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
) -> SearchPrompt:
    """The prompts of several questions, padded on the left. A row is that of [`search_prompt`] behind its padding.

    Args:
        questions: one a row.
        images: one or None a row.
        messages: one chat a row.
        processor, num_thought_tokens, mode, prompt_index, placeholder, chat_template, min_tokens, max_tokens: see
            [`search_prompt`].

    Raises:
        ValueError: see [`search_prompt`], with the row; lists of different lengths.
    """
    rows = len(questions)
    _check_options(rows, images, messages, num_thought_tokens, mode, prompt_index)
    style, token_id = _style(processor, placeholder, mode)
    chats = []
    for row, question in enumerate(questions):
        image = None if images is None else images[row]
        if messages is None:
            chat = question_chat(style, row, question, image, prompt_index)
            restated = question if mode == "reference" or prompt_index is None else None
        else:
            chat = caller_chat(style, row, messages[row], question, image)
            if question is None and mode == "reference":
                raise ValueError(f"row {row}: mode='reference' repeats the question of the messages; pass it too")
            known = mode == "paper" and (question is None or question in text_of(chat.messages[-1]["content"]))
            restated = None if known else question
        chats.append(chat.with_thoughts(restated, num_thought_tokens))
    rendered = [_render(processor, chat, chat_template) for chat in chats]
    texts = [text + end for text, end in rendered]
    pictures = [picture for chat in chats for picture in chat.images]
    inputs = _tokenize(processor, texts, pictures, _size(processor, pictures, min_tokens, max_tokens))
    mask = _thought_mask(inputs, style.placeholder, token_id, num_thought_tokens)
    return SearchPrompt(texts, inputs, mask, [end for _, end in rendered])


def published_prompt_field(
    processor: Any, question: str, has_image: bool = True, prompt_index: int = 0, chat_template: str | None = None
) -> str:
    """The text that published result files call `prompt`. It is not what the model reads: the turn of the user without
    thought block, under the template's own system message.

    Args:
        processor, question, prompt_index, chat_template: see [`search_prompt`].
        has_image: whether the question has an image.

    Raises:
        ValueError: see [`search_prompt`].
    """
    _check_options(1, None, None, 1, "reference", prompt_index)
    style = _style(processor, None, "reference")[0]
    chat = question_chat(style, 0, question, object() if has_image else None, prompt_index)
    return "".join(_render(processor, chat, chat_template))


def pixel_limits(processor: Any, min_tokens: int | None = None, max_tokens: int | None = None) -> dict[str, int]:
    """Bounds of an image in tokens, as the `size` of the image processor (in pixels).

    A token of a Qwen-VL processor is a square of `patch_size * merge_size` pixels a side: 28, in Qwen3-VL 32.

    Args:
        processor: with an image processor that resizes to a number of pixels.
        min_tokens, max_tokens: image tokens; None keeps the processor's own bound.

    Returns:
        `{"shortest_edge": pixels, "longest_edge": pixels}`, for `processor(..., images_kwargs={"size": ...})`.

    Raises:
        ValueError: bounds that leave no size; a processor without images, or whose images have one size.

    Example:
        >>> pixel_limits(processor, 128, 256)  # of Qwen2.5-VL
        {'shortest_edge': 100352, 'longest_edge': 200704}
    """
    images = getattr(processor, "image_processor", None)
    if images is None:
        raise ValueError(
            f"min_tokens={min_tokens!r}, max_tokens={max_tokens!r}: {type(processor).__name__} takes no images; leave "
            "both out"
        )
    area = _token_area(images)
    own = dict(getattr(images, "size", None) or {})
    if area is None or not {"shortest_edge", "longest_edge"} <= {name for name, value in own.items() if value}:
        raise ValueError(
            f"min_tokens={min_tokens!r}, max_tokens={max_tokens!r}: the images of {type(images).__name__} have one "
            "number of tokens, whatever their size; leave both out"
        )
    for name, value in (("min_tokens", min_tokens), ("max_tokens", max_tokens)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}={value!r} must be a number of image tokens, 1 or more")
    low = own["shortest_edge"] if min_tokens is None else min_tokens * area
    high = own["longest_edge"] if max_tokens is None else max_tokens * area
    if low > high:
        raise ValueError(
            f"min_tokens={min_tokens!r} and max_tokens={max_tokens!r} leave no size: {low} to {high} pixels (a bound "
            f"that is None is the processor's own), and a token is {area} pixels"
        )
    return {"shortest_edge": int(low), "longest_edge": int(high)}


# Rendering


def _render(processor: Any, chat: SearchChat, chat_template: str | None) -> tuple[str, str]:
    """The text of a chat and its generation prompt. A template without system turns gets the system message at the
    beginning of the user's turn.

    Raises:
        ValueError: no template, or one that cannot render the chat.
    """
    owner = chat.style.owner
    if chat_template is None and getattr(processor, "chat_template", None) is None:
        raise ValueError(f"{owner} has no chat template; set its chat_template, or pass chat_template=...")

    def render(chat: SearchChat, generation: bool) -> str:
        options = {} if chat_template is None else {"chat_template": chat_template}
        return processor.apply_chat_template(
            chat.messages, tokenize=False, add_generation_prompt=generation, **options
        )

    try:
        text = render(chat, False)
        kept = all(system.strip() in text for system in chat.system_texts)
    except Exception as error:  # whatever a template raises, perhaps about the system message
        if not chat.system_texts:
            raise ValueError(f"row {chat.row}: the chat template of {owner} fails ({error})") from error
        text, kept = "", False
    if not kept:
        chat = chat.folded()
        try:
            text = render(chat, False)
        except Exception as error:
            raise ValueError(
                f"row {chat.row}: the chat template of {owner} fails with a system message and without ({error}); "
                "pass chat_template=..."
            ) from error
    if chat.style.mode == "reference" and _CHATML_START in text:
        return text, _CHATML_GENERATION
    whole = render(chat, True)
    return (text, whole[len(text) :]) if whole.startswith(text) else (whole, "")


# Ids


def _tokenize(processor: Any, texts: list[str], images: list[Any], size: dict[str, int] | None) -> BatchFeature:
    tokenizer = getattr(processor, "tokenizer", processor)
    if len(texts) > 1 and tokenizer.pad_token is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no padding token for {len(texts)} rows; set tokenizer.pad_token"
        )
    begun = tokenizer.bos_token is not None and texts[0].startswith(tokenizer.bos_token)
    options: dict[str, Any] = {"return_tensors": "pt", "padding": len(texts) > 1, "padding_side": "left"}
    if processor is tokenizer:  # as its own chats: the template writes every special token
        encoded = tokenizer(texts, add_special_tokens=False, return_token_type_ids=False, **options)
        return BatchFeature(dict(encoded))
    if begun:
        options["add_special_tokens"] = False
    if isinstance(processor, ChameleonProcessor):  # the template writes the separators
        options["return_for_text_completion"] = True
    if images:
        options["images"] = images
        options["images_kwargs"] = {} if size is None else {"size": size}
    inputs = processor(text=texts, **options)
    if size is not None:
        _warn_outside(processor.image_processor, inputs, size)
    return inputs


def _size(processor: Any, images: list[Any], min_tokens: int | None, max_tokens: int | None) -> dict[str, int] | None:
    if min_tokens is None and max_tokens is None:
        return None
    size = pixel_limits(processor, min_tokens, max_tokens)
    return size if images else None


def _token_area(image_processor: Any) -> int | None:
    """Pixels of an image token; None where images are not cut into patches."""
    patch, merge = (getattr(image_processor, name, None) for name in ("patch_size", "merge_size"))
    return (patch * merge) ** 2 if isinstance(patch, int) and isinstance(merge, int) else None


def _warn_outside(image_processor: Any, inputs: BatchFeature, size: dict[str, int]) -> None:
    """Very long images are a token high, and then as wide as it takes."""
    area = _token_area(image_processor)
    for index, grid in enumerate(inputs["image_grid_thw"].tolist()):
        tokens = grid[0] * grid[1] * grid[2] // image_processor.merge_size**2
        if not size["shortest_edge"] <= tokens * area <= size["longest_edge"]:
            logger.warning(
                "image %d of this call has %d tokens, a grid of %s patches, outside the bounds of %d to %d tokens: no "
                "size of its shape lies between; crop it, or widen min_tokens and max_tokens",
                index,
                tokens,
                "x".join(map(str, grid[1:])),
                -(-size["shortest_edge"] // area),
                size["longest_edge"] // area,
            )


def _thought_mask(inputs: BatchFeature, token: str, token_id: int, number: int) -> torch.Tensor:
    """The last run of placeholders of each row, which must be `number` long."""
    found = (inputs["input_ids"] == token_id) & inputs["attention_mask"].bool()
    mask = torch.zeros_like(found)
    for row, places in enumerate(each.nonzero().flatten().tolist() for each in found):
        run = places[-number:]
        apart = len(run) < number or run[-1] - run[0] != number - 1
        if apart or (len(places) > number and places[-number - 1] == run[0] - 1):
            raise ValueError(
                f"row {row}: the ids have no run of exactly {number} x {token!r} (found at {places}); the chat "
                "template writes this token itself or changes the text, pass another placeholder=... or chat_template"
            )
        mask[row, run] = True
    return mask


def _style(processor: Any, placeholder: str | None, mode: str) -> tuple[ChatStyle, int]:
    """What the rows share, and the id of the placeholder.

    Raises:
        ValueError: a placeholder that is no single token, or a tokenizer without a free one.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    has_parts = getattr(processor, "image_processor", None) is not None
    image_token = getattr(processor, "image_token", None) if has_parts else None
    if placeholder is None:
        used = {image_token, *(getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos", "unk", "sep"))}
        known = [DEFAULT_PLACEHOLDER] if DEFAULT_PLACEHOLDER in tokenizer.get_added_vocab() else []
        known += [tokenizer.pad_token] if tokenizer.pad_token is not None else []
        placeholder = next((token for token in known if token not in used), None)
    if placeholder is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no free token that can stand for a thought: no {DEFAULT_PLACEHOLDER}, "
            "nor a padding token of no other use; pass placeholder=..., e.g. a reserved token"
        )
    if placeholder == image_token:
        raise ValueError(f"placeholder={placeholder!r} is the image token; choose another one")
    ids = tokenizer(placeholder * 2, add_special_tokens=False)["input_ids"]
    if len(ids) != 2 or ids[0] != ids[1] or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"placeholder={placeholder!r} is no single token of {type(tokenizer).__name__}: twice in a row it has the "
            f"ids {ids}; choose an added token"
        )
    return ChatStyle(type(processor).__name__, has_parts, placeholder, image_token, mode), ids[0]


def _check_options(
    rows: int, images: Any, messages: Any, num_thought_tokens: int, mode: str, prompt_index: int | None
) -> None:
    if mode not in PROMPT_MODES:
        raise ValueError(f"unknown mode {mode!r}; choose one of {list(PROMPT_MODES)}")
    number = num_thought_tokens
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"num_thought_tokens={number!r} must be 1 or more")
    if prompt_index is not None and prompt_index not in range(len(COT_TEMPLATES)):
        raise ValueError(
            f"prompt_index={prompt_index!r} must be 0 to {len(COT_TEMPLATES) - 1}, or None for the thought block alone"
        )
    if not rows:
        raise ValueError("questions are empty; pass at least one")
    for name, values in (("images", images), ("messages", messages)):
        if values is not None and len(values) != rows:
            raise ValueError(f"{len(values)} {name} for {rows} questions; give one a row, None for a row without")


__all__ = [
    "COT_TEMPLATES",
    "DEFAULT_PLACEHOLDER",
    "PROMPT_MODES",
    "SYSTEM_PROMPT",
    "SearchPrompt",
    "pixel_limits",
    "published_prompt_field",
    "search_prompt",
    "search_prompts",
]
